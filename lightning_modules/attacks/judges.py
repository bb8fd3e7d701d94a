"""Judges: detectors that an attack never saw, by which its concealment is measured.

B batch, T time, C channels, n clean training series, S statistics. A judge has a name, a provenance (what it was made
of) and ``score(series, mask) -> (B,) float64``, larger for what it takes as adversarial; scores of one judge compare
with each other, not with those of another. Scores are deterministic and, up to rounding, do not depend on the other
series of a batch. Judges that are fitted see clean training series only, and hand out what they learnt as tensors.
Source: spec of arXiv 2502.20948, sections 6 (roles), 11 (T6, T7, T8) and 12.3; the judges other than networks are ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_modules.attacks.frozen_networks import Network, logits_of, takes_mask
from lightning_modules.metrics.attack_functional import roughness

NEEDS_SCIKIT_LEARN = "a one-class SVM judges, which needs scikit-learn: pip install 'seqlit[timeseries]'"
"""What is said where it is missing."""

PROVENANCE_KEYS = ("seed", "architecture", "training_attacks")
"""What sets a held-out judge apart from the detectors that an attack was made against."""

DATA_SPLIT = "train"
"""Series that every judge learns from, ``data_split`` in its provenance. It sets none apart: all have the same."""

StatisticsRule = Literal["mahalanobis", "max_z"]

ARCHIVE_ROUNDING = 1e-6
"""Differences of mean and deviation below the rounding of the archive's own z-normalised series carry no evidence."""

_CHUNK_BYTES = 2**20  # differences of a chunk stay in the cache: seven times faster than 64 MiB at a time


class Judge(Protocol):
    """What every judge offers."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """What the judge was made of; see :data:`PROVENANCE_KEYS`. A key it lacks does not apply to it."""

    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64`` of ``(B, T, C) float`` series and ``(B, T) bool`` mask; larger is more adversarial."""


def valid_judge(vanilla_auc: float) -> bool:
    """Whether a detector separates vanilla attacks from clean series at all: AUC of at least 0.8.

    One that does not, or whose AUC is NaN, says nothing by failing to see a concealed attack (T6).
    """
    return vanilla_auc >= 0.8


def check_disjoint(attacked: Sequence[Judge], held_out: Sequence[Judge], keys: Sequence[str] = PROVENANCE_KEYS) -> None:
    """Refuse a held-out judge that shares name, network or provenance with an attacked detector (T8).

    A value may list several, separated by commas ("ifgsm, pgd"): one in common is shared. A key that one of the two
    lacks is not shared.

    Args:
        attacked: Detectors whose gradients or scores the attack, its training or its selection uses.
        held_out: Judges of the report.
        keys: Keys of provenance that must differ.

    Raises:
        ValueError: For the first pair that shares something.
    """
    for seen in attacked:
        for judge in held_out:
            networks = [getattr(one, "network", one) for one in (judge, seen)]
            if networks[0] is networks[1] or judge.name == seen.name:
                raise ValueError(
                    f"held-out judge {judge.name!r} and attacked detector {seen.name!r} must be two, got the same one"
                )
            for key in keys:
                shared = _listed(judge.provenance, key) & _listed(seen.provenance, key)
                if shared:
                    raise ValueError(
                        f"held-out judge {judge.name!r} and attacked detector {seen.name!r} must differ in {key}, "
                        f"got {', '.join(sorted(shared))} in both"
                    )


def _listed(provenance: Mapping[str, str], key: str) -> set[str]:
    return {part.strip() for part in provenance.get(key, "").split(",")} - {""}


def _checked(series: Tensor, mask: Tensor | None, n_channels: int | None = None) -> tuple[Tensor, Tensor]:
    """``(B, T, C)`` in float64, zero where padded, and ``(B, T) bool``; every series has a valid step."""
    if series.ndim != 3 or (n_channels is not None and series.shape[2] != n_channels):
        raise ValueError(f"series must be (B, T, {n_channels or 'C'}), got shape {tuple(series.shape)}")
    if mask is None:
        mask = torch.ones(series.shape[:2], dtype=torch.bool, device=series.device)
    if mask.shape != series.shape[:2]:
        raise ValueError(f"mask must be {tuple(series.shape[:2])}, got shape {tuple(mask.shape)}")
    values = series.detach().double().masked_fill(~mask[..., None], 0.0)
    if not bool(mask.any(1).all()):
        raise ValueError(f"series {int((~mask.any(1)).nonzero()[0])} of the batch has no valid step")
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"series must be finite, got NaN or infinity in series {row} of the batch")
    return values, mask


