"""KernelAttentionAggregator through the Trainer on drawn event sequences: what trains and what is refused."""

from functools import partial
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices, Crops, TailWindows
from datamodules.event_targets import CalendarDates, NextType, NoEventWithin, RandomTimes
from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.context import (
    Attention,
    AttentionHawkes,
    Concat,
    ContextRules,
    Ema,
    Evaluation,
    EveryKSteps,
    ExpHawkes,
    ExpLearnableHawkes,
    Gated,
    KernelAttention,
    LearnableAttention,
    LearnableAttentionHawkes,
    LearnableHawkes,
    LinearKernel,
    Live,
    LogisticProbe,
    Max,
    Mean,
    PerEpoch,
    Static,
    SymmetricAttention,
)
from lightning_modules.context.data_state import require_absolute_times
from lightning_modules.context.fixed_sequences import validation_sequences
from lightning_modules.context.study import ContextStudy
from lightning_modules.losses import CPC, CoLES, NextEvent, Supervised, recall_at
from lightning_modules.networks import RecurrentEncoder, TransformerEncoder, encode_table

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*in eval mode at the start"
    ),
]
SMALL = {"d_model": 8, "d_embedding": 4}
GRU = partial(RecurrentEncoder, **SMALL)
EVERY = {
    "mean": Mean,
    "max": Max,
    "attention": Attention,
    "learnable_attention": LearnableAttention,
    "symmetric_attention": SymmetricAttention,
    "kernel": KernelAttention,
    "exp_hawkes": partial(ExpHawkes, normalise="mean"),
    "exp_learnable_hawkes": partial(ExpLearnableHawkes, hidden=(6,)),
    "learnable_hawkes": partial(LearnableHawkes, hidden=(6,)),
    "attention_hawkes": AttentionHawkes,
    "learnable_attention_hawkes": LearnableAttentionHawkes,
    "linear_kernel": LinearKernel,
    "top_k": partial(KernelAttention, top_k=3),
    "heads": partial(KernelAttention, n_heads=2),
}
NOTHING_TO_LEARN = {"mean", "max", "attention", "exp_hawkes", "attention_hawkes"}
QUICK = Evaluation(probe=LogisticProbe(strengths=(0.1,), max_iterations=10))
SILENT = {"silent": NoEventWithin(rule=CalendarDates(every_days=6), days=3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.2).write(folder)
    return folder


def events_of(folder, of=EventSequencesDataModule, **settings):
    return of(
        **{
            "paths": str(folder / "events.parquet"),
            "user_column": "user",
            "time_column": "time",
            "categorical": ["event_type"],
            "numeric": ["amount"],
            "numeric_transform": "signed_log",
            "validation_fraction": 0.25,
            "test_fraction": 0.25,
            "sampler": Crops(2, 12),
            "targets": SILENT,
            "batch_size": 8,
            "cache_dir": str(folder / "cache"),
        }
        | settings
    )


def by_time(folder, **settings):
    return events_of(folder, split="time", validation_start="2020-02-01", test_start="2020-02-15", **settings)


def aggregator(data, **settings):
    facts = {name: getattr(data, name) for name in ("vocabulary_sizes", "n_numeric", "median_gap")}
    given = {
        "encoder": GRU,
        "encoder_objective": NextEvent,
        "encoder_epochs": 2,
        "aggregators": {"kernel": KernelAttention},
        "aggregator_epochs": 2,
        "evaluation": QUICK,
    }
    return KernelAttentionAggregator(**facts, **(given | settings))


def trainer_of(module, *callbacks, **settings):
    plan = module.encoder_epochs + (module.aggregator_epochs if module.learned else 0)
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": plan,
            "logger": False,
            "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
        }
        | settings
    )


def fitted(data, *callbacks, seed=1, **settings):
    seed_everything(seed, verbose=False)
    module = aggregator(data, **settings)
    trainer = trainer_of(module, *callbacks)
    trainer.fit(module, data)
    return module, trainer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Watch(Callback):
    """Weights of the encoder as aggregators begin, losses by epoch, and who has gradients."""

    def __init__(self):
        self.encoder, self.losses, self.with_gradient, self.val = None, [], set(), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == pl_module.encoder_epochs and self.encoder is None:
            self.encoder = {name: value.clone() for name, value in pl_module.model.encoder.state_dict().items()}
            pl_module.zero_grad()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch >= pl_module.encoder_epochs:
            named = pl_module.named_parameters()
            self.with_gradient |= {name for name, one in named if one.grad is not None and bool((one.grad != 0).any())}

    def on_validation_end(self, trainer, pl_module):
        self.val.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture(scope="module")
def run(folder):
    watch = Watch()
    data = events_of(folder)
    module, trainer = fitted(data, watch, encoder_epochs=4, aggregator_epochs=5, aggregators=EVERY, seed=3)
    return module, trainer, data, watch


