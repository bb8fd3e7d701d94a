"""Processes that share a gloo group: each runs one function of a test file, and hands back what it returns."""

import multiprocessing
import os
import runpy
import socket
from pathlib import Path

import pytest
import torch

MAIN = Path(__file__).with_name("rank_main.py")
PRELOADED = ["torch", "lightning.pytorch", "torchmetrics", "polars", "datamodules", "lightning_modules"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """``in_processes(world, __file__, "function", *arguments) -> [result of rank 0, of rank 1, ...]``.

    Every process runs ``function(*arguments)`` of the file, with the variables that torchrun would set, so that
    ``Trainer(devices=world, strategy="replicated")`` finds its place, in a folder of its own choosing. Arguments are
    pickled, results saved by torch. ``joined=True`` starts the gloo group before the function.
    """
    # Processes are forked off a server that has imported what they need and never ran anything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(world, file, function, *arguments, joined=False, timeout=240):
        folder = tmp_path_factory.mktemp("ranks")
        port = free_port()
        processes = []
        for rank in range(world):
            task = {
                "file": str(file),
                "function": function,
                "arguments": arguments,
                "joined": joined,
                "out": str(folder / f"{rank}.pt"),
                "environment": {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "NODE_RANK": "0",
                    "GROUP_RANK": "0",
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "test",
                    "GLOO_SOCKET_IFNAME": "lo",
                    "OMP_NUM_THREADS": "1",
                    # What draws by the seed of the run must find this process' here too, or none.
                    "PL_GLOBAL_SEED": os.environ.get("PL_GLOBAL_SEED"),
                },
            }
            process = context.Process(
                target=runpy.run_path, args=(str(MAIN),), kwargs={"init_globals": {"TASK": task}, "run_name": "rank"}
            )
            process.start()
            processes.append(process)
        try:
            for process in processes:
                process.join(timeout)
            hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                process.kill()
                process.join()
        found = []
        for rank, process in enumerate(processes):
            log = (folder / f"{rank}.log").read_text() if (folder / f"{rank}.log").is_file() else ""
            assert not hung, f"process {rank} of {hung} hung after {timeout} s:\n{log}"
            assert process.exitcode == 0, f"process {rank} ended with {process.exitcode}:\n{log}"
            found.append(torch.load(folder / f"{rank}.pt", weights_only=False))
        return found

    assert "RANK" not in os.environ, "these tests start their own processes"
    return run
