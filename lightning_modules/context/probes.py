"""Probes: small models that say how much of a label a representation holds. They never see a label of the test.

n queries, k features, K classes. Source: spec of arXiv 2502.10205, section 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss


class Probe(Protocol):
    """A classifier of features that is fitted and read in one call."""

    def fit_predict(
        self,
        train: Tensor,
        train_labels: Tensor,
        validation: Tensor,
        validation_labels: Tensor,
        test: Tensor,
        *,
        n_classes: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """Fit on train, choose on validation, and read validation and test.

        Args:
            train: ``(n, k) float32``.
            train_labels: ``(n,) int64`` in 0..K-1.
            validation: ``(n_v, k) float32``.
            validation_labels: ``(n_v,) int64``.
            test: ``(n_t, k) float32``.
            n_classes: K, at least 2.
            seed: Of every draw of the probe.

        Returns:
            Probabilities ``(n_v, K)`` and ``(n_t, K)``, ``float64``.

        Raises:
            ValueError: If there is no row of train or validation, shapes differ, a feature is not finite or a label
                is out of range.
        """
        ...


def _check(
    train: Tensor, train_labels: Tensor, validation: Tensor, validation_labels: Tensor, test: Tensor, n_classes: int
) -> None:
    if n_classes < 2:
        raise ValueError(f"a probe needs at least 2 classes, got {n_classes}")
    for name, features in (("train", train), ("validation", validation), ("test", test)):
        if features.ndim != 2 or features.shape[1] != train.shape[1]:
            raise ValueError(
                f"features of {name} must be (n, {train.shape[-1]}) as of train, got {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            row, column = torch.nonzero(~features.isfinite())[0].tolist()
            raise ValueError(
                f"features of {name} must be finite, got {features[row, column].item()} in row {row}, column {column}"
            )
    for name, features, labels in (("train", train, train_labels), ("validation", validation, validation_labels)):
        if len(features) == 0 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name} must have at least 1 query with a label each, got {len(features)} and {len(labels)}"
            )
        if labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(f"labels of {name} must lie in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")


@dataclass(frozen=True)
class LightGBMProbe:
    """Gradient boosted trees on the raw features.

    Parameters are the published ones but for the number of trees, which is the one with the least log-loss on
    validation; what the source does not name is LightGBM's default. :meth:`published` fits all trees.

    Attributes:
        n_trees: Most trees.
        patience: Trees without a better log-loss on validation after which fitting stops; None fits all.
        learning_rate: Of each tree.
        max_depth: Of a tree.
        bagging_fraction: Share of rows that each tree sees.
        feature_fraction: Share of features that each tree sees.
        l1: Penalty of leaf values.
        l2: Penalty of leaf values.
        min_leaf: Least rows in a leaf.
        seed: Of the trees; None takes the seed of the call.
        num_threads: None takes those of torch. Trees are the same for any number.
    """

    n_trees: int = 500
    patience: int | None = 30
    learning_rate: float = 0.02
    max_depth: int = 6
    bagging_fraction: float = 0.5
    feature_fraction: float = 0.75
    l1: float = 1.0
    l2: float = 1.0
    min_leaf: int = 50
    seed: int | None = None
    num_threads: int | None = None

    @classmethod
    def published(cls) -> "LightGBMProbe":
        """500 trees without early stopping, seed 42; fitted on train, not on a bootstrap of train and validation."""
        return cls(patience=None, seed=42)

    def fit_predict(
        self,
        train: Tensor,
        train_labels: Tensor,
        validation: Tensor,
        validation_labels: Tensor,
        test: Tensor,
        *,
        n_classes: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`Probe`.

        Raises:
            ImportError: If LightGBM is not installed.
        """
        try:
            import lightgbm
        except ImportError as error:
            raise ImportError("boosted probes need LightGBM: pip install 'seqlit[events]'") from error
        _check(train, train_labels, validation, validation_labels, test, n_classes)
        parameters: dict[str, Any] = {
            "objective": "binary" if n_classes == 2 else "multiclass",
            "metric": "binary_logloss" if n_classes == 2 else "multi_logloss",
            "learning_rate": self.learning_rate,
            "max_depth": self.max_depth,
            "bagging_fraction": self.bagging_fraction,
            "bagging_freq": 1,
            "feature_fraction": self.feature_fraction,
            "lambda_l1": self.l1,
            "lambda_l2": self.l2,
            "min_data_in_leaf": self.min_leaf,
            "seed": seed if self.seed is None else self.seed,
            "deterministic": True,
            "force_row_wise": True,  # how histograms are built is otherwise chosen by a stopwatch
            "num_threads": self.num_threads or torch.get_num_threads(),
            "verbosity": -1,
        }
        if n_classes > 2:
            parameters["num_class"] = n_classes
        rows = {name: part.cpu().numpy() for name, part in (("train", train), ("val", validation), ("test", test))}
        fitted = lightgbm.Dataset(rows["train"], train_labels.cpu().numpy())
        stopping: dict[str, Any] = {}
        if self.patience is not None:
            stopping = {
                "valid_sets": [lightgbm.Dataset(rows["val"], validation_labels.cpu().numpy(), reference=fitted)],
                "callbacks": [lightgbm.early_stopping(self.patience, verbose=False)],
            }
        trees = lightgbm.train(parameters, fitted, num_boost_round=self.n_trees, **stopping)
        return _probabilities(trees, rows["val"], n_classes), _probabilities(trees, rows["test"], n_classes)


