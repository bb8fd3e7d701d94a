"""What many processes tell each other: sums, rows, states, and what one computes for all.

Every function is a collective: all processes call it, in the same order, or all wait. Without a process group, or in
a group of one, nothing is sent and values come back as they are.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

_T = TypeVar("_T")
_LARGE = 1 << 20  # elements; larger gradients are sent as they lie, smaller ones joined
_PIECE = 1 << 24  # elements of a table that are sent at once


def n_processes() -> int:
    """Processes of the group, 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process, 0 without a group."""
    return distributed.get_rank() if n_processes() > 1 else 0


def share(weight: Tensor | float, *, device: torch.device | str = "cpu") -> Tensor | float:
    """Factor that turns local means into the mean over all processes, once gradients are averaged.

        L = sum_r w_r L_r / sum_r w_r = (1/R) sum_r s_r L_r,    s_r = R w_r / sum_r w_r

    Args:
        weight: What the local mean was taken over, w_r: positions, rows; 0 in a process that has none.
        device: Where the sum is made, that of the model.

    Returns:
        s_r; exactly 1.0 in a single process, 0 everywhere if all weights are.
    """
    if n_processes() == 1:
        return 1.0
    own = torch.as_tensor(weight, dtype=torch.float64, device=device)
    total = own.detach().clone()
    distributed.all_reduce(total)
    return torch.where(total > 0, own * n_processes() / total, torch.zeros_like(total)).to(torch.float32)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over processes in place of each gradient; where a process has none, it counts as 0.

    A parameter that no process has a gradient for keeps none.

    Args:
        parameters: The same, in the same order, in every process; those that need no gradient are left out.
    """
    world = n_processes()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world == 1 or not trained:
        return
    has = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.float32)
    has = has.to(trained[0].device)
    distributed.all_reduce(has)
    trained = [parameter for parameter, somewhere in zip(trained, has.tolist(), strict=True) if somewhere]
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.numel() >= _LARGE and parameter.grad.is_contiguous():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        else:
            small.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in small.values():
        joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(joined)
        joined /= world
        for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def sum_in_place(table: Tensor, device: torch.device | str) -> Tensor:
    """Put the sum over processes in place of a table that each filled a part of; exact where all but one hold 0.

    Args:
        table: The same shape in every process, contiguous.
        device: Where sums are made, that of the model: a table that lies elsewhere is sent in pieces.

    Returns:
        The table itself.
    """
    if n_processes() > 1:
        for piece in table.view(-1).split(_PIECE):
            sent = piece.to(device)
            distributed.all_reduce(sent)
            piece.copy_(sent)
    return table


def gather_objects(own: _T) -> list[_T]:
    """What every process holds, by rank; tensors should be on the CPU. Meant for states and reports, not for steps."""
    if n_processes() == 1:
        return [own]
    found: list[Any] = [None] * n_processes()
    distributed.all_gather_object(found, own)
    return found


def gather_rows(own: Tensor) -> tuple[Tensor, slice]:
    """Rows of every process, joined by rank, with gradients for those of this process.

    A loss of all rows is computed by every process alike. Each then holds the gradient with respect to its own rows,
    and the sum over processes is the gradient of the loss: with gradients averaged, multiply the loss by
    :func:`n_processes`.

    Args:
        own: ``(B_r, ...)``, B_r may differ and be 0; the other sizes may not.

    Returns:
        ``(sum_r B_r, ...)`` and the place of the own rows in it.
    """
    world = n_processes()
    if world == 1:
        return own, slice(0, len(own))
    sizes = [torch.zeros((), dtype=torch.int64, device=own.device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor(len(own), device=own.device))
    lengths = [int(size) for size in sizes]
    padded = own.new_zeros((max(lengths), *own.shape[1:]))
    padded[: len(own)] = own.detach()
    if padded.dtype == torch.bool:
        others = [row.bool() for row in _all_gather(padded.to(torch.uint8))]
    else:
        others = _all_gather(padded)
    begin = sum(lengths[: rank()])
    rows = [part[:length] for part, length in zip(others, lengths, strict=True)]
    rows[rank()] = own
    return torch.cat(rows), slice(begin, begin + len(own))


def _all_gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(n_processes())]
    distributed.all_gather(found, tensor.contiguous())
    return found


def from_first(compute: Callable[[], _T]) -> _T:
    """What the first process computes, in every process; an error there is raised everywhere, so that nobody waits.

    Args:
        compute: Called in the first process alone.

    Raises:
        Exception: Whatever ``compute`` raised, of the same type where it can be made from a message.
    """
    if n_processes() == 1:
        return compute()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = compute()
        except Exception as error:
            distributed.broadcast_object_list([None, _plain(error)], src=0)
            raise
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def kept_by_first(compute: Callable[[], _T]) -> _T | None:
    """What the first process computes, there alone and None elsewhere; the others wait for it, and raise its error."""
    kept: list[_T] = []
    from_first(lambda: kept.append(compute()))
    return kept[0] if kept else None


def _plain(error: Exception) -> Exception:
    """The error again from its message alone: what it holds beside may not be sent."""
    try:
        if type(error).__module__ == "builtins":
            return type(error)(str(error))
    except TypeError:  # wants more than a message
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def same_everywhere(module: nn.Module) -> None:
    """Put weights and buffers of the first process into every process."""
    if n_processes() == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_contiguous():
                distributed.broadcast(tensor.detach(), src=0)
            else:
                sent = tensor.detach().contiguous()
                distributed.broadcast(sent, src=0)
                tensor.copy_(sent)
