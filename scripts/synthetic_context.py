"""What context must and must not do where the truth is known: synthetic events against exact Bayes oracles.

    python scripts/synthetic_context.py --claims regime null shuffled cohort hawkes
    python scripts/synthetic_context.py --claims regime cohort --split time

``regime``: everybody's events and labels depend on a hidden state s(t); sparse users learn of it from others. Share of
the gap between the oracle of own history and the one that is told s(t), closed by the aggregator that is best on
validation. ``null``: s(t) never moves, so context has nothing to add. ``shuffled``: the regime, but every user's clock
moved by an offset of its own, so that others tell nothing of the moment. ``cohort``: every group has a state of its
own, which a mean over everybody hides. ``hawkes``: events of groups excite each other with a known decay, to be
recovered by maximum likelihood. Sizes are declared below. A cell is a file in OUT that is not computed again.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from scipy.stats import t as student
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from datamodules.event_oracles import log_losses, oracle_probabilities
from datamodules.synthetic_event_set import START
from datamodules.synthetic_events import cohort, null, regime
from datamodules.synthetic_hawkes import hawkes_cross
from lightning_modules import KernelAttentionAggregator
from lightning_modules.context import (
    AttentionHawkes,
    BestProbe,
    Context,
    ContextBank,
    ContextRules,
    Evaluation,
    ExpHawkes,
    KernelAttention,
    LightGBMProbe,
    LogisticProbe,
    Mean,
    SymmetricAttention,
    evaluate,
)
from lightning_modules.context.evaluation import Encoded
from lightning_modules.context.findings import findings, strict_controls
from lightning_modules.context.fixed_sequences import gathered
from lightning_modules.context.hawkes_fit import event_log_losses, fit_hawkes
from lightning_modules.context.probes import Probe
from lightning_modules.losses import NextEvent
from lightning_modules.networks import RecurrentEncoder
from lightning_modules.run_folder import write_whole

D_MODEL, N_CONTEXT, BATCH, STEPS_AN_EPOCH = 32, 300, 64, 20
# Epochs of encoder and aggregators. After 200 steps the encoder hardly tells the state of a group: a mean over the own
# group, were it known, closes a third of the gap of seed 10, after 800 steps 0.46, after 2,400 no more. Seed 10 chose
# the numbers of the cohort, and is in no table.
EPOCHS = {"regime": (10, 3), "null": (10, 3), "shuffled": (10, 3), "cohort": (40, 15)}
N_TRAIN, N_VALIDATION = 15_000, 6_000  # queries of the local target; all test queries are asked
AGGREGATORS: dict[str, dict[str, Callable[..., Any]]] = {
    "regime": {
        "mean": Mean,
        "kernel": KernelAttention,
        "exp_hawkes": partial(ExpHawkes, normalise="mean"),
        "exp_hawkes_quarter": partial(ExpHawkes, theta=0.25, normalise="mean"),
    },
    "cohort": {
        "mean": Mean,
        "kernel": KernelAttention,
        "symmetric": SymmetricAttention,
        "attention_hawkes": AttentionHawkes,
    },
}
AGGREGATORS["null"] = AGGREGATORS["shuffled"] = AGGREGATORS["regime"]
TREES = LightGBMProbe(n_trees=300, learning_rate=0.05, patience=20)
# The state of the own group enters the logit of a cohort linearly, that of everybody in a product with the type of the
# user; trees alone can read a calendar. So that no arm loses by its probe, each has the better one on validation.
PROBES: dict[str, Probe] = dict.fromkeys(AGGREGATORS, TREES) | {"cohort": BestProbe((LogisticProbe(), TREES))}
SEEDS = {"regime": range(10), "null": range(5), "shuffled": range(5), "cohort": range(5), "hawkes": range(5)}
N_TEST_SHUFFLED = 25_000  # of all users: the truth about sparse ones is not asked for
TRUE_THETA = 0.02


class Crops(IterableDataset):
    """Endless training batches of contiguous events before ``stop``, 10 to 80 of a user."""

    def __init__(self, events: Mapping[str, Tensor], users: Tensor, stop: int, seed: int) -> None:
        late = torch.cat([torch.zeros(1, dtype=torch.int64), (events["times"] < stop).long().cumsum(0)])
        first = events["offsets"][users]
        counts = late[events["offsets"][users + 1]] - late[first]
        kept = counts >= 10
        self.events, self.users, self.first, self.counts = dict(events), users[kept], first[kept], counts[kept]
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            rows = torch.randint(len(self.users), (BATCH,), generator=self.generator)
            u, v = torch.rand(2, BATCH, generator=self.generator)
            lengths = 10 + (u * (self.counts[rows].clamp(max=80) - 9)).long()
            starts = self.first[rows] + (v * (self.counts[rows] - lengths + 1)).long()
            yield gathered(self.events, self.users[rows], starts, lengths)


def only(queries: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of the queries of a target."""
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in queries.items()}


