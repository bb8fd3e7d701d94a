"""KernelAttentionAggregator whole: nothing of the future, of oneself or of the test reaches weights or features."""

from functools import partial
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from lightning import Callback, Trainer, seed_everything

from datamodules import EventSequencesDataModule
from datamodules.event_batches import Crops
from datamodules.event_targets import CalendarDates, NoEventWithin
from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.audit_command import audit_batch
from lightning_modules.context import (
    Attention,
    ContextRules,
    Evaluation,
    ExpHawkes,
    KernelAttention,
    LinearKernel,
    Live,
    LogisticProbe,
    Max,
    Mean,
    fit_contexts,
)
from lightning_modules.context.audit_edits import keep
from lightning_modules.losses import NextEvent
from lightning_modules.metrics.probe_metrics import probe_scores
from lightning_modules.networks import EventEncoder, RecurrentEncoder
from lightning_modules.networks.event_encoders import EventEmbedding

DAY = 86_400_000_000
N_USERS = 40
T2 = 1_581_724_800_000_000  # 15 February 2020, UTC
BY_TIME = {"split": "time", "validation_start": "2020-02-01", "test_start": "2020-02-15"}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*in eval mode at the start"
    ),
]
AGGREGATORS = {
    "mean": Mean,
    "max": Max,
    "attention": Attention,
    "kernel": KernelAttention,
    "linear": partial(LinearKernel, rank=4),
    "exp_hawkes": partial(ExpHawkes, normalise="mean"),
}
QUICK = Evaluation(probe=LogisticProbe(strengths=(0.1,), max_iterations=10), gaussian=False, constant=False)


def module_of(**settings):
    seed_everything(1, verbose=False)
    given = {
        "vocabulary_sizes": [14],
        "n_numeric": 1,
        "median_gap": 1.0,
        "encoder": partial(RecurrentEncoder, d_model=8, d_embedding=4),
        "encoder_objective": NextEvent,
        "encoder_epochs": 1,
        "aggregators": AGGREGATORS,
        "aggregator_epochs": 1,
        "evaluation": QUICK,
    }
    return KernelAttentionAggregator(**(given | settings)).eval()


@pytest.fixture(scope="module")
def batch():
    return regime(0, n_users=N_USERS, n_days=30, events_per_day=1.0, labels_per_day=0.4).batch()


def poisoned(events, later, numbers):
    """Other categories, and numbers of a kind, in some events."""
    categorical = torch.where(later.unsqueeze(1), 2 + (events["categorical"] + 5) % 12, events["categorical"])
    numeric = torch.where(later.unsqueeze(1), numbers, events["numeric"])
    return events | {"categorical": categorical, "numeric": numeric}


MODULES = {
    "sampled": {"context": ContextRules(n_users=15)},
    "everybody, by sums": {"context": ContextRules(n_users=None)},
    "by age": {"context": ContextRules(max_age_days=3.0, lag_days=0.25)},
    "tuned": {"tune_encoder": True, "aggregators": {"mean": Mean, "kernel": KernelAttention}},
}


@pytest.mark.parametrize("kind", MODULES)
def test_features_at_a_query_do_not_change_by_a_bit_with_what_comes_later(batch, kind):
    module, events = module_of(**MODULES[kind]), batch["events"]
    users = torch.arange(N_USERS)
    moment = int(events["times"][300])  # the time of an event, which strictly is not yet seen
    times = torch.full_like(users, moment)
    later = events["times"] >= moment
    found = module.represent(events, users, times)
    assert found.isfinite().all()
    shifted = events | {"times": torch.where(later, events["times"] + 7 * DAY, events["times"])}
    for edited in (poisoned(events, later, 1e3), poisoned(events, later, torch.nan), shifted):
        assert torch.equal(module.represent(edited, users, times), found)
    # float32 matrix products of batches of another shape
    torch.testing.assert_close(module.represent(keep(events, ~later), users, times), found, rtol=0, atol=1e-5)
    earlier = poisoned(events, events["times"] == events["times"][~later].max(), 1e3)
    assert not torch.equal(module.represent(earlier, users, times), found), "the past is read: this can fail"


