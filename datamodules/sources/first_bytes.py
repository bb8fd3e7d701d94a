"""Whether a file is what its name says, by its first bytes: readers of text take almost anything for a table."""

from collections.abc import Sequence
from pathlib import Path

_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
# How files begin that people take for CSV: more than one reader would show them as a column of a strange name.
_NO_TEXT = (
    (_PARQUET, "is Parquet, name it .parquet"),
    (_GZIP, "is gzipped, unpack it"),
    (b"PK\x03\x04", "is a zip archive or a spreadsheet, save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "is a spreadsheet, save it as CSV"),
    (b"\x89PNG", "is a picture"),
    (b"%PDF", "is a PDF"),
    (b"\xff\xfe", "is UTF-16, save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16, save it as UTF-8"),
)


def check_first_bytes(path: Path) -> None:
    """See that a table is of the kind that its name says: ``.parquet``, ``.csv.gz``, else CSV in UTF-8.

    Args:
        path: A file; one that is absent is left to its reader.

    Raises:
        ValueError: If it is empty, or begins like something else.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        first = stream.read(4)
    name = path.name.lower()
    if not first:
        raise ValueError(f"{path}: the file is empty")
    if name.endswith(".parquet"):
        if first != _PARQUET:
            raise ValueError(f"{path}: cannot be read as Parquet: begins with {first!r}, not with {_PARQUET!r}")
    elif name.endswith(".gz"):
        if not first.startswith(_GZIP):
            raise ValueError(f"{path}: cannot be read as gzip: begins with {first!r}, not with {_GZIP!r}")
    else:
        for begin, what in _NO_TEXT:
            if first.startswith(begin):
                raise ValueError(f"{path}: cannot be read as CSV: it {what}")


def check_header(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """See that the names of columns are text, and those that are needed are there once.

    Args:
        path: A CSV file, for the message.
        columns: As polars reads them, the second of two equal names with ``_duplicated_0`` behind it.
        needed: Those that are read.

    Raises:
        ValueError: If a name is not UTF-8, or one that is needed occurs twice.
    """
    for name in columns:
        if "\ufffd" in name:
            raise ValueError(f"{path}: cannot be read as CSV: the column name {name!r} is not UTF-8, save it as UTF-8")
        original, repeats, _ = name.partition("_duplicated_")
        if repeats and original in columns and original in needed:
            raise ValueError(f"{path}: column {original!r} occurs twice")