def _moments(values: Tensor, mask: Tensor, ddof: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(B, C)``, deviation over n - ddof ``(B, C)`` (0 for one step), centred ``(B, T, C)``, zero if padded."""
    n_steps = mask.sum(1)[:, None].double()
    mean = values.sum(1) / n_steps
    centred = (values - mean[:, None]).masked_fill(~mask[..., None], 0.0)
    return mean, (centred.square().sum(1) / (n_steps - ddof).clamp(min=1)).sqrt(), centred


def series_statistics(series: Tensor, mask: Tensor | None = None, n_bands: int = 8, n_fft: int | None = None) -> Tensor:
    """What a plain detector looks at, channel by channel.

    Mean; standard deviation (n - 1); largest absolute value; roughness (mean absolute second difference); and the
    natural logarithm of the mean power of the centred series in ``n_bands`` equal bands of frequency from 0 to half a
    cycle a step, 1e-12 added before the logarithm.

    Args:
        series: ``(B, T, C) float``.
        mask: ``(B, T) bool``, true where a step counts; steps that do not count are zero in the transform.
        n_bands: At least 1.
        n_fft: Length of the transform, at least T and 2 ``n_bands``; the shortest power of two by default. Fixed by
            the caller it makes statistics independent of padding.

    Returns:
        ``(B, C * (4 + n_bands)) float64``, all statistics of a channel side by side.

    Raises:
        ValueError: If shapes disagree, a value is not finite, ``n_bands`` is below 1 or ``n_fft`` is too short.
    """
    values, mask = _checked(series, mask)
    n_fft = _transform_length(series.shape[1], n_bands) if n_fft is None else n_fft
    if n_bands < 1 or n_fft < max(series.shape[1], 2 * n_bands):
        raise ValueError(
            f"the spectrum needs n_bands of at least 1 and n_fft of at least T and 2 n_bands, got n_bands = {n_bands} "
            f"and n_fft = {n_fft} for T = {series.shape[1]}"
        )
    mean, deviation, centred = _moments(values, mask)
    bends = [roughness(values[..., [channel]], mask).nan_to_num(0.0) for channel in range(values.shape[2])]
    power = torch.fft.rfft(centred, n=n_fft, dim=1)[:, 1:].abs().square() / mask.sum(1)[:, None, None]
    bands = torch.stack([part.mean(1) for part in power.tensor_split(n_bands, dim=1)], dim=2)
    plain = torch.stack([mean, deviation, values.abs().amax(1), torch.stack(bends, 1)], dim=2)
    return torch.cat([plain, (bands + 1e-12).log()], dim=2).flatten(1)


def _transform_length(n_steps: int, n_bands: int) -> int:
    return 1 << (max(n_steps, 2 * n_bands) - 1).bit_length()


class NetworkJudge:
    """A trained discriminator: ``D = sigmoid(logit) = P(adversarial)``, in float64, where it is below 1 up to logit 36.

    Args:
        network: ``(B, T, C), mask (B, T) -> (B, 1)`` logits; one without a parameter ``mask`` serves for series of one
            length.
        name: Name in reports.
        provenance: All of :data:`PROVENANCE_KEYS`.
        batch_size: Series scored at a time, at least 1.

    Raises:
        ValueError: If the provenance is incomplete or ``batch_size`` is below 1.
    """

    def __init__(self, network: Network, name: str, provenance: Mapping[str, str], batch_size: int = 1024) -> None:
        missing = [key for key in PROVENANCE_KEYS if not provenance.get(key)]
        if missing:
            raise ValueError(f"provenance of judge {name!r} must name {', '.join(PROVENANCE_KEYS)}, lacks {missing}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network, self.name, self.provenance = network, name, dict(provenance)
        self.batch_size = batch_size

    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64`` probability of being adversarial, with evaluation statistics; the network is left as it was.

        Raises:
            ValueError: If there is no series, the network does not give (B, 1) finite logits, or it takes no mask and
                the series differ in length.
        """
        if mask is not None and not bool(mask.all()) and not takes_mask(self.network):
            raise ValueError(f"the network of judge {self.name!r} takes no mask, got series of different length")
        logits = logits_of(self.network, series, mask, batch_size=self.batch_size)
        if logits.shape != (len(series), 1) or not bool(logits.isfinite().all()):
            raise ValueError(
                f"the network of judge {self.name!r} must give finite logits ({len(series)}, 1), got shape "
                f"{tuple(logits.shape)}, {int((~logits.isfinite()).sum())} of them not finite"
            )
        return logits[:, 0].double().sigmoid()


class TwoStatisticsJudge:
    """The two-line detector of z-normalised sets (T7): ``max(|mean|, |std - 1|)`` over channels.

    Scores below ``tie`` are 0 and so equal: they lie within the archive's own rounding, and a detector that reads them
    reads float32 arithmetic (the strict form, ``tie`` 0). Of a channel that is constant in the scored series the mean
    alone counts, for no division makes its deviation 1; one that was constant and no longer is deviates. Not applicable
    to sets that are not z-normalised series by series.

    Args:
        name: Name in reports.
        tie: Scores below it are ties, at least 0; 0 keeps them all.
        ddof: The std is over n - ``ddof``, as that which the series were divided by: 1, the form of the archive, or 0,
            that of scikit-learn, whose clean series would all score ``sqrt(n / (n - 1)) - 1`` otherwise.

    Raises:
        ValueError: If ``tie`` is below 0 or ``ddof`` neither 0 nor 1.
    """

    def __init__(self, name: str = "two statistics", tie: float = ARCHIVE_ROUNDING, ddof: int = 1) -> None:
        if tie < 0:
            raise ValueError(f"tie must be at least 0, got {tie}")
        if ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, got {ddof}")
        self.name, self.tie, self.ddof = name, tie, ddof
        self.provenance = {"architecture": "two statistics"}

    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64``.

        Raises:
            ValueError: If the shapes disagree or a value is not finite.
        """
        values, mask = _checked(series, mask)
        mean, deviation, _ = _moments(values, mask, self.ddof)
        padded = ~mask[..., None]
        varies = values.masked_fill(padded, -torch.inf).amax(1) > values.masked_fill(padded, torch.inf).amin(1)
        found = torch.maximum(mean.abs(), torch.where(varies, (deviation - 1).abs(), 0.0)).amax(1)
        return torch.where(found < self.tie, 0.0, found)


class FittedJudge(ABC):
    """A judge of clean training series whose whole knowledge is a few tensors.

    Attributes:
        name: Name in reports.
        provenance: Only an architecture and the data split: no seed and no attack goes into it.
    """

    architecture: str
    keys: tuple[str, ...]
    """Names of the tensors of the state."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.architecture
        self.provenance = {"architecture": self.architecture, "data_split": DATA_SPLIT}
        self._state: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Copies of the fitted tensors by name, on the CPU; empty before the fit."""
        return {key: value.detach().cpu().clone() for key, value in self._state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` of a judge of the same class and options gave.

        Raises:
            ValueError: If the names of the tensors differ.
        """
        if set(state) != set(self.keys):
            raise ValueError(f"state of {self.name!r} must hold {sorted(self.keys)}, got {sorted(state)}")
        self._state = {key: value.detach().clone() for key, value in state.items()}

    def _get(self, key: str, like: Tensor) -> Tensor:
        if not self._state:
            raise ValueError(f"judge {self.name!r} must be fitted before it scores")
        return self._state[key].to(like.device)

    @abstractmethod
    def fit(self, series: Tensor, mask: Tensor | None = None) -> None:
        """Learn from ``(n, T, C) float`` clean training series with ``(n, T) bool`` mask."""

    @abstractmethod
    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64`` of ``(B, T, C) float`` series with ``(B, T) bool`` mask."""


class _OfStatistics(FittedJudge):
    """Statistics as robust z: minus the median, over 1.4826 times the median absolute deviation.

    A deviation of zero or below the archive's rounding is raised to it, so that float32 rounding is no evidence.
    """

    def __init__(self, name: str | None, n_bands: int) -> None:
        if n_bands < 1:
            raise ValueError(f"n_bands must be at least 1, got {n_bands}")
        super().__init__(name)
        self.n_bands = n_bands

    def _fit_z(self, series: Tensor, mask: Tensor | None) -> Tensor:
        if len(series) < 2:
            raise ValueError(f"judge {self.name!r} needs at least 2 clean training series, got {len(series)}")
        n_fft = _transform_length(series.shape[1], self.n_bands)
        found = series_statistics(series, mask, self.n_bands, n_fft)
        centre = found.median(0).values
        spread = 1.4826 * (found - centre).abs().median(0).values
        self._state = {"n_fft": torch.tensor(n_fft), "centre": centre, "spread": spread.clamp(min=ARCHIVE_ROUNDING)}
        return self._z(series, mask)

    def _z(self, series: Tensor, mask: Tensor | None) -> Tensor:
        centre = self._get("centre", series)
        n_channels = centre.numel() // (4 + self.n_bands)
        if series.ndim != 3 or series.shape[2] != n_channels:
            raise ValueError(f"series must be (B, T, {n_channels}) as in training, got shape {tuple(series.shape)}")
        found = series_statistics(series, mask, self.n_bands, int(self._state["n_fft"]))
        return (found - centre) / self._get("spread", series)


class StatisticsJudge(_OfStatistics):
    """Distance of a series' statistics (:func:`series_statistics`) from those of clean training series.

    "max_z": the largest ``|z|``. "mahalanobis": ``sqrt(z' R^{-1} z)`` with R the second moments of z about its median
    with z clipped to +-5, shrunk to the identity by ``S / (n + S)``: as many pseudo-series as statistics.

    Args:
        rule: "mahalanobis" or "max_z".
        n_bands: Bands of the spectrum, at least 1.
        name: Name in reports.

    Raises:
        ValueError: If the rule is unknown or ``n_bands`` is below 1.
    """

    architecture = "statistics"
    keys = ("n_fft", "centre", "spread", "whitening")

    def __init__(self, rule: StatisticsRule = "mahalanobis", n_bands: int = 8, name: str | None = None) -> None:
        if rule not in get_args(StatisticsRule):
            raise ValueError(f"rule must be one of {', '.join(get_args(StatisticsRule))}, got {rule!r}")
        super().__init__(name, n_bands)
        self.rule = rule

    def fit(self, series: Tensor, mask: Tensor | None = None) -> None:
        """Learn medians, deviations and second moments of the statistics.

        Args:
            series: ``(n, T, C) float``, n at least 2.
            mask: ``(n, T) bool``.

        Raises:
            ValueError: If there are fewer than 2 series, shapes disagree or a value is not finite.
        """
        z = self._fit_z(series, mask).clamp(-5, 5)
        n_series, n_statistics = z.shape
        identity = torch.eye(n_statistics, dtype=z.dtype, device=z.device)
        moments = (z.T @ z + n_statistics * identity) / (n_series + n_statistics)
        self._state["whitening"] = torch.linalg.solve_triangular(torch.linalg.cholesky(moments), identity, upper=False)

    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64``.

        Raises:
            ValueError: Before the fit, for series longer than or of other channels than in training, or not finite.
        """
        z = self._z(series, mask)
        if self.rule == "max_z":
            return z.abs().amax(1)
        return (z @ self._get("whitening", series).T).norm(dim=1)


class NearestNeighbourJudge(FittedJudge):
    """Distance to the k-th nearest clean training series.

    The distance of two series is the root mean square difference over channels and the steps valid in both, so that
    long and short series compare; infinite where they have no step in common.

    Args:
        k: At least 1.
        name: Name in reports.

    Raises:
        ValueError: If ``k`` is below 1.
    """

    architecture = "nearest neighbour"
    keys = ("series", "mask")

    def __init__(self, k: int = 1, name: str | None = None) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        super().__init__(name)
        self.k = k

    def fit(self, series: Tensor, mask: Tensor | None = None) -> None:
        """Keep the ``(n, T, C) float`` clean training series, n above k, and their ``(n, T) bool`` mask.

        Raises:
            ValueError: If n is at most k, shapes disagree or a value is not finite.
        """
        if len(series) <= self.k:
            raise ValueError(f"judge {self.name!r} needs more than k = {self.k} training series, got {len(series)}")
        values, mask = _checked(series, mask)
        self._state = {"series": values, "mask": mask}

    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64``.

        Raises:
            ValueError: Before the fit, for series of other length or channels than in training, or not finite.
        """
        reference = self._get("series", series)
        values, mask = _checked(series, mask, reference.shape[2])
        if values.shape[1] != reference.shape[1]:
            raise ValueError(
                f"series must be padded to T = {reference.shape[1]} as in training, got shape {tuple(series.shape)}"
            )
        return self._distances(values, mask).kthvalue(self.k, dim=1).values

    def leave_one_out(self) -> Tensor:
        """``(n,) float64`` score of each training series among the others.

        Raises:
            ValueError: Before the fit.
        """
        if not self._state:
            raise ValueError(f"judge {self.name!r} must be fitted before it scores")
        distances = self._distances(self._state["series"], self._state["mask"])
        return distances.fill_diagonal_(torch.inf).kthvalue(self.k, dim=1).values

    def _distances(self, values: Tensor, mask: Tensor) -> Tensor:
        """``(B, n)``, by differences: the expanded square loses the small distances that matter here."""
        reference, reference_mask = self._get("series", values), self._get("mask", values)
        squares = values.new_zeros(len(values), len(reference))
        n_rows = max(1, _CHUNK_BYTES // (8 * reference.numel()))
        for start in range(0, len(values), n_rows):
            rows = slice(start, start + n_rows)
            apart = (values[rows, None] - reference).square_()
            squares[rows] = apart.masked_fill_(~(mask[rows, None] & reference_mask)[..., None], 0.0).sum((2, 3))
        n_common = mask.double() @ reference_mask.double().T * reference.shape[2]
        return torch.where(n_common > 0, (squares / n_common).sqrt(), torch.inf)


class OneClassJudge(_OfStatistics):
    """One-class support vector machine with a Gaussian kernel on the statistics.

    ``score(u) = rho - sum_i alpha_i exp(-gamma |u - u_i|^2)``, ``gamma = 1 / S``, of ``u = sign(z) log(1 + |z|)``: with
    z itself the kernel would be 0, and all scores equal, for all that is far from the training series. Fitted by
    scikit-learn (extra [timeseries]), scored from its support vectors without it.

    Args:
        nu: Bound on the share of training series outside, in (0, 1].
        n_bands: Bands of the spectrum, at least 1.
        name: Name in reports.

    Raises:
        ValueError: If ``nu`` is not in (0, 1] or ``n_bands`` is below 1.

    Source: B. Schoelkopf et al., "Estimating the support of a high-dimensional distribution", Neural Computation 13
    (2001).
    """

    architecture = "one-class SVM"
    keys = ("n_fft", "centre", "spread", "support", "weights", "offset")

    def __init__(self, nu: float = 0.05, n_bands: int = 8, name: str | None = None) -> None:
        if not 0 < nu <= 1:
            raise ValueError(f"nu must lie in (0, 1], got {nu}")
        super().__init__(name, n_bands)
        self.nu = nu

    def fit(self, series: Tensor, mask: Tensor | None = None) -> None:
        """Learn the statistics' medians and deviations and the support vectors.

        Args:
            series: ``(n, T, C) float``, n at least 2.
            mask: ``(n, T) bool``.

        Raises:
            ValueError: If there are fewer than 2 series, shapes disagree or a value is not finite.
            ImportError: Without scikit-learn.
        """
        try:
            from sklearn.svm import OneClassSVM
        except ImportError as error:
            raise ImportError(NEEDS_SCIKIT_LEARN) from error
        compressed = _signed_log(self._fit_z(series, mask))
        machine = OneClassSVM(nu=self.nu, gamma=1 / compressed.shape[1], tol=1e-6).fit(compressed.cpu().numpy())
        self._state["support"] = torch.from_numpy(machine.support_vectors_)
        self._state["weights"] = torch.from_numpy(machine.dual_coef_[0])
        self._state["offset"] = torch.tensor(-float(machine.intercept_[0]), dtype=torch.float64)

    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B,) float64``; above 0 outside the region learnt.

        Raises:
            ValueError: Before the fit, for series longer than or of other channels than in training, or not finite.
        """
        compressed = _signed_log(self._z(series, mask))
        squares = torch.cdist(compressed, self._get("support", series)).square()
        kernel = (-squares / compressed.shape[1]).exp()
        return self._get("offset", series) - kernel @ self._get("weights", series)


def _signed_log(values: Tensor) -> Tensor:
    return values.sign() * values.abs().log1p()
