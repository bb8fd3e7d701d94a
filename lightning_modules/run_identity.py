"""What makes two configs the same experiment, so that a later command takes up the right run.

Counted are model, data and seed, and of the trainer what decides the numbers: precision, clipping and accumulation of
gradients, batches of training and validation that are left out or overfitted, and callbacks that take part in training.
Not counted is what only `predict` reads, and what only decides how
fast things go, where and how often they are written, or how long a run goes on: devices, nodes, strategy, loggers,
progress bars, limits of epochs, steps and time. A trainer's values at their defaults are left out, so that runs which
do not name them are found too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

LIMITS_OF_FIT = frozenset({"trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.overfit_batches"})
"""Keys that decide what was fitted; another command than `fit`, which they may cut short, need not name them alike."""

_SPEED_ONLY = frozenset({"eval_batch_size", "num_workers", "n_workers", "cache_dir", "impl", "progress"})
# next_session is new every day, of one and the same fit.
_PREDICT_ONLY = frozenset({"next_session", "predict_attack", "keep_iterates"})
# By their whole name: the context of event sequences has max_rows too, which decides what is seen.
_SPEED_ONLY_KEYS = frozenset({"model.init_args.max_rows"})
# By name and not by an attribute of the class: configs of runs are compared without importing what they name, and
# Lightning's own callbacks carry no attribute of ours. A callback that is not listed may do anything, so it counts.
_REPORTING = frozenset(
    {
        *("AdversarialSeriesWriter", "AttackReport", "ClassPredictionWriter", "ContextReport", "EmbeddingWriter"),
        *("EpochLines",),
        *("LastCheckpoint", "NaNGuard", "PortfolioReport", "PortfolioWriter", "RandomState", "RankingReport"),
        *("RecommendationWriter", "WandbRun"),
        *("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint"),
        *("RichModelSummary", "RichProgressBar", "ThroughputMonitor", "Timer", "TQDMProgressBar"),
    }
)
# Lightning takes several words for a precision.
_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that decides a result.

    Args:
        config: A resolved config as nested mappings of plain values.

    Returns:
        Dotted key to value.
    """
    decisive = {key: config.get(key) for key in ("model", "data", "seed_everything")}
    decisive |= {f"trainer.{key}": value for key, value in _of_trainer(config.get("trainer") or {}).items()}
    uncounted = _SPEED_ONLY | _PREDICT_ONLY
    found = {key: value for key, value in _leaves(decisive) if key not in _SPEED_ONLY_KEYS}
    return {key: value for key, value in found.items() if key.rsplit(".", 1)[-1] not in uncounted}


def _of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer adds, without values at their defaults."""
    found: dict[str, Any] = {}
    precision = str(trainer.get("precision") or "32-true")
    precision = _PRECISIONS.get(precision, precision)
    if precision != "32-true":
        found["precision"] = precision
    if trainer.get("gradient_clip_val"):
        found["gradient_clip_val"] = float(trainer["gradient_clip_val"])
        if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
            found["gradient_clip_algorithm"] = trainer["gradient_clip_algorithm"]
    if trainer.get("accumulate_grad_batches") not in (None, 1):
        found["accumulate_grad_batches"] = trainer["accumulate_grad_batches"]
    for key in ("limit_train_batches", "limit_val_batches"):
        if trainer.get(key) is not None and repr(trainer[key]) != "1.0":  # all batches, where 1 is a single one
            found[key] = trainer[key]
    if trainer.get("overfit_batches"):
        found["overfit_batches"] = trainer["overfit_batches"]
    given = trainer.get("callbacks") or []
    counts: dict[str, int] = {}
    for callback in given if isinstance(given, list) else [given]:
        name = str(callback["class_path"]).rsplit(".", 1)[-1]
        if name not in _REPORTING:
            counts[name] = counts.get(name, 0) + 1
            key = f"callbacks.{name}" if counts[name] == 1 else f"callbacks.{name}_{counts[name]}"
            found[key] = callback.get("init_args") or {}
    return found


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
