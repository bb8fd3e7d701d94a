"""Metrics of concealed attacks: how many decisions an attack breaks, how well it hides, how far it moves a series.

n series, K classes, M detectors, B batch, T time, C channels. "..." stands for any leading axes (configurations,
iterations), so that a whole sweep is one call. Predictions and labels are int64 class numbers; a detector's score is
larger for what it takes as adversarial, and a decision at a threshold is ``score >= threshold`` (0.5 on
probabilities) as in the published tables. Results are float64. A share over no series is NaN.
Source: spec of arXiv 2502.20948, section 9, where the names in capitals come from.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

ConcealabilityForm = Literal["f1", "auc", "auc_two_sided"]
PoolingRule = Literal["published", "max"]


def _check_rows(name: str, values: Tensor, other: str, reference: Tensor) -> None:
    if values.ndim == 0 or reference.ndim == 0 or values.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"{name} and {other} must hold the same series on their last axis, got shapes {tuple(values.shape)} and "
            f"{tuple(reference.shape)}"
        )


def _check_scores(clean_scores: Tensor, adversarial_scores: Tensor) -> None:
    for name, scores in (("clean_scores", clean_scores), ("adversarial_scores", adversarial_scores)):
        if scores.ndim == 0:
            raise ValueError(f"{name} must be (..., n), got a single number")
        if bool(scores.isnan().any()):
            raise ValueError(f"{name} must not be NaN, got {int(scores.isnan().sum())} of {scores.numel()}")


def _share(hits: Tensor, among: Tensor) -> Tensor:
    """Share of ``among`` (bool) on the last axis where ``hits`` is true too; NaN where ``among`` is empty."""
    return (hits & among).sum(-1).double() / among.sum(-1).double()


def f1_of_counts(true_positives: Tensor, false_positives: Tensor, false_negatives: Tensor) -> Tensor:
    """F1 ``= 2 TP / (2 TP + FP + FN)``, float64; 0 where there is neither a positive nor a positive prediction."""
    above = 2.0 * true_positives.double()
    below = above + false_positives + false_negatives
    return torch.where(below > 0, above / below, 0.0)


def class_counts(predicted: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """True positives, false positives and false negatives of each class.

    Args:
        predicted: ``(..., n) int64`` in 0..K-1.
        labels: ``(n,)`` or ``(..., n) int64`` in 0..K-1.
        n_classes: K, at least 2.

    Returns:
        Three ``(..., K) int64``.

    Raises:
        ValueError: If the last axes differ, K is below 2 or a class number is not in 0..K-1.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}")
    _check_rows("predicted", predicted, "labels", labels)
    for name, values in (("predicted", predicted), ("labels", labels)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < n_classes:
            raise ValueError(f"{name} must lie in 0..{n_classes - 1}, got {int(values.min())}..{int(values.max())}")
    hits, calls, truths = [], [], []
    for number in range(n_classes):
        called, true = predicted == number, labels == number
        hits.append((called & true).sum(-1))
        calls.append((called & ~true).sum(-1))
        truths.append((~called & true).sum(-1))
    return torch.stack(hits, -1), torch.stack(calls, -1), torch.stack(truths, -1)


def f1_of_class_counts(true_positives: Tensor, false_positives: Tensor, false_negatives: Tensor) -> Tensor:
    """F1 of class 1 for K = 2; for K > 2 the mean of F1 over the classes that occur in truth or prediction.

    Args:
        true_positives: ``(..., K) int64``, K at least 2.
        false_positives: As ``true_positives``.
        false_negatives: As ``true_positives``.

    Returns:
        ``(...) float64``; NaN without a single series.
    """
    occurs = (true_positives + false_positives + false_negatives) > 0
    if true_positives.shape[-1] == 2:
        # only class 0, all rightly called: F1 is 0 by convention
        f1 = f1_of_counts(true_positives[..., 1], false_positives[..., 1], false_negatives[..., 1])
        return torch.where(occurs.any(-1), f1, torch.nan)
    f1 = f1_of_counts(true_positives, false_positives, false_negatives)
    return f1.sum(-1) / occurs.sum(-1)


def classifier_f1(predicted: Tensor, labels: Tensor, n_classes: int = 2) -> Tensor:
    """F1 of the classifier: of class 1 for K = 2, macro for K > 2 (:func:`f1_of_class_counts`).

    Args:
        predicted: ``(..., n) int64``.
        labels: ``(n,)`` or ``(..., n) int64``.
        n_classes: K, at least 2.

    Returns:
        ``(...) float64``.

    Raises:
        ValueError: As :func:`class_counts`.
    """
    return f1_of_class_counts(*class_counts(predicted, labels, n_classes))


def effectiveness(predicted: Tensor, labels: Tensor, n_classes: int = 2) -> Tensor:
    """EFF ``= 1 - F1(y, yhat(x_adv))``; arguments, shapes and errors as :func:`classifier_f1`.

    On clean series it is not 0 but the classifier's own error; :func:`accuracy_on_correct` stands beside it. A
    classifier that always says 0 has EFF = 1 at any accuracy.
    """
    return 1 - classifier_f1(predicted, labels, n_classes)


def accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """ACC, share of ``predicted == labels`` on the last axis, ``(...) float64``.

    With the clean predictions in place of the labels it is ACC_ORIG_ADV, the agreement of clean and adversarial
    decisions; one minus that is the fooling rate.

    Raises:
        ValueError: If the last axes differ.
    """
    _check_rows("predicted", predicted, "labels", labels)
    return (predicted == labels).double().mean(-1)


def fooling_rate(clean_predicted: Tensor, adversarial_predicted: Tensor) -> Tensor:
    """``1 - ACC_ORIG_ADV``: share of series whose decision the attack changes, right or wrong, ``(...) float64``."""
    return 1 - accuracy(adversarial_predicted, clean_predicted)


def fooled(
    clean_predicted: Tensor, adversarial_predicted: Tensor, labels: Tensor, targets: Tensor | None = None
) -> Tensor:
    """Whether a series is called rightly when clean and wrongly (as its target, where targets are given) when attacked.

    Args:
        clean_predicted: ``(n,)`` or ``(..., n) int64``.
        adversarial_predicted: ``(..., n) int64``.
        labels: ``(n,)`` or ``(..., n) int64``.
        targets: ``(n,) int64`` wanted classes of a targeted attack.

    Returns:
        ``(..., n) bool``.

    Raises:
        ValueError: If the last axes differ.
    """
    _check_rows("clean_predicted", clean_predicted, "labels", labels)
    _check_rows("adversarial_predicted", adversarial_predicted, "labels", labels)
    broken = adversarial_predicted != labels if targets is None else adversarial_predicted == targets
    return (clean_predicted == labels) & broken


def accuracy_on_correct(clean_predicted: Tensor, adversarial_predicted: Tensor, labels: Tensor) -> Tensor:
    """ACC_CORRECT: accuracy on adversarial series among those called rightly when clean.

    Args:
        clean_predicted: ``(n,)`` or ``(..., n) int64``.
        adversarial_predicted: ``(..., n) int64``.
        labels: ``(n,)`` or ``(..., n) int64``.

    Returns:
        ``(...) float64``; NaN where no clean series is called rightly.

    Raises:
        ValueError: If the last axes differ.
    """
    return 1 - attack_success_rate(clean_predicted, adversarial_predicted, labels)


def attack_success_rate(
    clean_predicted: Tensor, adversarial_predicted: Tensor, labels: Tensor, targets: Tensor | None = None
) -> Tensor:
    """Share of :func:`fooled` among the series called rightly when clean, ``(...) float64``; NaN if there is none."""
    broken = fooled(clean_predicted, adversarial_predicted, labels, targets)
    return _share(broken, (clean_predicted == labels).expand_as(broken))


def joint_success(
    clean_predicted: Tensor,
    adversarial_predicted: Tensor,
    labels: Tensor,
    flagged: Tensor,
    targets: Tensor | None = None,
) -> Tensor:
    """Share of (fooled AND not flagged) among the series called rightly when clean: the headline of a report.

    Args:
        clean_predicted: ``(n,)`` or ``(..., n) int64``.
        adversarial_predicted: ``(..., n) int64``.
        labels: ``(n,)`` or ``(..., n) int64``.
        flagged: ``(..., n) bool`` adversarial series above the detector's calibrated threshold.
        targets: As :func:`fooled`.

    Returns:
        ``(...) float64``; NaN where no clean series is called rightly.

    Raises:
        ValueError: If the last axes differ.
    """
    _check_rows("flagged", flagged, "labels", labels)
    hit = fooled(clean_predicted, adversarial_predicted, labels, targets) & ~flagged
    return _share(hit, (clean_predicted == labels).expand_as(hit))


def steps_to_flip(predicted: Tensor, labels: Tensor) -> Tensor:
    """First iterate at which a series is called wrongly; 0 for a clean error, -1 for a series that never flips.

    Args:
        predicted: ``(N + 1, ..., n) int64`` decisions at iterates 0..N.
        labels: ``(n,)`` or ``(..., n) int64``.

    Returns:
        ``(..., n) int64``.

    Raises:
        ValueError: If the last axes differ.
    """
    _check_rows("predicted", predicted, "labels", labels)
    wrong = predicted != labels
    return torch.where(wrong.any(0), wrong.int().argmax(0), -1)


def _counts_below(clean_scores: Tensor, adversarial_scores: Tensor) -> tuple[Tensor, Tensor]:
    """``(..., m)`` clean scores strictly below, and at or below, each adversarial score."""
    clean, adversarial = clean_scores.double(), adversarial_scores.double()
    if clean.ndim > 1:
        lead = torch.broadcast_shapes(clean.shape[:-1], adversarial.shape[:-1])
        clean, adversarial = clean.expand(*lead, -1), adversarial.expand(*lead, -1)
    ordered, adversarial = clean.sort(-1).values.contiguous(), adversarial.contiguous()
    return torch.searchsorted(ordered, adversarial), torch.searchsorted(ordered, adversarial, right=True)


def detector_auc(clean_scores: Tensor, adversarial_scores: Tensor) -> Tensor:
    """ROC_AUC_DISC ``= P(adversarial > clean) + P(adversarial = clean) / 2``, by counting, exact under ties.

    For an unmoved series it is 0.5; the published tables write 1.0 at iterate 0 by convention.

    Args:
        clean_scores: ``(n,)`` or ``(..., n) float``.
        adversarial_scores: ``(..., m) float``.

    Returns:
        ``(...) float64``; NaN without a clean or without an adversarial series.

    Raises:
        ValueError: If a score is NaN.
    """
    _check_scores(clean_scores, adversarial_scores)
    below, at_or_below = _counts_below(clean_scores, adversarial_scores)
    n_pairs = clean_scores.shape[-1] * adversarial_scores.shape[-1]
    return (below + at_or_below).sum(-1).double() / (2 * n_pairs if n_pairs else torch.nan)


def average_precision(negative_scores: Tensor, positive_scores: Tensor) -> Tensor:
    """PR: ``sum_i (R_i - R_{i-1}) P_i`` over falling distinct thresholds, precision P and recall R.

    Each positive series adds the precision at its own score, which is the same sum; ties enter together.

    Args:
        negative_scores: ``(n,)`` or ``(..., n) float``.
        positive_scores: ``(..., m) float``.

    Returns:
        ``(...) float64``; NaN without a positive series.

    Raises:
        ValueError: If a score is NaN.
    """
    _check_scores(negative_scores, positive_scores)
    n_negative, n_positive = negative_scores.shape[-1], positive_scores.shape[-1]
    false_positives = n_negative - _counts_below(negative_scores, positive_scores)[0]
    ordered = positive_scores.double().contiguous()
    true_positives = n_positive - torch.searchsorted(ordered.sort(-1).values, ordered)
    return (true_positives.double() / (true_positives + false_positives)).mean(-1)


def detector_f1(clean_scores: Tensor, adversarial_scores: Tensor, threshold: float = 0.5) -> Tensor:
    """F1_DISC on the pooled set, truth 0 for clean and 1 for adversarial, decision ``score >= threshold``.

    Args:
        clean_scores: ``(n,)`` or ``(..., n) float``.
        adversarial_scores: ``(..., m) float``.
        threshold: Smallest score that is called adversarial; 0.5 for probabilities.

    Returns:
        ``(...) float64``: 0 for a detector that always says clean, 2/3 for one that always says adversarial on as
        many clean as adversarial series; NaN without any series.

    Raises:
        ValueError: If a score is NaN.
    """
    _check_scores(clean_scores, adversarial_scores)
    called, false = (adversarial_scores >= threshold).sum(-1), (clean_scores >= threshold).sum(-1)
    f1 = f1_of_counts(called, false, adversarial_scores.shape[-1] - called)
    return f1 if clean_scores.shape[-1] + adversarial_scores.shape[-1] else f1 * torch.nan


def detector_accuracy(clean_scores: Tensor, adversarial_scores: Tensor, threshold: float = 0.5) -> Tensor:
    """ACC_DISC on the pooled set: share of right decisions; arguments, shapes and errors as :func:`detector_f1`."""
    _check_scores(clean_scores, adversarial_scores)
    right = (adversarial_scores >= threshold).sum(-1) + (clean_scores < threshold).sum(-1)
    n_series = clean_scores.shape[-1] + adversarial_scores.shape[-1]
    return right.double() / (n_series or torch.nan)


def detection_rate(clean_scores: Tensor, adversarial_scores: Tensor, false_alarm_rate: float) -> Tensor:
    """Largest true-positive rate of any threshold with at most this false-positive rate (no interpolation).

    With ``k = floor(rate * n)`` a series is detected if its score exceeds the (k + 1)-th largest clean score, which
    at most k clean scores do. The threshold is read off the judged clean series themselves: it describes the ROC
    curve, whereas a calibrated detector takes :func:`lightning_modules.attacks.thresholds.conformal_threshold`.

    Args:
        clean_scores: ``(n,)`` or ``(..., n) float``.
        adversarial_scores: ``(..., m) float``.
        false_alarm_rate: Inside 0..1, e.g. 0.01 or 0.05.

    Returns:
        ``(...) float64``; NaN without a clean or without an adversarial series.

    Raises:
        ValueError: If the rate is not in [0, 1) or a score is NaN.
    """
    if not 0 <= false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie in [0, 1), got {false_alarm_rate}")
    _check_scores(clean_scores, adversarial_scores)
    n_clean = clean_scores.shape[-1]
    if n_clean == 0 or adversarial_scores.shape[-1] == 0:
        lead = torch.broadcast_shapes(clean_scores.shape[:-1], adversarial_scores.shape[:-1])
        return torch.full(lead, torch.nan, dtype=torch.float64, device=adversarial_scores.device)
    n_allowed = int(false_alarm_rate * n_clean + 1e-9)  # 0.29 * 100 is 28.999999999999996
    limit = clean_scores.sort(-1, descending=True).values[..., n_allowed]
    return (adversarial_scores > limit[..., None]).double().mean(-1)


def concealability_of_auc(auc: Tensor, *, two_sided: bool = False) -> Tensor:
    """``1 - AUC``; two-sided ``2 (1 - max(AUC, 1 - AUC)) = 1 - |2 AUC - 1|``.

    A detector whose AUC an attack drives to 0 still tells the two sets apart once its answer is read upside down.
    The two-sided form is 1 for AUC 0.5, where no reading helps, and 0 for AUC 0 as for AUC 1.
    """
    return 2 * (1 - torch.maximum(auc, 1 - auc)) if two_sided else 1 - auc


def concealability(
    clean_scores: Tensor, adversarial_scores: Tensor, form: ConcealabilityForm = "f1", threshold: float = 0.5
) -> Tensor:
    """CONC ``= 1 - F1_DISC`` ("f1", the published tables), ``1 - AUC`` ("auc") or its two-sided form.

    Args:
        clean_scores: ``(n,)`` or ``(..., n) float``.
        adversarial_scores: ``(..., m) float``.
        form: "f1", "auc" or "auc_two_sided" (:func:`concealability_of_auc`); the forms can contradict each other.
        threshold: Of the F1 form.

    Returns:
        ``(...) float64``; 1 in the F1 form for a detector that always says clean.

    Raises:
        ValueError: If the form is unknown or a score is NaN.
    """
    check_form(form)
    if form == "f1":
        return 1 - detector_f1(clean_scores, adversarial_scores, threshold)
    auc = detector_auc(clean_scores, adversarial_scores)
    return concealability_of_auc(auc, two_sided=form == "auc_two_sided")


def check_form(form: str) -> None:
    """Refuse a form of concealability that is not one of :data:`ConcealabilityForm`.

    Raises:
        ValueError: If the form is unknown.
    """
    if form not in get_args(ConcealabilityForm):
        raise ValueError(f"form must be one of {', '.join(get_args(ConcealabilityForm))}, got {form!r}")


def success_f(effectiveness: Tensor, concealability: Tensor) -> Tensor:
    """Success ``F = 2 EFF CONC / (EFF + CONC)``, 0 where both are 0; shapes broadcast."""
    total = effectiveness + concealability
    return torch.where(total == 0, 0.0, 2 * effectiveness * concealability / total)


def hidden_probability(adversarial_probabilities: Tensor) -> Tensor:
    """PROB_HID ``= max_j mean_i D_j(x_adv,i)``; lower is better hidden.

    Args:
        adversarial_probabilities: ``(..., M, n) float`` of detector j for adversarial series i.

    Returns:
        ``(...) float64``.

    Raises:
        ValueError: If there is no axis of detectors.
    """
    if adversarial_probabilities.ndim < 2:
        raise ValueError(
            f"adversarial_probabilities must be (..., M, n), got shape {tuple(adversarial_probabilities.shape)}"
        )
    return adversarial_probabilities.double().mean(-1).amax(-1)


def pool_detectors(
    clean_scores: Tensor, adversarial_scores: Tensor, rule: PoolingRule = "published"
) -> tuple[Tensor, Tensor]:
    """One score of several detectors.

    "published": the largest of the detectors for a clean series, the smallest for an adversarial one. This knows
    which series is which and favours the attacker. "max": the largest for both, as a panel that flags what any
    member flags.

    Args:
        clean_scores: ``(..., M, n) float``, one row a detector.
        adversarial_scores: ``(..., M, m) float``, the same detectors in the same order.
        rule: "published" or "max".

    Returns:
        ``(..., n)`` and ``(..., m)`` scores.

    Raises:
        ValueError: If the rule is unknown or the numbers of detectors differ.
    """
    if rule not in get_args(PoolingRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(PoolingRule))}, got {rule!r}")
    if clean_scores.ndim < 2 or adversarial_scores.ndim < 2 or clean_scores.shape[-2] != adversarial_scores.shape[-2]:
        raise ValueError(
            f"scores must be (..., M, n) with the same M detectors, got shapes {tuple(clean_scores.shape)} and "
            f"{tuple(adversarial_scores.shape)}"
        )
    pooled = adversarial_scores.amin(-2) if rule == "published" else adversarial_scores.amax(-2)
    return clean_scores.amax(-2), pooled


