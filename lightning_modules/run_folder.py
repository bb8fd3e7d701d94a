"""Where a run leaves its things, and how a later command finds them again.

``runs/<method>/version_<n>/`` holds ``config.yaml`` (resolved), ``metrics.csv``, ``fit.json``,
``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``, and after ``test`` the folder ``report/``. A run belongs to a
config when both resolve to the same model, data and seed; what only decides how fast things go does not count.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

BEST, LAST = "best.ckpt", "last.ckpt"
_SPEED_ONLY = frozenset({"eval_batch_size", "num_workers", "n_workers", "cache_dir", "impl", "progress"})


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place when the block ends well, and goes when it does not.

    A reader finds the old file or the new one, never a part. The draft keeps the suffix: writers choose formats by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two configs the same experiment: every leaf of model, data and seed that decides a result.

    Args:
        config: A resolved config as nested mappings of plain values.

    Returns:
        Dotted key to value.
    """
    decisive = {key: config.get(key) for key in ("model", "data", "seed_everything")}
    return {key: value for key, value in _leaves(decisive) if key.rsplit(".", 1)[-1] not in _SPEED_ONLY}


def runs_newest_first(root: Path) -> list[Path]:
    """Run folders ``version_<n>`` below ``root``, the highest n first."""
    folders = [path for path in root.glob("version_*") if path.name[8:].isdigit() and (path / "config.yaml").is_file()]
    return sorted(folders, key=lambda path: int(path.name[8:]), reverse=True)


def newest_run(root: Path, config: Mapping[str, Any], checkpoint: str) -> Path:
    """The newest run of ``config`` below ``root`` that holds ``checkpoint``.

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
    difference = ""
    for run in runs_newest_first(root):
        if not (run / "checkpoints" / checkpoint).is_file():
            continue
        found = identity(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        if found == wanted:
            return run
        if not difference:
            missing = object()
            keys = sorted(
                key for key in wanted.keys() | found.keys() if wanted.get(key, missing) != found.get(key, missing)
            )
            shown = ", ".join(f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys[:2])
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            difference = f" (the newest other run, {run}, differs: {shown}{more})"
    raise FileNotFoundError(
        f"no run of this config with a {checkpoint} in {root}{difference}; run `seqlit fit` with this config first, "
        "or name a checkpoint with --ckpt_path"
    )


class _AppendingWriter(ExperimentWriter):
    """Writes on where an interrupted run stopped; Lightning's own writer deletes what it finds."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(next(csv.reader(file), []))


class RunLogger(CSVLogger):
    """CSV metrics in ``<save_dir>/<name>/version_<n>/metrics.csv``; a resumed run appends to its own file.

    Args:
        save_dir: Folder of all runs.
        name: The method, a folder below ``save_dir``.
        version: Number or folder name of the run; by default the next free number.
    """

    def __init__(self, save_dir: str = "runs", name: str = "default", version: int | str | None = None) -> None:
        super().__init__(save_dir, name=name, version=version)

    @property
    def experiment(self) -> Any:
        """The writer behind ``log_metrics``."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: ``config.yaml`` holds them all."""


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder when ``fit`` starts, once and whole."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; a resumed run, its trainer perhaps set otherwise, adds ``config_sitting_<n>.yaml``."""
        if stage != "fit" or not trainer.loggers:
            return
        folder = trainer.log_dir  # a collective: on every rank
        if folder is None or not trainer.is_global_zero:
            return
        path, sitting = Path(folder) / self.config_filename, 1
        while path.exists():
            sitting += 1
            path = path.with_name(f"config_sitting_{sitting}.yaml")
        write_whole(path, self.parser.dump(self.config, skip_unset=False))


def drop_unfinished_epochs(run: Path, epoch: int) -> None:
    """Take rows past ``epoch`` out of ``metrics.csv``: what was logged after the checkpoint is logged once more."""
    path = run / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    column = rows[0].index("epoch")
    kept = [rows[0], *(row for row in rows[1:] if int(row[column]) <= epoch)]
    if len(kept) < len(rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(kept)
        write_whole(path, text.getvalue())


def read_fit_facts(folder: Path) -> dict[str, Any]:
    """What ``fit`` wrote about itself (seconds, epochs), empty where there is nothing."""
    path = folder / "fit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
