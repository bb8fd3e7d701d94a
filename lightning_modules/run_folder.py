"""Where a run leaves its things, and how a later command finds them again.

``runs/<method>/version_<n>/`` holds ``config.yaml`` (resolved), ``metrics.csv``, ``fit.json``,
``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``, and after ``test`` the folder ``report/``. Results of a part
of the data, as of ``trainer.limit_test_batches``, go into ``partial/`` instead. What a fit without a checkpoint left in
a folder that another fit takes over lies in ``lost_<n>/``. A run belongs to a config when both resolve to the same
experiment (:mod:`lightning_modules.run_identity`).
"""

import csv
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lightning_modules.run_identity import LIMITS_OF_FIT, identity

try:
    import fcntl
except ModuleNotFoundError:  # not everywhere: two fits then could take one folder at the same moment
    fcntl = None  # type: ignore[assignment]

_RUNNING = "running.json"
BEST, LAST = "best.ckpt", "last.ckpt"
NOTHING_TO_RESUME = 3
"""Exit status of ``fit --ckpt_path last`` by which a job file tells that it may begin anew; other errors end with 2."""

_DRAFT = re.compile(r"\..+\.\d+(\.\w+)?")
_LOST = re.compile(r"lost_\d+")


class NothingToResumeError(FileNotFoundError):
    """No run of a config has a checkpoint to go on from, and the newest has not finished: it may begin anew."""


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place when the block ends well, and goes when it does not.

    A reader finds the old file or the new one, never a part, also when the machine went down. The draft keeps the
    suffix: writers choose formats by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        _flush(draft)  # else a rename may reach the disk before what it renames
        os.replace(draft, path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_drafts(run: Path) -> None:
    """Remove what killed writers left in the folder of a run that nobody writes to."""
    for path in run.rglob(".*"):
        if _DRAFT.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="")


def write_parquet(path: Path, frame: pl.DataFrame, what: str = "") -> None:
    """Write ``frame`` to ``path``, whole or not at all, and say so where ``what`` names its rows."""
    with drafted(path) as draft:
        frame.write_parquet(draft)
    if what:
        print(f"seqlit: {len(frame)} {what} in {path}", flush=True)


def runs_newest_first(root: Path) -> list[Path]:
    """Run folders ``version_<n>`` below ``root``, the highest n first."""
    folders = [path for path in root.glob("version_*") if path.name[8:].isdigit() and (path / "config.yaml").is_file()]
    return sorted(folders, key=lambda path: int(path.name[8:]), reverse=True)


def newest_run(root: Path, config: Mapping[str, Any], checkpoint: str) -> Path:
    """The newest run of ``config`` below ``root`` that holds ``checkpoint``, for a command that evaluates it.

    Limits of a fit's batches, of which ``limit_val_batches`` cuts ``validate`` too, need not be named, nor be those of
    the fit: where no run has the same, the newest that was fitted on all batches is taken.

    Args:
        root: The method's folder of runs.
        config: The resolved config asked for.
        checkpoint: ``"best.ckpt"`` or ``"last.ckpt"``.

    Returns:
        The run's folder.

    Raises:
        FileNotFoundError: If there is none; says what the newest run of another config differs in.
    """
    wanted = identity(config)
    without_limits = {key: value for key, value in wanted.items() if key not in LIMITS_OF_FIT}
    unlimited: Path | None = None
    difference = ""
    for run in runs_newest_first(root):
        if not (run / "checkpoints" / checkpoint).is_file():
            continue
        found = _identity_of(run)
        if found == wanted:
            return run
        if found == without_limits:
            unlimited = unlimited or run
        compared = wanted if LIMITS_OF_FIT & found.keys() else without_limits
        difference = difference or f" (the newest other run, {run}, differs: {_difference(found, compared)})"
    if unlimited is not None:
        return unlimited
    raise FileNotFoundError(
        f"no run of this config with a {checkpoint} in {root}{difference}; run `seqlit fit` with this config first, "
        "or name a checkpoint with --ckpt_path"
    )


