"""The published probes through a whole fit and test: boosted trees on a label of the user, linear ones on the rest."""

from functools import partial

import pytest
import torch
from lightning import Callback, Trainer, seed_everything

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices
from datamodules.event_published import EveryNthEvent, FinalDays
from datamodules.event_targets import LastEvent, NextType, StaticLabel
from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.context import Evaluation, KernelAttention, LightGBMProbe, LinearProbe, Mean
from lightning_modules.context.findings import findings
from lightning_modules.losses import CoLES
from lightning_modules.networks import RecurrentEncoder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging"),
]


class Kept(Callback):
    """Keeps the study of a test."""

    def on_test_batch_end(self, trainer, pl_module, outputs, *_):
        self.study = outputs


def test_global_local_and_next_type_through_their_probes(tmp_path):
    pytest.importorskip("lightgbm", reason="boosted probes need the extra `events`")
    files = regime(0, n_users=120, n_days=40, events_per_day=2.0, labels_per_day=0.1).write(tmp_path)
    windows = partial(EveryNthEvent, step=4)
    data = EventSequencesDataModule(
        paths=files["events"],
        users_path=files["users"],
        label_columns=["group"],
        user_column="user",
        time_column="time",
        categorical=["event_type"],
        numeric=["amount"],
        numeric_transform="signed_log",
        reference_mode=True,
        sampler=ColesSlices(2, 2, 12),
        targets={
            "group": StaticLabel(LastEvent(), "group"),
            "final": FinalDays(windows(8), days=10, column="group", positive="1"),
            "next": NextType(windows(7), "event_type", top=5),
        },
        validation_fraction=0.2,
        test_fraction=0.3,
        batch_size=16,
        cache_dir=str(tmp_path / "cache"),
    )
    seed_everything(0, verbose=False)
    linear = LinearProbe(n_epochs=3, batch_size=64)
    module = KernelAttentionAggregator(
        **{name: getattr(data, name) for name in ("vocabulary_sizes", "n_numeric", "median_gap")},
        encoder=partial(RecurrentEncoder, d_model=8, d_embedding=4),
        encoder_objective=CoLES,
        encoder_epochs=1,
        aggregators={"mean": Mean, "kernel": KernelAttention},
        aggregator_epochs=1,
        reference_mode=True,
        evaluation=Evaluation(
            probe=linear, probes={"group": LightGBMProbe(n_trees=20, patience=None, min_leaf=5, seed=42)}
        ),
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    kept = Kept()
    trainer = Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, callbacks=[kept], **quiet)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    targets = {target.name: target for target in kept.study.targets}
    assert {name: (one.scope, one.probe, one.n_classes, one.outcome_dependent) for name, one in targets.items()} == {
        "group": ("global", "LightGBMProbe", 2, True),
        "final": ("local", "LinearProbe", 2, True),
        "next": ("next", "LinearProbe", 5, False),
    }
    for target in targets.values():
        for probabilities in target.test.values():
            assert probabilities.shape == (len(target.labels), target.n_classes)
            # float64 of probabilities that sum to 1
            torch.testing.assert_close(probabilities.sum(1), torch.ones(len(target.labels), dtype=torch.float64))
    # No tree splits on a constant column; those on context do split on it.
    group = targets["group"]
    assert torch.equal(group.test["own"].argmax(1), group.test["constant"].argmax(1))
    assert not torch.equal(group.test["own"], group.test["kernel"])
    asked = dict(zip(group.users.tolist(), group.labels.tolist(), strict=True))
    assert len(asked) == len(group.labels), "a user is asked once, at the last event"
    told = findings(kept.study, n_resamples=20)["targets"]
    assert all(arm["outcome_dependent"] for name in ("group", "final") for arm in told[name]["arms"].values())
