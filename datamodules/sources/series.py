"""Labelled series from files of the UCR and UEA archives: ``.ts``, ``.tsv``, ``.txt``, ``.arff``, plain or ``.gz``.

N series, T steps of the longest, C channels. Rows are counted from 1 without headers and comments. A column is the
place of a value in its channel, from 1; in ``.tsv`` and ``.txt``, where the class comes first, that in the row.
"""

import difflib
import gzip
import importlib.util
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENDINGS = (".ts", ".tsv", ".txt", ".arff")
"""Formats, the one that says most of itself first: downloads of the archive hold the same set in several."""

_FILE_NAME = re.compile(rf"(.+)_(TRAIN|TEST)({'|'.join(map(re.escape, ENDINGS))})(\.gz)?")
_LARGEST = float(np.finfo(np.float32).max)
_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


@dataclass(frozen=True)
class LabelledSeries:
    """One split of a set.

    Attributes:
        path: Where it was read from.
        values: ``(N, T, C) float64``, 0 after the end of a series.
        lengths: ``(N,) int64``, 1..T.
        labels: N class names; numbers are written plainly, ``1`` for ``1.0000e+00``.
        declared: Class names that the header lists, empty if it lists none.
        may_vary: Whether the file says that lengths differ, a ``.tsv`` by rows that end in NaN.
    """

    path: Path
    values: Array
    lengths: NDArray[np.int64]
    labels: tuple[str, ...]
    declared: tuple[str, ...]
    may_vary: bool


class _Row(NamedTuple):
    channels: list[str]
    label: str


class _Parsed(NamedTuple):
    """Rows of a file, not yet numbers. ``width`` is the declared number of steps; ``first_column`` that of a value."""

    rows: list[_Row]
    separator: str | None
    first_column: int = 1
    declared: tuple[str, ...] = ()
    may_vary: bool = False
    n_channels: int | None = None
    width: int | None = None


def find_set(folder: str | None, name: str | None) -> tuple[Path, Path]:
    """Files of the official train and test split, ``NAME_TRAIN.*`` and ``NAME_TEST.*`` of one format.

    Args:
        folder: Holds the files, or a folder ``NAME`` that does. None: the sets that lie inside the installed sktime;
            nothing is downloaded, and sktime is not imported.
        name: NAME. None: the only set of ``folder``, or of several the one that is called like the folder.

    Raises:
        ValueError: If neither is given, a file of the pair is missing, or the name does not tell which set is meant.
        FileNotFoundError: If there is no such folder.
        ImportError: If sktime is needed and not installed.
    """
    if folder is None:
        if name is None:
            raise ValueError("folder or name must be given, got neither")
        return _bundled_set(name)
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"folder: no folder {folder!r} (looked in {Path.cwd()})")
    if name is not None and (place / name).is_dir():
        place = place / name
    pairs, single = _pairs(place)
    if name is None:
        name = place.resolve().name
        if name not in pairs and len(pairs) == 1:
            (name,) = pairs
        if name not in pairs and len(pairs) > 1:
            raise ValueError(f"folder: {folder} holds the sets {', '.join(sorted(pairs))}: say which one by name")
    if name in pairs:
        return pairs[name]
    formats = ", ".join(ENDINGS)
    if single:
        files = ", ".join(path.name for path in single)
        raise ValueError(f"folder: {place} holds {files}, but no set with both _TRAIN and _TEST in one of {formats}")
    raise ValueError(f"folder: {place} holds no files {name}_TRAIN and {name}_TEST in one of {formats} (or with .gz)")


def _pairs(place: Path) -> tuple[dict[str, tuple[Path, Path]], list[Path]]:
    """Complete sets by name, each in its preferred format, and the files that belong to none."""
    files: dict[tuple[str, str, str], Path] = {}
    # Backwards, so that a plain file takes the place of its packed twin.
    for path in sorted(place.iterdir(), reverse=True):
        match = _FILE_NAME.fullmatch(path.name)
        if match is not None:
            files[match[1], match[3], match[2]] = path
    pairs: dict[str, tuple[Path, Path]] = {}
    for ending in ENDINGS:
        for name, theirs, split in sorted(files):
            other = files.get((name, ending, "TEST"))
            if theirs == ending and split == "TRAIN" and other is not None:
                pairs.setdefault(name, (files[name, ending, "TRAIN"], other))
    return pairs, sorted(path for (name, _, _), path in files.items() if name not in pairs)


def _bundled_set(name: str) -> tuple[Path, Path]:
    package = importlib.util.find_spec("sktime")
    if package is None or package.origin is None:
        raise ImportError(
            f"name: {name!r} without folder is read from the sets that sktime brings: pip install 'seqlit[timeseries]'"
        )
    place = Path(package.origin).parent / "datasets" / "data"
    known = sorted(path.name for path in place.glob("*/") if path.name in _pairs(path)[0])
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it brings {', '.join(known)};"
        raise ValueError(
            f"name: {name!r} is not among the sets that sktime brings: {hint} others can be downloaded from "
            "https://www.timeseriesclassification.com, then give their folder"
        )
    return _pairs(place / name)[0][name]


