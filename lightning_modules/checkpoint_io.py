"""Checkpoints that are whole or not there, whatever moment a run dies in."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from lightning_modules.run_folder import drafted


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a draft beside the checkpoint, has the disk hold it, and renames it.

    Lightning's own writer makes the whole file in memory first and moves it from the folder of temporary files, which
    across file systems is a copy that can be cut off. A path with a scheme, such as ``s3://``, is left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Args:
            checkpoint: Whatever ``torch.save`` takes; from our modules and callbacks tensors and plain values.
            path: Of the file.
            storage_options: Must be None.

        Raises:
            TypeError: If there are storage options.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Through a stream of Python, a full disk is an OSError that says so; torch's own has a RuntimeError for it.
        with drafted(Path(path)) as draft, draft.open("wb") as stream:
            torch.save(checkpoint, stream)