def newest_unfinished_run(
    root: Path, config: Mapping[str, Any], asked: Mapping[str, int], *, is_first: bool = True
) -> Path:
    """The newest run of ``config`` below ``root`` that did less than is asked for and can be gone on with.

    A run that stopped by itself before it had done what it was asked for (early stopping) is finished.

    Args:
        root: The method's folder of runs.
        config: The resolved config asked for.
        asked: ``max_epochs`` and ``max_steps``, -1 for no limit.
        is_first: Whether this is the first process of the fit, which may have claimed the run when another looks.

    Returns:
        The run's folder, which holds ``last.ckpt``.

    Raises:
        NothingToResumeError: If there is no run of this config, or the newest was ended before its first ``last.ckpt``
            and none before it can be gone on with.
        FileNotFoundError: If there is none because the newest run of this config has finished.
        ValueError: If the run is still at work on this machine.
    """
    wanted = identity(config)
    same = other = ""
    has_finished = False
    for run in runs_newest_first(root):
        found, facts = _identity_of(run), read_fit_facts(run)
        if found != wanted:
            other = other or f"the newest other run, {run}, differs: {_difference(found, wanted)}"
        elif facts.get("finished") and (facts.get("stopped_early") or not is_less_than_asked(facts, asked)):
            has_finished = has_finished or not same
            early = " and stopped early" if facts.get("stopped_early") else ""
            same = same or f"the newest, {run}, has finished: {facts['epochs']} epochs{early}"
        elif not (run / "checkpoints" / LAST).is_file():
            same = same or f"the newest, {run}, was ended before its first {LAST}"
        else:
            if is_first:
                _refuse_working(run)
            return run
    found_instead = same or other or "there is no run"
    message = f"no unfinished run of this config in {root} ({found_instead}); to start one, leave out --ckpt_path last"
    if has_finished:
        raise FileNotFoundError(message)
    raise NothingToResumeError(f"{message} (exit status {NOTHING_TO_RESUME}: there is nothing to resume)")


def refuse_taken(run: Path, asked: str | None = None) -> None:
    """See that a fresh fit into this folder overwrites no other run.

    One that was ended before its first ``last.ckpt`` is none, though it may have written ``best.ckpt`` a moment before:
    it cannot be gone on with, see :meth:`RunLogger.claim`.

    Args:
        run: The folder, which need not be there.
        asked: Path of the checkpoint that the fit starts from, if any.

    Raises:
        ValueError: If there are checkpoints, or a run that finished without any.
    """
    checkpoints = {path.name for path in (run / "checkpoints").glob("*") if not _DRAFT.fullmatch(path.name)}
    facts = read_fit_facts(run)
    # Of a fit that was killed its note stays, one that failed says so itself; other checkpoints are somebody's.
    was_ended = LAST not in checkpoints and (bool(facts) or (run / _RUNNING).is_file())
    if not facts.get("finished") and (not checkpoints or was_ended):
        return
    other = "another trainer.logger.init_args.version (null: the next free number)"
    if asked is not None:
        advice = f"a fit from {asked} is a run of its own, choose {other}; --ckpt_path last goes on in the same folder"
    elif LAST in checkpoints:
        advice = f"go on with it by --ckpt_path last, or choose {other}"
    else:
        advice = f"without a {LAST} nothing goes on with it, choose {other}"
    raise ValueError(f"{run} holds a run already: {advice}")


def _refuse_working(run: Path) -> None:
    pid = _worker(run)
    if pid is not None:
        raise ValueError(f"{run} is still being trained, by process {pid}: wait for it, or end it first")


def _set_aside(run: Path) -> None:
    """Move what a fit that nothing goes on with left into ``lost_<n>/``, so that nothing of a new one is added."""
    if not (run / "config.yaml").exists():
        return
    remove_drafts(run)
    left = [path for path in run.iterdir() if path.name != _RUNNING and not _LOST.fullmatch(path.name)]
    number = 1
    while (run / f"lost_{number}").exists():
        number += 1
    lost = run / f"lost_{number}"
    lost.mkdir()
    # The config last: a kill in between leaves it, and the next fit moves the rest.
    for path in sorted(left, key=lambda path: path.name == "config.yaml"):
        path.rename(lost / path.name)
    print(f"seqlit: what a fit that was ended before its first {LAST} left in {run} is now in {lost}", flush=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where the system and the disk know locks; a process that dies gives it back."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def mark_running(run: Path, *, running: bool) -> None:
    """Write who is at work on a run, or take the note away; one of a process that was killed stays behind."""
    if running:
        note = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        write_whole(run / _RUNNING, json.dumps(note) + "\n")
    else:
        (run / _RUNNING).unlink(missing_ok=True)


def _worker(run: Path) -> int | None:
    """The process of this machine that is at work on a run; of other machines nothing can be said."""
    try:
        note = json.loads((run / _RUNNING).read_text(encoding="utf-8"))
        host, pid, started = str(note["host"]), int(note["pid"]), note.get("started")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if host != socket.gethostname() or pid == os.getpid():  # in a container every first process has one number
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    if started is not None and _started(pid) not in (None, started):  # the number went to another process
        return None
    return pid


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since it was booted; None where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_less_than_asked(done: Mapping[str, int], asked: Mapping[str, int]) -> bool:
    """Whether ``epochs`` and ``steps`` done are both below ``max_epochs`` and ``max_steps``, -1 being no limit."""
    return all(asked[f"max_{unit}"] == -1 or done.get(unit, 0) < asked[f"max_{unit}"] for unit in ("epochs", "steps"))


def _identity_of(run: Path) -> dict[str, Any]:
    return identity(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    missing = object()
    keys = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key, missing) != found.get(key, missing))
    shown = ", ".join(f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys[:2])
    return shown + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")


