"""Random streams in the checkpoint, so that a resumed run draws what the unbroken run would have drawn."""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from lightning_modules.collectives import gather_objects, rank


class RandomState(Callback):
    """Carries the generators of Python, NumPy, torch and CUDA of every process as tensors and plain values.

    They are put back when training starts, after everything that a start itself may draw. A process that the
    checkpoint does not know, or that starts afresh, draws from the seed of the run plus its rank, from all of them:
    processes drop out different units, and the first draws as if this callback were not there. Checkpoints stay
    loadable with ``weights_only=True``.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator of every process now: a collective, as Lightning builds it in all of them."""
        return {"processes": gather_objects(_generators())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict["processes"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the streams where the checkpoint left them."""
        restored, self._restored = self._restored, []
        if rank() < len(restored):
            _restore(restored[rank()])
        elif rank() > 0:
            _seed(torch.initial_seed() + rank())


def _seed(seed: int) -> None:
    """Begin all streams that are kept anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  it takes 32 bits
    torch.manual_seed(seed)  # CUDA's too


def _generators() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    # The global NumPy generator is what third-party samplers draw from, so it is the one to keep.
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        # of the process' own device: asking for another's would take memory there
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def _restore(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": numpy_state["bit_generator"],
            "state": {"key": np.array(numpy_state["key"], dtype=np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