class PerturbationNorms(NamedTuple):
    """Norms of a perturbation over all time steps and channels of a series, each ``(..., B) float64``."""

    l1: Tensor
    l2: Tensor
    linf: Tensor
    l2_relative: Tensor
    """``||delta||_2 / ||x||_2``; 0 for an unmoved series, infinite for a moved series of zeros."""


def _valid(series: Tensor, mask: Tensor | None) -> Tensor:
    """``(..., B, T, C)`` in float64 with padded steps at zero, whatever they held."""
    if series.ndim < 3:
        raise ValueError(f"series must be (..., B, T, C), got shape {tuple(series.shape)}")
    if mask is None:
        return series.double()
    if mask.shape != series.shape[-3:-1]:
        raise ValueError(f"mask must be (B, T) = {tuple(series.shape[-3:-1])}, got shape {tuple(mask.shape)}")
    return series.double().masked_fill(~mask[..., None], 0.0)


def perturbation_norms(series: Tensor, adversarial: Tensor, mask: Tensor | None = None) -> PerturbationNorms:
    """L1, L2, L-infinity and relative L2 norm of ``adversarial - series``, one value a series.

    Args:
        series: ``(B, T, C) float``.
        adversarial: ``(..., B, T, C) float``.
        mask: ``(B, T) bool``, true where a step counts.

    Returns:
        Four ``(..., B) float64``.

    Raises:
        ValueError: If the shapes disagree.
    """
    if series.shape != adversarial.shape[-3:]:
        raise ValueError(
            f"adversarial must be (..., B, T, C) over series {tuple(series.shape)}, got {tuple(adversarial.shape)}"
        )
    clean = _valid(series, mask)
    moved = (_valid(adversarial, mask) - clean).flatten(-2)
    l2, size = moved.norm(dim=-1), clean.flatten(-2).norm(dim=-1)
    return PerturbationNorms(
        l1=moved.abs().sum(-1),
        l2=l2,
        linf=moved.abs().amax(-1),
        l2_relative=torch.where(l2 > 0, l2 / size, 0.0),
    )


