"""Random streams in the checkpoint, so that a resumed run draws what the unbroken run would have drawn."""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class RandomState(Callback):
    """Carries the generators of Python, NumPy, torch and CUDA as tensors and plain values.

    They are put back when training starts, after everything that a start itself may draw. Checkpoints stay loadable
    with ``weights_only=True``.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator now."""
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
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the streams where the checkpoint left them."""
        state, self._restored = self._restored, None
        if state is None:
            return
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
        if len(state["cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all([words.cpu() for words in state["cuda"]])
