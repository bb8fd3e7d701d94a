"""NaNGuard: it stops at the very batch, before the weights are touched, in automatic and manual optimisation."""

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks import NaNGuard

BAD = 3  # the batch that is planted


class Toy(LightningModule):
    """Squares of a linear map; the batch BAD gives a loss, or only a gradient, that is not finite."""

    def __init__(self, *, manual: bool, fault: str) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.fault = fault
        self.layer, self.other = nn.Linear(2, 1), nn.Linear(2, 1)
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())
        loss = self.layer(batch["x"]).square().mean()
        if batch_idx == BAD and self.fault == "gradient":
            loss = loss + (0 * self.layer.bias).abs().sqrt().sum()  # 0, with a slope of inf * 0
        elif batch_idx == BAD and self.fault != "none":
            loss = loss * float(self.fault)
        if self.automatic_optimization:
            return loss
        for optimizer, one in zip(self.optimizers(), (self.other(batch["x"]).mean() ** 2, loss), strict=True):
            optimizer.zero_grad()
            self.manual_backward(one)
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.other, self.layer)]


def fit(tmp_path, toy, **arguments):
    rows = [{"x": torch.full((2,), float(number)), "name": f"row {number}"} for number in range(6)]
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[NaNGuard()],
        **arguments,
    )
    trainer.fit(toy, DataLoader(rows, batch_size=1))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec")
class TestGuard:
    @pytest.mark.parametrize("manual", [False, True])
    @pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "gradient"])
    def test_the_batch_is_kept_and_the_weights_are_those_before_the_step(self, tmp_path, manual, fault):
        toy = Toy(manual=manual, fault=fault)
        what = "a gradient" if fault == "gradient" else "the loss"
        with pytest.raises(
            ValueError, match=rf"^{what} is not finite at epoch 0, batch 3, step \d+; gradients: .*"
        ) as raised:
            fit(tmp_path, toy)
        assert "\n" not in str(raised.value)
        kept = torch.load(tmp_path / "nonfinite_batch.pt", weights_only=True)
        assert torch.equal(kept["batch"]["x"], torch.full((1, 2), 3.0))
        assert kept["batch"]["name"] == ["row 3"]
        assert (kept["batch_idx"], kept["epoch"], kept["rank"]) == (BAD, 0, 0)
        assert kept["step"] == (2 * BAD if manual else BAD)
        assert kept["parameters"] == []
        assert "layer.bias" in kept["gradients"]
        assert not any(name.startswith("other") for name in kept["gradients"])
        assert torch.equal(toy.layer.weight, toy.seen[BAD])
        assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_batch.pt"]

    @pytest.mark.parametrize("accumulated", [2, 4])
    def test_amid_gathered_gradients_the_batch_is_still_the_one(self, tmp_path, accumulated):
        with pytest.raises(ValueError, match="batch 3"):
            fit(tmp_path, Toy(manual=False, fault="nan"), accumulate_grad_batches=accumulated)
        assert torch.load(tmp_path / "nonfinite_batch.pt", weights_only=True)["batch_idx"] == BAD

    @pytest.mark.parametrize("manual", [False, True])
    def test_a_sound_fit_is_left_alone(self, tmp_path, manual):
        toy = Toy(manual=manual, fault="none")
        fit(tmp_path, toy)
        assert len(toy.seen) == 6
        assert not list(tmp_path.iterdir())
