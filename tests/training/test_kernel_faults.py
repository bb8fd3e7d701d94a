"""A fit of KernelAttentionAggregator that is broken off at any step and goes on from ``last.ckpt`` ends as it would."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger

from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.callbacks import LastCheckpoint, RandomState
from lightning_modules.context import Ema, Evaluation, KernelAttention, Live, LogisticProbe
from lightning_modules.losses import CoLES
from lightning_modules.networks import RecurrentEncoder

EVERY_N_STEPS = 3
ENCODER_EPOCHS, EPOCHS, BATCHES = 2, 4, 4
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*smaller than the logging",
        "ignore:.*in eval mode at the start",
    ),
]
# A tuned encoder draws noise, so random numbers matter; a learning rate at which the best epoch need not be the last.
GRU = partial(RecurrentEncoder, d_model=6, d_embedding=4, noise=0.1)
MODES = {
    "frozen": {"wide_encoder": GRU},
    "ema": {"tune_encoder": True, "refresh": Ema(0.7)},
    "live": {"tune_encoder": True, "refresh": Live(3)},
}
N_STOPS = {"frozen": 7, "ema": 7, "live": 6}


@pytest.fixture(scope="module")
def make_data(tmp_path_factory, event_data):
    folder = tmp_path_factory.mktemp("events")
    regime(0, n_users=30, n_days=40, events_per_day=1.0, labels_per_day=0.2).write(folder)
    return partial(event_data, folder, batch_size=3)


class Kept(Logger):
    """Metrics by step, in memory; what is logged twice must be the same."""

    name, version = "kept", 0

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            assert self.rows.setdefault((step, name), value) == value, f"{name} of step {step} was another before"


def fit(make_data, mode, run, rows, *callbacks, resume=None, encoder_weights=None):
    seed_everything(1, verbose=False)
    encoder_epochs = 0 if encoder_weights else ENCODER_EPOCHS
    data = make_data()
    module = KernelAttentionAggregator(
        vocabulary_sizes=data.vocabulary_sizes,
        n_numeric=data.n_numeric,
        median_gap=data.median_gap,
        encoder=GRU,
        encoder_objective=CoLES,
        encoder_epochs=encoder_epochs,
        encoder_weights=encoder_weights,
        aggregators={"kernel": KernelAttention},
        aggregator_epochs=EPOCHS - ENCODER_EPOCHS,
        evaluation=Evaluation(probe=LogisticProbe(strengths=(0.1,), max_iterations=10)),
        encoder_optimizer=partial(torch.optim.Adam, lr=0.1),
        **MODES[mode],
    )
    if resume is not None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # random numbers must come from the checkpoint
            seed(12345)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=encoder_epochs + EPOCHS - ENCODER_EPOCHS,
        limit_train_batches=BATCHES,
        logger=Kept(rows),
        default_root_dir=run,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RandomState(), LastCheckpoint(every_n_train_steps=EVERY_N_STEPS), *callbacks],
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module, data, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def probed(module, data):
    """What a test of the fitted module finds."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    studies = []
    watch = Callback()
    watch.on_test_batch_end = lambda *arguments: studies.append(arguments[2])
    trainer.callbacks.append(watch)
    trainer.test(module, data, verbose=False)
    (target,) = studies[0].targets
    return target.test


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_that_is_broken_off_anywhere_ends_as_the_unbroken_one(
    make_data, tmp_path, mode, break_at, broken, assert_same
):
    rows = {}
    *fitted, unbroken = fit(make_data, mode, tmp_path / "unbroken", rows)
    tested = probed(*fitted)
    drawn = random.Random(mode)
    batches_done = []
    for stop in sorted(drawn.sample(range(1, EPOCHS * BATCHES), N_STOPS[mode])):
        run, rows_here = tmp_path / str(stop), {}
        with pytest.raises(broken):
            fit(make_data, mode, run, rows_here, break_at(stop, at_end=drawn.random() < 0.5))
        last = run / "checkpoints" / "last.ckpt"
        if last.is_file():
            loop = torch.load(last, weights_only=True)["loops"]["fit_loop"]
            batches_done.append(loop["epoch_loop.batch_progress"]["current"]["ready"])
        *resumed, checkpoint = fit(make_data, mode, run, rows_here, resume=last if last.is_file() else None)
        for part in ("state_dict", "optimizer_states", "contexts", "best_encoders", "epoch", "global_step", "loops"):
            assert_same(unbroken[part], checkpoint[part], f"stopped at {stop}: {part}")
        random_states = (one["callbacks"]["RandomState"] for one in (unbroken, checkpoint))
        assert_same(*random_states, f"stopped at {stop}: random streams")
        assert_same(tested, probed(*resumed), f"stopped at {stop}: test")
        assert rows_here == rows, f"stopped at {stop}"
    assert any(0 < n_done < BATCHES for n_done in batches_done), "none went on amid an epoch: this proves nothing"


def test_aggregators_of_a_loaded_encoder_go_on_amid_their_first_epoch(
    make_data, tmp_path, break_at, broken, assert_same
):
    fit(make_data, "ema", tmp_path / "encoder", {})
    weights = str(tmp_path / "encoder" / "checkpoints" / "last.ckpt")
    unbroken = fit(make_data, "ema", tmp_path / "unbroken", {}, encoder_weights=weights)[2]
    run = tmp_path / "broken"
    with pytest.raises(broken):
        fit(make_data, "ema", run, {}, break_at(BATCHES - 1, at_end=False), encoder_weights=weights)
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 0
    resumed = fit(make_data, "ema", run, {}, resume=last, encoder_weights=weights)[2]
    for part in ("state_dict", "optimizer_states", "contexts"):
        assert_same(unbroken[part], resumed[part], part)