def read_series(path: Path) -> LabelledSeries:
    r"""Read and check one file.

    * ``.ts``: header up to ``@data``; a row is ``v,v,...:v,v,...:class``, one group a channel. Lengths may differ
      between rows where the header says ``@equalLength false``.
    * ``.tsv``, ``.txt``: one channel; a row is the class, then the values, between tabs, commas or blanks.
    * ``.arff``: numeric attributes, then the class; or one relational attribute ``'v,v,...\nv,v,...'``, one line a
      channel, then the class.

    Args:
        path: A file that ends in one of :data:`ENDINGS`, with or without ``.gz``.

    Raises:
        ValueError: In one line with file, row and column: a value is missing, not a number, infinite or beyond
            float32; lengths or numbers of channels differ where they must not; there is no series, no class or a
            class that the header does not list; the file is damaged or holds time stamps.
        FileNotFoundError: If there is no such file.
    """
    lines = _lines(path)
    ending = Path(path.name.removesuffix(".gz")).suffix
    match ending:
        case ".ts":
            parsed = _parse_ts(path, lines)
        case ".tsv" | ".txt":
            parsed = _parse_table(path, lines)
        case ".arff":
            parsed = _parse_arff(path, lines)
        case _:
            raise ValueError(f"{path}: must end in {', '.join(ENDINGS)}, or that and .gz")
    if not parsed.rows:
        raise ValueError(f"{path}: the file holds no series")
    return _packed(path, parsed)


