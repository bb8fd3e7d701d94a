"""A folder or disk that refuses what a run writes: one clear line, and no draft or half a file is left behind.

What a run opens for writing below ``runs/`` and which folders it makes is recorded first; then each of these fails in
turn. The tests run as root, whom permissions do not stop, so it is Python's own calls that refuse.
"""

import builtins
import errno
import io
import os
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

METHODS = ("sasrec_cce", "concealed_attack", "kernel_attention", "tda_portfolio")
COMMANDS = ("fit", "test", "predict")
MUST_FAIL = {
    "config.yaml",
    "metrics.csv",
    "fit.json",
    "best.ckpt",
    "last.ckpt",
    "metrics.json",
    "report.md",
    "checkpoints",
}


def written_name(path: object) -> str | None:
    """Of a file below ``runs``, that of a draft being its file's; None for all others."""
    if not isinstance(path, str | os.PathLike):
        return None
    found = Path(os.fspath(path))
    if "runs" not in found.absolute().parts:
        return None
    return re.sub(r"^\.(.+?)\.\d+(\.\w+)?$", r"\1\2", found.name)


class Disk:
    """Records what is opened for writing and made, and refuses the one thing that it is told to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.refused: str | None = None
        self.number, self.n_refusals = errno.ENOSPC, 0

    def _asked(self, path: object) -> bool:
        name = written_name(path)
        if name is None:
            return False
        self.seen.append(name)
        self.n_refusals += name == self.refused
        return name == self.refused

    def _refuse(self, path: object) -> None:
        raise OSError(self.number, os.strerror(self.number), os.fspath(path))

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        open_, mkdir = io.open, os.mkdir

        def opened(file, mode="r", *rest, **options):
            if any(letter in mode for letter in "wax") and self._asked(file):
                if self.number == errno.ENOSPC and "w" in mode:  # it fills when some is written
                    with open_(file, "wb") as stream:
                        stream.write(b"half")
                self._refuse(file)
            return open_(file, mode, *rest, **options)

        def made(path, *rest, **options):
            if not os.path.isdir(path) and self._asked(path):  # whoever makes it needs it
                self._refuse(path)
            return mkdir(path, *rest, **options)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(os, "mkdir", made)
        for name in ("write_parquet", "write_csv"):  # polars does not ask Python for its files
            monkeypatch.setattr(pl.DataFrame, name, self._through(getattr(pl.DataFrame, name)))

    def _through(self, write):
        def written(frame, file=None, *rest, **options):
            if self._asked(file):
                Path(file).write_bytes(b"half")
                self._refuse(file)
            return write(frame, file, *rest, **options)

        return written


def kind(command: str, name: str) -> str:
    """Pictures of a report are written by one function: one stands for all."""
    return f"{command} *.png" if name.endswith(".png") else f"{command} {name}"


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in METHODS[1:])])
def test_every_file_of_a_run_may_be_refused(seqlit, toys, tmp_path, monkeypatch, method):
    config = tmp_path / "toy.yaml"
    settings = toys.config(method)
    settings["data"]["init_args"] |= (
        {"cache_dir": str(tmp_path / "cache")} if method in (METHODS[0], METHODS[2]) else {}
    )
    config.write_text(yaml.safe_dump(settings))
    disk = Disk()
    disk.patch(monkeypatch)
    written = {}
    for command in COMMANDS:
        disk.seen = []
        assert seqlit(command, "--config", config)[0] == 0
        for name in disk.seen:
            written.setdefault(kind(command, name), (command, name))
    assert {name for _, name in written.values()} >= MUST_FAIL
    assert {"test *.png"} <= written.keys()
    assert any(name.startswith("predict ") and name.endswith(".parquet") for name in written)

    wrong = []
    for place, (label, (command, name)) in enumerate(written.items()):
        number = (errno.ENOSPC, errno.EACCES)[place % 2]
        folder = tmp_path
        if command == "fit":
            folder = tmp_path / f"fit {place}"
            folder.mkdir()
        monkeypatch.chdir(folder)
        for path in Path("runs").rglob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        disk.refused, disk.number, disk.n_refusals = name, number, 0
        status, _, error = seqlit(command, "--config", config)
        disk.refused = None
        lines = error.splitlines()
        where = f"{label}, {errno.errorcode[number]}"
        if not disk.n_refusals:
            wrong.append(f"{where}: was not written again")
        elif status != 2 or len(lines) != 1 or not lines[0].startswith("seqlit: error: "):
            wrong.append(f"{where}: status {status}: {error[-300:]}")
        elif os.strerror(number) not in lines[0]:
            wrong.append(f"{where}: {lines[0]}")
        found = [path for path in Path("runs").rglob("*") if path.is_file()]
        left = [path for path in found if written_name(path) != path.name or path.read_bytes()[:4] == b"half"]
        if left and name != "metrics.csv":  # rows are appended to it; a resumed run drops one that was cut off
            wrong.append(f"{where}: left {left}")
    assert not wrong, "\n".join(wrong)