def _probabilities(trees: Any, features: Any, n_classes: int) -> Tensor:
    if len(features) == 0:
        return torch.empty(0, n_classes, dtype=torch.float64)
    found = torch.from_numpy(np.asarray(trees.predict(features), dtype=np.float64))
    return torch.stack([1 - found, found], 1) if n_classes == 2 else found


@dataclass(frozen=True)
class LogisticProbe:
    """Multinomial logistic regression on standardised features, its penalty chosen on validation.

        minimise  mean cross-entropy + (strength / 2) ||W||^2 ,   logits = W (x - mean) / sd + c

    Mean and sd are those of train; c is not penalised; with two classes there is one logit, of class 1. Solved in
    float64 by L-BFGS from the strongest penalty to the weakest, each begun where the last ended.

    Attributes:
        strengths: Penalties to choose from, by log-loss on validation; the stronger of equals.
        max_iterations: Of L-BFGS for each penalty.
        tolerance: Largest gradient at which it stops.
    """

    strengths: tuple[float, ...] = (1.0, 0.1, 0.01, 1e-3, 1e-4)
    max_iterations: int = 100
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if not self.strengths or min(self.strengths) < 0:
            raise ValueError(f"strengths must be at least one number and none negative, got {self.strengths}")

    def fit_predict(
        self,
        train: Tensor,
        train_labels: Tensor,
        validation: Tensor,
        validation_labels: Tensor,
        test: Tensor,
        *,
        n_classes: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`Probe`; nothing is drawn."""
        _check(train, train_labels, validation, validation_labels, test, n_classes)
        mean, sd = train.double().mean(0), train.double().std(0, correction=0)
        # A feature that is constant but for rounding must not be blown up to unit variance.
        sd = torch.where(sd > 1e-6 * mean.abs(), sd, 1.0)
        features, chosen_on, read = ((part.double() - mean) / sd for part in (train, validation, test))
        best, least = None, float("inf")
        coefficients = features.new_zeros(features.shape[1] + 1, 1 if n_classes == 2 else n_classes)
        for strength in sorted(self.strengths, reverse=True):
            coefficients = self._solve(features, train_labels, coefficients, strength)
            loss = float(cross_entropy(_logits(chosen_on, coefficients), validation_labels))
            if best is None or loss < least:
                best, least = coefficients, loss
        assert best is not None
        return _logits(chosen_on, best).softmax(1), _logits(read, best).softmax(1)

    def _solve(self, features: Tensor, labels: Tensor, start: Tensor, strength: float) -> Tensor:
        coefficients = start.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [coefficients],
            max_iter=self.max_iterations,
            tolerance_grad=self.tolerance,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            penalty = coefficients[:-1].square().sum() * strength / 2
            loss = cross_entropy(_logits(features, coefficients), labels) + penalty
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        return coefficients.detach()


def _logits(features: Tensor, coefficients: Tensor) -> Tensor:
    """``(n, K)`` of ``(k + 1, K)`` coefficients, constants in the last row; one column is the logit of class 1."""
    logits = torch.addmm(coefficients[-1:], features, coefficients[:-1])
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


@dataclass(frozen=True)
class BestProbe:
    """The one of several probes with the least log-loss on validation; of equals the first.

    Every arm, control or not, has its own choice, so that none loses for a probe that does not suit it.

    Attributes:
        probes: To choose from.
    """

    probes: Sequence[Probe] = (LogisticProbe(), LightGBMProbe())

    def __post_init__(self) -> None:
        if not self.probes:
            raise ValueError("probes must be at least one, got none")

    def fit_predict(
        self,
        train: Tensor,
        train_labels: Tensor,
        validation: Tensor,
        validation_labels: Tensor,
        test: Tensor,
        *,
        n_classes: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`Probe`."""
        found = [
            probe.fit_predict(train, train_labels, validation, validation_labels, test, n_classes=n_classes, seed=seed)
            for probe in self.probes
        ]
        labels = validation_labels.cpu()
        return min(found, key=lambda read: float(nll_loss(read[0].cpu().log(), labels)))


@dataclass(frozen=True)
class LinearProbe:
    """One linear layer on the raw features under cross-entropy, as published: Adam, a fixed number of epochs.

    Attributes:
        n_epochs: Over train.
        batch_size: Rows a step.
        learning_rate: Of Adam.
    """

    n_epochs: int = 10
    batch_size: int = 512
    learning_rate: float = 1e-3

    def fit_predict(
        self,
        train: Tensor,
        train_labels: Tensor,
        validation: Tensor,
        validation_labels: Tensor,
        test: Tensor,
        *,
        n_classes: int,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`Probe`; validation is only read. Torch's own random state is left alone."""
        _check(train, train_labels, validation, validation_labels, test, n_classes)
        generator = torch.Generator().manual_seed(seed)
        layer = nn.utils.skip_init(nn.Linear, train.shape[1], n_classes)
        bound = train.shape[1] ** -0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        train, train_labels = train.cpu(), train_labels.cpu()
        optimizer = torch.optim.Adam(layer.parameters(), lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.n_epochs):
                for rows in torch.randperm(len(train), generator=generator).split(self.batch_size):
                    optimizer.zero_grad()
                    cross_entropy(layer(train[rows]), train_labels[rows]).backward()
                    optimizer.step()
        with torch.no_grad():
            return layer(validation.cpu()).double().softmax(1), layer(test.cpu()).double().softmax(1)