def test_probabilities_of_a_test_do_not_change_with_what_comes_after_its_queries(batch):
    """The study itself, of all folds: a probe fitted on train queries reads nothing that comes after the last query."""
    module, events = module_of(context=ContextRules(n_users=15)), batch["events"]
    moment = int(events["times"].sort().values[-150])
    queries = {
        name: {key: value[one["times"] <= moment] if torch.is_tensor(value) else value for key, value in one.items()}
        for name, one in batch["queries"].items()
        if name == "local"
    }
    asked = batch | {"queries": queries}
    edited = asked | {"events": poisoned(events, events["times"] >= moment, torch.nan)}
    one, other = (module.test_step(given, 0).targets[0] for given in (asked, edited))
    assert len(one.labels) > 20
    for arm, probabilities in one.test.items():
        assert torch.equal(probabilities, other.test[arm]), arm


@pytest.mark.parametrize("n_users", [15, None])
def test_own_events_never_change_the_own_context(batch, n_users):
    module, events = module_of(context=ContextRules(n_users=n_users)), batch["events"]
    bank = module.model.bank(module(events), events, torch.arange(N_USERS))
    lengths = events["offsets"].diff()
    time = torch.tensor([int(events["times"].max()) + 1])
    for user in bank.context_users[lengths[bank.context_users] > 3][:4].tolist():
        mine = torch.arange(len(events["times"]))
        mine = (mine >= events["offsets"][user]) & (mine < events["offsets"][user + 1])
        asked = (torch.tensor([user]), time, time)
        found = module.represent_context(events, events, *asked)
        other = module.represent_context(events, poisoned(events, mine, -5.0), *asked)
        if n_users is not None:
            assert torch.equal(other, found)
        # sums over time add the own state and take it off again: rounding of float32 states below 1
        torch.testing.assert_close(other, found, rtol=0, atol=1e-6)
        neighbour = poisoned(events, ~mine, -5.0)
        assert not torch.allclose(module.represent_context(events, neighbour, *asked), found, atol=1e-3)


def test_alone_one_has_no_context(batch):
    module, events = module_of(), batch["events"]
    user = int(events["offsets"].diff().argmax())
    time = torch.tensor([int(events["times"].max()) + 1])
    only = torch.tensor([user])
    found = module.represent_context(events, events, only, time, time, context_users=only)
    of_each = found.reshape(len(module.model.aggregators), -1)
    assert not of_each[:, :-1].any(), "the declared vectors, which begin at 0"
    assert of_each[:, -1].all(), "and their flags"


def test_the_audit_finds_nothing_and_finds_what_the_released_code_does():
    # By time, where those who are asked are context of each other, and a bank may hold oneself.
    batch = regime(0, n_users=30, n_days=30, events_per_day=1.0, labels_per_day=0.4, new_regimes_at=0.6).batch()
    known = SimpleNamespace(
        target="local",
        n_queries=40,
        n_cuts=3,
        n_users=30,
        seed=0,
        ties="strict",
        tolerance=0.0,
        resize_tolerance=1e-5,
    )

    def leaks(**settings):
        module = module_of(aggregators={"mean": Mean, "kernel": KernelAttention}, **settings)
        findings = audit_batch(module, batch, known)
        return {finding.name for finding in findings if finding.status == "leak"}

    assert leaks(context=ContextRules(n_users=20)) == set()
    assert leaks(context=ContextRules(n_users=20, ties="inclusive")) == {"same moment"}
    assert leaks(context=ContextRules(n_users=20, include_self=True)) == {"self"}
    # Whose event is the last is known later only; where the audit sees it come from is its own matter.
    assert leaks(context=ContextRules(n_users=20, drop_last_prefix=True))


