"""Networks under attack: called with evaluation statistics, and left exactly as they were found.

B series, T steps, C channels. A network is anything callable on ``(B, T, C)``; what is said of modules, parameters and
buffers holds for ``nn.Module``.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

Network = Callable[..., Tensor]
"""``(series (B, T, C)) -> logits``, or ``(series, mask)`` where it has a parameter called ``mask``."""

CPU_PASS_STEPS = 40_000
"""Time steps, of all series together, of a pass on a CPU. What wider passes keep for the backward leaves the caches and
is mapped anew by the allocator in every step: at 256 to 1,024 series of 300 steps PatchTST, S4, ResCNN and LSTM take
1.1 to 1.6 times as long, RNNAttention as long."""


def pass_rows(x: Tensor, most: int | None = None) -> int:
    """Series of a pass where a batch ``(B, T, C)`` may be cut: all, on a CPU equal parts of about 40,000 steps.

    Args:
        x: The series.
        most: No more than so many.
    """
    n_rows = max(1, len(x))
    if x.device.type == "cpu":
        n_passes = -(-n_rows * x.shape[1] // CPU_PASS_STEPS)
        n_rows = -(-n_rows // n_passes)
    return n_rows if most is None else min(n_rows, most)


def takes_mask(network: Network) -> bool:
    """Whether the network, or the ``forward`` of a module, has a parameter called ``mask``.

    A wrapper that hands masks on answers for the network inside, by an attribute ``takes_mask`` of its own.
    """
    answer = getattr(network, "takes_mask", None)
    if isinstance(answer, bool):
        return answer
    called = network.forward if isinstance(network, nn.Module) else network
    schema = getattr(called, "schema", None)  # a TorchScript method has no Python signature
    if schema is not None:
        return any(argument.name == "mask" for argument in schema.arguments)
    try:
        return "mask" in inspect.signature(called).parameters
    except (TypeError, ValueError):
        return False


def taken_mask(network: Network, mask: Tensor | None, role: str = "network") -> Tensor | None:
    """The mask as a network takes it: None for one that takes none, if no series is padded.

    Read from the device where the network takes none, so a loop asks before it begins.

    Args:
        network: Any network.
        mask: ``(B, T) bool`` or None.
        role: What the network is, for the error.

    Raises:
        ValueError: If series are padded and the network takes no mask: it would read padding as series.
    """
    if mask is None or takes_mask(network):
        return mask
    padded = int((~mask.all(dim=1)).sum())
    if padded:
        name = getattr(network, "__name__", type(network).__name__)
        raise ValueError(
            f"the {role} {name} takes no mask, and {padded} of {len(mask)} series are padded: give series of one "
            "length, or a network with a parameter called mask"
        )
    return None


def call(network: Network, x: Tensor, mask: Tensor | None) -> Tensor:
    """The network's output, with the mask where there is one and the network takes it.

    Raises:
        ValueError: As :func:`taken_mask`.
    """
    taken = taken_mask(network, mask)
    return network(x) if taken is None else network(x, mask=taken)


def modules_of(networks: Iterable[Network]) -> Iterator[nn.Module]:
    """Every module of the networks once, those of the programs that a :class:`Victim` holds included.

    Args:
        networks: Any networks; what is no ``nn.Module`` has none.
    """
    seen: set[int] = set()
    waiting = list(networks)
    for network in waiting:
        for module in network.modules() if isinstance(network, nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                waiting += getattr(module, "unregistered_programs", ())
                yield module


def _is_recurrent(module: nn.Module) -> bool:
    """Whether it calls cuDNN's recurrent layers: a layer, one in TorchScript, or an exported graph with one."""
    if isinstance(module, torch.fx.GraphModule):
        return any(str(node.target).startswith(("aten.lstm", "aten.gru", "aten.rnn")) for node in module.graph.nodes)
    return isinstance(module, nn.RNNBase) or getattr(module, "original_name", None) in ("LSTM", "GRU", "RNN")


