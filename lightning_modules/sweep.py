"""What a sweep file says: wandb's own format, read strictly, with the distributions that a local search can draw.

A key or distribution that is not known here ends in one line, instead of a search of something else than was asked.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Method = Literal["bayes", "random", "grid"]
ARGUMENTS = "${args}"
_COMMAND = ("seqlit", "fit")
_TOP = {"program", "command", "method", "metric", "early_terminate", "parameters", "name", "description"}
_SCALARS = (str, int, float, bool, type(None))
# Distribution -> keys beside `distribution`.
_KEYS = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max", "q"),
}


@dataclass(frozen=True)
class Parameter:
    """One swept key and what its values are drawn from.

    Args:
        key: Dotted key of the command line.
        distribution: One of wandb's ``constant``, ``categorical``, ``int_uniform``, ``uniform``, ``q_uniform``,
            ``log_uniform`` (bounds are natural logarithms), ``log_uniform_values``, ``q_log_uniform_values``.
        values: All values where they are listed, else empty.
        low: Least value, of numbers.
        high: Largest value.
        step: Values are its multiples; 0 for none.
    """

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0

    @property
    def is_logarithmic(self) -> bool:
        """Whether logarithms of values are uniform."""
        return "log" in self.distribution

    def draw(self, trial: Any) -> Any:
        """A value from an Optuna trial."""
        match self.distribution:
            case "constant":
                return self.values[0]
            case "categorical":
                return trial.suggest_categorical(self.key, self.values)
            case "int_uniform":
                return trial.suggest_int(self.key, int(self.low), int(self.high))
            case "q_uniform":
                # Whole steps are drawn, so that 3 x 0.1 is 0.3 and not 0.30000000000000004 for the next reader.
                return self._multiple(trial.suggest_int(self.key, *self._steps))
            case "uniform":
                return trial.suggest_float(self.key, self.low, self.high)
            case "log_uniform" | "log_uniform_values":
                return trial.suggest_float(self.key, self.low, self.high, log=True)
            case "q_log_uniform_values":
                drawn = trial.suggest_float(self.key, self.low, self.high, log=True)
                return self._multiple(round(drawn / self.step))
        raise ValueError(f"{self.key}: unknown distribution {self.distribution!r}")

    @property
    def _steps(self) -> tuple[int, int]:
        """The least and the largest multiple of the step within the bounds."""
        return math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)

    def _multiple(self, n_steps: int) -> Any:
        value = n_steps * self.step
        return int(value) if float(self.step).is_integer() else float(f"{value:.12g}")

    def grid(self) -> list[Any]:
        """All values as Optuna's grid wants them.

        Raises:
            ValueError: If there are infinitely many.
        """
        match self.distribution:
            case "constant" | "categorical":
                return list(self.values)
            case "int_uniform":
                return list(range(int(self.low), int(self.high) + 1))
            case "q_uniform":
                first, last = self._steps
                return list(range(first, last + 1))
        raise ValueError(f"{self.key}: method grid needs values or whole steps, got {self.distribution}")


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked.

    Args:
        command: What follows ``seqlit``, with ``${args}`` where the drawn values go.
        method: ``bayes``, ``random`` or ``grid``.
        metric: A key that ``fit`` logs.
        maximises: Whether more of it is better.
        parameters: Swept keys.
        min_iter: Values of the metric before the first trial may be ended; None if none is ever.
        eta: The best 1/eta of the trials go on.
    """

    command: tuple[str, ...]
    method: Method
    metric: str
    maximises: bool
    parameters: tuple[Parameter, ...]
    min_iter: int | None = None
    eta: int = 3

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """Arguments of ``seqlit`` for drawn values, as wandb's agent writes them, but for None: that is ``null``."""
        drawn = [f"--{key}={'null' if value is None else value}" for key, value in values.items()]
        return [one for word in self.command for one in (drawn if word == ARGUMENTS else [word])]

    def grid(self) -> dict[str, list[Any]]:
        """Values by key, as Optuna's grid wants them; constants are not drawn.

        Raises:
            ValueError: If a key has infinitely many.
        """
        return {one.key: one.grid() for one in self.parameters if one.distribution != "constant"}


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: In one line, if a key, a distribution or the command is not one that a local search knows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such sweep: {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold keys such as method, metric and parameters, got {type(found).__name__}")
    _known(path, "", found, _TOP, needed=("command", "method", "metric", "parameters"))
    if found["method"] not in get_args(Method):
        raise ValueError(f"{path}: method must be one of {', '.join(get_args(Method))}, got {found['method']!r}")
    metric = _mapping(path, "metric", found["metric"])
    _known(path, "metric", metric, {"name", "goal"}, needed=("name", "goal"))
    if metric["goal"] not in ("minimize", "maximize"):
        raise ValueError(f"{path}: metric.goal must be minimize or maximize, got {metric['goal']!r}")
    given = _mapping(path, "parameters", found["parameters"])
    if not given:
        raise ValueError(f"{path}: parameters must name at least one key")
    sweep = Sweep(
        command=_command(path, found["command"]),
        method=found["method"],
        metric=str(metric["name"]),
        maximises=metric["goal"] == "maximize",
        parameters=tuple(_parameter(path, str(key), _mapping(path, str(key), one)) for key, one in given.items()),
        **_early(path, found.get("early_terminate")),
    )
    if sweep.method == "grid":
        try:
            sweep.grid()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return sweep


def _known(path: Path, where: str, found: Mapping[Any, Any], keys: set[str], needed: Sequence[str] = ()) -> None:
    inside = f"{where}: " if where else ""
    unknown = sorted(str(key) for key in found if key not in keys)
    if unknown:
        raise ValueError(f"{path}: {inside}unknown key {unknown[0]!r}, known are {', '.join(sorted(keys))}")
    missing = [key for key in needed if key not in found]
    if missing:
        raise ValueError(f"{path}: {inside}{missing[0]} is missing")


def _mapping(path: Path, where: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: {where} must be a mapping, got {found!r}")
    return found


def _command(path: Path, found: Any) -> tuple[str, ...]:
    words = tuple(map(str, found)) if isinstance(found, list) else ()
    if words[:2] != _COMMAND or words.count(ARGUMENTS) != 1:
        raise ValueError(f"{path}: command must be a list [seqlit, fit, ..., {ARGUMENTS}], got {found!r}")
    macros = [word for word in words if "${" in word and word != ARGUMENTS]
    if macros:
        raise ValueError(f"{path}: command: a local search fills in {ARGUMENTS} alone, got {macros[0]}")
    return words[1:]


def _early(path: Path, found: Any) -> dict[str, int]:
    """First rung and eta of Hyperband: after ``min_iter``, ``min_iter * eta``, ... values the best 1/eta go on."""
    if found is None:
        return {}
    given = _mapping(path, "early_terminate", found)
    _known(path, "early_terminate", given, {"type", "min_iter", "max_iter", "s", "eta"}, needed=("type",))
    if given["type"] != "hyperband":
        raise ValueError(f"{path}: early_terminate.type must be hyperband, got {given['type']!r}")
    numbers = {key: given[key] for key in ("min_iter", "max_iter", "s", "eta") if key in given}
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (2 if key == "eta" else 1):
            raise ValueError(f"{path}: early_terminate.{key} must be a whole number above 0 (eta: 1), got {value!r}")
    eta = numbers.get("eta", 3)
    if ("min_iter" in numbers) == ("max_iter" in numbers) or ("s" in numbers) != ("max_iter" in numbers):
        raise ValueError(f"{path}: early_terminate needs min_iter, or max_iter and s, got {sorted(numbers)}")
    first = numbers["min_iter"] if "min_iter" in numbers else max(1, numbers["max_iter"] // eta ** numbers["s"])
    return {"min_iter": first, "eta": eta}


def _parameter(path: Path, key: str, found: Mapping[str, Any]) -> Parameter:
    keys = {"distribution", *itertools.chain.from_iterable(_KEYS.values())}
    _known(path, key, found, keys)
    name = found.get("distribution", _implied(found))
    if name not in _KEYS:
        raise ValueError(f"{path}: {key}: distribution must be one of {', '.join(_KEYS)}, got {name!r}")
    _known(path, key, found, {"distribution", *_KEYS[name]}, needed=_KEYS[name])
    if name in ("constant", "categorical"):
        values = [found["value"]] if name == "constant" else found["values"]
        if not isinstance(values, list) or not values or not all(isinstance(value, _SCALARS) for value in values):
            raise ValueError(f"{path}: {key}: values must be numbers or words, got {values!r}")
        return Parameter(key, name, values=tuple(values))
    bounds = {one: found[one] for one in _KEYS[name]}
    allowed: Callable[[Any], bool] = _is_whole if name == "int_uniform" else _is_number
    wrong = [one for one, value in bounds.items() if not allowed(value)]
    if wrong:
        what = "a whole number" if name == "int_uniform" else "a number (YAML reads 1e-3 as a word, 1.0e-3 as one)"
        raise ValueError(f"{path}: {key}: {wrong[0]} must be {what}, got {bounds[wrong[0]]!r}")
    low, high, step = bounds["min"], bounds["max"], bounds.get("q", 0)
    if (
        low >= high
        or ("q" in bounds and not 0 < step <= high - low)
        or (name.endswith("log_uniform_values") and low <= 0)
    ):
        above = ", above 0" if name.endswith("log_uniform_values") else ""
        raise ValueError(f"{path}: {key}: min must be below max{above}, and q above 0 and no wider, got {bounds}")
    if name == "log_uniform":
        low, high = math.exp(low), math.exp(high)
    return Parameter(key, name, low=low, high=high, step=step)


def _implied(found: Mapping[str, Any]) -> str:
    """The distribution that wandb takes where none is named."""
    if "value" in found:
        return "constant"
    if "values" in found:
        return "categorical"
    return "int_uniform" if all(_is_whole(found.get(key)) for key in ("min", "max")) else "uniform"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