class Read(Callback):
    """What training and validation were given."""

    def __init__(self):
        self.latest, self.users, self.validation = -1, set(), None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.latest = max(self.latest, int(batch["times"].max()))
        self.users |= set(batch["users"].tolist())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validation = batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    regime(0, n_users=N_USERS, n_days=60, events_per_day=1.0, labels_per_day=0.2).write(folder)
    return folder


def fitted(folder, paths=None, context=None, **settings):
    data = EventSequencesDataModule(
        paths=paths or str(folder / "events.parquet"),
        user_column="user",
        time_column="time",
        categorical=["event_type"],
        numeric=["amount"],
        sampler=Crops(2, 12),
        targets={"silent": NoEventWithin(rule=CalendarDates(every_days=6), days=3)},
        batch_size=8,
        cache_dir=str(folder / "cache"),
        **{"validation_fraction": 0.25, "test_fraction": 0.25} | settings,
    )
    module = module_of(
        **{name: getattr(data, name) for name in ("vocabulary_sizes", "n_numeric", "median_gap")},
        aggregators={"mean": Mean, "kernel": KernelAttention},
        tune_encoder=True,
        **({} if context is None else {"context": context}),
    )
    read = Read()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[read],
    )
    trainer.fit(module, data)
    return module, data, read


def test_under_a_time_split_nothing_at_or_after_t1_is_trained_on_or_in_a_bank(folder):
    module, data, read = fitted(folder, **BY_TIME)
    full = data.test_dataloader().dataset[0]
    stop = full["train_stop"]
    assert int(full["events"]["times"].max()) > stop
    assert 0 < read.latest < stop
    for bank in module.contexts.banks.values():
        assert len(bank.times) > 0
        assert int(bank.times.max()) < stop
    assert stop <= int(read.validation["events"]["times"].max()) < T2
    assert all(int(one["fold"].max()) == 1 for one in read.validation["queries"].values())


def test_a_fit_does_not_depend_by_a_bit_on_events_of_the_test(folder, tmp_path):
    """Weights and banks of two fits whose files differ from T2 on."""
    module, *_ = fitted(folder, **BY_TIME)
    events = pl.read_parquet(folder / "events.parquet")
    late = pl.col("time") >= pl.lit("2020-02-15").str.to_datetime()
    changed = events.with_columns(
        pl.when(late).then(pl.lit("never seen before")).otherwise(pl.col("event_type")).alias("event_type"),
        pl.when(late).then(pl.col("amount") * 100).otherwise(pl.col("amount")).alias("amount"),
    )
    assert not changed.equals(events)
    changed.write_parquet(tmp_path / "events.parquet")
    other, *_ = fitted(folder, paths=str(tmp_path / "events.parquet"), **BY_TIME)
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, bank in module.contexts.banks.items():
        assert torch.equal(bank.states, other.contexts.banks[name].states)


