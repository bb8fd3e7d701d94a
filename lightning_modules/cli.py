"""The ``seqlit`` command: LightningCLI in subclass mode, plus a memory of where runs are."""

import importlib.util
import logging
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.callbacks import EpochLines, RandomState
from lightning_modules.run_folder import BEST, LAST, RunLogger, SaveRunConfig, newest_run

# Facts that the data knows and the model needs. A model that has no such argument ignores the link.
LINKS = ("n_items", "max_length", "recommend_seen", "item_counts")
# Module that is missing -> extra that brings it.
EXTRAS = {"wandb": "wandb", "gtda": "tda", "sklearn": "tda", "sktime": "timeseries"}
_IRRELEVANT = (
    # batches are assembled whole in well under a millisecond: worker processes would only cost copies
    ".*does not have many workers.*",
    # everything is logged by epoch
    ".*smaller than the logging interval.*",
    # a resumed run goes on in its own folder
    "Checkpoint directory .* exists and is not empty",
    # lightning 2.6 against the newer pytree of torch 2.13
    ".*isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)
TRACEBACK_VARIABLE = "SEQLIT_TRACEBACK"


class _Parser(LightningArgumentParser):
    """Ends a wrong config in one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if ex is not None and os.environ.get(TRACEBACK_VARIABLE):
            raise ex
        _fail(_missing_extra(message) or message)


class SeqlitCLI(LightningCLI):
    """Finds the run a command belongs to, and links the facts of the data to the model."""

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
        if not zipfile.is_zipfile(path):
            raise ValueError(f"ckpt_path: {path} is not a checkpoint (or a truncated one)")

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
        self._choose_run(config)

    def _choose_run(self, config: Any) -> None:
        logger = config.trainer.logger
        if not _is_run_logger(logger):
            return
        asked = config.ckpt_path
        root = Path(logger.init_args.save_dir) / logger.init_args.name
        resolved = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False))
        if self.subcommand == "fit":
            if asked == "last":
                run = newest_run(root, resolved, LAST)
                logger.init_args.version = run.name
                config.ckpt_path = str(run / "checkpoints" / LAST)
            return
        if asked in (None, "best", "last"):
            checkpoint = LAST if asked == "last" else BEST
            config.ckpt_path = str(newest_run(root, resolved, checkpoint) / "checkpoints" / checkpoint)
        run = Path(config.ckpt_path).parent.parent
        if (run / "config.yaml").is_file():
            # Results go beside the checkpoint they came from, and the metrics of the fit stay as they are.
            config.trainer.logger = False
            config.trainer.default_root_dir = str(run)


def _is_run_logger(logger: Any) -> bool:
    return getattr(logger, "class_path", None) == f"{RunLogger.__module__}.{RunLogger.__qualname__}"


def _one_line(message: str) -> str:
    """Fold a nested parser message into one line, without the branches of a union that could not have been meant."""
    lines = [line.strip(" -") for line in str(message).splitlines()]
    noise = re.compile(r"^(Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value type:|Does not validate|tip:|$)")
    kept = [line for line in lines if not noise.match(line)]
    return re.sub(r"\s+", " ", "; ".join(kept)).replace(":;", ":").strip()


def _fail(message: str) -> NoReturn:
    print(f"seqlit: error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _missing_extra(message: str) -> str | None:
    for module, extra in EXTRAS.items():
        if module in message.lower() and importlib.util.find_spec(module) is None:
            return f"this config needs {module}, which is not installed: pip install 'seqlit[{extra}]'"
    return None


def main() -> None:
    """Entry point of the console script; arguments are those of the command line.

    A wrong config, file or checkpoint ends in one line and exit status 2; with the environment variable
    ``SEQLIT_TRACEBACK=1`` it ends in a traceback instead.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message=message)
    try:
        SeqlitCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveRunConfig,
            trainer_defaults={"callbacks": [RandomState(), EpochLines()]},
            parser_class=_Parser,
        )
    except (ValueError, OSError, ImportError, MisconfigurationException, RuntimeError) as error:
        # Of runtime errors only the one that names every weight that does not fit the network is a user's.
        foreign = isinstance(error, RuntimeError) and "Error(s) in loading state_dict" not in str(error)
        if foreign or os.environ.get(TRACEBACK_VARIABLE):
            raise
        _fail(_missing_extra(str(error)) or str(error))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
