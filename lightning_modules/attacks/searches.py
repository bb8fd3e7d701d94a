"""Steps without a gradient: noise, and random search on the value of the objective.

B series, T steps, C channels. The searches never go down: a series moves only where its value rises.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.attacks.projections import Linf, Strength
from lightning_modules.attacks.steppers import Advance, Stepper

if TYPE_CHECKING:
    from lightning_modules.attacks.run import Evaluation, Run


class Noise(Stepper):
    """Baseline: every step adds noise of size ``s``, ``s sign(N(0, 1))`` or ``N(0, s^2)``.

    Args:
        step: ``s``, in units of the series.
        kind: ``"sign"`` or ``"gaussian"``.

    Raises:
        ValueError: If ``kind`` is unknown.

    Source: spec of the concealed attack, section 5.
    """

    uses_gradient = False
    uses_noise = True

    def __init__(self, step: float | None = None, kind: Literal["sign", "gaussian"] = "sign") -> None:
        super().__init__(step)
        if kind not in ("sign", "gaussian"):
            raise ValueError(f"kind must be 'sign' or 'gaussian', got {kind!r}")
        self.kind = kind

    def start(self, run: "Run") -> Advance:
        """No memory."""
        shape = run.ball.x0.shape[1:]

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            drawn = run.noise.signs(*shape) if self.kind == "sign" else run.noise.normal(*shape)
            return run.confine(x + run.step * drawn), None

        return advance


class SimBA(Stepper):
    """Query attack: a random time step of each series is moved by ``+s``, ``-s`` or not, whichever value is best.

    Args:
        step: ``s``, in units of the series.
        channels: ``"all"`` moves every channel of the time step, ``"one"`` a random one.

    Raises:
        ValueError: If ``channels`` is unknown.

    Source: spec of the concealed attack, section 5; C. Guo et al., arXiv 1905.07121.
    """

    uses_gradient = False
    uses_noise = True
    uses_values = True

    def __init__(self, step: float | None = None, channels: Literal["all", "one"] = "all") -> None:
        super().__init__(step)
        if channels not in ("all", "one"):
            raise ValueError(f"channels must be 'all' or 'one', got {channels!r}")
        self.channels = channels

    def start(self, run: "Run") -> Advance:
        """No memory."""
        n_series, n_times, n_channels = run.ball.x0.shape
        order = _valid_steps_first(run.steps)
        n_valid = n_times if run.steps is None else run.steps.sum(dim=1).clamp(min=1)

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, "Evaluation"]:
            time = run.noise.integers(n_valid, 1)
            if order is not None:
                time = order.gather(1, time)
            bump = torch.zeros_like(x).scatter_(1, time[..., None].expand(n_series, 1, n_channels), 1.0)
            if self.channels == "one":
                channel = run.noise.integers(n_channels, 1, 1).expand(n_series, n_times, 1)
                bump = bump * torch.zeros_like(x).scatter_(2, channel, 1.0)
            up, down = run.confine(x + run.step * bump), run.confine(x - run.step * bump)
            x, evaluation = run.better(x, evaluation, up)
            x, evaluation = run.better(x, evaluation, down)
            return x, evaluation

        return advance


def _valid_steps_first(mask: Tensor | None) -> Tensor | None:
    """``(B, T) int64``: time steps of each series, those that may move first."""
    return None if mask is None else mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)


class SquareSearch(Stepper):
    """Square-style random search in time: a window of each series is set to ``x0 +- radius`` where that helps.

    The window's share of the steps that may move falls along the attack as in the original; the sign is drawn for each
    channel. The first iterate has a random sign at every position.

    Args:
        share: Share of the time steps of the first windows, inside 0..1.

    Raises:
        ValueError: If ``share`` lies outside; at the attack, without an linf ball or with a step of the call's own.

    Source: M. Andriushchenko et al., arXiv 1912.00049, algorithms 1 and 2, with windows in place of squares.
    """

    uses_gradient = False
    uses_noise = True
    uses_values = True
    step_from_radius = True
    starts_itself = True
    ball = Linf

    SCHEDULE: ClassVar[tuple[float, ...]] = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Parts of the attack after which the share halves: 10, 50, 200, 500, 1000, .. of 10,000 queries."""

    def __init__(self, share: float = 0.8) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share must lie above 0 and at most at 1, got {share}")
        self.share = share

    def length(self, step: Strength | None, radii: Tensor | None, n_steps: int) -> Strength:
        """The radius."""
        if step is not None:
            raise ValueError("SquareSearch takes its step from the radius: give radius=, not step=")
        assert radii is not None
        return radii.flatten()

    def initial(self, run: "Run") -> Tensor:
        """A random vertex of the cube."""
        return run.ball.x0 + run.step * run.noise.signs(*run.ball.x0.shape[1:])

    def start(self, run: "Run") -> Advance:
        """Counts the steps."""
        n_times, n_channels = run.ball.x0.shape[1:]
        times: Tensor = torch.arange(n_times, device=run.ball.x0.device)
        n_steps = times.new_full((len(run.ball.x0), 1), n_times)
        if run.steps is not None:  # a window is so many steps that may move: padding is no place for one
            times = torch.where(run.steps, run.steps.cumsum(dim=1) - 1, -1)
            n_steps = run.steps.sum(dim=1, keepdim=True).clamp(min=1)
        k = 0

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, "Evaluation"]:
            nonlocal k
            halvings = sum(k > part * run.n_steps for part in self.SCHEDULE)
            width = (n_steps.double() * (self.share * 0.5**halvings)).round().long().clamp(min=1)
            k += 1
            first = run.noise.integers((n_steps - width + 1).flatten(), 1)
            window = ((times >= first) & (times < first + width))[..., None]
            candidate = torch.where(window, run.ball.x0 + run.step * run.noise.signs(1, n_channels), x)
            return run.better(x, evaluation, run.confine(candidate))

        return advance
