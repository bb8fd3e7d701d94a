"""``seqlit search``: a wandb sweep file run here by Optuna, without an account.

    seqlit search --sweep configs/sweeps/sasrec_cce.yaml --n_trials 20 [--jobs 2] [--storage search.db] [-- OVERRIDES]

Each trial is a ``seqlit fit`` in a process of its own, so that one that crashes does not end the search. A trial is
worth its best epoch, as ``best.ckpt`` is. ``early_terminate`` ends trials as wandb's Hyperband does; one that is ended
gets a SIGTERM, like from an agent, and leaves a whole run. What comes after ``--`` goes to every fit.
"""

import argparse
import csv
import io
import itertools
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from lightning_modules.run_folder import BEST, RunLogger, write_whole
from lightning_modules.search_pictures import objective_by_trial, parallel_coordinates, short_names
from lightning_modules.search_process import FitProcess, Report, TrialFailed
from lightning_modules.sweep import Sweep, read_sweep

_STUDY = "seqlit"
_STOPPED = "stopped"

Runner = Callable[[Sequence[str], Path, Report], list[float]]


def search_main(arguments: list[str]) -> int:
    """Run ``seqlit search``.

    Args:
        arguments: Those after ``search``.

    Returns:
        0 when all trials were made, 130 when a signal ended the search.

    Raises:
        ValueError: If arguments or the sweep do not fit, or no trial ended well; one line.
        ImportError: If Optuna is missing.
    """
    own, overrides = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        own, overrides = arguments[:place], arguments[place + 1 :]
    known = _parser().parse_args(own)
    if known.n_trials < 1 or known.jobs < 1:
        raise ValueError(f"search: n_trials and jobs must be at least 1, got {known.n_trials} and {known.jobs}")
    sweep = read_sweep(Path(known.sweep))
    runner = FitProcess(sweep.metric)
    with _signals(runner.stopping):
        return search(
            sweep,
            runner,
            n_trials=known.n_trials,
            folder=Path(known.output or f"runs/search/{Path(known.sweep).stem}"),
            storage=known.storage,
            jobs=known.jobs,
            seed=known.seed,
            overrides=overrides,
            stopping=runner.stopping,
        )


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"search: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Arguments(prog="seqlit search", description="Search over a sweep file; overrides of the fits follow --.")
    parser.add_argument("--sweep", required=True, help="a file of configs/sweeps, in wandb's format")
    parser.add_argument("--n_trials", type=int, default=20, help="trials in all, those of an earlier sitting included")
    parser.add_argument("--storage", help="SQLite file: a search that was stopped goes on where it was")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; with several jobs order decides too")
    parser.add_argument("--output", help="folder of the searches; by default runs/search/<name of the sweep>")
    return parser


@contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the running fits first: they would go on without their search."""

    def stop(number: int, frame: Any) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def search(
    sweep: Sweep,
    runner: Runner,
    *,
    n_trials: int,
    folder: Path,
    storage: str | None = None,
    jobs: int = 1,
    seed: int = 0,
    overrides: Sequence[str] = (),
    stopping: threading.Event | None = None,
) -> int:
    """Make the trials and write what came of them.

    Writes ``search.json``, ``search.csv``, ``objective.png`` and ``parameters.png`` to ``folder/search_<n>``, with
    the run of trial k in ``trial_<k>/version_0``.

    Args:
        sweep: What to search.
        runner: Fits once and returns the values of the metric.
        n_trials: Trials in all.
        folder: Folder of the searches of this sweep.
        storage: SQLite file of an earlier sitting, or of one to come.
        jobs: Fits at a time.
        seed: Of what is drawn.
        overrides: More arguments of every fit.
        stopping: Set from outside to end early.

    Returns:
        0, or 130 if ``stopping`` was set.

    Raises:
        ValueError: If the storage is that of another search, an override sets what the sweep varies, or no trial
            ended well.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of a failed trial by its traceback; here it is a line
    stopping = stopping or threading.Event()
    _check_overrides(sweep, overrides)
    study = _study(sweep, storage, seed)
    _check_same(study, {"sweep": asdict(sweep), "overrides": list(overrides)}, storage)
    home = Path(study.user_attrs.get("folder") or _fresh(folder))
    study.set_user_attr("folder", str(home))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of a sitting that was killed
        study.tell(trial.number, state=TrialState.FAIL)
    home.mkdir(parents=True, exist_ok=True)

    def objective(trial: Any) -> float:
        values = {one.key: one.draw(trial) for one in sweep.parameters}
        run = home / f"trial_{trial.number}" / "version_0"
        trial.set_user_attr("values", values)
        trial.set_user_attr("run", str(run))
        reported, ended = 0, False

        def report(logged: list[float]) -> bool:
            nonlocal reported, ended
            for step in range(reported, len(logged)):
                # Judged by its best so far, as it will be in the end.
                trial.report(_best(logged[: step + 1], sweep), step + 1)
            reported, ended = len(logged), trial.should_prune()
            return ended

        try:
            logged = runner([*sweep.arguments(values), *overrides, *_placed(run)], run, report)
            if stopping.is_set():
                raise TrialFailed(_STOPPED)
            if not logged:
                raise TrialFailed(f"the run logged no {sweep.metric}")
        except TrialFailed as error:
            trial.set_user_attr("error", _STOPPED if stopping.is_set() else str(error))
            raise
        trial.set_user_attr("logged", logged)
        if ended:
            raise optuna.TrialPruned
        report(logged)  # what came between the last look and the end; too late to be ended
        return _best(logged, sweep)

    def say(study: Any, trial: Any) -> None:
        print(f"trial {trial.number}: {_outcome(trial, sweep)}", flush=True)
        if stopping.is_set():
            study.stop()

    left = n_trials - sum(_is_made(trial) for trial in study.get_trials())
    if sweep.method == "grid":
        left = _enqueue_points(study, sweep, left)
    if left > 0:
        study.optimize(objective, n_trials=left, n_jobs=jobs, catch=(TrialFailed,), callbacks=[say])
    begun = [trial for trial in study.get_trials() if trial.state != TrialState.WAITING]
    _finish(begun, sweep, home)
    return 130 if stopping.is_set() else 0


def _best(logged: Sequence[float], sweep: Sweep) -> float:
    return max(logged) if sweep.maximises else min(logged)


def _check_overrides(sweep: Sweep, overrides: Sequence[str]) -> None:
    for word in overrides:
        key = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and key in {one.key for one in sweep.parameters}:
            raise ValueError(f"search: {key} is what the sweep varies; to fix it, give it a `value` in the sweep file")


def _placed(run: Path) -> list[str]:
    """Arguments that put a run into a folder of its own."""
    logger = "--trainer.logger"
    place = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
    name = f"{RunLogger.__module__}.{RunLogger.__qualname__}"
    return [f"{logger}={name}", *(f"{logger}.init_args.{key}={value}" for key, value in place.items())]


def _study(sweep: Sweep, storage: str | None, seed: int) -> Any:
    import optuna

    if storage is not None:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            storage=None if storage is None else f"sqlite:///{storage}",
            study_name=_STUDY,
            load_if_exists=True,
            direction="maximize" if sweep.maximises else "minimize",
        )
    except Exception as error:  # of whatever stands between Optuna and the file
        raise ValueError(f"search: {storage} is no file of a search: {str(error).splitlines()[0]}") from error
    seed += len(study.trials)  # a second sitting must not draw the same values again
    # The points of a grid are not drawn, but enqueued.
    sampler = optuna.samplers.TPESampler if sweep.method == "bayes" else optuna.samplers.RandomSampler
    study.sampler = sampler(seed=seed)
    study.pruner = optuna.pruners.NopPruner()
    if sweep.min_iter is not None:
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(sweep.min_iter, reduction_factor=sweep.eta)
    return study


def _enqueue_points(study: Any, sweep: Sweep, n_trials: int) -> int:
    """Have trials wait for points of the grid that none has made; how many are to be made, at most ``n_trials``.

    Optuna's own sampler of grids takes a trial that was stopped or killed for one that was made.
    """
    waiting = [trial for trial in study.get_trials() if trial.state.name == "WAITING"]  # of a sitting that was stopped
    made = [trial for trial in study.get_trials() if _is_made(trial)]
    known = [trial.user_attrs.get("point", trial.params) for trial in (*waiting, *made)]
    grid = sweep.grid()
    points = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    missing = (point for point in points if point not in known)
    fresh = list(itertools.islice(missing, max(0, n_trials - len(waiting))))
    for point in fresh:
        study.enqueue_trial(point, user_attrs={"point": point})
    return min(n_trials, len(waiting) + len(fresh))


