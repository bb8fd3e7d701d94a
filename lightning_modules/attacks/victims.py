"""Victims from anywhere: loading, pre-processing inside the graph, and the refusal of probabilities.

B series, T steps, C channels, K classes. Weights are read with ``weights_only`` and cannot run code. The file of a
program (TorchScript or ``torch.export``) can: it is read only where the caller says that it is trusted.
"""

import importlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from lightning_modules.attacks.frozen_networks import Network, call, frozen, modules_of, takes_mask

AFFINE = ("Add", "Div", "Mean", "Mul", "Neg", "Rsub", "Sub")
"""Names of nodes that scale, shift or average what comes from one other node alone; ``Addmm`` is a layer."""

SHAPE_ONLY = (
    *("Alias", "AsStrided", "Cat", "Clamp", "Clone", "Expand", "Permute", "Reshape", "Select", "Slice", "Split"),
    *("Squeeze", "Stack", "TBackward", "ToCopy", "Transpose", "Unbind", "Unsafe", "Unsqueeze", "UnsafeView", "View"),
)
"""Beginnings of the names of autograd nodes that move values about (or clip them) without turning them into others."""

PROBES = (1.0, -1.0, 10.0, -10.0, 100.0, -100.0)
"""Factors of the series that show whether a single output can leave 0..1."""


