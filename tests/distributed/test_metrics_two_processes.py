import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_modules.metrics import MAP, MRR, NDCG, Coverage, HitRate, Precision, Recall, Surprisal

WORKER = textwrap.dedent(
    """
    import sys
    import torch
    from torch import distributed
    from lightning_modules.metrics import MAP, MRR, NDCG, Coverage, HitRate, Precision, Recall, Surprisal

    rank, world, store, batches, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    per_user = {kind.__name__: kind(3) for kind in (NDCG, HitRate, MRR, Recall, Precision, MAP)}
    catalogue = {kind.__name__: kind(3, 40) for kind in (Coverage, Surprisal)}
    for top, relevant, items, offsets in torch.load(batches)[rank]:
        for metric in per_user.values():
            metric.update(top, relevant)
        for metric in catalogue.values():
            metric.update(top, items, offsets)
    together = {name: metric.compute() for name, metric in (per_user | catalogue).items()}
    torch.save(together, f"{out}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()
    """
)


def batch(n_users, seed):
    """Rankings, relevant items and histories of ``n_users`` users over 40 items, a few without relevant items."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(n_users, 40, generator=generator).argsort(dim=1)
    relevant = torch.rand(n_users, 40, generator=generator).argsort(dim=1)[:, :6]
    relevant[torch.rand(n_users, 6, generator=generator) < torch.rand(n_users, 1, generator=generator)] = -1
    lengths = torch.randint(0, 9, (n_users,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    items = torch.randint(0, 40, (int(offsets[-1]),), generator=generator)
    return shuffled[:, :4], relevant, items, offsets


def in_this_process(batches):
    per_user = {kind.__name__: kind(3) for kind in (NDCG, HitRate, MRR, Recall, Precision, MAP)}
    catalogue = {kind.__name__: kind(3, 40) for kind in (Coverage, Surprisal)}
    for top, relevant, items, offsets in batches:
        for metric in per_user.values():
            metric.update(top, relevant)
        for metric in catalogue.values():
            metric.update(top, items, offsets)
    return {name: metric.compute() for name, metric in (per_user | catalogue).items()}


def in_processes(shards, folder):
    """Start one process per shard; rendezvous through a file, so that no port can be taken."""
    torch.save(shards, folder / "batches.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                str(rank),
                str(len(shards)),
                str(folder / "store"),
                str(folder / "batches.pt"),
                str(folder / "out.pt"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(shards))
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"out.pt.{rank}") for rank in range(len(shards))]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([[16, 4], [27]], id="uneven"),
        pytest.param([[15, 13], []], id="second-shard-without-a-batch"),
        pytest.param([[0], [29]], id="first-shard-with-an-empty-batch"),
    ],
)
def test_two_processes_equal_one(sizes, tmp_path):
    shards = [[batch(n, seed=10 * rank + j) for j, n in enumerate(part)] for rank, part in enumerate(sizes)]
    one = in_this_process([users for shard in shards for users in shard])
    for two in in_processes(shards, tmp_path):
        assert set(one) == set(two)
        for name, value in one.items():
            assert 0 < value < 1, name
            # float64 sums of at most 200 values below 1 in another order
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-14)