@contextmanager
def frozen(networks: Iterable[Network], device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradient for any parameter; afterwards, also after an exception, everything as before.

    Restored are the train flag of every submodule, ``requires_grad`` of every parameter, and every buffer that was
    written, replaced, or None and filled, also in the program of a :class:`Victim`. ``.grad`` is never touched.
    Autograd works inside even where the caller is in ``no_grad`` or ``inference_mode``. The backward of cuDNN's
    recurrent layers refuses evaluation mode: cuDNN is off while a network on CUDA contains one.

    Args:
        networks: Classifier, detectors, surrogate; one may occur twice.
        device: Where the series lie.
    """
    modules = list(modules_of(networks))
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        if device.type == "cuda" and any(map(_is_recurrent, modules)):
            undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        for module in modules:
            # set flag by flag: train() and eval() may be overridden to do more, such as merging weights
            if getattr(module, "training", False):  # a frozen TorchScript module has no such flag
                undo.callback(setattr, module, "training", True)
                module.training = False
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    undo.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            for name, buffer in module.named_buffers(recurse=False):
                undo.callback(_restore_buffer, module, name, buffer, buffer.detach().clone())
            buffers = module._buffers
            if isinstance(buffers, dict):  # TorchScript keeps its own, and none of them is None
                for name in [name for name, buffer in buffers.items() if buffer is None]:
                    undo.callback(buffers.__setitem__, name, None)
        yield


@torch.no_grad()
def _restore_buffer(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    if getattr(module, name) is not buffer:
        setattr(module, name, buffer)
    buffer.copy_(value)


def logits_of(network: Network, x: Tensor, mask: Tensor | None = None, *, batch_size: int = 1024) -> Tensor:
    """Logits of any number of series with evaluation statistics and without a graph.

    Args:
        network: Classifier or detector.
        x: ``(B, T, C) float``.
        mask: ``(B, T) bool`` or None.
        batch_size: Series a pass, at least 1.

    Returns:
        What the network returns, joined along the first axis.

    Raises:
        ValueError: If there is no series, or series are padded and the network takes no mask.
    """
    if len(x) == 0:
        raise ValueError("x must hold at least one series, got none")
    mask = taken_mask(network, mask)
    with frozen([network], x.device), torch.no_grad():
        chunks = range(0, len(x), batch_size)
        masks = [None if mask is None else mask[start : start + batch_size] for start in chunks]
        return torch.cat(
            [call(network, x[start : start + batch_size], part) for start, part in zip(chunks, masks, strict=True)]
        )


def confidence(logits: Tensor) -> Tensor:
    """``|z|`` of one logit, else the gap between the two largest: ``(...)``, at least 0, in units of the logits.

    The gap does not change when all logits are shifted, and equals ``|z|`` where the two logits are ``(0, z)``.
    """
    if logits.shape[-1] == 1:
        return logits[..., 0].abs()
    first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def calibrate(model: Network, x: Tensor, mask: Tensor | None = None, *, batch_size: int = 1024) -> float:
    """Scale of a network's logits: the median of :func:`confidence` over clean series.

    Objectives divide logits by it, so that ``alpha`` means the same whatever the networks' confidence.

    Args:
        model: Classifier or detector.
        x: ``(B, T, C) float`` clean series, of the validation split.
        mask: ``(B, T) bool`` or None.
        batch_size: Series a pass.

    Returns:
        The median, above 0.

    Raises:
        ValueError: If there is no series, or the median is 0 or not finite: the network says nothing.

    Source: spec of the concealed attack, section 13; the issue's paragraph on confident victims.
    """
    scale = confidence(logits_of(model, x, mask, batch_size=batch_size)).double().quantile(0.5).item()
    if not 0 < scale < float("inf"):
        raise ValueError(f"the median confidence of the network on {len(x)} series must be above 0, got {scale}")
    return scale