@pytest.mark.parametrize("rules", [{"n_users": 12}, {"n_users": 12, "max_rows": 3, "policy": "random"}])
def test_whom_a_context_draws_does_not_depend_on_who_comes_later(folder, tmp_path, rules):
    """Fits, and embeddings of the same queries, of a file with users who come after T1 and T2 and of one cut off there.

    The names of later users lie before and between those of others, so that all are numbered anew.
    """
    events = pl.read_parquet(folder / "events.parquet")
    time = pl.col("time")
    t1, cut = (pl.lit(text).str.to_datetime() for text in ("2020-02-01", "2020-02-25"))
    number = pl.col("user").str.slice(1).cast(pl.Int64)
    there = events.with_columns(pl.col("user") + " first")
    after_t1 = events.filter((number % 2 == 0) & (time >= t1)).with_columns(pl.col("user") + " after T1")
    after_cut = events.filter((number % 3 == 0) & (time >= cut)).with_columns(pl.col("user") + " after all")
    whole = pl.concat([there, after_t1, after_cut])
    found = []
    for name, table in (("whole", whole), ("cut", whole.filter(time < cut))):
        path = tmp_path / f"{name}.parquet"
        table.write_parquet(path)
        module, data, _ = fitted(folder, paths=str(path), context=ContextRules(seed=3, **rules), **BY_TIME)
        full = data.test_dataloader().dataset[0]
        bank = module.model.bank(module.model.encode(full["events"]), full["events"], full["context_users"])
        drawn = [full["user_ids"][user] for user in bank.context_users.tolist()]
        asked, ids = full["queries"]["silent"], full["user_ids"]
        embedded = module.eval().represent(
            full["events"], asked["users"], asked["times"], context_users=full["context_users"]
        )
        names = [(ids[user], time) for user, time in zip(asked["users"].tolist(), asked["times"].tolist(), strict=True)]
        found.append((module, drawn, dict(zip(names, embedded, strict=True))))
    (one, drawn, embedded), (other, fewer, again) = found
    known = set(whole.filter(time < t1)["user"].to_list())
    assert sum(user in known for user in drawn) == 12
    later = [user for user in drawn if user.endswith("after T1")]
    assert 0 < len(later) < N_USERS // 2, "who joins after T1 is drawn at the same rate"
    assert [user for user in drawn if user in fewer] == fewer
    seen_by_cut = set(whole.filter(time < cut)["user"].to_list())
    assert not (set(drawn) - set(fewer)) & seen_by_cut
    # other users in a batch of the encoder round the last digits of float32 otherwise; another draw moves the first
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **close)
    common = [name for name in again if name in embedded]
    assert len(common) > 50
    assert max(time for _, time in common) > T2
    for name in common:
        torch.testing.assert_close(embedded[name], again[name], **close)