class _AppendingWriter(ExperimentWriter):
    """Writes on where an interrupted run stopped; Lightning's own writer deletes what it finds."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(next(csv.reader(file), []))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue())


class RunLogger(CSVLogger):
    """CSV metrics in ``<save_dir>/<name>/version_<n>/metrics.csv``; a resumed run appends to its own file.

    Args:
        save_dir: Folder of all runs.
        name: The method, a folder below ``save_dir``.
        version: Number or folder name of the run; by default the next free number.
    """

    def __init__(self, save_dir: str = "runs", name: str = "default", version: int | str | None = None) -> None:
        super().__init__(save_dir, name=name, version=version)
        self._is_numbered = version is None
        self._made: list[Path] = []  # folders, from that of the run up
        self._is_claimed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer behind ``log_metrics``."""
        if self._experiment is None:
            self._made = self._made or self._make_folder()
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment

    def claim(self, *, resumes: bool) -> None:
        """Take the folder of a given version for a fit of this process: of two that start together, one is refused.

        Nothing is appended to what a fit that was ended before its first ``last.ckpt`` left there: it is moved to
        ``lost_<n>/``. A version that is numbered here needs no claim. To be called in the first process alone.

        Args:
            resumes: Whether the fit goes on with the run of this folder.

        Raises:
            ValueError: If a process of this machine is at work there, or a fresh fit would overwrite a run.
        """
        if self._is_numbered:
            return
        self._made = self._make_folder()
        folder = Path(self.log_dir)
        with _alone(folder):
            _refuse_working(folder)
            if not resumes:
                refuse_taken(folder)
                _set_aside(folder)
            mark_running(folder, running=True)
        self._is_claimed = True

    def _make_folder(self) -> list[Path]:
        """Make the run folder: it and those above that were not there; none where a given one is gone on with."""
        parent = Path(self.log_dir).parent
        above = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = Path(self.log_dir)
            try:
                folder.mkdir()
            except FileExistsError:
                if not self._is_numbered:
                    return []
                self._version = int(self.version) + 1  # another process was faster
            else:
                return [folder, *above]

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: ``config.yaml`` holds them all."""

    def remove_folder(self) -> None:
        """Take away the run folder, with folders above it that are empty then, where this logger made them."""
        made, self._made = self._made, []
        if self._is_claimed:
            mark_running(Path(self.log_dir), running=False)
        if made:
            self._experiment = None  # it would write once more when it is told to end
            shutil.rmtree(made[0], ignore_errors=True)
        for parent in made[1:]:
            try:
                parent.rmdir()
            except OSError:  # others have written there in the meantime
                return


def drop_rows_after(run: Path, checkpoint: Mapping[str, Any]) -> None:
    """Take out of ``metrics.csv`` what was logged after ``last.ckpt``: a resumed run logs it once more.

    A row carries the number of optimiser steps before the one it was logged in, so that those of a checkpoint are
    below the number of the next step. A row that was cut off goes too.

    Args:
        run: The run's folder.
        checkpoint: As Lightning writes them.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        return
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]["total"]
    # Amid an epoch it is written before the trainer counts the batch.
    next_step = loops["epoch_loop.state_dict"]["_batches_that_stepped"] + batches["processed"] - batches["completed"]
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(io.StringIO(whole, newline="")))
    if not rows:
        path.unlink()
        return
    header = rows[0]
    column = header.index("step")
    kept = [row for row in rows[1:] if len(row) == len(header) and row[column] and int(row[column]) < next_step]
    if len(kept) < len(rows) - 1 or whole != text:
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows([header, *kept])
        write_whole(path, lines.getvalue())


def read_fit_facts(folder: Path) -> dict[str, Any]:
    """What ``fit`` wrote about itself (see ``EpochLines``), empty where there is nothing."""
    path = folder / "fit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