def roughness(series: Tensor, mask: Tensor | None = None) -> Tensor:
    """ROUGHNESS: mean of ``|x_{t+1} - 2 x_t + x_{t-1}|`` over channels and the steps with both neighbours.

    Args:
        series: ``(..., B, T, C) float``.
        mask: ``(B, T) bool``; a step counts where it and both neighbours are true.

    Returns:
        ``(..., B) float64``; NaN for a series without three steps in a row. ROUGHNESS of a set is the mean over its
        series, ROUGHNESS_NORM the ratio of two such means.

    Raises:
        ValueError: If the shapes disagree.
    """
    values = _valid(series, mask)
    bends = (values[..., 2:, :] - 2 * values[..., 1:-1, :] + values[..., :-2, :]).abs()
    if mask is None:
        return bends.mean((-2, -1))
    whole = mask[..., 2:] & mask[..., 1:-1] & mask[..., :-2]
    return bends.masked_fill(~whole[..., None], 0.0).sum((-2, -1)) / (whole.sum(-1) * series.shape[-1])


def dtw(series: Tensor, other: Tensor, mask: Tensor | None = None, radius: int | None = None) -> Tensor:
    """Dynamic time warping distance of pairs of series, whole batch at a time along anti-diagonals.

    ``D(i, j) = |x_i - y_j|^2 + min(D(i-1, j), D(i-1, j-1), D(i, j-1))``, distance ``sqrt(D(L-1, L-1))``, with the
    squared Euclidean distance over channels and, if asked for, ``|i - j| <= radius`` (Sakoe-Chiba band). Time and
    memory are O(B T (radius + 1)) and O(B T).

    Args:
        series: ``(B, T, C) float``.
        other: ``(B, T, C) float``, e.g. the attacked series.
        mask: ``(B, T) bool`` of both; padded steps are taken out, what lies on either side of a gap is adjacent.
        radius: Half-width of the band in steps, at least 0; None for no band. 0 is the Euclidean distance.

    Returns:
        ``(B,) float64``; NaN for a series without a valid step.

    Raises:
        ValueError: If the shapes disagree or ``radius`` is below 0.
    """
    if series.ndim != 3 or series.shape != other.shape:
        raise ValueError(f"dtw needs two (B, T, C), got shapes {tuple(series.shape)} and {tuple(other.shape)}")
    if radius is not None and radius < 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    n_series, n_steps, _ = series.shape
    x, y = _valid(series, mask), _valid(other, mask)
    last = torch.full((n_series,), n_steps - 1, device=series.device)
    if mask is not None:
        valid_first = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        x, y, last = x.gather(1, valid_first), y.gather(1, valid_first), mask.sum(1) - 1
    # Time first: a diagonal is then two contiguous slices, x forwards and y backwards.
    x, y_backwards = x.transpose(0, 1).contiguous(), y.transpose(0, 1).flip(0).contiguous()
    band = n_steps if radius is None else radius
    # Row i + 1 holds D(i, diagonal - i); row 0 and all that lies outside the band stay infinite.
    outside = x.new_full((n_steps + 1, n_series), torch.inf)
    diagonal, before = outside.clone(), outside.clone()
    total = x.new_full((n_series,), torch.nan)
    for number in range(2 * n_steps - 1):
        low = max(0, number - n_steps + 1, (number - band + 1) // 2)
        high = min(number, n_steps - 1, (number + band) // 2) + 1
        shift = n_steps - 1 - number
        after = outside.clone()
        if low < high:
            cost = (x[low:high] - y_backwards[low + shift : high + shift]).square().sum(-1)
            if number:
                cost += torch.minimum(torch.minimum(diagonal[low:high], diagonal[low + 1 : high + 1]), before[low:high])
            after[low + 1 : high + 1] = cost
        before, diagonal = diagonal, after
        if number % 2 == 0:
            total = torch.where(last == number // 2, diagonal[number // 2 + 1], total)
    return total.sqrt()