def test_every_aggregator_of_one_fit_learns_beside_the_others(run):
    module, _, _, watch = run
    assert set(module.learned) == set(EVERY) - NOTHING_TO_LEARN
    assert watch.val[3]["val/loss"] < watch.val[0]["val/loss"]
    for name in module.learned:
        losses = [epoch[f"val/{name}/loss"] for epoch in watch.val[4:]]
        assert losses[-1] < losses[0], f"{name}: {losses}"


def test_a_frozen_encoder_stays_byte_by_byte_and_only_branches_have_gradients(run):
    module, _, _, watch = run
    now = module.model.encoder.state_dict()
    assert any("running" in name or "mean" in name for name in now), "statistics of a norm are among them"
    for name, value in now.items():
        assert value.numpy().tobytes() == watch.encoder[name].numpy().tobytes(), name
    assert not any(parameter.requires_grad for parameter in module.model.encoder.parameters())
    trained = {name.split(".")[2] for name in watch.with_gradient}
    assert {name.split(".")[1] for name in watch.with_gradient} == {"branches"}
    assert trained == set(module.learned)


def test_the_best_encoder_is_kept_not_that_of_the_last_epoch(folder):
    class Weights(Callback):
        def __init__(self):
            self.found = []

        def on_validation_end(self, trainer, pl_module):
            state = {name: value.clone() for name, value in pl_module.model.encoder.state_dict().items()}
            self.found.append((float(trainer.callback_metrics["val/loss"]), state))

    def hot(params):
        return torch.optim.Adam(params, lr=0.3)  # at which the last epoch is not the best

    kept = Weights()
    checkpoint = ModelCheckpoint(
        dirpath=folder / "best", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    data = events_of(folder)
    module, _ = fitted(
        data, kept, checkpoint, aggregators={"mean": Mean, "max": Max}, encoder_epochs=5, encoder_optimizer=hot
    )
    losses = [loss for loss, _ in kept.found]
    assert losses.index(min(losses)) < 4, "the last epoch is the best one: this proves nothing"
    best = kept.found[losses.index(min(losses))][1]
    assert same(module.model.encoder.state_dict(), best)
    written = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(written[f"model.encoder.{name}"], value) for name, value in best.items())


def test_an_aggregator_is_the_same_whatever_it_is_compared_with(folder):
    data = events_of(folder)
    together, _ = fitted(data, aggregators={"attention": LearnableAttention, "kernel": KernelAttention, "mean": Mean})
    alone, _ = fitted(data, aggregators={"kernel": KernelAttention})
    one, other = together.model.branch("kernel").state_dict(), alone.model.branch("kernel").state_dict()
    assert same(one, other)


def test_a_context_without_anything_to_learn_takes_no_epochs(folder):
    names = {name: EVERY[name] for name in sorted(NOTHING_TO_LEARN)}
    module, trainer = fitted(events_of(folder), aggregators=names, aggregator_epochs=0, encoder_epochs=1)
    assert module.learned == []
    assert trainer.current_epoch == 1
    learns, _ = fitted(events_of(folder), aggregators={"mean": Mean}, combination=Gated, aggregator_epochs=1)
    assert learns.learned == ["mean"], "a gate is learned, whatever it joins"