Role = Literal["classifier", "surrogate", "detector"]


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Whether autograd reaches a sigmoid or softmax behind nodes that move, scale, shift or average its values."""
    node = output.grad_fn
    while node is not None:
        if node.name().startswith(("Sigmoid", "Softmax")):
            return True
        sources = [source for source, _ in node.next_functions if source is not None]
        # not the product of a gate and a value
        affine = node.name().partition("Backward")[0] in AFFINE and len(sources) == 1
        if not (affine or node.name().startswith(SHAPE_ONLY)) or not sources:
            return False
        node = sources[0]
    return False


def refuse_probabilities(
    network: Network, x: Tensor, mask: Tensor | None = None, *, logits: Tensor | None = None
) -> None:
    """Raise where a network returns probabilities in place of logits.

    Outputs inside 0..1 are suspicious, not proof: an untrained network gives small logits. They are probabilities if
    they never leave 0..1 over series scaled by -100..100 and noise as large and autograd finds a sigmoid or softmax
    behind them, scaled, shifted or averaged at most; several columns also if every row sums to 1, one column if it
    comes within 0.01 of both 0 and 1.

    Args:
        network: Classifier or detector.
        x: ``(B, T, C) float`` series; the first two are probed, in one pass.
        mask: ``(B, T) bool`` or None.
        logits: ``(B, K') float`` outputs for ``x`` where already known.

    Raises:
        ValueError: If the outputs are probabilities.
    """
    if logits is not None and not _inside_unit_interval(logits):
        return
    x, mask = x[:2], None if mask is None else mask[:2]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    points = torch.cat([pattern * factor for factor in PROBES for pattern in (x, noise)])
    with frozen([network], x.device):
        repeated = None if mask is None else mask.repeat(2 * len(PROBES), 1)
        output = call(network, points.detach().clone().requires_grad_(), repeated)
        ends_in_sigmoid = _ends_in_sigmoid(output)
        found = output.detach()
    # A softmax by hand overflows where series are large: what it gives there says nothing.
    found = found[found.isfinite().all(dim=1)]
    if not len(found) or not _inside_unit_interval(found):
        return
    if found.shape[1] > 1:
        # 1e-3: half precision sums to 1 within about 5e-4
        proved = bool(((found.sum(dim=1) - 1).abs() < 1e-3).all()) and bool((found != found[:1]).any())
    else:
        proved = bool(found.min() < 0.01) and bool(found.max() > 0.99)
    probabilities = ends_in_sigmoid or proved
    if probabilities:
        raise ValueError(
            f"the network returns probabilities (all {found.numel()} probed outputs in 0..1); give logits: drop its "
            "last sigmoid or softmax"
        )


def _inside_unit_interval(output: Tensor) -> bool:
    return bool(((output >= 0) & (output <= 1)).all())


class Victim(nn.Module):
    """A network with its own pre-processing inside the graph, so that an attack differentiates through both.

    The network is put into evaluation mode, which a victim never leaves. A program whose train mode is part of its
    graph (exported or traced so) has no such switch: see :func:`check_logits`.

    Args:
        network: ``(series) -> logits`` or ``(series, mask) -> logits``.
        preprocessing: ``(B, T, C) -> what the network takes``, differentiable; None for none.
        channels_first: Hand the network ``(B, C, T)``; the pre-processing still gets ``(B, T, C)``.

    Raises:
        ValueError: At a call, if series are padded and the network takes no mask.
    """

    def __init__(
        self, network: Network, preprocessing: Callable[[Tensor], Tensor] | None = None, *, channels_first: bool = False
    ) -> None:
        super().__init__()
        # A program is no child: it lacks the flags that everybody asks children for, or refuses to have them set.
        self.unregistered_programs = (network,) if _is_program(network) else ()
        self._network = None if self.unregistered_programs else network
        if isinstance(self._network, nn.Module):
            self._network.eval()
        for module in modules_of(self.unregistered_programs):
            if getattr(module, "training", False):  # eval() of an exported program raises
                module.training = False
        self.preprocessing = preprocessing
        self.channels_first = channels_first

    @property
    def network(self) -> Network:
        """The network as it was given."""
        found = self.unregistered_programs[0] if self.unregistered_programs else self._network
        assert found is not None
        return found

    @property
    def takes_mask(self) -> bool:
        """Whether the network inside takes a mask."""
        return takes_mask(self.network)

    def train(self, mode: bool = True) -> "Victim":
        """Nothing: a victim stays in evaluation mode."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Victim":
        for program in self.unregistered_programs:
            if isinstance(program, nn.Module):
                program._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, 1)`` or ``(B, K)``; the mask goes to networks that take one."""
        prepared = series if self.preprocessing is None else self.preprocessing(series)
        return call(self.network, prepared.transpose(1, 2) if self.channels_first else prepared, mask)


def _is_program(network: Network) -> TypeGuard[nn.Module]:
    return isinstance(network, torch.jit.ScriptModule | torch.fx.GraphModule)


def load_victim(
    *,
    class_path: str | None = None,
    init_args: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    program: str | Path | None = None,
    trusted: bool = False,
    preprocessing: Callable[[Tensor], Tensor] | str | None = None,
    channels_first: bool = False,
    probe: Tensor | None = None,
) -> Victim:
    """A victim by class path with its weights, or from the file of a program.

    Args:
        class_path: Import path of an ``nn.Module``, such as ``package.module.Class``.
        init_args: Its arguments.
        weights: File of its ``state_dict``, or of a checkpoint with one under ``"state_dict"`` or ``"model"``, also of
            a ``TimeSeriesClassifier`` whose ``network`` it is; read with ``weights_only``, so that the file cannot run
            code.
        program: File of ``torch.export`` (``.pt2``) or of TorchScript (any other ending), in place of a class.
        trusted: That the file of the program may run code, as a script may: torch unpickles parts of a ``.pt2`` and
            evaluates expressions in it, and TorchScript is code. Weights of a class need no such trust.
        preprocessing: See :class:`Victim`; or the import path of such a function.
        channels_first: See :class:`Victim`.
        probe: ``(B, T, C) float`` series on which the outputs are checked for probabilities and for their shape.

    Raises:
        ValueError: If neither or both of class and program are given, a program is not trusted, the class is not an
            ``nn.Module``, a file is missing or cannot be read, the weights do not fit, the outputs are not logits, or a
            program was exported or traced in train mode: a ``.pt2`` by the example in its file, others by the probe.
    """
    if (class_path is None) == (program is None):
        raise ValueError(f"give either class_path or program, got {class_path!r} and {program!r}")
    if program is not None:
        if init_args or weights:
            raise ValueError("a program brings its arguments and weights: give init_args and weights with class_path")
        if trusted is not True:
            raise ValueError(
                f"the file of a program can run code: give trusted: true if {program} comes from where you trust, got "
                f"{trusted!r}; a class_path with weights needs no trust"
            )
        network: nn.Module = _load_program(Path(program))
    else:
        assert class_path is not None
        network = _instance(class_path, init_args or {})
        if weights is not None:
            _load_weights(network, Path(weights))
    if isinstance(preprocessing, str):
        preprocessing = _imported(preprocessing)
    victim = Victim(network, preprocessing, channels_first=channels_first)
    if probe is not None:
        check_logits(victim, probe)
    return victim


def check_logits(network: Network, x: Tensor, mask: Tensor | None = None) -> int:
    """Number of classes of a network that returns logits.

    Args:
        network: Classifier.
        x: ``(B, T, C) float`` series; at most 8 are used.
        mask: ``(B, T) bool`` or None.

    Returns:
        K, 2 for one logit.

    Raises:
        ValueError: If the output is not ``(B, 1)`` or ``(B, K)``, is not finite or holds probabilities, or the network
            is or holds a program in train mode, of which a call writes a buffer or two equal calls differ.
    """
    x, mask = x[:8], None if mask is None else mask[:8]
    with frozen([network], x.device), torch.no_grad():
        logits = call(network, x.clone(), mask)
    check_shape(logits, len(x), "classifier")
    refuse_train_mode(network, x, mask)
    check_outputs(network, x, mask, logits, "classifier")
    return max(2, logits.shape[1])


def refuse_train_mode(network: Network, x: Tensor, mask: Tensor | None = None) -> None:
    """Raise where a network is or holds a program whose graph was saved in train mode; at once where it holds none.

    Args:
        network: Classifier or detector.
        x: ``(B, T, C) float`` series, passed through twice.
        mask: ``(B, T) bool`` or None.

    Raises:
        ValueError: If a call writes a buffer of the program or two equal calls differ.
    """
    _refuse_train_mode(network, x.device, lambda: call(network, x.clone(), mask))


def check_shape(logits: Any, n_series: int, role: Role) -> None:
    """Refuse what cannot be logits.

    Args:
        logits: Output of a network.
        n_series: B.
        role: ``"classifier"`` or ``"surrogate"``, ``(B, 1)`` or ``(B, K) float``, or ``"detector"``, ``(B, 1) float``.

    Raises:
        ValueError: If it is no tensor or has another shape.
    """
    width = "1" if role == "detector" else "1 or n_classes"
    fits = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == n_series
    if not fits or logits.shape[1] < 1 or (role == "detector" and logits.shape[1] != 1):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"a {role} must return logits of shape ({n_series}, {width}), got {got}")


def check_outputs(
    network: Network, x: Tensor, mask: Tensor | None, logits: Tensor, role: Role, labels: Tensor | None = None
) -> None:
    """Refuse a network by its outputs on clean series.

    Args:
        network: Classifier or detector.
        x: ``(B, T, C) float`` clean series.
        mask: ``(B, T) bool`` or None.
        logits: ``(B, K') float`` for them.
        role: What the network is, for the error.
        labels: ``(B,) int64`` that must be among the classes; None where there is nothing to compare.

    Raises:
        ValueError: If a label lies beyond the classes, a logit is not finite, or they are probabilities.
    """
    if labels is not None:
        check_labels(logits, labels, role)
    if not bool(logits.isfinite().all()):
        raise ValueError(f"the {role} returns a logit that is not finite on {len(x)} clean series")
    refuse_probabilities(network, x, mask, logits=logits)


def check_labels(logits: Tensor, labels: Tensor, role: Role) -> None:
    """Refuse labels beyond the classes, which would index beyond the logits.

    Args:
        logits: ``(B, 1)`` or ``(B, K) float``.
        labels: ``(B,) int64``.
        role: Whose logits they are, for the error.

    Raises:
        ValueError: If a label does not lie in 0..K-1, of one logit in 0..1.
    """
    n_classes = max(2, logits.shape[1])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"labels must lie in 0..{n_classes - 1} for this {role}, got {low}..{high}")


def _refuse_train_mode(network: Network, device: torch.device, forward: Callable[[], Any]) -> None:
    """Raise where calls write a buffer of the programs of a network, or two equal calls differ: batch norm, dropout."""
    programs = [module for module in modules_of([network]) if _is_program(module)]
    if not programs:
        return
    with frozen([network], device), torch.no_grad():
        before = [{name: buffer.clone() for name, buffer in program.named_buffers()} for program in programs]
        first, second = forward(), forward()
        written = [
            name
            for program, buffers in zip(programs, before, strict=True)
            for name, buffer in program.named_buffers()
            if not torch.equal(buffer, buffers[name])
        ]
    # 1e-3: a GPU adds in any order; dropout changes more
    differ = isinstance(first, Tensor) and bool((first - second).norm() > 1e-3 * first.norm())
    if written or differ:
        found = f"a call writes its buffer {written[0]!r}" if written else "two equal calls differ"
        raise ValueError(f"the program was saved in train mode, {found}: save it from network.eval()")


def _instance(class_path: str, init_args: Mapping[str, Any]) -> nn.Module:
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {class_path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"class_path must name an nn.Module, got {class_path!r}")
    try:
        return found(**init_args)
    except TypeError as error:
        raise ValueError(f"{class_path} does not take init_args {dict(init_args)}: {error}") from error


def _imported(path: str) -> Callable[[Tensor], Tensor]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"preprocessing must be the import path of a function, got {path!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"preprocessing must be the import path of a function, got {path!r}")
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        loaded = torch.load(_existing(path), map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a file of plain weights (read with weights_only): {first}") from error
    state = loaded
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            state = loaded[key]
            break
    names = network.state_dict().keys()
    if isinstance(state, dict) and state.keys() != names:
        # A checkpoint of a LightningModule that holds the network, as TimeSeriesClassifier does, names it in front.
        inside = {key[8:]: value for key, value in state.items() if str(key).startswith("network.")}
        state = inside if inside and inside.keys() == names else state
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        found = " ".join(str(error).split())
        raise ValueError(f"the weights of {path} do not fit {type(network).__name__}: {found}") from error


def _why(path: Path, error: Exception) -> str:
    """What a file holds instead of a program."""
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(name.endswith("/data.pkl") for name in names) and not any("/code/" in name for name in names):
        return (
            "torch.save wrote weights or a pickled object; save the network by torch.export.save or torch.jit.save, or "
            "give its class_path with weights"
        )
    return str(error).splitlines()[0]


def _load_program(path: Path) -> nn.Module:
    _existing(path)
    arguments, named = None, {}
    try:
        if path.suffix == ".pt2":
            exported = torch.export.load(path)
            program = exported.module()
            arguments, named = exported.example_inputs or (None, {})
        else:
            program = torch.jit.load(path, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} holds no program of torch.export or TorchScript: {_why(path, error)}") from error
    if arguments is not None:
        _refuse_train_mode(program, torch.device("cpu"), lambda: program(*arguments, **named))
    return program
