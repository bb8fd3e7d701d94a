"""Files meant by names, globs and names of bundled data."""

import glob
from collections.abc import Sequence
from pathlib import Path

BUNDLED = {"online_retail": "online_retail/transactions.parquet"}
"""Packaged files by the name that follows ``bundled:``."""

_BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "bundled"


def resolve_paths(paths: str | Sequence[str]) -> list[Path]:
    """Files meant by names, globs and ``bundled:<name>``, sorted, each once.

    Raises:
        FileNotFoundError: If a name or glob matches no file.
        ValueError: If nothing is named, a bundled name is unknown, a folder is named, or a file is neither ``.csv``
            nor ``.parquet``.
    """
    found: set[Path] = set()
    for name in [paths] if isinstance(paths, str) else paths:
        if name.startswith("bundled:"):
            relative = BUNDLED.get(name.removeprefix("bundled:"))
            if relative is None:
                raise ValueError(f"paths: {name!r} is not bundled, choose from {[f'bundled:{n}' for n in BUNDLED]}")
            found.add(_BUNDLED_FOLDER / relative)
            continue
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise FileNotFoundError(f"paths: no file matches {name!r} (looked in {Path.cwd()})")
        found |= {Path(match).resolve() for match in matches}
    if not found:
        raise ValueError("paths must name at least one file, got none")
    for path in sorted(found):
        if path.is_dir():
            raise ValueError(f"paths: {path} is a folder, name its files by a glob such as {path}/*.parquet")
        if path.suffix.lower() not in (".csv", ".parquet"):
            raise ValueError(f"paths: {path} must end in .csv or .parquet")
    return sorted(found)
