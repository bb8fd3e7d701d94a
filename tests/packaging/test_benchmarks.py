"""Benchmarks of contexts and attacks in small: they run, compare first, and print their tables."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (
            ["bench_context.py", "--users", "20", "--queries", "16", "--by-hand", "2", "--sizes", "60", "90"],
            ["| exact mean, prefix sums | sorted |", "| KernelAttention | scattered |", "| 60 |", "| 90 |"],
        ),
        (
            ["bench_attacks.py", "--networks", "LSTM", "--series", "4", "--series-large", "4", "--steps", "2"],
            ["| LSTM, 4 | SumReg | a bare loop |", "| LSTM, 4 | PGD, accuracy", "| LSTM |"],
        ),
    ],
    ids=["context", "attacks"],
)
def test_a_small_benchmark_prints_its_tables(project, arguments, rows):
    name, *rest = arguments
    repeats = ["--repeats" if name == "bench_context.py" else "--pairs", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(project / "scripts" / name), *rest, *repeats],
        capture_output=True,
        text=True,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
    )
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert row in done.stdout, done.stdout