def fitted(drawn: Any, claim: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """Fit encoder and aggregators on what training may see; the model and the one batch of the test."""
    encoder_epochs, aggregator_epochs = EPOCHS[claim]
    batch = drawn.batch()
    events, local = batch["events"], batch["queries"]["local"]
    folds = torch.from_numpy(drawn.user_folds)
    if drawn.split == "users":
        users, kept = torch.nonzero(folds == 0).flatten(), (folds < 2)[torch.from_numpy(drawn.event_users)]
    else:
        users = torch.arange(drawn.n_users)
        kept = events["times"] < local["times"][local["fold"] == 2].min()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.long().cumsum(0)])[events["offsets"]]
    seen = {key: events[key][kept] for key in ("categorical", "numeric", "times")} | {"offsets": offsets}
    before = {"local": only(local, local["fold"] < 2)}
    seed_everything(seed, verbose=False)
    adam = partial(torch.optim.Adam, lr=4e-3)
    module = KernelAttentionAggregator(
        **drawn.facts(),
        encoder=partial(RecurrentEncoder, d_model=D_MODEL, d_embedding=16, time_gaps=True),
        encoder_objective=partial(NextEvent, at="target"),
        encoder_epochs=encoder_epochs,
        aggregators=dict(AGGREGATORS[claim]),
        aggregator_epochs=aggregator_epochs,
        context=ContextRules(n_users=N_CONTEXT, seed=seed),
        max_context_queries=1024,
        evaluation=Evaluation(max_validation_users=64),
        encoder_optimizer=adam,
        aggregator_optimizer=adam,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=encoder_epochs + aggregator_epochs,
        limit_train_batches=STEPS_AN_EPOCH,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(Crops(events, users, drawn.train_stop, seed), batch_size=None)
    trainer.fit(module, loader, DataLoader([batch | {"events": seen, "queries": before}], batch_size=None))
    return module.model.eval(), batch


def share_closed(drawn: Any, claim: str, seed: int) -> dict[str, Any]:
    """Log-losses of arms and oracles on sparse users' test queries, and the share of the gap with its interval."""
    model, batch = fitted(drawn, claim, seed)
    local = batch["queries"]["local"]
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.from_numpy(drawn.sparse)[local["users"]]
    rows = []
    for fold, most in enumerate((N_TRAIN, N_VALIDATION)):
        inside = torch.nonzero(local["fold"] == fold).flatten()
        rows.append(inside[torch.randperm(len(inside), generator=generator)[:most]])
    if claim == "shuffled":
        tested = torch.nonzero(local["fold"] == 2).flatten()
        tested = tested[torch.randperm(len(tested), generator=generator)[:N_TEST_SHUFFLED]]
    else:
        tested = torch.nonzero((local["fold"] == 2) & sparse).flatten()
    rows = torch.cat([*rows, tested])
    asked = only(local, rows)
    evaluation = Evaluation(probe=PROBES[claim], gaussian=False, constant=False)
    with torch.inference_mode(False):
        study = evaluate(model, batch | {"queries": {"local": asked}}, evaluation, seed=seed)
    target = study.targets[0]
    labels, users = target.labels.numpy(), target.users.numpy()
    # A moved clock leaves no oracle: its s(t) is that of another moment for every user.
    oracles = {
        knows: log_losses(oracle_probabilities(drawn, "local", knows)[tested.numpy()], labels)
        for knows in (() if claim == "shuffled" else ("own", "regime"))
    }
    losses = {arm: log_losses(found.numpy(), labels) for arm, found in target.test.items()}
    chosen = target.chosen("log_loss")
    assert chosen is not None
    found = findings(study, n_resamples=500, measure="log_loss")["targets"]["local"]
    resampled = np.random.default_rng(seed)
    everybody, place = np.unique(users, return_inverse=True)
    columns = [losses[chosen], losses["own+time"], np.ones(len(users)), *oracles.values()]
    sums = np.stack([np.bincount(place, values) for values in columns])
    draws = resampled.multinomial(len(everybody), np.full(len(everybody), 1 / len(everybody)), size=1000) @ sums.T
    beyond = (draws[:, 0] - draws[:, 1]) / draws[:, 2]
    result = {
        "n": len(labels),
        "oracles": {name: float(values.mean()) for name, values in oracles.items()},
        "arms": {arm: float(values.mean()) for arm, values in losses.items()},
        "chosen": chosen,
        "minus own+time": [
            float(losses[chosen].mean() - losses["own+time"].mean()),
            *np.quantile(beyond, [0.025, 0.975]),
        ],
        "judged": found["arms"][chosen]["judged"],
    }
    if oracles:
        shares = (draws[:, 3] - draws[:, 0]) / (draws[:, 3] - draws[:, 4])
        gap = oracles["own"].mean() - oracles["regime"].mean()
        share = float((oracles["own"].mean() - losses[chosen].mean()) / gap)
        result["share"] = [share, *np.quantile(shares, [0.025, 0.975])]
    if claim == "cohort":
        encoded = Encoded(model, batch["events"], batch["context_users"])
        result["mass"] = {name: mass_on_own_group(drawn, encoded, asked, name) for name in AGGREGATORS[claim]}
        result["known group"] = known_group_loss(drawn, encoded, asked, seed)
    return result


def of_own_group(drawn: Any, context: Context, users: Tensor) -> Tensor:
    """``(Q, n) bool``: rows of users of the asked user's group."""
    groups = torch.from_numpy(drawn.groups)
    return groups[context.users.expand(context.visible.shape)] == groups[users].unsqueeze(1)


@torch.no_grad()
def mass_on_own_group(drawn: Any, encoded: Encoded, asked: Mapping[str, Any], name: str) -> float:
    """Mean weight that an aggregator puts on users of the asked user's group, over 1,000 test queries."""
    rows = torch.nonzero(asked["fold"] == 2).flatten()[:1000]
    users, times = asked["users"][rows], asked["times"][rows]
    context = encoded.bank(name).context(times, users, "gathered")
    weights = encoded.model.branch(name).aggregator.weights(encoded.own(name, users, times).states, context)
    return float((weights * of_own_group(drawn, context, users)).sum() / weights.sum())


@torch.no_grad()
def known_group_loss(drawn: Any, encoded: Encoded, asked: Mapping[str, Any], seed: int) -> float:
    """Log-loss on the test beside the mean state of the own group, which no model knows: what attention could reach."""
    features = []
    for users, times in zip(asked["users"].split(2048), asked["times"].split(2048), strict=True):
        context = encoded.bank("mean").context(times, users, "gathered")
        same = context.visible & of_own_group(drawn, context, users)
        mean = context.combine(same / same.sum(1, keepdim=True).clamp(min=1), context.states)
        features.append(torch.cat([encoded.own("mean", users, times).states, mean], 1))
    parts = [(torch.cat(features)[asked["fold"] == fold], asked["labels"][asked["fold"] == fold]) for fold in range(3)]
    (train, labels), (validation, validation_labels), (test, test_labels) = parts
    probe = PROBES["cohort"]
    _, found = probe.fit_predict(train, labels, validation, validation_labels, test, n_classes=2, seed=seed)
    return float(log_losses(found.numpy(), test_labels.numpy()).mean())


def recovered_theta(seed: int) -> dict[str, Any]:
    """Learned theta from starts three times too long and too short, and held-out losses at 0.1, 1 and 10 times."""
    found: dict[str, Any] = {}
    for kind, all_events in (("last event", False), ("all events", True)):
        drawn = hawkes_cross(seed, theta_days=TRUE_THETA, all_events=all_events)
        batch = drawn.batch()
        one_hot = torch.eye(int(drawn.groups.max()) + 1, dtype=torch.float64)
        bank = ContextBank.build(one_hot[torch.from_numpy(drawn.types)], batch["events"], batch["context_users"])
        queries, groups = batch["queries"]["event"], torch.from_numpy(drawn.groups)
        parts = [only(queries, queries["fold"] == fold) for fold in (0, 2)]
        contexts = [bank.context(part["times"], part["users"], "gathered") for part in parts]
        asked = [one_hot[groups[part["users"]]] for part in parts]
        fit = partial(fit_hawkes, asked[0], contexts[0], parts[0]["labels"], pings_per_day=drawn.pings_per_day)
        found[kind] = {f"from {start:g}": fit(theta=start * TRUE_THETA).theta for start in (3, 1 / 3)}
        if not all_events:
            held_out = {}
            for times in (0.1, 1, 10):
                at = fit(theta=times * TRUE_THETA, learn_theta=False)
                rates = at.rates(asked[1], contexts[1])
                held_out[f"{times:g}"] = float(event_log_losses(rates, parts[1]["labels"], drawn.pings_per_day).mean())
            found["held out"] = held_out
            found["n_events"] = len(batch["events"]["times"])
    return found


def with_own_clocks(drawn: Any, seed: int) -> Any:
    """Every user's events and queries moved by an offset of its own, up to the length of the whole."""
    span = drawn.stop - START
    offsets = np.random.default_rng(10_000 + seed).integers(0, span, drawn.n_users)
    queries = {
        name: asked | {"times": asked["times"] + offsets[asked["users"]]} for name, asked in drawn.queries.items()
    }
    times = drawn.times + offsets[drawn.event_users]
    return dataclasses.replace(drawn, times=times, queries=queries, stop=drawn.stop + span)


def compute(claim: str, split: str, seed: int) -> dict[str, Any]:
    """One cell."""
    if claim == "hawkes":
        return recovered_theta(seed)
    if claim == "shuffled":
        return share_closed(with_own_clocks(regime(seed), seed), claim, seed)
    later = {"new_regimes_at": 0.6} if split == "time" else {}
    return share_closed({"regime": regime, "null": null, "cohort": cohort}[claim](seed, **later), claim, seed)


def shown(values: list[float]) -> str:
    """Value with interval."""
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def over_strictest(cell: Mapping[str, Any]) -> tuple[str, float]:
    """The control of the chosen arm with the least log-loss on the test, and the chosen arm's log-loss minus its."""
    control = min(strict_controls(cell["chosen"]), key=cell["arms"].__getitem__)
    return control, cell["arms"][cell["chosen"]] - cell["arms"][control]


def helps(cell: Mapping[str, Any]) -> str:
    """Whether the chosen arm beats its strictest control under Holm's correction."""
    return "yes" if cell["judged"]["helps"] else "no"


def table(claim: str, split: str, cells: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Markdown of a claim."""
    if claim == "hawkes":
        yield "| seed | theta from 3 x | from 1/3 x | loss at 0.1 x | at 1 x | at 10 x | all events: from 3 x |"
        yield "|---" * 7 + "|"
        for seed, cell in cells.items():
            learned, losses = cell["last event"], cell["held out"]
            row = [learned["from 3"], learned["from 0.333333"]]
            other = cell["all events"]["from 3"]
            numbers = [f"{value:.4f}" for value in (*row, *losses.values(), other)]
            yield f"| {seed} | {' | '.join(numbers)} |"
        for kind in ("last event", "all events"):
            thetas = [cell[kind]["from 3"] for cell in cells.values()]
            yield f"- {kind}: median theta {statistics.median(thetas):.4f}, true {TRUE_THETA}"
        return
    who = "test queries of all users" if claim == "shuffled" else "sparse users' test queries"
    oracles = [] if claim == "shuffled" else ["oracle own", "oracle s(t)"]
    has_gap = claim in ("regime", "cohort")
    heads = ["seed", "queries", *oracles, "own", "own+time", "chosen on validation", "its log-loss"]
    heads += [*(["share of the gap"] if has_gap else []), "minus own+time"]
    heads += ["strictest control", "minus strictest", "helps"]
    yield f"{claim}, split by {split}; log-loss of the local label on {who}\n\n| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for seed, cell in cells.items():
        numbers = [*cell["oracles"].values(), cell["arms"]["own"], cell["arms"]["own+time"]]
        chosen = cell["chosen"]
        row = [str(seed), str(cell["n"]), *(f"{one:.3f}" for one in numbers), chosen, f"{cell['arms'][chosen]:.3f}"]
        row += [*([shown(cell["share"])] if has_gap else []), shown(cell["minus own+time"])]
        control, difference = over_strictest(cell)
        row += [control, f"{difference:+.3f}", helps(cell)]
        yield f"| {' | '.join(row)} |"
    over_seeds = {
        key: [cell[key][0] for cell in cells.values()] for key in [*(["share"] if has_gap else []), "minus own+time"]
    }
    over_seeds["minus strictest"] = [over_strictest(cell)[1] for cell in cells.values()]
    for key, values in over_seeds.items():
        if len(values) > 1:
            mean, sd = statistics.mean(values), statistics.stdev(values)
            half = float(student.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
            yield f"- {key}, over seeds: {mean:.3f} ± {half:.3f} (95 % of the mean), standard deviation {sd:.3f}"
    if claim == "cohort":
        yield "\nShare of the weights on the own group (chance 1/8), and log-loss of the arm, means over seeds:"
        for name in AGGREGATORS[claim]:
            mass = statistics.mean(cell["mass"][name] for cell in cells.values())
            loss = statistics.mean(cell["arms"][name] for cell in cells.values())
            yield f"- {name}: {mass:.3f}, {loss:.3f}"
        known = statistics.mean(cell["known group"] for cell in cells.values())
        yield f"- mean over the own group, told by the truth: 1, {known:.3f}"


def main() -> None:
    """Compute what is missing, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--split", choices=["users", "time"], default="users")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic_context"))
    options = parser.parse_args()
    for claim in options.claims:
        cells = {}
        for seed in tqdm(options.seeds or SEEDS[claim], desc=claim, file=sys.stderr):
            file = options.out / f"{claim}, {options.split}, {seed}.json"
            if not file.is_file():
                started = time.perf_counter()
                cell = compute(claim, options.split, seed)
                write_whole(file, json.dumps(cell | {"seconds": time.perf_counter() - started}) + "\n")
            cells[seed] = json.loads(file.read_text(encoding="utf-8"))
        print("\n".join([*table(claim, options.split, cells), ""]))
        seconds = [f"{cell['seconds']:.0f}" for cell in cells.values()]
        print(f"Seconds a seed: {', '.join(seconds)}.\n")


if __name__ == "__main__":
    main()
