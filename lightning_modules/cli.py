"""The ``seqlit`` command: LightningCLI in subclass mode, plus a memory of where runs are."""

import importlib.util
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.callbacks import EpochLines, LastCheckpoint, NaNGuard, RandomState, WandbRun
from lightning_modules.callbacks.run_config import SaveRunConfig
from lightning_modules.callbacks.wandb_run import is_swept
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.config_files import check_config_files
from lightning_modules.many_devices import REPLICATED, check_strategy, wants_many
from lightning_modules.run_folder import (
    BEST,
    LAST,
    NOTHING_TO_RESUME,
    NothingToResumeError,
    RunLogger,
    drop_rows_after,
    newest_run,
    newest_unfinished_run,
    read_fit_facts,
    refuse_taken,
    remove_drafts,
)

# Facts that the data knows and the model needs. A model that has no such argument ignores the link.
LINKS = (
    *("n_items", "max_length", "recommend_seen", "target", "item_counts"),
    *("n_channels", "n_classes", "n_steps", "class_names", "z_norm_ddof"),
    *("vocabulary_sizes", "n_numeric", "median_gap"),
)
# Module that is missing -> extra that brings it.
EXTRAS = {
    "wandb": "wandb",
    "gtda": "tda",
    "gudhi": "tda",
    "sklearn": "tda",
    "clarabel": "tda",
    "joblib": "tda",
    "sktime": "timeseries",
    "tslearn": "timeseries",
    "lightgbm": "events",
    "optuna": "search",
}
_IRRELEVANT = (
    # batches are assembled whole in well under a millisecond: worker processes would only cost copies
    ".*does not have many workers.*",
    # everything is logged by epoch
    ".*smaller than the logging interval.*",
    # a checkpoint is read from another folder than the one it was written to
    "The dirpath has changed from",
    # a resumed run goes on in its own folder
    "Checkpoint directory .* exists and is not empty",
    # a victim that is attacked, not trained
    "Found .* in eval mode at the start of training",
    # tslearn would save models with it
    "(?s)h5py not installed",
    # lightning 2.6 against the newer pytree of torch 2.13
    ".*isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)
# Runtime errors that are about the user's input: weights that do not fit, a metric to stop by that nobody logs.
_USERS_RUNTIME_ERRORS = ("Error(s) in loading state_dict", "Early stopping conditioned on metric")
_OTHERS_WAIT = 5.0  # seconds
_LONGEST = 470  # signs of a line that somebody reads
TRACEBACK_VARIABLE = "SEQLIT_TRACEBACK"
_COMMANDS = ("fit", "validate", "test", "predict", "audit", "search")  # the parser knows the first four
# Some injected classes are dataclasses with subclasses, such as objectives of attacks. Once: a second call is refused.
set_parsing_settings(subclasses_enabled=["is_pure_dataclass"])


class _Parser(LightningArgumentParser):
    """Ends a wrong config in one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if ex is not None and os.environ.get(TRACEBACK_VARIABLE):
            raise ex
        if "subcommand" in message:  # misspelt or missing
            message = re.sub(r"(?<=choose from ).*(?=\))|(?<=one of \{).*(?=\})", ", ".join(_COMMANDS), message)
        _fail(_missing_extra(message) or message)


# How every command builds its parser and its objects.
CLI_OPTIONS: dict[str, Any] = {
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 42,
    "auto_configure_optimizers": False,
    "load_from_checkpoint_support": False,
    "save_config_callback": SaveRunConfig,
    "parser_class": _Parser,
}


class _Printed(logging.Handler):
    """Shows what the data modules say of their steps, in the first process."""

    def emit(self, record: logging.LogRecord) -> None:
        if _rank() == 0:
            print(f"data: {record.getMessage()}", flush=True)


class SeqlitCLI(LightningCLI):
    """Finds the run a command belongs to, and links the facts of the data to the model."""

    _resumes = False  # whether a fit goes on in the folder of a run

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for fact in LINKS:
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Our checkpoints carry no hyperparameters to read back: only see that the file is a checkpoint at all."""
        path = self.config[self.config["subcommand"]].ckpt_path
        if path in (None, "best", "last"):
            return
        if not Path(path).is_file():
            raise FileNotFoundError(f"ckpt_path: no such checkpoint: {path}")
        _read_checkpoint(path)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.trainer.enable_progress_bar is None:
            config.trainer.enable_progress_bar = sys.stdout.isatty()
        if "weights_only" in config and config.weights_only is None:
            config.weights_only = True  # our checkpoints hold tensors and plain values only
        if "return_predictions" in config:
            config.return_predictions = False  # they go to Parquet, batch by batch
        if config.data is None:
            raise ValueError("data: no data module given, name one by data.class_path")
        trainer = config.trainer
        if trainer.accumulate_grad_batches < 1:  # which Lightning would divide by
            given = trainer.accumulate_grad_batches
            raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {given}")
        check_strategy(trainer.strategy)
        if trainer.strategy == "ddp" or (
            trainer.strategy == "auto" and wants_many(trainer.devices, trainer.num_nodes, trainer.accelerator)
        ):
            trainer.strategy = REPLICATED
        is_run = self.subcommand != "fit" or _run_logger(trainer.logger)
        if trainer.enable_checkpointing is not False and is_run and not _names(trainer.callbacks, LastCheckpoint):
            self.trainer_defaults["callbacks"].append(LastCheckpoint())
        if self.subcommand == "fit" and is_swept() and not _names(trainer.callbacks, WandbRun):
            self.trainer_defaults["callbacks"].append(WandbRun())  # or its agent would never see the metric
        self._choose_run(config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As Lightning's, with checkpoints that are whole or not there, unless the config has its own writer."""
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        try:
            return super().instantiate_trainer(plugins=plugins, **kwargs)
        except TypeError as error:  # how Lightning says that a number of devices cannot be
            raise ValueError(f"trainer: {error}") from error

    def before_fit(self) -> None:
        """Take the run folder, when all that can be refused before the fit has been."""
        logger = next((one for one in self.trainer.loggers if isinstance(one, RunLogger)), None)
        if logger is not None and self.trainer.is_global_zero:
            logger.claim(resumes=self._resumes)

    def _choose_run(self, config: Any) -> None:
        logger, asked = _run_logger(config.trainer.logger), config.ckpt_path
        if self.subcommand == "fit" and asked == "best":
            raise ValueError("ckpt_path: a fit goes on from last or from the path of a checkpoint, got best")
        if logger is None:
            if self.subcommand != "fit" and asked in (None, "best", "last"):
                raise ValueError(
                    "ckpt_path: name a checkpoint: without a RunLogger as trainer.logger none is looked up"
                )
            return
        root = Path(logger.init_args.save_dir) / logger.init_args.name

        def resolved() -> Any:
            return yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False))

        if self.subcommand == "fit":
            if asked == "last":
                run = newest_unfinished_run(root, resolved(), _limits(config.trainer), is_first=_rank() == 0)
                logger.init_args.version = run.name
                config.ckpt_path = str(run / "checkpoints" / LAST)
                self._resumes = True
                last = _read_checkpoint(config.ckpt_path)
                if _rank() == 0 and not config.trainer.fast_dev_run:  # which writes nothing
                    remove_drafts(run)
                    drop_rows_after(run, last)
            elif logger.init_args.version is not None and not config.trainer.fast_dev_run:
                refuse_taken(Path(RunLogger(**logger.init_args.as_dict()).log_dir), asked)
            return
        if asked in (None, "best", "last"):
            checkpoint = LAST if asked == "last" else BEST
            run = newest_run(root, resolved(), checkpoint)
            config.ckpt_path = str(run / "checkpoints" / checkpoint)
            facts = read_fit_facts(run)
            which = f"a run of {facts['epochs']} epochs" if facts else "an unfinished run"
            if _rank() == 0:
                print(f"seqlit: {config.ckpt_path}, of {which}", flush=True)
        run = Path(config.ckpt_path).parent.parent
        if (run / "config.yaml").is_file():
            # Results go beside the checkpoint they came from, and the metrics of the fit stay as they are.
            config.trainer.logger = False
            config.trainer.default_root_dir = str(run)


