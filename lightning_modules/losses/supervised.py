"""Supervised training of representations of event sequences, by a linear head."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.losses.next_event import EventObjective

IGNORED = -100
"""Label of a row that is not counted."""


class Supervised(EventObjective):
    """Cross-entropy of a linear head on the representation of a sequence, averaged over the rows that have a label.

    Args:
        d: D, width of the representation.
        vocabulary_sizes: Of the data; not read.
        n_numeric: Of the data; not read.
        n_classes: Classes of the label, at least 2.

    Raises:
        ValueError: If ``n_classes`` is below 2.
    """

    needs = "last"

    def __init__(self, *, d: int, vocabulary_sizes: Sequence[int], n_numeric: int, n_classes: int = 2) -> None:
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}")
        super().__init__(d=d, vocabulary_sizes=vocabulary_sizes, n_numeric=n_numeric)
        self.n_classes = n_classes
        self.head = nn.Linear(d, n_classes)

    def forward(self, representation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of representations ``(B, D)`` with ``batch["labels"] (B,) int64``, -100 where there is none.

        Raises:
            ValueError: If the batch has no labels, or one lies beyond the classes.
        """
        if "labels" not in batch:
            raise ValueError(
                f"Supervised needs batches with labels, got {', '.join(batch)}: sample windows of a target"
            )
        labels = batch["labels"]
        known = labels[labels != IGNORED]
        if not len(known):
            return self.weighted(self.head(representation[:0]).sum(), 0)
        least, most = (int(value) for value in known.aminmax())
        if least < 0 or most >= self.n_classes:
            raise ValueError(f"labels must be in 0..{self.n_classes - 1}, got {least if least < 0 else most}")
        mean = F.cross_entropy(self.head(representation), labels, ignore_index=IGNORED)
        return self.weighted(mean, len(known))
