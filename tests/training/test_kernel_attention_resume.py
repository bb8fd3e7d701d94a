"""A fit of KernelAttentionAggregator that goes on from the checkpoint of any epoch ends as the unbroken one."""

from functools import partial

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.callbacks import RandomState
from lightning_modules.context import Ema, EveryKSteps, KernelAttention, Live, Mean, Static
from lightning_modules.losses import CoLES
from lightning_modules.networks import RecurrentEncoder

ENCODER_EPOCHS, EPOCHS = 2, 4
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*smaller than the logging",
        "ignore:.*in eval mode at the start",
        "ignore:The dirpath has changed",  # the resumed fit writes elsewhere than the unbroken one
        "ignore:Checkpoint directory .* exists and is not empty",
    ),
]
# A tuned encoder draws noise, so random numbers matter; a learning rate at which the best epoch need not be the last.
GRU = partial(RecurrentEncoder, d_model=8, d_embedding=4, noise=0.1)
MODES = {
    "frozen": {},
    "static": {"tune_encoder": True, "refresh": Static()},
    "every_2_steps": {"tune_encoder": True, "refresh": EveryKSteps(2)},
    "ema": {"tune_encoder": True, "refresh": Ema(0.7)},
    "live": {"tune_encoder": True, "refresh": Live(3)},
}


@pytest.fixture(scope="module")
def make_data(tmp_path_factory, event_data):
    folder = tmp_path_factory.mktemp("events")
    regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.2).write(folder)
    return partial(event_data, folder, batch_size=8)


def fit(make_data, mode, runs, resume=None):
    seed_everything(1, verbose=False)
    data = make_data()
    module = KernelAttentionAggregator(
        vocabulary_sizes=data.vocabulary_sizes,
        n_numeric=data.n_numeric,
        median_gap=data.median_gap,
        encoder=GRU,
        encoder_objective=CoLES,
        encoder_epochs=ENCODER_EPOCHS,
        wide_encoder=GRU,
        aggregators={"mean": Mean, "kernel": KernelAttention},
        aggregator_epochs=EPOCHS - ENCODER_EPOCHS,
        encoder_optimizer=partial(torch.optim.Adam, lr=0.1),
        **MODES[mode],
    )
    if resume is not None:
        torch.manual_seed(12345)  # random numbers must come from the checkpoint
    checkpoints = ModelCheckpoint(
        dirpath=runs, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RandomState(), checkpoints],
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return torch.load(runs / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_fits_end_as_the_unbroken_one(make_data, tmp_path, mode, assert_same):
    unbroken = fit(make_data, mode, tmp_path / "unbroken")
    assert set(unbroken["contexts"]["banks"]) == ({"shared"} if mode == "frozen" else {"mean", "kernel"})
    assert set(unbroken["best_encoders"]) == {"encoder", "wide"}
    for epoch in range(EPOCHS - 1):
        resumed = fit(make_data, mode, tmp_path / f"after {epoch}", tmp_path / "unbroken" / f"epoch={epoch}.ckpt")
        for part in ("state_dict", "optimizer_states", "contexts", "best_encoders", "epoch", "global_step"):
            assert_same(unbroken[part], resumed[part], f"after epoch {epoch}: {part}")
    before = torch.load(tmp_path / "unbroken" / f"epoch={EPOCHS - 2}.ckpt", weights_only=True)["state_dict"]
    name = "model.branches.kernel.aggregator.phi.layers.0.weight"
    assert not torch.equal(before[name], unbroken["state_dict"][name]), "nothing was left to train: this proves nothing"