def _read_checkpoint(path: str) -> dict[str, Any]:
    """The checkpoint, its tensors not read; the one place where a file that is none is told from one that is."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler meets in a file that is anything
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        raise ValueError(f"ckpt_path: {path} is not a checkpoint, or not a whole one") from error
    if (
        not isinstance(checkpoint, dict)
        or not {"state_dict", "epoch", "pytorch-lightning_version"} <= checkpoint.keys()
    ):
        raise ValueError(f"ckpt_path: {path} is a file of tensors, but no checkpoint of a run")
    return checkpoint


def _limits(trainer: Any) -> dict[str, int]:
    """What a trainer of these arguments is asked for, -1 for no limit; Lightning's default is 1,000 epochs."""
    max_steps = trainer.max_steps
    if trainer.max_epochs is not None:
        return {"max_epochs": trainer.max_epochs, "max_steps": max_steps}
    return {"max_epochs": 1000 if max_steps == -1 and trainer.max_time is None else -1, "max_steps": max_steps}


def _names(callbacks: Any, kind: type) -> bool:
    """Whether a config's callbacks name this class."""
    several = callbacks if isinstance(callbacks, list) else [callbacks]
    return any(str(getattr(one, "class_path", "")).rsplit(".", 1)[-1] == kind.__name__ for one in several)