def with_newcomers(events, stop):
    """Events before ``stop``, with somebody new after every third user, who has four events from then on.

    Returns them, and the old number of each user, -1 for the new ones.
    """
    known = keep(events, events["times"] < stop)
    everybody = torch.stack([torch.arange(N_USERS), torch.full((N_USERS,), -1)], 1)
    everybody = everybody[(everybody >= 0) | (torch.arange(N_USERS) % 3 == 0).unsqueeze(1)]
    parts = []
    for user in everybody.tolist():
        rows = slice(*known["offsets"][user : user + 2].tolist()) if user >= 0 else slice(4)
        part = {name: known[name][rows] for name in ("categorical", "numeric", "times")}
        parts.append(part if user >= 0 else part | {"times": stop + torch.arange(4)})
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = torch.tensor([len(part["times"]) for part in parts])
    draws = torch.where(everybody >= 0, -1.0, torch.arange(len(everybody)) / len(everybody)).double()
    return table | {"offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]), "draws": draws}, everybody


@pytest.mark.parametrize("n_users", [12, None])
def test_live_states_and_drift_are_of_the_same_users_whoever_comes_later(batch, n_users, monkeypatch):
    """Later users lie between the others; to the bank of training they have no event."""
    monkeypatch.setattr(fit_contexts, "DRIFT_USERS", 4)
    events = batch["events"]
    stop, found = int(events["times"].sort().values[400]), []
    for newcomers in (False, True):
        known = keep(events, events["times"] < stop), torch.arange(N_USERS)
        table, numbers = with_newcomers(events, stop) if newcomers else known
        module = module_of(
            aggregators={"mean": Mean}, tune_encoder=True, refresh=Live(4), context=ContextRules(n_users=n_users)
        )
        contexts, encoder = module.contexts, module.model.encoder_of("mean")
        contexts.read(table, torch.arange(len(numbers)), stop, torch.device("cpu"))
        contexts.encode_due(0)
        drawn = numbers[contexts.bank("mean").context_users]
        assert bool((drawn < 0).any()) == newcomers, "of those who come later some are in the context"
        live, encode = [], encoder.encode_steps

        def watched(one, live=live, numbers=numbers, encode=encode):
            live.append(numbers[one["users"]].tolist())
            return encode(one)

        encoder.encode_steps = watched
        for contexts.steps in range(5):
            contexts.live_states("mean")
        with torch.no_grad():
            encoder.start.add_(1.0)
        found.append((live, contexts.drifts()["mean"]))
    (live, drifted), (live_too, drifted_too) = found
    assert live == live_too
    assert {len(users) for users in live} == {4}
    assert len({tuple(users) for users in live}) > 1
    assert drifted > 0
    assert drifted == pytest.approx(drifted_too, rel=1e-4)  # float32 states in batches of other users


def test_under_a_user_split_no_test_user_is_trained_on_or_in_the_validation(folder):
    module, data, read = fitted(folder)
    full = data.test_dataloader().dataset[0]
    n_users = len(full["user_ids"])
    train = set(full["context_users"].tolist())
    tested = set(torch.cat([one["users"][one["fold"] == 2] for one in full["queries"].values()]).tolist())
    assert tested
    assert read.users <= train
    assert not tested & train
    events = read.validation["events"]
    assert len(events["offsets"]) == n_users + 1
    assert not events["offsets"].diff()[sorted(tested)].any()
    for bank in module.contexts.banks.values():
        assert set(bank.users.tolist()) <= train


class LastType(EventEncoder):
    """State after an event: its type, one-hot, and nothing learned."""

    def __init__(self, *, vocabulary_sizes, n_numeric):
        super().__init__(EventEmbedding(vocabulary_sizes, n_numeric, d_embedding=2), d_model=vocabulary_sizes[0])

    def advance(self, batch, memory):
        return torch.nn.functional.one_hot(batch["categorical"][..., 0], self.d_model).float(), memory

    def unroll(self, vectors, memory):
        raise NotImplementedError

    def initial_state(self):
        return torch.zeros(self.d_model)


def canary(seed):
    """A label drawn for each second, and at that very second an event of a third of the users that equals it."""
    random = torch.Generator().manual_seed(seed)
    n_users, n_moments = 60, 240
    moments = torch.arange(1, n_moments + 1) * DAY
    label = torch.randint(2, (n_moments,), generator=random)
    speaks = torch.rand(n_users, n_moments, generator=random) < 1 / 3
    users, places = speaks.nonzero(as_tuple=True)
    asked = ~speaks & (torch.rand(n_users, n_moments, generator=random) < 0.1)
    of, when = asked.nonzero(as_tuple=True)
    fold = torch.where(when < 140, 0, torch.where(when < 180, 1, 2)).to(torch.int8)
    events = {
        "categorical": 2 + label[places].unsqueeze(1),
        "numeric": torch.zeros(len(users), 1),
        "times": moments[places],
        "offsets": torch.cat([torch.zeros(1).long(), speaks.sum(1).cumsum(0)]),
    }
    queries = {"users": of, "times": moments[when], "labels": label[when], "fold": fold}
    facts = {"n_classes": 2, "scope": "local", "outcome_dependent": False, "description": "the label of the second"}
    return {
        "events": events,
        "user_ids": list(range(n_users)),
        "queries": {"label": queries | facts},
        "context_users": torch.arange(n_users),
        "train_stop": 2**63 - 1,
        "split": "users",
    }


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_a_canary_of_the_same_second_sings_only_where_ties_are_seen(ties):
    given = canary(0)
    module = module_of(
        vocabulary_sizes=[4],
        encoder=LastType,
        aggregators={"mean": Mean, "attention": Attention},
        context=ContextRules(n_users=None, ties=ties),
        evaluation=Evaluation(),
    )
    (target,) = module.test_step(given, 0).targets
    scores = {arm: probe_scores(target.labels.numpy(), test.numpy())["roc_auc"][0] for arm, test in target.test.items()}
    # 60 moments of the test with a label each: the standard error of an AUC of chance is about 0.075
    assert 0.35 < scores["own"] < 0.65
    for arm in ("mean", "attention"):
        if ties == "strict":
            assert 0.3 < scores[arm] < 0.7, scores
        else:
            assert scores[arm] > 0.95, scores
        assert scores[f"shuffled:{arm}"] < 0.7, scores