def _check_same(study: Any, said: dict[str, Any], storage: str | None) -> None:
    said = json.loads(json.dumps(said))  # as a storage gives it back
    before = study.user_attrs.setdefault("said", said)
    if before != said:
        raise ValueError(f"search: {storage} holds another sweep or other overrides; choose another --storage")
    study.set_user_attr("said", said)


def _fresh(folder: Path) -> Path:
    taken = [int(path.name[7:]) for path in folder.glob("search_*") if path.name[7:].isdigit()]
    return folder / f"search_{max(taken, default=-1) + 1}"


def _is_made(trial: Any) -> bool:
    """Whether a trial says something of its values, be it that they fail; a stopped or killed one does not."""
    return bool(trial.state.is_finished()) and (trial.state.name != "FAIL" or _error(trial) not in ("", _STOPPED))


def _error(trial: Any) -> str:
    return str(trial.user_attrs.get("error", ""))


def _outcome(trial: Any, sweep: Sweep) -> str:
    logged = trial.user_attrs.get("logged")
    if not logged:
        return f"failed: {_error(trial) or 'killed'}"
    ended = ", ended early" if trial.state.name == "PRUNED" else ""
    return f"{sweep.metric} {_best(logged, sweep):.6g}, the best of {len(logged)}{ended}"


_STATES = {
    "COMPLETE": "complete",
    "PRUNED": "ended early",
    "FAIL": "failed",
    "RUNNING": "running",
}


def _row(trial: Any, sweep: Sweep) -> dict[str, Any]:
    logged = trial.user_attrs.get("logged") or []
    return {
        "trial": trial.number,
        "state": _STATES[trial.state.name],
        "value": _best(logged, sweep) if logged else None,
        "n_logged": len(logged),
        "seconds": None if trial.duration is None else trial.duration.total_seconds(),
        "values": trial.user_attrs.get("values", {}),
        "run": trial.user_attrs.get("run"),
        "error": _error(trial),
    }


def _finish(trials: Sequence[Any], sweep: Sweep, home: Path) -> None:
    """Write and print what came of the trials, and how to test the best."""
    rows = [_row(trial, sweep) for trial in trials]
    complete = [row for row in rows if row["state"] == "complete"]
    best = min(complete, key=lambda row: -row["value"] if sweep.maximises else row["value"], default=None)
    found = {
        "metric": sweep.metric,
        "goal": "maximize" if sweep.maximises else "minimize",
        "best": best,
        "trials": rows,
    }
    write_whole(home / "search.json", json.dumps(found, indent=2) + "\n")
    keys = [one.key for one in sweep.parameters]
    flat = [[*(row[key] for key in _COLUMNS), *(row["values"].get(key) for key in keys)] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*_COLUMNS, *keys], *flat])
    write_whole(home / "search.csv", text.getvalue())
    if best is None:
        errors = [row["error"] for row in rows if row["error"] not in ("", _STOPPED)]
        if errors:
            raise ValueError(f"search: none of {len(rows)} trials ended well, see {home}; the first: {errors[0]}")
        print(f"seqlit: stopped before a trial ended, see {home}", flush=True)
        return
    objective_by_trial(home / "objective.png", rows, sweep.metric, maximises=sweep.maximises)
    parallel_coordinates(home / "parameters.png", rows, sweep)
    run = Path(best["run"])
    print(_table(rows, sweep))
    print(f"seqlit: trials and pictures in {home}")
    print(f"seqlit: best is trial {best['trial']}, {sweep.metric} {best['value']:.6g}, in {run}")
    checkpoint = run / "checkpoints" / BEST
    print(f"  seqlit test --config {shlex.quote(str(run / 'config.yaml'))} --ckpt_path {shlex.quote(str(checkpoint))}")
    sys.stdout.flush()


_COLUMNS = ("trial", "state", "value", "n_logged", "seconds", "run", "error")


def _table(rows: Sequence[dict[str, Any]], sweep: Sweep) -> str:
    """Trials, the best first, with the values that differ."""
    varied = [one.key for one in sweep.parameters if one.distribution != "constant"]
    worst = float("-inf") if sweep.maximises else float("inf")
    order = sorted(rows, key=lambda row: worst if row["value"] is None else row["value"], reverse=sweep.maximises)
    lines = [["trial", "state", sweep.metric, *short_names(varied)]]
    for row in order:
        numbers = [row["value"], *(row["values"].get(key) for key in varied)]
        lines.append([str(row["trial"]), row["state"], *map(_short, numbers)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