def _run_logger(logger: Any) -> Any:
    """The settings of the RunLogger, alone or among other loggers; None where there is none."""
    name = f"{RunLogger.__module__}.{RunLogger.__qualname__}"
    given = logger if isinstance(logger, list) else [logger]
    return next((one for one in given if getattr(one, "class_path", None) == name), None)


def _one_line(message: str) -> str:
    """Fold a nested parser message into one line, without the branches of a union that could not have been meant."""
    noise = re.compile(r"(Subtypes:|Errors:|Expected a <class 'NoneType'>|Does not validate|Given value|tip:|$)")
    kept, in_noise = [], False
    for line in str(message).splitlines():
        words = re.sub(r"^(- )+", "", line.strip())
        # A value that was given may be a whole config over many lines; the reason stands before it.
        in_noise = bool(noise.match(words)) or (in_noise and not line.lstrip().startswith("- "))
        if not in_noise:
            kept.append(words)
    line = re.sub(r"\s+", " ", "; ".join(kept)).replace(":;", ":").strip()
    # A file may hold signs that steer a terminal.
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in line)


def _rank() -> int:
    """This process' number as its launcher says it; before the trainer is there, nothing else knows."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def _fail(message: str, status: int = 2) -> NoReturn:
    if _rank() > 0:
        # Most errors are those of all processes: the first says it, and its end is theirs.
        time.sleep(_OTHERS_WAIT)
    where = f" in process {_rank()}" if _rank() > 0 else ""
    line = _one_line(message)
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 4] + " ..."  # of a list of all weights, for one
    print(f"seqlit: error{where}: {line}", file=sys.stderr)
    sys.exit(status)


def _missing_extra(message: str) -> str | None:
    for module, extra in EXTRAS.items():
        absent = re.search(rf"(No module named|Module not found:|Requirement) '{module}\b", message)
        if absent and importlib.util.find_spec(module) is None:
            return f"this config needs {module}, which is not installed: pip install 'seqlit[{extra}]'"
    return None


def main() -> None:
    """Entry point of the console script; arguments are those of the command line.

    A wrong config, file or checkpoint ends in one line and exit status 2, a resume without a checkpoint to go on from
    with status 3; with the environment variable ``SEQLIT_TRACEBACK=1`` it ends in a traceback instead.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    data_log = logging.getLogger("datamodules")
    if not any(isinstance(handler, _Printed) for handler in data_log.handlers):
        data_log.addHandler(_Printed())
    data_log.setLevel(logging.INFO)
    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message=message)
    try:
        check_config_files(sys.argv[1:])
        if sys.argv[1:2] == ["audit"]:
            from lightning_modules.audit_command import audit_main  # which builds on this module

            sys.exit(audit_main(sys.argv[2:]))
        if sys.argv[1:2] == ["search"]:
            from lightning_modules.search_command import search_main

            sys.exit(search_main(sys.argv[2:]))
        SeqlitCLI(**CLI_OPTIONS, trainer_defaults={"callbacks": [RandomState(), NaNGuard(), EpochLines()]})
    except (ValueError, OSError, ImportError, MisconfigurationException, RuntimeError) as error:
        foreign = isinstance(error, RuntimeError) and not str(error).startswith(_USERS_RUNTIME_ERRORS)
        if foreign or os.environ.get(TRACEBACK_VARIABLE):
            raise
        status = NOTHING_TO_RESUME if isinstance(error, NothingToResumeError) else 2
        _fail(_missing_extra(str(error)) or str(error), status)
    else:
        # After an error others may wait in a collective, and so would this process.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
