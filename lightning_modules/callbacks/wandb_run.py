"""A run on Weights & Biases beside the CSV file: config, metrics, report and best checkpoint, online or offline."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.callbacks.results_folder import folder_of_run, is_partial
from lightning_modules.run_folder import BEST, write_whole

IDENTITY = "wandb.json"
_RULE = re.compile(r"\|?(\s*:?-+:?\s*\|)+(\s*:?-+:?\s*)?")


class WandbRun(Callback):
    """Sends a run to wandb. The run folder keeps the run's id, so that a resumed fit and a test go on with it.

    | command | what is sent |
    |---|---|
    | ``fit`` | the resolved config, whatever is logged, and at the end ``best.ckpt`` with its config as an artifact |
    | ``test`` | numbers of ``report/metrics.json``, tables of ``report/report.md``, pictures, all as an artifact too |

    ``predict`` and ``validate`` send nothing, and neither does a ``test`` that leaves out batches. Only the first
    process talks to wandb. A run stopped by a signal, as an agent stops the bad runs of a sweep, is finished as usual
    and uploads no checkpoint; one that fails is marked as failed. Whether runs go to a server is said by wandb's own
    ``WANDB_MODE``; ``wandb sync`` sends later what was written offline to ``<run folder>/wandb``. Under an agent the
    CLI adds this callback by itself.

    Args:
        project: wandb project; an agent's sweep overrules it.
        entity: wandb team or user; by default that of the login.
        tags: Tags of the run.
        upload_checkpoint: Whether the best checkpoint is uploaded.

    Raises:
        ModuleNotFoundError: If wandb is not installed: ``pip install 'seqlit[wandb]'``.
        ValueError: When the run begins, if there is no login or the server refuses it; one line.
    """

    def __init__(
        self,
        project: str = "seqlit",
        entity: str | None = None,
        tags: Sequence[str] = (),
        upload_checkpoint: bool = True,
    ) -> None:
        import wandb  # noqa: F401  missing, it shall be missing before anything is trained

        self.project = project
        self.entity = entity
        self.tags = list(tags)
        self.upload_checkpoint = upload_checkpoint
        self._folder: Path | None = None
        self._metrics: WandbLogger | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        leaves_none = trainer.fast_dev_run or stage not in ("fit", "test") or (stage == "fit" and not trainer.loggers)  # type: ignore[attr-defined]
        # Asking for it is a collective: on every rank.
        self._folder = None if leaves_none else folder_of_run(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the run, send its config, and let metrics go to wandb as well."""
        if self._folder is None:
            return
        run = self._begin(self._folder) if trainer.is_global_zero else None
        if run is not None:
            # An epoch logs several times: what is drawn over is the step of training, not the number of calls.
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            config = self._folder / "config.yaml"  # a run from Python has none
            if config.is_file():
                run.config.update(yaml.safe_load(config.read_text(encoding="utf-8")), allow_val_change=True)
        self._metrics = WandbLogger(experiment=run)
        trainer.loggers = [*trainer.loggers, self._metrics]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send nothing of a test that leaves out batches: the run holds that of all."""
        if is_partial(trainer):
            self._folder = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send what the command left, after all other callbacks have written theirs."""
        folder = self._folder
        run = self._end(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        if run is not None:
            if self.upload_checkpoint:
                _send_checkpoint(run, folder / "checkpoints" / BEST)
            run.finish()
        elif stage == "test":
            self._send_report(folder, {key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run: as usual where a signal stopped it, else as failed."""
        run = self._end(trainer)
        if run is not None:
            run.finish(exit_code=int(isinstance(exception, Exception)))

    def _end(self, trainer: Trainer) -> Any:
        """Take the logger away again; the run, which is still to be finished, in the process that has one."""
        metrics, self._metrics, self._folder = self._metrics, None, None
        if metrics is None:
            return None
        trainer.loggers = [one for one in trainer.loggers if one is not metrics]
        return metrics.experiment if trainer.is_global_zero else None

    def _begin(self, folder: Path) -> Any:
        """A wandb run; that of an earlier command where its id stands in the folder."""
        import wandb

        path = folder / IDENTITY
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        try:
            run = wandb.init(
                id=known.get("id"),
                project=known.get("project") or self.project,
                entity=known.get("entity") or self.entity,
                name="/".join(folder.parts[-2:]),
                tags=self.tags,
                dir=str(folder),
                resume="allow",
            )
        except wandb.errors.Error as error:  # no login, or a server that cannot be reached or refuses
            said = str(error).rstrip(". ")
            raise ValueError(f"wandb: {said}; with WANDB_MODE=offline it needs no login and no network") from error
        if not run.disabled:  # whose entity and id are made up
            facts = {"id": run.id, "project": run.project, "entity": run.entity or None}
            write_whole(path, json.dumps(facts, indent=2) + "\n")
        return run

    def _send_report(self, folder: Path, logged: Mapping[str, float]) -> None:
        import wandb

        report = folder / "report"
        run = self._begin(folder)
        run.summary.update(dict(logged))
        if (report / "metrics.json").is_file():
            found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
            run.summary.update({f"test/{key}": value for key, value in numbers(found)})
        sent: dict[str, Any] = {f"report/{path.stem}": wandb.Image(str(path)) for path in sorted(report.glob("*.png"))}
        if (report / "report.md").is_file():
            tables = markdown_tables((report / "report.md").read_text(encoding="utf-8"))
            for title, header, rows in tables:
                sent[f"report/{title}"] = wandb.Table(columns=list[str | int](header), data=rows)
        if sent:
            run.log(sent)
            artifact = wandb.Artifact(f"report-{run.id}", type="report")
            artifact.add_dir(str(report))
            run.log_artifact(artifact)
        run.finish()


def _send_checkpoint(run: Any, checkpoint: Path) -> None:
    import wandb

    if not checkpoint.is_file():
        return
    artifact = wandb.Artifact(f"model-{run.id}", type="model")
    artifact.add_file(str(checkpoint))
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():  # modules are built from it, weights alone are no model
        artifact.add_file(str(config))
    run.log_artifact(artifact, aliases=["best"])


def is_swept() -> bool:
    """Whether an agent of a wandb sweep started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested mappings as ``("outer/inner", value)``; lists are left out."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from numbers(value, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield prefix, tree


def markdown_tables(text: str) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Tables of a Markdown text.

    Args:
        text: With tables whose rows begin and end with ``|`` and have a rule below their head.

    Returns:
        Title (the heading above as ``words_of_it``, numbered where it has several tables), column names, and rows:
        a column of nothing but numbers as floats, others as text.
    """
    found: list[tuple[str, list[str], list[list[Any]]]] = []
    heading, n_below = "table", 0
    lines = [line.strip() for line in text.splitlines()]
    place = 0
    while place < len(lines):
        line = lines[place]
        if line.startswith("#"):
            # What follows a colon differs from run to run, and a key must not.
            heading, n_below = re.sub(r"\W+", "_", line.lstrip("# ").partition(":")[0]).strip("_").lower(), 0
        elif line.startswith("|") and place + 1 < len(lines) and _RULE.fullmatch(lines[place + 1]):
            end = place + 2
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            n_below += 1
            title = heading if n_below == 1 else f"{heading}_{n_below}"
            columns = [_cells(row) for row in (line, *lines[place + 2 : end])]
            found.append((title, _unique(columns[0]), _typed(columns[1:], len(columns[0]))))
            place = end - 1
        place += 1
    return found


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.removeprefix("|").removesuffix("|").split("|")]


def _unique(header: list[str]) -> list[str]:
    """Names of columns: none empty, none twice."""
    names = [name or "row" for name in header]
    return [name if name not in names[:place] else f"{name} {place + 1}" for place, name in enumerate(names)]


def _typed(rows: list[list[str]], n_columns: int) -> list[list[Any]]:
    def column(place: int) -> list[Any]:
        cells = [row[place] if place < len(row) else "" for row in rows]
        try:
            return [float(cell) for cell in cells]
        except ValueError:
            return cells

    return [list(row) for row in zip(*map(column, range(n_columns)), strict=True)]
