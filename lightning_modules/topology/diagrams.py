"""Persistence diagrams of point clouds: one interface over giotto-tda and gudhi, parallel and cached.

Vietoris-Rips filtration of Euclidean distances, homology over F_2, no maximum edge length, reduced homology (the
component that never dies is left out). giotto-tda computes in float32, so distances are rounded to float32 before
either backend sees them: births and deaths are then distances among those, and both backends return the same numbers.
"""

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

Array = NDArray[np.float64]
Diagram = dict[int, Array]
"""Bars ``(n_bars, 2) float64`` by degree: birth and death, sorted by birth, then death; birth < death."""

Backend = Literal["giotto", "gudhi"]

MAX_DEGREE = 3
"""Degrees above are refused: the number of simplices grows as n^(degree + 2)."""

_FORMAT_VERSION = 1  # part of the cache key: raised when diagrams change in meaning

logger = logging.getLogger(__name__)


def persistence_diagrams(
    point_clouds: Sequence[Array],
    degrees: Sequence[int] = (0, 1, 2),
    *,
    backend: Backend = "giotto",
    n_workers: int = 1,
    cache_dir: str | None = None,
    progress: bool = False,
) -> list[Diagram]:
    """Diagrams of each cloud by itself.

    Births and deaths carry the relative error of float32, 6e-8. Bars that are empty in float32 are left out, so that
    a cloud whose points are all equal has no bar at all.

    Args:
        point_clouds: A of them, each ``(n, d) float``, n and d at least 1; they may differ in both.
        degrees: Homology degrees wanted, from 0 to 3.
        backend: ``giotto`` (giotto-tda, AGPL) or ``gudhi`` (about three times as fast in degree 2).
        n_workers: Processes; results do not depend on it.
        cache_dir: Folder in which the diagrams of a call are kept in one file, by content of clouds and degrees; a
            damaged file is computed anew. None keeps nothing.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        A diagrams, each with every one of ``degrees``.

    Raises:
        ValueError: If there is no cloud, a cloud is empty or not finite, or an argument is not allowed.
        ModuleNotFoundError: If the backend is not installed: ``No module named 'gtda'``.
    """
    clouds = [_checked(number, cloud) for number, cloud in enumerate(point_clouds)]
    wanted = tuple(degrees)
    if not clouds:
        raise ValueError("point_clouds must hold at least one cloud, got none")
    if not wanted or len(set(wanted)) < len(wanted) or not all(degree in range(MAX_DEGREE + 1) for degree in wanted):
        raise ValueError(f"degrees must be different numbers from 0 to {MAX_DEGREE}, at least one, got {wanted}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, got {n_workers}")
    file = None if cache_dir is None else Path(cache_dir) / f"{content_key(clouds, wanted, backend)}.npz"
    found = None if file is None else _read(file, wanted, len(clouds))
    if found is None:
        found = _computed(clouds, wanted, backend, n_workers, progress)
        if file is not None:
            _write(file, found, wanted)
    return found


def content_key(clouds: Sequence[Array], degrees: Sequence[int], backend: str) -> str:
    """blake2b of everything that the diagrams depend on."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((_FORMAT_VERSION, backend, tuple(degrees), [cloud.shape for cloud in clouds])).encode())
    for cloud in clouds:
        digest.update(np.ascontiguousarray(cloud, np.float64).tobytes())
    return digest.hexdigest()


def _checked(number: int, cloud: Array) -> Array:
    points = np.asarray(cloud, np.float64)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"cloud {number} must have shape (points, dimension), both at least 1, got {points.shape}")
    if not np.isfinite(points).all():
        place = int(np.argwhere(~np.isfinite(points))[0, 0])
        raise ValueError(f"cloud {number} must be finite, got {points[place].tolist()} as point {place}")
    return points


def _computed(
    clouds: list[Array], degrees: tuple[int, ...], backend: Backend, n_workers: int, progress: bool
) -> list[Diagram]:
    rips: Any
    unpack: Callable[[Any, tuple[int, ...]], list[Diagram]]
    if backend == "giotto":
        from gtda.homology import VietorisRipsPersistence

        rips = VietorisRipsPersistence(metric="precomputed", homology_dimensions=sorted(degrees), coeff=2)
        unpack, prefer = _of_giotto, "processes"  # it holds the interpreter's lock
    else:
        from gudhi.sklearn import RipsPersistence

        rips = RipsPersistence(list(degrees), input_type="full distance matrix", homology_coeff_field=2)
        unpack, prefer = _of_gudhi, "threads"  # it releases the lock, and threads start at once
    from joblib import Parallel, delayed
    from tqdm import tqdm

    # Chunks large enough that handing them over costs little, and enough of them that no worker idles at the end.
    size = max(1, min(16, len(clouds) // (4 * n_workers)))
    chunks = [clouds[start : start + size] for start in range(0, len(clouds), size)]
    # The backend's own method is what a process is sent: it imports the backend, not this package and torch.
    parts = Parallel(n_jobs=n_workers, prefer=prefer, return_as="generator")(
        delayed(rips.fit_transform)([_distances(points) for points in chunk]) for chunk in chunks
    )
    found: list[Diagram] = []
    hidden = None if progress else True  # None: shown on a terminal, not in a log file
    with tqdm(total=len(clouds), desc="persistence diagrams", unit="stock", disable=hidden, leave=False) as bar:
        for part in parts:
            found += unpack(part, degrees)
            bar.update(len(part))
    return found


def _distances(points: Array) -> Array:
    """Full matrix ``(n, n) float64`` of Euclidean distances rounded to float32."""
    return squareform(pdist(points).astype(np.float32).astype(np.float64))


def _of_giotto(padded: Array, degrees: tuple[int, ...]) -> list[Diagram]:
    """From ``(clouds, bars, 3)`` with birth, death and degree, filled up with bars of length 0."""
    return [{degree: _bars(rows[rows[:, 2] == degree, :2]) for degree in degrees} for rows in padded]


def _of_gudhi(intervals: list[list[Array]], degrees: tuple[int, ...]) -> list[Diagram]:
    """From one array a degree, with the component that never dies."""
    return [
        {degree: _bars(bars[np.isfinite(bars[:, 1])]) for degree, bars in zip(degrees, diagram, strict=True)}
        for diagram in intervals
    ]


def _bars(bars: Array) -> Array:
    kept = np.asarray(bars[bars[:, 0] < bars[:, 1]], np.float64)  # what has no length is padding
    return kept[np.lexsort((kept[:, 1], kept[:, 0]))]


def _write(file: Path, diagrams: list[Diagram], degrees: tuple[int, ...]) -> None:
    """Whole or not at all: under another name first, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    bars = np.concatenate([diagram[degree] for diagram in diagrams for degree in degrees])
    counts = np.array([[len(diagram[degree]) for degree in degrees] for diagram in diagrams])
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".draft-", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, bars=bars, counts=counts)
        os.replace(draft, file)
    finally:
        Path(draft).unlink(missing_ok=True)


def _read(file: Path, degrees: tuple[int, ...], n_clouds: int) -> list[Diagram] | None:
    """The diagrams in a file; None if there is none or it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            bars, counts = stored["bars"], stored["counts"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        logger.warning("%s is damaged: its diagrams are computed anew", file)
        return None
    if counts.shape != (n_clouds, len(degrees)) or bars.shape != (counts.sum(), 2):
        logger.warning("%s does not hold what its name says: its diagrams are computed anew", file)
        return None
    pieces = iter(np.split(bars, np.cumsum(counts.ravel())[:-1]))
    return [{degree: next(pieces) for degree in degrees} for _ in range(n_clouds)]
