"""Where a test or a prediction puts what it found: results of a part of the data never take the place of the whole."""

from pathlib import Path

from lightning import Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader

from lightning_modules.collectives import gather_objects

PARTIAL = "partial"


def folder_of_run(trainer: Trainer) -> Path:
    """Where the run lies; a collective, to be called in every process."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def results_folder(trainer: Trainer) -> Path | None:
    """The folder for a report or for predictions; a collective, to be called in every process.

    Args:
        trainer: Amid ``test`` or ``predict``.

    Returns:
        The run folder, or ``partial/`` in it where ``limit_test_batches`` or ``limit_predict_batches`` leaves out
        batches; None under ``fast_dev_run``, which leaves nothing behind.
    """
    run = folder_of_run(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            print("seqlit: a fast_dev_run writes no results", flush=True)
        return None
    return run / PARTIAL if is_partial(trainer) else run


def is_partial(trainer: Trainer) -> bool:
    """Whether a limit leaves out batches, in any process, of the test or prediction under way; a collective."""
    if trainer.predicting:
        limit, asked, loaders = trainer.limit_predict_batches, trainer.num_predict_batches, trainer.predict_dataloaders
    else:
        limit, asked, loaders = trainer.limit_test_batches, trainer.num_test_batches, trainer.test_dataloaders
    if isinstance(limit, float):  # a share of all batches
        return limit < 1
    lengths = [sized_len(loader) for loader in CombinedLoader(loaders, "sequential").flattened]
    # None is a loader without a length; of several processes each has its own loaders
    own = None in lengths or sum(asked) < sum(length or 0 for length in lengths)
    return any(gather_objects(own))
