"""What attention must find and what context must not: a group among others, nothing, and a decay over several seeds.

The slow tests run real presets of ``scripts/synthetic_context.py``, of one to three minutes each; sizes stand there.
"""

import json
import os
import statistics
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything

from datamodules import EventSequencesDataModule
from datamodules.event_batches import Crops
from datamodules.event_targets import CalendarDates, NoEventWithin
from datamodules.synthetic_events import cohort
from lightning_modules import KernelAttentionAggregator
from lightning_modules.context import Mean, SymmetricAttention
from lightning_modules.context.evaluation import Encoded
from lightning_modules.losses import NextEvent
from lightning_modules.networks import RecurrentEncoder

N_GROUPS = 4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging")
def test_trained_attention_looks_at_the_own_group(tmp_path):
    drawn = cohort(0, n_users=80, n_days=60, n_groups=N_GROUPS, events_per_day=2.0, labels_per_day=0.1)
    drawn.write(tmp_path)
    data = EventSequencesDataModule(
        paths=str(tmp_path / "events.parquet"),
        user_column="user",
        time_column="time",
        categorical=["event_type"],
        numeric=["amount"],
        numeric_transform="signed_log",
        sampler=Crops(5, 60),
        targets={"silent": NoEventWithin(rule=CalendarDates(every_days=6), days=3)},
        validation_fraction=0.2,
        test_fraction=0.2,
        batch_size=16,
        cache_dir=str(tmp_path / "cache"),
    )
    seed_everything(0, verbose=False)
    adam = partial(torch.optim.Adam, lr=1e-2)
    module = KernelAttentionAggregator(
        **{name: getattr(data, name) for name in ("vocabulary_sizes", "n_numeric", "median_gap")},
        encoder=partial(RecurrentEncoder, d_model=16, d_embedding=8),
        encoder_objective=partial(NextEvent, at="target"),
        encoder_epochs=30,
        aggregators={"mean": Mean, "symmetric": SymmetricAttention},
        aggregator_epochs=20,
        encoder_optimizer=adam,
        aggregator_optimizer=adam,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=50, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, data)
    (batch,) = data.test_dataloader()
    assert batch["user_ids"] == sorted(drawn.user_ids)
    groups = torch.from_numpy(drawn.groups[np.argsort(drawn.user_ids)])
    asked = batch["queries"]["silent"]
    rows = (asked["fold"] == 2) & (asked["times"] > asked["times"].median())  # histories that tell the group
    users, times = asked["users"][rows], asked["times"][rows]
    encoded = Encoded(module.model.eval(), batch["events"], batch["context_users"])
    mass = {}
    with torch.no_grad():
        for name in ("mean", "symmetric"):
            context = encoded.bank(name).context(times, users, "gathered")
            weights = module.model.branch(name).aggregator.weights(encoded.own(name, users, times).states, context)
            same = groups[context.users.expand(weights.shape)] == groups[users].unsqueeze(1)
            mass[name] = float((weights * same).sum() / weights.sum())
    # The mean gives the share of the own group among who is visible: a quarter, but for the draw of users.
    assert 0.15 < mass["mean"] < 0.35
    # 1.47 times of it here, 1.3 times after two fifths of the steps.
    assert mass["symmetric"] > 1.25 * mass["mean"]


def cell(project, folder, claim, seed, split="users"):
    """What the script found for a seed."""
    pytest.importorskip("lightgbm", reason="boosted probes need the extra `events`")
    command = [sys.executable, "scripts/synthetic_context.py", "--claims", claim, "--seeds", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--split", split, "--out", str(folder)], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{claim}, {split}, {seed}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_symmetric_attention_recovers_the_group_where_the_mean_fails(project, tmp_path):
    found = cell(project, tmp_path, "cohort", 0, "time")
    # Chance is 1/8.
    assert found["mass"]["symmetric"] > 0.6
    assert found["mass"]["mean"] < 0.2
    # By time the mean over all groups is worse than own history alone, and better than it is who finds the group.
    assert found["arms"]["mean"] > found["arms"]["own"]
    assert found["judged"]["helps"] is True
    assert found["share"][1] > 0.2, "the lower end of the interval; 0.29 here"
    # What a mean over the true group would have: attention comes close to it.
    assert found["arms"][found["chosen"]] < found["known group"] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "seed"), [("shuffled", 0), *(("null", seed) for seed in range(5))])
def test_context_that_tells_nothing_does_not_help(project, tmp_path, claim, seed):
    found = cell(project, tmp_path, claim, seed)
    assert not found["judged"]["helps"]
    # The requirement is 0.005 nats; the interval over users of a single seed may be as wide as that by itself.
    assert abs(found["minus own+time"][0]) < 0.005


@pytest.mark.slow
def test_the_median_decay_of_five_seeds_is_within_a_fifth(project, tmp_path):
    thetas = [cell(project, tmp_path, "hawkes", seed)["last event"]["from 3"] for seed in range(5)]
    assert abs(statistics.median(thetas) / 0.02 - 1) < 0.2
