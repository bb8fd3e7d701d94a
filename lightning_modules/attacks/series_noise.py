"""Random numbers that belong to a series, not to its place in a batch.

A number is a hash of (seed, series, draw, position). The same series therefore meets the same noise whatever the batch
size, the order and the other series, which a stream shared by the batch cannot give.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""0x9E3779B97F4A7C15 as int64: the increment of SplitMix64."""
FIRST_MIX = -4658895280553007687  # 0xBF58476D1CE4E5B9
SECOND_MIX = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on int64 that wraps around."""
    value = (value ^ _shift_right(value, 30)) * FIRST_MIX
    value = (value ^ _shift_right(value, 27)) * SECOND_MIX
    return value ^ _shift_right(value, 31)


class SeriesNoise:
    """Draws for B series, each from a stream of its own.

    Args:
        index: ``(B,) int64`` number of each series; equal numbers get equal noise.
        seed: Of the whole attack, in 0..2^62 - 1.
        dtype: Floating dtype of the draws; below float32 they are made in float32 and rounded.
    """

    def __init__(self, index: Tensor, seed: int, dtype: torch.dtype) -> None:
        self._index = index
        self._dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self._streams = _mix(index * GOLDEN + _mix(torch.full_like(index, seed) + GOLDEN))
        self._n_draws = 0

    def _hash(self, shape: tuple[int, ...]) -> Tensor:
        self._n_draws += 1
        positions = torch.arange(torch.Size(shape).numel(), device=self._index.device) * GOLDEN
        keys = _mix(self._streams + self._n_draws)
        return _mix(keys[:, None] + positions).reshape(len(self._index), *shape)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        """``(B, *shape) float64`` strictly inside 0..1, all of them exact in float32 too."""
        return (_shift_right(self._hash(shape), 41).double() + 0.5) * 2.0**-23

    def uniform(self, *shape: int) -> Tensor:
        """``(B, *shape) float`` uniform strictly inside 0..1, on a grid of ``2^-23``; half precision may round to 1."""
        return self._uniform(shape).to(self._dtype)

    def normal(self, *shape: int) -> Tensor:
        """``(B, *shape) float`` standard normal, by the inverse distribution function."""
        return torch.special.ndtri(self._uniform(shape).to(self._wide)).to(self._dtype)

    def signs(self, *shape: int) -> Tensor:
        """``(B, *shape) float``, -1 or 1 with equal chance."""
        return ((self._hash(shape) >= 0).to(self._dtype) - 0.5) * 2

    def integers(self, high: int | Tensor, *shape: int) -> Tensor:
        """``(B, *shape) int64`` uniform in ``0..high - 1``.

        Args:
            high: Exclusive bound, at least 1 and below ``2^23``; a ``(B,)`` tensor bounds each series.
            shape: Trailing axes.
        """
        if isinstance(high, Tensor):
            high = high.reshape(-1, *[1] * len(shape))
        return (self._uniform(shape) * high).long()
