"""Adversarial series to Parquet, with their course."""

from typing import Any

import polars as pl

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.study import AdversarialSeries
from lightning_modules.callbacks.frame_writer import FrameWriter


def series_frame(found: AdversarialSeries) -> pl.DataFrame:
    """One row a series.

    Columns ``index`` (row of the test file), ``label``, ``predicted`` (of the adversarial series), ``attack``,
    ``iteration`` (chosen), ``n_channels``; ``series`` and ``adversarial``, the valid steps, channel after channel
    within a step; ``predicted_at`` and ``detector_probability_at`` (the largest of the attacked discriminators), a
    value for every iterate 0..N; ``detector_probability_at NAME``, the same of each attacked discriminator alone; and
    where iterates were kept, ``iterates``: for every iterate 0..N the valid steps, as in ``adversarial``.
    """
    lengths = found.mask.sum(1).tolist()
    course = decisions(found.logits.flatten(0, 1)).unflatten(0, found.logits.shape[:2])  # (N + 1, B)
    probability = found.detector_logits.double().sigmoid()  # (N + 1, M, B)

    def valid(series: Any) -> list[list[float]]:
        return [row[:length].flatten().tolist() for row, length in zip(series.cpu(), lengths, strict=True)]

    def at_iterates(values: Any) -> pl.Series:
        return pl.Series(values.T.tolist(), dtype=pl.List(pl.Float64))

    columns = {
        f"detector_probability_at {name}": at_iterates(probability[:, number])
        for number, name in enumerate(found.detectors)
    }
    if found.iterates is not None:
        points = [
            run[:, :length].flatten(1).tolist()
            for run, length in zip(found.iterates.transpose(0, 1).cpu(), lengths, strict=True)
        ]
        columns["iterates"] = pl.Series(points, dtype=pl.List(pl.List(pl.Float32)))
    return pl.DataFrame(
        {
            "index": found.index.cpu().numpy(),
            "label": found.labels.cpu().numpy(),
            "predicted": course[found.iteration].cpu().numpy(),
            # With types, for a process may have no series in a batch.
            "attack": pl.Series([found.attack] * len(lengths), dtype=pl.String),
            "iteration": pl.Series([found.iteration] * len(lengths), dtype=pl.Int64),
            "n_channels": pl.Series([found.series.shape[2]] * len(lengths), dtype=pl.Int64),
            "series": pl.Series(valid(found.series), dtype=pl.List(pl.Float32)),
            "adversarial": pl.Series(valid(found.x_adv), dtype=pl.List(pl.Float32)),
            "predicted_at": pl.Series(course.T.tolist(), dtype=pl.List(pl.Int64)),
            "detector_probability_at": at_iterates(probability.amax(1)),
            **columns,
        }
    )


class AdversarialSeriesWriter(FrameWriter):
    """Writes what ``predict`` gives to ``adversarial_series.parquet`` in the run folder, see :class:`FrameWriter`."""

    file, what, kind = "adversarial_series.parquet", "adversarial series", AdversarialSeries

    def frame(self, outputs: AdversarialSeries, batch: Any) -> pl.DataFrame:
        """See :func:`series_frame`."""
        return series_frame(outputs)