OBJECTIVES = {
    "coles": (CoLES, ColesSlices(2, 2, 12)),
    "next_event": (NextEvent, Crops(2, 12)),
    "next_event_at_target": (partial(NextEvent, at="target"), Crops(2, 12)),
    "cpc": (partial(CPC, n_steps_ahead=2), Crops(4, 12)),
    "supervised": (Supervised, TailWindows("silent", 12)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", [events_of, by_time])
def test_fit_test_and_predict_by_every_objective_and_split(folder, objective, split):
    factory, sampler = OBJECTIVES[objective]
    data = split(folder, sampler=sampler)
    module, trainer = fitted(data, encoder_objective=factory, aggregator_epochs=1, encoder_epochs=1)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    kept = []

    class Keep(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            kept.append(outputs)

    tester = trainer_of(module, Keep())
    tester.test(module, data, verbose=False)
    (study,) = kept
    assert isinstance(study, ContextStudy)
    (target,) = study.targets
    assert {"own", "own+time", "gaussian", "constant", "shuffled:kernel", "kernel", "kernel+time"} < set(target.test)
    for probabilities in target.test.values():
        assert probabilities.shape == (len(target.labels), 2)
        # float64 probabilities
        torch.testing.assert_close(probabilities.sum(1), torch.ones(len(target.labels)).double(), rtol=0, atol=1e-9)
    (found,) = tester.predict(module, data)
    assert len(found.times) == len(target.labels)
    assert found.embedding.shape == (len(found.times), 17)
    for user, seen in zip(found.user_ids, found.top_users, strict=True):
        assert user not in seen, "nobody influences himself"


class OneBatch(EventSequencesDataModule):
    """The same few sequences in every step."""

    def train_dataloader(self):
        batch = next(iter(super().train_dataloader()))
        return torch.utils.data.DataLoader([batch] * 25, batch_size=None, collate_fn=lambda one: one)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_batch_is_learned_by_heart_by_an_aggregator(folder, objective):
    """A hundred steps of a branch over an encoder that was hardly trained and stays as it is."""
    factory, sampler = OBJECTIVES[objective]
    watch = Watch()
    fitted(
        events_of(folder, of=OneBatch, sampler=sampler),
        watch,
        encoder_objective=factory,
        encoder_epochs=1,
        encoder_optimizer=partial(torch.optim.Adam, lr=1e-5),
        aggregator_epochs=4,
        combination=Gated,
        aggregator_optimizer=partial(torch.optim.Adam, lr=0.03),
    )
    # Measured: at most 0.17 of what the untrained encoder's own heads cost.
    assert watch.losses[-1] < 0.3 * watch.losses[0], watch.losses


# Tuned encoders


class Banks(Callback):
    """The bank of each step, and what the branch's encoder would have put into it."""

    def __init__(self):
        self.states, self.fresh, self.logged, self._table = [], [], [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch >= pl_module.encoder_epochs:
            self._table = encode_table(pl_module.model.encoder_of("kernel"), pl_module.contexts._events)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bank = pl_module.contexts.banks.get("kernel")
        if bank is not None:
            self.states.append(bank.states.clone())
            self.fresh.append(self._table[bank.event_rows])

    def on_validation_end(self, trainer, pl_module):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer, pl_module):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def encoded_anew(self):
        """Steps, from 1 on, before which the bank changed."""
        return [
            step for step in range(1, len(self.states)) if not torch.equal(self.states[step - 1], self.states[step])
        ]


POLICIES = {
    "static": (Static(), []),
    "every_2_steps": (EveryKSteps(2), [2, 4, 6, 8]),
    "per_epoch": (PerEpoch(), [3, 6]),
    "ema": (Ema(0.5), [3, 6]),
    "live": (Live(4), [3, 6]),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_banks_of_tuned_encoders_are_encoded_when_the_policy_says_so(folder, policy):
    refresh, expected = POLICIES[policy]
    banks = Banks()
    module, _ = fitted(
        events_of(folder),
        banks,
        encoder_epochs=1,
        aggregator_epochs=3,
        aggregators={"mean": Mean, "kernel": KernelAttention},
        tune_encoder=True,
        refresh=refresh,
    )
    assert module.learned == ["own", "mean", "kernel"], "the baseline gets as many epochs"
    assert len(banks.states) == 9, "three steps an epoch"
    assert banks.encoded_anew() == expected
    # rounding of a padded batch that is put together as it was
    fresh = [step for step in range(9) if torch.allclose(banks.states[step], banks.fresh[step], rtol=0, atol=1e-6)]
    assert fresh == ([0] if policy == "ema" else [0, *expected]), "the copy of Ema lags behind"
    drifts = [epoch["bank/kernel/drift"] for epoch in banks.logged if "bank/kernel/drift" in epoch]
    assert all(0 < value < 1 for value in drifts)
    # age of a bank in the three steps of the last epoch
    ages = {"static": (6 + 7 + 8) / 3, "every_2_steps": (0 + 1 + 0) / 3}.get(policy, (0 + 1 + 2) / 3)
    assert banks.logged[-1]["bank/kernel/age_steps"] == pytest.approx(ages)
    for name in module.learned:
        tuned = module.model.branch(name).encoder.state_dict()
        assert not same(tuned, module.model.encoder.state_dict()), f"{name} did not move"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bank_of_a_test_is_encoded_as_the_aggregator_knew_it(folder, tmp_path, policy):
    """By the pre-trained encoder, its slow copy or the tuned one, in a process that knows the checkpoint alone too."""
    settings = {
        "encoder_epochs": 1,
        "aggregators": {"mean": Mean},
        "tune_encoder": True,
        "refresh": POLICIES[policy][0],
        "aggregator_optimizer": partial(torch.optim.Adam, lr=1e-2),
    }
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="best")
    data = events_of(folder)
    module, trainer = fitted(data, checkpoint, **settings)
    batch = data.test_dataloader().dataset[0]
    encoders = {"static": module.model.encoder}
    if policy == "ema":
        encoders["ema"] = module.contexts.refreshes["mean"].momentum_encoder
    tuned = module.model.encoder_of("mean")
    bank = module._encoded(batch["events"], batch["context_users"]).bank("mean")
    states = encode_table(encoders.get(policy, tuned), batch["events"])
    assert torch.equal(bank.states, states[bank.event_rows])
    own = encode_table(tuned, batch["events"])
    assert torch.equal(bank.states, own[bank.event_rows]) == (policy not in encoders)
    if policy == "static":
        trained_with = module.contexts.bank("mean")
        assert torch.equal(bank.users, trained_with.users)
        assert torch.equal(bank.times, trained_with.times)
        # float32 in batches of other users
        torch.testing.assert_close(bank.states, trained_with.states, rtol=0, atol=1e-6)
    (found,) = trainer.predict(module, data)
    seed_everything(99, verbose=False)
    fresh = aggregator(events_of(folder), **settings)
    (again,) = trainer_of(fresh, checkpoint).predict(
        fresh, data, ckpt_path=str(tmp_path / "best.ckpt"), weights_only=True
    )
    assert torch.equal(found.context, again.context)


@pytest.mark.parametrize("tune", [False, True])
def test_contexts_of_a_checkpoint_go_where_the_model_is(folder, tune):
    """A validation, a test or a prediction by itself has no start of training that would move them."""
    data = events_of(folder)
    settings = {"tune_encoder": True, "refresh": Ema(0.5), "aggregators": {"mean": Mean}} if tune else {}
    module, trainer = fitted(data, encoder_epochs=1, aggregator_epochs=1, **settings)
    asked = []
    module.contexts.to = asked.append
    for command in (trainer.validate, trainer.test):
        command(module, data, verbose=False)
    trainer.predict(module, data)
    assert asked == [module.device] * 3
    del module.contexts.to
    module.contexts.to(torch.device("meta"))
    bank = module.contexts.bank("mean" if tune else "kernel")
    assert {one.device.type for one in bank.buffers()} == {"meta"}
    if tune:
        copy = module.contexts.refreshes["mean"].momentum_encoder
        assert {one.device.type for one in copy.state_dict().values()} == {"meta"}


def test_the_wider_encoder_is_tuned_as_long_as_the_branches(folder):
    """By an optimiser and with heads of its own, like the baseline."""
    before, watch, steps = {}, Watch(), []

    class Wide(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == pl_module.encoder_epochs - 1:
                before.update({name: one.clone() for name, one in pl_module.wide.state_dict().items()})
            steps.append([max((int(s["step"]) for s in o.state.values()), default=0) for o in trainer.optimizers])

    data, kept = events_of(folder), []
    wide = partial(RecurrentEncoder, d_model=16, d_embedding=4)
    module, _ = fitted(data, Wide(), watch, wide_encoder=wide, tune_encoder=True, aggregator_epochs=3)
    assert module.learned == ["own", "kernel", "wide"]
    assert same(before, module._best["wide"][1]), "it begins at its best epoch"
    assert steps[-1] == [6, 6, 9, 9, 9], "two encoders of two epochs, then three branches of three"
    moved = {name for name, one in module.wide.state_dict().items() if not torch.equal(one, before[name])}
    assert {name.split(".")[0] for name in moved} >= {"recurrent", "embedding"}
    losses = [epoch["val/wide/loss"] for epoch in watch.val]
    assert len(set(losses)) == 5

    class Keep(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            kept.append(outputs)

    trainer_of(module, Keep()).test(module, data, verbose=False)
    assert "wide" in kept[0].targets[0].test

    class Alone(Callback):
        """Takes the wider encoder out of what is tuned."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == pl_module.encoder_epochs:
                pl_module.learned.remove("wide")
                pl_module.optimizers = lambda use_pl_optimizer, real=pl_module.optimizers: real(use_pl_optimizer)[:-1]

    without, _ = fitted(data, Alone(), wide_encoder=wide, tune_encoder=True, aggregator_epochs=3)
    assert same(module.model.state_dict(), without.model.state_dict()), "a control moves nobody else"
    frozen, _ = fitted(data, wide_encoder=wide, aggregator_epochs=1)
    assert frozen.wide_branch is None
    assert frozen.learned == ["kernel"]


def test_coles_is_watched_by_its_recall(folder):
    watch = Watch()
    data = events_of(folder, sampler=ColesSlices(2, 2, 12))
    wide = partial(RecurrentEncoder, d_model=16, d_embedding=4)
    module, _ = fitted(data, watch, encoder_objective=CoLES, encoder_epochs=1, aggregator_epochs=1, wide_encoder=wide)
    first, last = watch.val
    assert {name for name in first if "recall" in name} == {"val/recall", "val/wide/recall"}
    sequences = validation_sequences(next(iter(data.val_dataloader())), module.pretraining["encoder"], max_users=512)
    with torch.no_grad():
        states = module.model.encoder.eval().encode_last(sequences)
    assert first["val/recall"] == pytest.approx(recall_at(states, sequences["users"]), abs=1e-6)  # float32 when logged
    assert last["val/recall"] == first["val/recall"], "while encoders are trained alone"


def test_the_reference_mode_is_a_flag(folder):
    data = events_of(folder)
    tuned = aggregator(data, reference_mode=True, tune_encoder=True, aggregators={"kernel": KernelAttention})
    assert isinstance(tuned._policy, Static)
    assert isinstance(aggregator(data, tune_encoder=True)._policy, PerEpoch)
    assert isinstance(aggregator(data, reference_mode=True, tune_encoder=True, refresh=Ema())._policy, Ema)
    assert (tuned.model.branch("kernel").aggregator.scale, tuned.model.rules.window) == (1.0, 100)
    given = aggregator(data, reference_mode=True, context=ContextRules(ties="strict", window=7))
    assert (given.model.rules.ties, given.model.rules.window, given.model.rules.min_prefix) == ("strict", 7, 15)


def test_a_window_leaves_the_own_history_whole(folder):
    """What is exported of oneself, and what the wider encoder gives, is the state of everything that happened."""
    data = events_of(folder)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    queries, found = batch["queries"]["silent"], {}
    for window in (None, 2):
        seed_everything(1, verbose=False)
        recorded = Recorded()
        module = aggregator(
            data,
            context=ContextRules(window=window),
            aggregators={"mean": Mean},
            wide_encoder=partial(RecurrentEncoder, d_model=16, d_embedding=4),
            evaluation=Evaluation(probe=recorded),
        ).eval()
        study = module.test_step(batch, 0)
        arms = dict(zip(study.targets[0].test, recorded.train, strict=True))
        found[window] = module.represent(batch["events"], queries["users"], queries["times"]), arms
    (whole, arms), (cut, arms_cut) = found.values()
    assert torch.equal(whole[:, :8], cut[:, :8])
    assert not torch.equal(whole[:, 8:], cut[:, 8:]), "the context is cut"
    assert all(torch.equal(arms[name], arms_cut[name]) for name in ("own", "wide"))
    assert not torch.equal(arms["mean"], arms_cut["mean"])


class Recorded:
    """A probe that keeps what it was fitted on."""

    def __init__(self):
        self.train = []

    def fit_predict(self, train, train_labels, validation, validation_labels, test, *, n_classes, seed):
        self.train.append(train)
        return tuple(torch.full((len(part), n_classes), 1 / n_classes).double() for part in (validation, test))


def test_live_states_carry_a_gradient_into_the_encoder_and_are_those_of_its_training(folder):
    data = by_time(folder)
    module, _ = fitted(
        data, encoder_epochs=1, aggregator_epochs=1, aggregators={"mean": Mean}, tune_encoder=True, refresh=Live(5)
    )
    bank, encoder = module.contexts.bank("mean"), module.model.encoder_of("mean").eval()
    encoder.zero_grad()
    states = module.contexts.live_states("mean")
    users = Live(5).users(bank.users.unique(), module.contexts.steps)
    lived = torch.isin(bank.users, users)
    assert 0 < int(lived.sum()) < len(lived)
    assert torch.equal(states[~lived], bank.states[~lived])
    table = encode_table(encoder, module.contexts._events)[bank.event_rows]
    torch.testing.assert_close(states[lived], table[lived], rtol=0, atol=1e-6)  # float32 in batches of other shapes
    states[lived].sum().backward()
    assert all(bool((one.grad != 0).any()) for one in encoder.recurrent.parameters())

    read = {}
    encoder.encode_steps = lambda batch: read.update(batch) or torch.zeros(*batch["mask"].shape, 8)
    module.contexts.live_states("mean")
    assert int(read["times"].max()) <= int(bank.times.max()) < data.val_dataloader().dataset[0]["train_stop"]


# Variants


def test_an_encoder_is_taken_from_a_checkpoint(folder, tmp_path):
    data = events_of(folder)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="best")
    first, _ = fitted(data, checkpoint, aggregator_epochs=1)
    path = str(tmp_path / "best.ckpt")
    second, trainer = fitted(
        data, seed=7, encoder_weights=path, encoder_epochs=0, aggregators={"new": SymmetricAttention}
    )
    assert same(first.model.encoder.state_dict(), second.model.encoder.state_dict())
    assert trainer.current_epoch == 2
    bank, other = first.contexts.banks["shared"], second.contexts.banks["shared"]
    assert torch.equal(bank.states, other.states)


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """A checkpoint whose encoder was trained by CoLES on users of the default split."""
    path = tmp_path_factory.mktemp("pretrained")
    data = events_of(folder, sampler=ColesSlices(2, 2, 12), targets={})
    mean = {"encoder_objective": CoLES, "encoder_epochs": 1, "aggregators": {"mean": Mean}}
    fitted(data, ModelCheckpoint(dirpath=path, filename="best"), **mean)
    return path / "best.ckpt"


def with_weights(data, path, **settings):
    return fitted(data, encoder_weights=str(path), encoder_epochs=0, aggregator_epochs=1, **settings)


def test_an_encoder_of_another_objective_on_the_same_training_is_taken(folder, pretrained):
    data = events_of(folder, sampling_seed=None)
    module, _ = with_weights(data, pretrained, seed=9)
    saved = torch.load(pretrained, weights_only=True)
    weights = {f"model.encoder.{name}": one for name, one in module.model.encoder.state_dict().items()}
    assert all(torch.equal(one, saved["state_dict"][name]) for name, one in weights.items())
    seed = saved["EventSequencesDataModule"]["sampling_seed"]
    assert (seed, data.state_dict()["sampling_seed"]) == (1, 9), "only weights are taken over, not the order of batches"
    with_weights(events_of(folder, of=OneBatch), pretrained)  # a data module of another name, the same in it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 43}, "trained with seed 42, here it is 43"),
        ({"test_fraction": 0.3}, "trained with test_fraction 0.25, here it is 0.3"),
        ({"split": "time", "validation_start": "2020-02-01", "test_start": "2020-02-15"}, "trained with "),
    ],
)
def test_an_encoder_of_another_training_is_refused(folder, pretrained, settings, message):
    with pytest.raises(ValueError, match=rf"encoder_weights: .*best\.ckpt: checkpoint was {message}") as refused:
        with_weights(events_of(folder, **settings), pretrained)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["vocabularies", "means", "deviations", "train_digest"])
def test_an_encoder_of_another_coding_is_refused(folder, pretrained, tmp_path, name):
    saved = torch.load(pretrained, weights_only=True)
    state = saved["EventSequencesDataModule"]
    state[name] = [one[::-1] for one in state[name]] if name == "vocabularies" else state[name][::-1]
    state[name] = [one + 1 for one in state[name]] if name in ("means", "deviations") else state[name]
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=f"encoder_weights: .*trained on other events: {name} differs"):
        with_weights(events_of(folder), tmp_path / "other.ckpt")


def test_an_encoder_that_does_not_say_what_it_was_trained_on_is_taken_with_a_warning(folder, pretrained, tmp_path):
    saved = torch.load(pretrained, weights_only=True)
    torch.save({"state_dict": saved["state_dict"]}, tmp_path / "bare.ckpt")
    with pytest.warns(
        UserWarning, match=r"bare\.ckpt does not say what it was trained on, so nothing could be compared"
    ):
        with_weights(events_of(folder), tmp_path / "bare.ckpt")


def test_relative_times_have_no_context(folder):
    data = events_of(folder, relative_times=True)
    module = aggregator(data)
    with pytest.raises(
        ValueError, match=r"context needs absolute times, got .*relative_times true: .*nobody"
    ) as refused:
        trainer_of(module).fit(module, data)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="context needs absolute times"):
        trainer_of(module).test(module, data, verbose=False)


def test_a_data_module_that_says_something_else_by_its_split_is_let_through():
    for split in ("by hand", '["relative_times"]', {"relative_times": False}, None):
        require_absolute_times(SimpleNamespace(state_dict=lambda split=split: {"split": split}))
    require_absolute_times(None)


@pytest.mark.parametrize("tune", [False, True])
def test_an_audit_is_shown_what_is_exported(folder, tune):
    data = events_of(folder)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    queries = batch["queries"]["silent"]
    rows = queries["fold"] == 2
    contexts = 2 * (8 + 1)  # each with its flag, as what a combination gives has it again
    for combination, width in ((Concat, contexts), (Gated, 2 * contexts)):
        module = aggregator(
            data,
            aggregators={"mean": Mean, "kernel": KernelAttention},
            combination=combination,
            tune_encoder=tune,
            evaluation=Evaluation(explained="kernel"),
        ).eval()
        shown = module.represent(
            batch["events"], queries["users"][rows], queries["times"][rows], batch["context_users"]
        )
        exports = module.predict_step(batch, 0)
        assert shown.shape[1] == 8 * (1 + 2 * tune) + width
        last = exports.context if combination is Concat else exports.embedding
        assert torch.equal(shown[:, -9:], last)


def test_a_wider_encoder_is_an_arm_of_its_own_best_epoch(folder):
    kept = []

    class Keep(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            kept.append(outputs)

    data, watch = events_of(folder), Watch()
    module, _ = fitted(data, watch, wide_encoder=partial(RecurrentEncoder, d_model=16, d_embedding=4))
    assert module._best["wide"][0] == min(epoch["val/wide/loss"] for epoch in watch.val[:2])
    assert same(module.wide.state_dict(), module._best["wide"][1])
    trainer_of(module, Keep()).test(module, data, verbose=False)
    assert "wide" in kept[0].targets[0].test


@pytest.mark.parametrize("window", [None, 4])
def test_a_transformer_with_a_window(folder, window):
    module, trainer = fitted(
        events_of(folder),
        encoder=partial(TransformerEncoder, d_model=8, d_embedding=4, max_length=16),
        context=ContextRules(window=window),
        encoder_epochs=1,
        aggregator_epochs=1,
    )
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    trainer_of(module).test(module, events_of(folder), verbose=False)


def test_the_own_group_is_left_out(folder, tmp_path):
    users = pl.read_parquet(folder / "users.parquet")
    grouped = pl.read_parquet(folder / "events.parquet").join(users.select("user", "group"), on="user")
    grouped.with_columns(pl.col("group").cast(pl.String)).write_parquet(tmp_path / "events.parquet")
    data = events_of(folder, paths=str(tmp_path / "events.parquet"), group_column="group")
    rules = ContextRules(exclude_group=True)
    module, _ = fitted(data, context=rules, encoder_epochs=1, aggregator_epochs=1)
    events = data.test_dataloader().dataset[0]["events"]
    users = torch.arange(len(events["groups"]))
    times = torch.full_like(users, int(events["times"].max()) + 1)
    context = module.contexts.bank("kernel").context(times, users, "gathered")
    groups = events["groups"]
    assert bool(context.visible.any())
    assert not bool((context.visible & (groups[context.users] == groups[users].unsqueeze(1)))[groups >= 0].any())
    with pytest.raises(ValueError, match="exclude_group needs events with groups"):
        fitted(events_of(folder), context=rules)


def test_a_supervised_target_is_named_where_there_are_several(folder):
    targets = SILENT | {"next": NextType(rule=RandomTimes(2), column="event_type", top=4)}
    settings = {"encoder_objective": Supervised, "encoder_epochs": 1, "aggregator_epochs": 1}
    data = events_of(folder, sampler=TailWindows("silent", 12), targets=targets)
    with pytest.raises(ValueError, match=r"evaluation\.supervised must name the target .*, there are silent, next"):
        fitted(data, **settings)
    fitted(data, evaluation=Evaluation(supervised="silent"), **settings)


def test_a_second_fit_forgets_the_first_but_for_its_weights(folder, tmp_path):
    module, _ = fitted(events_of(folder), aggregator_epochs=1)
    regime(5, n_users=30, n_days=40, events_per_day=1.0, labels_per_day=0.2).write(tmp_path)
    other = events_of(tmp_path)
    weights = module.model.encoder.recurrent.weight_hh_l0.clone()
    trainer_of(module).fit(module, other)
    assert not torch.equal(weights, module.model.encoder.recurrent.weight_hh_l0), "it is trained again"
    bank = module.contexts.bank("kernel")
    times = other.val_dataloader().dataset[0]["events"]["times"]
    assert torch.equal(bank.times, times[bank.event_rows])


def test_a_validation_by_itself_is_that_of_the_last_phase(folder, tmp_path):
    data = events_of(folder)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="best")
    _, trainer = fitted(data, checkpoint)
    logged = trainer.callback_metrics["val/kernel/loss"]
    restored = aggregator(data)
    validator = trainer_of(restored, checkpoint)
    validator.validate(restored, data, ckpt_path=str(tmp_path / "best.ckpt"), weights_only=True, verbose=False)
    assert torch.equal(validator.callback_metrics["val/kernel/loss"], logged)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregators": {"own": Mean}}, "none of .*'own'"),
        ({"aggregators": {"encoder": Mean}}, "no aggregator may be called 'encoder'"),
        ({"aggregators": {"a.b": Mean}}, "by names without '.', got"),
        ({"aggregator_epochs": 0}, "aggregator_epochs must be at least 1 for kernel, got 0"),
        ({"aggregator_epochs": -1}, "aggregator_epochs must be at least 0, got -1"),
        ({"encoder_epochs": 0}, "encoder_epochs must be at least 1, got 0"),
        ({"encoder_weights": "x.ckpt"}, "encoder_epochs must be 0 with encoder_weights, got 2"),
        (
            {"encoder_weights": "x.ckpt", "encoder_epochs": 0, "wide_encoder": GRU},
            "wide_encoder .* needs encoder_epochs",
        ),
        ({"max_context_queries": 0}, "max_context_queries must be at least 1, got 0"),
        ({"refresh": PerEpoch()}, "refresh is for a tuned encoder"),
        ({"evaluation": Evaluation(explained="mean")}, "evaluation.explained names 'mean', there are kernel"),
        ({"evaluation": Evaluation(shuffled=["max"])}, "evaluation.shuffled names 'max', there are kernel"),
        (
            {"tune_encoder": True, "refresh": Live(2), "context": ContextRules(window=3)},
            "Live encodes whole histories, not with",
        ),
        (
            {"encoder": partial(TransformerEncoder, max_length=4, **SMALL), "context": ContextRules(window=5)},
            "context.window must be at most the encoder's max_length 4, got 5",
        ),
    ],
)
def test_wrong_settings_end_in_one_line(folder, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        aggregator(events_of(folder), **settings)
    assert "\n" not in str(refused.value)


def test_facts_that_were_not_linked(folder):
    with pytest.raises(ValueError, match="n_numeric, median_gap must come from the data, got None"):
        KernelAttentionAggregator(vocabulary_sizes=[4], n_numeric=None, median_gap=None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"n_users": 0}, "context.n_users must be at least 1, or null for no limit, got 0"),
        ({"max_rows": 0}, "context.max_rows must be at least 1"),
        ({"window": 0}, "context.window must be at least 1"),
        ({"min_prefix": 0}, "context.min_prefix must be at least 1, got 0"),
        ({"lag_days": -1.0}, "context.lag_days must be finite and at least 0, got -1.0"),
        ({"max_age_days": float("inf")}, "context.max_age_days must be finite"),
        ({"ties": "loose"}, r"context.ties must be one of \('strict', 'inclusive'\), got 'loose'"),
        ({"policy": "best"}, "context.policy must be one of"),
        ({"before_first": "zero"}, "context.before_first must be one of"),
    ],
)
def test_rules_of_context_that_cannot_be(rules, message):
    with pytest.raises(ValueError, match=message):
        ContextRules(**rules)


@pytest.mark.parametrize("name", ["max_validation_users", "n_influencers"])
def test_numbers_of_an_evaluation(name):
    with pytest.raises(ValueError, match=f"evaluation.{name} must be at least 1, got 0"):
        Evaluation(**{name: 0})


def test_a_plan_and_a_trainer_that_do_not_fit(folder):
    data = events_of(folder)
    module = aggregator(data)
    with pytest.raises(
        ValueError, match=r"trainer\.max_epochs must be 4: 2 of the encoder and 2 of the aggregators, got 3"
    ):
        trainer_of(module, max_epochs=3).fit(module, data)
    for settings in ({"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}):
        with pytest.raises(ValueError, match="banks are built from the events of validation, which must follow each"):
            trainer_of(module, **settings).fit(module, data)


def test_targets_that_cannot_be_tested_are_refused_before_a_fit(folder):
    probes = {"other": QUICK.probe}
    with pytest.raises(ValueError, match=r"evaluation\.probes names 'other', there are silent"):
        fitted(events_of(folder), evaluation=Evaluation(probes=probes))
    first = {"silent": NoEventWithin(rule=CalendarDates(dates=["2020-01-20"]), days=3)}
    with pytest.raises(
        ValueError, match=r"target 'silent' needs queries in each fold, got {'train': \d+, 'validation': 0}"
    ):
        fitted(by_time(folder, targets=first))
    module, _ = fitted(events_of(folder, targets={}), encoder_epochs=1, aggregator_epochs=1)
    with pytest.raises(ValueError, match="a test asks targets, the data has none"):
        trainer_of(module).test(module, events_of(folder, targets={}), verbose=False)
    with pytest.raises(ValueError, match="embeddings are those of test queries, the data has no targets"):
        trainer_of(module).predict(module, events_of(folder, targets={}))


def test_no_user_to_validate_on(folder):
    data = events_of(folder, validation_fraction=0.0, targets={})
    with pytest.raises(ValueError, match="no validation user has two events"):
        fitted(data)


def test_a_strategy_that_splits_the_model_is_refused(folder):
    module = aggregator(events_of(folder))
    module._trainer = SimpleNamespace(world_size=2, strategy=object())
    with pytest.raises(ValueError, match=r"trainer\.strategy must be 'replicated'.*got object"):
        module.setup("fit")


def test_checkpoints_of_something_else(folder, tmp_path):
    module = aggregator(events_of(folder))
    with pytest.raises(ValueError, match="checkpoint holds no contexts"):
        module.on_load_checkpoint({"state_dict": {}})
    saved = {}
    aggregator(events_of(folder), tune_encoder=True).on_save_checkpoint(saved)
    with pytest.raises(ValueError, match=r"holds the contexts of \['kernel'\], the config here names \['shared'\]"):
        module.on_load_checkpoint(saved)
    (tmp_path / "text.ckpt").write_text("nothing")
    with pytest.raises(ValueError, match=r"encoder_weights: .*text\.ckpt is not a checkpoint"):
        aggregator(events_of(folder), encoder_weights=str(tmp_path / "text.ckpt"), encoder_epochs=0)
    torch.save({"state_dict": {"head": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="encoder_weights: no encoder in "):
        aggregator(events_of(folder), encoder_weights=str(tmp_path / "other.ckpt"), encoder_epochs=0)
