"""A fit of KernelAttentionAggregator that goes on from the checkpoint of any epoch ends as the unbroken one."""

from functools import partial

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices
from datamodules.event_targets import CalendarDates, NoEventWithin
from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.callbacks import RandomState
from lightning_modules.context import Ema, EveryKSteps, KernelAttention, Live, Mean, Static
from lightning_modules.losses import CoLES
from lightning_modules.networks import RecurrentEncoder

ENCODER_EPOCHS, EPOCHS = 2, 4
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging",
    "ignore:.*in eval mode at the start",
    "ignore:The dirpath has changed",  # the resumed fit writes elsewhere than the unbroken one
    "ignore:Checkpoint directory .* exists and is not empty",
)
# A tuned encoder draws noise, so random numbers matter; a learning rate at which the best epoch need not be the last.
GRU = partial(RecurrentEncoder, d_model=8, d_embedding=4, noise=0.1)
MODES = {
    "frozen": {},
    "static": {"tune_encoder": True, "refresh": Static()},
    "every_2_steps": {"tune_encoder": True, "refresh": EveryKSteps(2)},
    "ema": {"tune_encoder": True, "refresh": Ema(0.7)},
    "live": {"tune_encoder": True, "refresh": Live(3)},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps of a few microseconds: on busy cores threads would wait for each other many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.2).write(folder)
    return folder


def fit(folder, mode, runs, resume=None):
    seed_everything(1, verbose=False)
    data = EventSequencesDataModule(
        paths=str(folder / "events.parquet"),
        user_column="user",
        time_column="time",
        categorical=["event_type"],
        numeric=["amount"],
        validation_fraction=0.25,
        test_fraction=0.25,
        sampler=ColesSlices(2, 2, 12),
        targets={"silent": NoEventWithin(rule=CalendarDates(every_days=6), days=3)},
        batch_size=8,
        cache_dir=str(folder / "cache"),
    )
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


def assert_same(one, other, where):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where}.{number}")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("mode", MODES)
def test_resumed_fits_end_as_the_unbroken_one(folder, tmp_path, mode):
    unbroken = fit(folder, mode, tmp_path / "unbroken")
    assert set(unbroken["contexts"]["banks"]) == ({"shared"} if mode == "frozen" else {"mean", "kernel"})
    assert set(unbroken["best_encoders"]) == {"encoder", "wide"}
    for epoch in range(EPOCHS - 1):
        resumed = fit(folder, mode, tmp_path / f"after {epoch}", tmp_path / "unbroken" / f"epoch={epoch}.ckpt")
        for part in ("state_dict", "optimizer_states", "contexts", "best_encoders", "epoch", "global_step"):
            assert_same(unbroken[part], resumed[part], f"after epoch {epoch}: {part}")
    before = torch.load(tmp_path / "unbroken" / f"epoch={EPOCHS - 2}.ckpt", weights_only=True)["state_dict"]
    name = "model.branches.kernel.aggregator.phi.layers.0.weight"
    assert not torch.equal(before[name], unbroken["state_dict"][name]), "nothing was left to train: this proves nothing"
