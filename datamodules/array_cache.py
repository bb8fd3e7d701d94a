"""Prepared arrays on disk: memory-mapped, keyed by content and settings, written whole or not at all."""

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
from numpy.typing import NDArray

try:
    import fcntl
except ModuleNotFoundError:  # not everywhere: processes then prepare side by side
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 2
"""Part of the key: raised when the arrays change in meaning."""

_FACTS = "facts.json"
_IDS = ("user_ids", "item_ids")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What is written to the cache: arrays by name, the two tables of original ids, and counts."""

    arrays: dict[str, NDArray[Any]]
    user_ids: pl.Series
    item_ids: pl.Series
    facts: dict[str, Any]


class CacheFolder:
    """Read access to a prepared folder. Arrays are opened as read-only memory maps when first asked for.

    A pickled folder carries its path alone, so that a worker process maps the same files again.

    Args:
        path: A folder written by :func:`open_or_build`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        self._open: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def array(self, name: str) -> NDArray[Any]:
        """The array as a read-only view of its memory map."""
        if name not in self._open:
            # A plain array over the map: indexing a np.memmap itself costs several microseconds more.
            self._open[name] = np.asarray(np.load(self.path / f"{name}.npy", mmap_mode=self._mode(name)))
        return self._open[name]

    def _mode(self, name: str) -> Any:
        return "r" if self.facts["arrays"][name]["shape"] != [0] else None  # an empty file cannot be mapped

    def ids(self, name: str) -> pl.Series:
        """Original ids, ``user_ids`` or ``item_ids``, by number."""
        return pl.read_parquet(self.path / f"{name}.parquet")["id"]

    def is_whole(self) -> bool:
        """Whether every file is there with the type, shape and size that were written."""
        for name, entry in self.facts["arrays"].items():
            file = self.path / f"{name}.npy"
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return False
            array = self.array(name)
            if array.dtype.str != entry["dtype"] or list(array.shape) != entry["shape"]:
                return False
        sizes = self.facts["tables"]
        return all((self.path / n).is_file() and (self.path / n).stat().st_size == s for n, s in sizes.items())


def content_digests(paths: Sequence[Path], cache_dir: Path) -> list[str]:
    """blake2b of each file's bytes, sorted. Digests are remembered by path, size, times and inode."""
    memory_file = cache_dir / "content.json"
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memory = {}
    found = {}
    for path in paths:
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
        if key not in memory:
            with path.open("rb") as stream:
                memory[key] = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found[key] = path.suffix.lower() + memory[key]
    draft = cache_dir / f".content-{_process_name()}"
    try:
        draft.write_text(json.dumps(memory, indent=1), encoding="utf-8")
        os.replace(draft, memory_file)
    finally:
        draft.unlink(missing_ok=True)
    return sorted(found.values())


def open_or_build(cache_dir: Path, settings: dict[str, Any], prepare: Callable[[], Prepared]) -> CacheFolder:
    """Open the folder for these settings; if there is none, or it is damaged, prepare it anew.

    Of several processes that ask at the same time one prepares, and the others wait and read: as many times the memory
    would be needed else. A folder is written under another name and renamed when it is whole, so that a process that
    dies leaves nothing that is used, and where disks know no locks, of several that write the same the first one wins.
    What dead processes left is removed.

    Args:
        cache_dir: Where the folders lie; made if needed.
        settings: Everything the content depends on, content digests included; JSON-able.
        prepare: Does the work.
    """
    settings = settings | {"format_version": FORMAT_VERSION}
    key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()
    path = cache_dir / key
    found = _open_whole(path)
    if found is None:
        with _alone(path):
            found = _open_whole(path)  # another process may have prepared it in the meantime
            if found is None:
                return _build(path, settings, prepare)
    logger.info("cache %s", path)
    return found


def _build(path: Path, settings: dict[str, Any], prepare: Callable[[], Prepared]) -> CacheFolder:
    cache_dir, key = path.parent, path.name
    _remove_leftovers(cache_dir)
    draft = cache_dir / f".building-{key}-{_process_name()}"
    shutil.rmtree(draft, ignore_errors=True)  # in a container every process may have the same number
    try:
        prepared = prepare()
        _write(draft, prepared, settings)
        if path.exists():
            damaged = cache_dir / f".damaged-{key}-{_process_name()}"
            if _open_whole(path) is None:
                os.replace(path, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            os.replace(draft, path)
        except OSError:
            if _open_whole(path) is None:  # not another process that was faster
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    logger.info("cache %s written", path)
    return CacheFolder(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of what is to be made at ``path``.

    One process at a time has it, of this machine and, where the disk is shared and knows locks, of all. The system
    takes it back from a process that dies. Where there are no locks nobody waits.
    """
    name = path.with_name(f"{path.name}.lock")
    stream = None if fcntl is None else _locked(name)
    try:
        yield
    finally:
        if stream is not None:
            name.unlink(missing_ok=True)  # still held: who waited for it sees that it is gone, and makes another
            stream.close()


def _locked(name: Path) -> BinaryIO | None:
    """The file, open and locked; None on a disk without locks."""
    while True:
        stream = name.open("ab")
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that prepares %s", name.with_suffix(""))
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            stream.close()
            return None
        if os.fstat(stream.fileno()).st_nlink > 0:
            return stream
        stream.close()


def _open_whole(path: Path) -> CacheFolder | None:
    try:
        folder = CacheFolder(path)
        return folder if folder.is_whole() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, prepared: Prepared, settings: dict[str, Any]) -> None:
    folder.mkdir()
    entries = {}
    for name, array in prepared.arrays.items():
        file = folder / f"{name}.npy"
        np.save(file, array)
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "bytes": file.stat().st_size}
    for name, ids in zip(_IDS, (prepared.user_ids, prepared.item_ids), strict=True):
        pl.DataFrame({"id": ids}).write_parquet(folder / f"{name}.parquet")
    tables = {f"{name}.parquet": (folder / f"{name}.parquet").stat().st_size for name in _IDS}
    facts = prepared.facts | {"settings": settings, "arrays": entries, "tables": tables}
    (folder / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _process_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_leftovers(cache_dir: Path) -> None:
    for path in cache_dir.glob(f".*-{socket.gethostname()}-*"):
        pid = int(path.name.rsplit("-", 1)[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        except PermissionError:
            continue
