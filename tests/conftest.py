"""What every test gets: a fixed thread count, clean global state, and a way to call the real command."""

import os
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
# No example has a deadline: on a machine that others use too, a stopwatch fails what is right.
settings.register_profile("no stopwatch", deadline=None)
settings.load_profile("no stopwatch")
if not torch.cuda.is_available():
    # Triton decides when a kernel is defined, so before the first import: on a CPU kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
PROJECT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def clean_torch():
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread():
    """Bit for bit holds with one thread only; and with steps of microseconds several would just wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return PROJECT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that may not be redistributed; skips where it is not at hand."""
    folder = os.environ.get("SEQLIT_DATA")
    if not folder:
        pytest.skip("SEQLIT_DATA is not set: the folder of data sets that cannot be bundled")
    return Path(folder)


@pytest.fixture
def seqlit(monkeypatch, capsys, tmp_path):
    """Call the real command in a fresh folder: ``seqlit("fit", ...) -> (exit status, output, error output)``."""
    from lightning_modules.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seqlit", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
