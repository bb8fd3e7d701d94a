"""A loss that is not finite in one process ends all of them at the same step, and none waits."""

from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks import NaNGuard
from lightning_modules.collectives import rank

WORLD, SICK, BAD = 3, 1, 2


class Toy(LightningModule):
    """A process's loss is not finite in one batch; with ``world`` of them at once that of all."""

    def __init__(self, sick: list[int]) -> None:
        super().__init__()
        self.layer, self.sick = nn.Linear(2, 1), sick

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["x"]).square().mean()
        return loss * float("nan") if batch_idx == BAD and rank() in self.sick else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, sick):
    loader = DataLoader([{"x": torch.full((2,), 10.0 * rank_of() + row)} for row in range(5)], batch_size=1)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=WORLD,
        strategy="replicated",
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[NaNGuard()],
    )
    toy = Toy(sick)
    try:
        trainer.fit(toy, loader)
    except ValueError as error:
        return {"line": str(error), "finite": bool(torch.isfinite(toy.layer.weight).all())}
    return {"line": "", "finite": True}


def rank_of() -> int:
    """Before there is a group."""
    import os

    return int(os.environ["RANK"])


@pytest.mark.parametrize("sick", [[SICK], list(range(WORLD))])
def test_every_process_stops_at_the_step_of_one(in_processes, tmp_path, sick):
    for number, found in enumerate(in_processes(WORLD, __file__, "fit", str(tmp_path), sick)):
        assert found["line"].startswith(
            f"the loss is not finite in process {', '.join(map(str, sick))} at epoch 0, batch 2"
        )
        assert found["finite"], "the verdict falls before the step"
        assert (f"nonfinite_batch_rank{number}.pt" in found["line"]) == (number in sick)
    assert {path.name for path in tmp_path.iterdir()} == {f"nonfinite_batch_rank{number}.pt" for number in sick}
    for number in sick:
        kept = torch.load(Path(tmp_path) / f"nonfinite_batch_rank{number}.pt", weights_only=True)
        assert torch.equal(kept["batch"]["x"], torch.full((1, 2), 10.0 * number + BAD))
        assert kept["rank"] == number