def _lines(path: Path) -> list[str]:
    """Lines that say something, stripped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.name.endswith(".gz") else content).decode("utf-8-sig")
    except _UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read, truncated or damaged: {error}") from error
    return [line for line in map(str.strip, text.splitlines()) if line]


def _parse_ts(path: Path, lines: Sequence[str]) -> _Parsed:
    header, rows = _header_and_rows(path, [line for line in lines if not line.startswith("#")])
    said = {key: value.split() for key, value in map(_split_once, header)}
    flags = {key: words[0].lower() == "true" for key, words in said.items() if words}
    if flags.get("@timestamps"):
        raise ValueError(f"{path}: '@timeStamps true': only series without time stamps can be read")
    if not flags.get("@classlabel"):
        raise ValueError(f"{path}: no '@classLabel true' in the header: a set without classes cannot be used here")
    found = []
    for number, line in enumerate(rows, start=1):
        *channels, label = line.split(":")
        if not channels:
            raise ValueError(f"{path}: row {number}: no class after ':'")
        found.append(_Row(channels, label))
    dimensions = _whole_number(path, "@dimensions", said.get("@dimensions"))
    return _Parsed(
        found,
        ",",
        declared=tuple(map(class_name, said["@classlabel"][1:])),
        may_vary=not flags.get("@equallength", True),
        n_channels=1 if flags.get("@univariate") else dimensions,
    )


def _parse_table(path: Path, lines: Sequence[str]) -> _Parsed:
    separator = next((mark for mark in "\t," if lines and mark in lines[0]), None)
    rows = []
    for line in lines:
        label, *values = line.split(separator, 1)
        rows.append(_Row(values, label))
    parsed = _Parsed(rows, separator, first_column=2)
    return _without_padding(path, parsed) if ".tsv" in path.suffixes else parsed


def _without_padding(path: Path, parsed: _Parsed) -> _Parsed:
    """Series of different lengths as the archive of 2018 writes them: rows of one width that end in NaN."""
    shortened, widths = [], []
    for row in parsed.rows:
        cells = row.channels[0].split(parsed.separator) if row.channels else []
        widths.append(len(cells))
        while cells and cells[-1].strip().lower() == "nan":
            cells.pop()
        shortened.append(_Row([(parsed.separator or " ").join(cells)] if cells else [], row.label))
    if shortened == parsed.rows:
        return parsed
    for number, width in enumerate(widths, start=1):
        if width != widths[0]:
            raise ValueError(f"{path}: row {number}: {width} values, NaN at its end included, expected {widths[0]}")
    return parsed._replace(rows=shortened, may_vary=True)


def _parse_arff(path: Path, lines: Sequence[str]) -> _Parsed:
    header, rows = _header_and_rows(path, [line for line in lines if not line.startswith("%")])
    attributes = [rest for key, rest in map(_split_once, header) if key == "@attribute"]
    relational = [place for place, rest in enumerate(attributes) if rest.lower().endswith(" relational")]
    nominal = re.search(r"\{(.*)\}\s*(%.*)?$", attributes[-1]) if attributes else None
    if nominal is None:
        raise ValueError(f"{path}: the last attribute must be the class, such as '@attribute target {{1,2}}'")
    if len(relational) > 1 or (relational and relational[0] != 0):
        raise ValueError(f"{path}: besides the class there may be one relational attribute only, the series")
    found = []
    for number, line in enumerate(rows, start=1):
        if relational:
            match = re.fullmatch(r"""(['"])(.*)\1\s*,(.*)""", line)
            if match is None:
                raise ValueError(f"{path}: row {number}: is not a quoted series, then a comma and the class")
            found.append(_Row(match[2].split("\\n"), match[3]))
        else:
            # A name in quotes may hold commas.
            match = re.fullmatch(r"""(.*),\s*('[^']*'|"[^"]*")""", line)
            *channel, label = match.groups() if match else line.rsplit(",", 1)
            found.append(_Row(channel, label))
    declared = tuple(map(class_name, re.findall(r"""\s*('[^']*'|"[^"]*"|[^,]*[^,\s])""", nominal[1])))
    # The class is an attribute too, and so is the relation around the steps.
    width = len(attributes) - (2 if relational else 1)
    return _Parsed(found, ",", declared=declared, n_channels=None if relational else 1, width=width)


def _header_and_rows(path: Path, lines: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    begin = next((place for place, line in enumerate(lines) if line.lower() == "@data"), None)
    if begin is None:
        raise ValueError(f"{path}: {'no line @data' if lines else 'the file is empty'}")
    return lines[:begin], lines[begin + 1 :]


def _split_once(line: str) -> tuple[str, str]:
    key, *rest = line.split(None, 1)
    return key.lower(), rest[0] if rest else ""


def _whole_number(path: Path, key: str, words: list[str] | None) -> int | None:
    if words is None:
        return None
    if len(words) != 1 or not words[0].isdecimal():
        raise ValueError(f"{path}: {key} must be a whole number, got {' '.join(words)!r}")
    return int(words[0])


def class_name(text: str) -> str:
    """A class as it is named: without quotes, whole numbers without decimals, so that 1, 1.0 and 1e0 are one class."""
    name = text.strip().strip("'\"")
    try:
        number = float(name)
    except ValueError:
        return name
    return str(int(number)) if number.is_integer() else name


def _packed(path: Path, parsed: _Parsed) -> LabelledSeries:
    n_channels = len(parsed.rows[0].channels) if parsed.n_channels is None else parsed.n_channels
    labels, series = [], []
    width = parsed.width
    for number, row in enumerate(parsed.rows, start=1):
        label = class_name(row.label)
        if label.lower() in ("", "?", "nan"):
            raise ValueError(f"{path}: row {number}: the class is missing, got {row.label.strip()!r}")
        if parsed.declared and label not in parsed.declared:
            raise ValueError(
                f"{path}: row {number}: class {label!r} is not in the header: {', '.join(parsed.declared)}"
            )
        labels.append(label)
        if not row.channels or row.channels == [""]:
            raise ValueError(f"{path}: row {number}: holds no values beside the class")
        if len(row.channels) != n_channels:
            raise ValueError(f"{path}: row {number}: {len(row.channels)} channels, expected {n_channels}")
        places = [f"channel {channel}, " if n_channels > 1 else "" for channel in range(1, n_channels + 1)]
        channels = [
            _numbers(f"{path}: row {number}, {place}", text, parsed)
            for place, text in zip(places, row.channels, strict=True)
        ]
        if parsed.may_vary:
            width = len(channels[0])
        width = len(channels[0]) if width is None else width
        for place, values in zip(places, channels, strict=True):
            if len(values) != width:
                where = f"{path}: row {number}, {place}".removesuffix(", ")
                expected = f"{width} as in its first channel" if parsed.may_vary else str(width)
                raise ValueError(f"{where}: {len(values)} values, expected {expected}")
        series.append(np.stack(channels, axis=1))
    lengths = np.array([len(values) for values in series], dtype=np.int64)
    padded = np.zeros((len(series), int(lengths.max()), n_channels))
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(series)
    return LabelledSeries(path, padded, lengths, tuple(labels), parsed.declared, parsed.may_vary)


def _numbers(where: str, text: str, parsed: _Parsed) -> Array:
    cells = text.split(parsed.separator)
    try:
        values = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        _refuse_cell(where, cells, parsed.first_column)
    # Not a number compares as false, so one comparison finds it too. Python's float would take 1_000.
    if not (np.abs(values) <= _LARGEST).all() or "_" in text:
        _refuse_cell(where, cells, parsed.first_column)
    return values


def _refuse_cell(where: str, cells: Sequence[str], first_column: int) -> NoReturn:
    """Name the first cell that is no finite float32."""
    for column, cell in enumerate(map(str.strip, cells), start=first_column):
        if cell in ("", "?"):
            raise ValueError(f"{where}column {column}: the value is missing, got {cell!r}")
        try:
            value = float(cell.replace("_", "not a number"))
        except ValueError:
            raise ValueError(f"{where}column {column}: {cell!r} is not a number") from None
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{where}column {column}: {cell!r} is not a finite number of float32")
    raise AssertionError("called for cells without a fault")
