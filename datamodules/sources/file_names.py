"""Files meant by names, globs and names of bundled data."""

import glob
from collections.abc import Sequence
from pathlib import Path

BUNDLED = {
    "online_retail": "online_retail/transactions.parquet",
    "completejourney": "completejourney/transactions_sample.parquet",
    "completejourney_demographics": "completejourney/demographics.parquet",
    "us20": "us20/sp500_dataset.csv.gz",
    "us20_index": "us20/sp500_index.csv.gz",
}
"""Packaged files by the name that follows ``bundled:``."""

_BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "bundled"


def resolve_paths(
    paths: str | Sequence[str], *, argument: str = "paths", endings: Sequence[str] = (".csv", ".parquet")
) -> list[Path]:
    """Files meant by names, globs and ``bundled:<name>``, sorted, each once.

    Args:
        paths: What is named.
        argument: Name of the argument, for the message.
        endings: Allowed ends of file names, in lower case.

    Raises:
        FileNotFoundError: If a name or glob matches no file.
        ValueError: If nothing is named, a bundled name is unknown, a folder is named, or a file ends otherwise.
    """
    found: set[Path] = set()
    for name in [paths] if isinstance(paths, str) else paths:
        if name.startswith("bundled:"):
            relative = BUNDLED.get(name.removeprefix("bundled:"))
            if relative is None:
                raise ValueError(
                    f"{argument}: {name!r} is not bundled, choose from {[f'bundled:{n}' for n in BUNDLED]}"
                )
            found.add(_BUNDLED_FOLDER / relative)
            continue
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{argument}: no file matches {name!r} (looked in {Path.cwd()})")
        found |= {Path(match).resolve() for match in matches}
    if not found:
        raise ValueError(f"{argument} must name at least one file, got none")
    for path in sorted(found):
        if path.is_dir():
            raise ValueError(f"{argument}: {path} is a folder, name its files by a glob such as {path}/*.parquet")
        if not path.name.lower().endswith(tuple(endings)):
            allowed = " or ".join([", ".join(endings[:-1]), endings[-1]] if len(endings) > 1 else endings)
            raise ValueError(f"{argument}: {path} must end in {allowed}")
    return sorted(found)
