"""Of several processes that find no cache one prepares it; a process that dies gives its place to the next."""

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import polars as pl
import pytest

from datamodules import array_cache
from datamodules.array_cache import Prepared, open_or_build

pytest.importorskip("fcntl")
# Writes its log to a file, appends a line to another for each preparation, and prints what it read. The module is
# loaded by itself: its package would import torch, which takes seconds.
PROGRAM = f"""
    import importlib.util, logging, os, sys, time
    from pathlib import Path
    import numpy as np
    import polars as pl
    spec = importlib.util.spec_from_file_location("array_cache", {array_cache.__file__!r})
    sys.modules["array_cache"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Prepared, open_or_build = module.Prepared, module.open_or_build
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    logging.basicConfig(filename=folder / ("log-" + str(os.getpid())), level=logging.INFO, format="%(message)s")
    def prepare():
        with (folder / "prepared.txt").open("a") as file:
            file.write("prepared\\n")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (folder / "go_on").exists():
            time.sleep(0.01)
        ids = pl.Series(["a"])
        return Prepared(dict(values=np.arange(5)), ids, ids, dict(n=5))
    found = open_or_build(folder / "cache", dict(kind="test"), prepare)
    print(found.array("values").tolist())
"""


def start(folder, seconds):
    (folder / "cache").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.01)


def log_of(folder, process):
    path = folder / f"log-{process.pid}"
    return path.read_text() if path.exists() else ""


def n_prepared(folder):
    path = folder / "prepared.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_two_processes_prepare_once(tmp_path):
    """The first prepares until it is told to go on, and it is told when the second has met its lock, or has not."""
    first = start(tmp_path, 120)
    wait_for(lambda: n_prepared(tmp_path) == 1)
    second = start(tmp_path, 0)
    wait_for(
        lambda: "waiting for another process that prepares" in log_of(tmp_path, second) or n_prepared(tmp_path) > 1
    )
    (tmp_path / "go_on").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert n_prepared(tmp_path) == 1
    assert all("[0, 1, 2, 3, 4]" in output for output in outputs)
    assert "waiting" not in log_of(tmp_path, first)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [""], "the lock was left behind"


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    killed = start(tmp_path, 120)
    wait_for(lambda: n_prepared(tmp_path) == 1)
    waiting = start(tmp_path, 0)
    wait_for(lambda: "waiting" in log_of(tmp_path, waiting))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    killed.stdout.close()
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "[0, 1, 2, 3, 4]" in output
    assert n_prepared(tmp_path) == 2
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [""]


def test_a_lock_file_that_was_left_is_taken_over(tmp_path):
    """As a process killed with nobody waiting leaves it: its name is there, nobody holds it."""

    def prepare():
        ids = pl.Series(["a"])
        return Prepared({"values": np.arange(5)}, ids, ids, {})

    whole = open_or_build(tmp_path, {"kind": "test"}, prepare).path
    (whole / "values.npy").unlink()  # damaged, so that it is prepared anew
    lock = whole.with_name(f"{whole.name}.lock")
    lock.touch()
    assert open_or_build(tmp_path, {"kind": "test"}, prepare).array("values").tolist() == [0, 1, 2, 3, 4]
    assert not lock.exists()
