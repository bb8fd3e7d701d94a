"""Stocks represented by the topology of their returns: scale, embed, diagrams, vector.

A stocks, T days, D width. Source: arXiv 2308.07944; spec, section 3.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.topology.diagrams import Array, Backend, Diagram, content_key, persistence_diagrams
from lightning_modules.topology.scaling import Scale, scale_returns
from lightning_modules.topology.takens import embed, search_parameters

Embedding = Literal["one", "mult"]

_OF_A_FLAT_SERIES = (2, 1)  # its points are all equal under any dimension and delay

logger = logging.getLogger(__name__)


class Vectoriser(Protocol):
    """What turns diagrams into rows, such as those of :mod:`lightning_modules.topology.vectorisers`."""

    degrees: Sequence[int]

    def fit(self, X: Sequence[dict[int, Array]], y: Any = None) -> Any:
        """Fit to training diagrams."""

    def transform(self, X: Sequence[dict[int, Array]]) -> Array:
        """Rows ``(A, D)``."""

    def state(self) -> dict[str, Tensor]:
        """What was fitted."""

    def load_state(self, state: dict[str, Tensor]) -> Any:
        """Take over what another has fitted."""


class TopologicalRepresentation(nn.Module):
    """Vectors of the persistence diagrams of delay embeddings, one row a stock.

    ``fit`` chooses dimension and delay and fits the vectoriser on the train window; calling the module uses them on any
    window. Nothing is random. What was fitted is part of the state dict, as tensors and numbers. Columns are not
    standardised: the clusterer does that.

    A stock of constant returns has no bars, and a row of zeros or of whatever an empty diagram has.

    Args:
        vectoriser: Turns diagrams into rows; by default a persistence image of degree 1.
        scale: Of each stock's returns before the embedding: ``none``, ``zscore``, ``mad`` or ``vol_garch``.
        embedding: ``one``: the means over stocks of the searched dimension and of the searched delay, truncated to
            integers, for all; ``mult``: of each stock its own, kept by place in the window.
        dimension: Given for all stocks in place of the searched one.
        delay: The same, in days.
        max_dimension: Largest searched.
        max_delay: Largest searched, in days.
        stride: Days between points.
        giotto_compat: Whether to search as giotto-tda does, at this stride; by default as in the textbook, at stride 1.
        degrees: Homology degrees of :meth:`diagrams`, at least those of the vectoriser; by default those.
        backend: ``giotto`` or ``gudhi``: the same diagrams, about three times as fast.
        n_workers: Processes for the diagrams.
        cache_dir: Folder in which diagrams are kept; None keeps none.
        progress: Whether to show a progress bar, on a terminal.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        *,
        vectoriser: Vectoriser | None = None,
        scale: Scale = "zscore",
        embedding: Embedding = "one",
        dimension: int | None = None,
        delay: int | None = None,
        max_dimension: int = 10,
        max_delay: int = 30,
        stride: int = 5,
        giotto_compat: bool = False,
        degrees: Sequence[int] | None = None,
        backend: Backend = "giotto",
        n_workers: int = 1,
        cache_dir: str | None = ".seqlit_cache/topology",
        progress: bool = True,
    ) -> None:
        for name, choice, allowed in (
            ("scale", scale, get_args(Scale)),
            ("embedding", embedding, get_args(Embedding)),
            ("backend", backend, get_args(Backend)),
        ):
            if choice not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
        for name, number, least in (
            ("dimension", dimension, 1),
            ("delay", delay, 1),
            ("max_dimension", max_dimension, 2),
            ("max_delay", max_delay, 1),
            ("stride", stride, 1),
            ("n_workers", n_workers, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if vectoriser is None:
            from lightning_modules.topology.vectorisers import PersistenceImage  # needs scikit-learn

            vectoriser = PersistenceImage()
        wanted = tuple(vectoriser.degrees if degrees is None else degrees)
        if not set(vectoriser.degrees) <= set(wanted):
            raise ValueError(f"degrees must hold those of the vectoriser, {tuple(vectoriser.degrees)}, got {wanted}")
        super().__init__()
        self.vectoriser = vectoriser
        self.scale = scale
        self.embedding = embedding
        self.dimension = dimension
        self.delay = delay
        self.max_dimension = max_dimension
        self.max_delay = max_delay
        self.stride = stride
        self.giotto_compat = giotto_compat
        self.degrees = wanted
        self.backend = backend
        self.n_workers = n_workers
        self.cache_dir = cache_dir
        self.progress = progress
        self.parameters_: list[tuple[int, int]] | None = None
        self._latest: tuple[str, list[Diagram]] | None = None

    def fit(self, returns: Tensor) -> "TopologicalRepresentation":
        """Choose dimension and delay, and fit the vectoriser.

        Args:
            returns: ``(A, T) float`` of the train window.

        Raises:
            ValueError: If returns are not finite rows, or too short for the search or the embedding.
        """
        values, flat = self._scaled(returns)
        searched = self._searched(values, flat)
        if self.embedding == "one":
            known = [pair for pair, is_flat in zip(searched, flat, strict=True) if not is_flat] or searched
            dimension, delay = np.array(known).sum(0) // len(known)
            searched = [(int(dimension), int(delay))]
        self.parameters_ = searched
        self.vectoriser.fit(self._diagrams(values, flat))
        return self

    def forward(self, returns: Tensor) -> Tensor:
        """Rows ``(A, D)`` in the dtype and on the device of ``returns (A, T)``.

        With ``embedding="mult"`` and another number of stocks than fitted, dimensions and delays are searched anew.

        Raises:
            ValueError: Before ``fit``, and as :meth:`fit`.
        """
        if self.parameters_ is None:
            raise ValueError("TopologicalRepresentation must be fitted before use, it is not")
        rows = self.vectoriser.transform(self._diagrams(*self._scaled(returns)))
        return torch.from_numpy(rows).to(returns)

    def diagrams(self, returns: Tensor) -> list[Diagram]:
        """Diagrams of each stock under the fitted dimension and delay, as of :func:`persistence_diagrams`.

        Raises:
            ValueError: As :meth:`forward`.
        """
        if self.parameters_ is None:
            raise ValueError("TopologicalRepresentation must be fitted before use, it is not")
        return self._diagrams(*self._scaled(returns))

    def get_extra_state(self) -> dict[str, Any]:
        """What was fitted, for the state dict."""
        if self.parameters_ is None:
            return {}
        return {"parameters": [list(pair) for pair in self.parameters_], "vectoriser": self.vectoriser.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what another of the same arguments has fitted."""
        if not state:
            self.parameters_ = None
            return
        self.parameters_ = [(dimension, delay) for dimension, delay in state["parameters"]]
        self.vectoriser.load_state({name: value.cpu() for name, value in state["vectoriser"].items()})

    def _scaled(self, returns: Tensor) -> tuple[Array, Any]:
        scaled = scale_returns(returns.detach().cpu().double().numpy(), self.scale)
        if scaled.flat.any():
            logger.warning("%d of %d stocks have constant returns: no topology", scaled.flat.sum(), len(scaled.flat))
        return scaled

    def _searched(self, values: Array, flat: Any) -> list[tuple[int, int]]:
        """Dimension and delay of each stock."""
        if self.dimension is not None and self.delay is not None:
            return [(self.dimension, self.delay)] * len(values)
        found = []
        for series, is_flat in zip(values, flat, strict=True):
            dimension, delay = _OF_A_FLAT_SERIES
            if not is_flat:
                dimension, delay = search_parameters(
                    series,
                    max_dimension=self.max_dimension,
                    max_delay=self.max_delay,
                    stride=self.stride if self.giotto_compat else 1,
                    giotto_compat=self.giotto_compat,
                )
            found.append((self.dimension or dimension, self.delay or delay))
        return found

    def _diagrams(self, values: Array, flat: Any) -> list[Diagram]:
        assert self.parameters_ is not None
        parameters = self.parameters_
        if self.embedding == "one":
            parameters = parameters * len(values)
        elif len(parameters) != len(values):
            parameters = self._searched(values, flat)
        clouds = [
            embed(series, dimension, delay, self.stride)
            for series, (dimension, delay) in zip(values, parameters, strict=True)
        ]
        # The window just fitted on is the one represented next, and drawn after that.
        key = content_key(clouds, self.degrees, self.backend)
        if self._latest is None or self._latest[0] != key:
            found = persistence_diagrams(
                clouds,
                self.degrees,
                backend=self.backend,
                n_workers=self.n_workers,
                cache_dir=self.cache_dir,
                progress=self.progress,
            )
            self._latest = (key, found)
        return self._latest[1]
