"""Studies that the tests of reports read: a portfolio study of a synthetic market, and a study of attacks."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from lightning_modules.attacks.study import AttackStudy, ChosenAttack, JudgeRecord
from lightning_modules.portfolio.backtest import Decision, Track, hold, make_plan
from lightning_modules.portfolio.market import Market, month_starts
from lightning_modules.portfolio.study import Arm, Study


def synthetic_study_market(n_stocks, n_days, rng, *, index=True, sectors=True):
    """One market factor, sector factors, volatilities between 10 and 45 % a year."""
    n_sectors = 7 if sectors else 0
    place = rng.integers(max(1, n_sectors), size=n_stocks)
    factor = rng.standard_t(5, n_days) * 0.006 + 0.0004
    groups = rng.normal(0, 0.005, (n_days, max(1, n_sectors)))
    own = rng.normal(0, 1, (n_days, n_stocks)) * rng.uniform(0.006, 0.028, n_stocks)
    returns = factor[:, None] * rng.uniform(0.5, 1.5, n_stocks) + groups[:, place] + own
    returns[0] = np.nan
    prices = 50 * np.cumprod(1 + np.nan_to_num(returns), axis=0)
    return Market(
        dates=np.busday_offset("2015-01-02", np.arange(n_days)).astype("datetime64[D]"),
        tickers=tuple(f"T{stock:03d}" for stock in range(n_stocks)),
        prices=prices,
        returns=returns,
        member=np.ones((n_days, n_stocks), dtype=bool),
        index_prices=1000 * np.cumprod(1 + factor) if index else None,
        sectors=place if sectors else np.full(n_stocks, -1),
        sector_names=("Energy", "Financial", "Healthcare", "Consumer Defensive", "Technology", "Utilities", "Other")
        if sectors
        else (),
        delisting_returns=np.full(n_stocks, np.nan),
    )


def pick_and_weigh(labels, n_per_cluster=2):
    """Hold the first stocks of each cluster, calm ones more."""
    picks = np.concatenate([np.flatnonzero(labels == label)[:n_per_cluster] for label in np.unique(labels)])

    def decide(past, number):
        calm = 1 / past.filled_returns()[-250:, picks].std(0)
        weights = np.zeros(past.n_stocks)
        weights[picks] = calm / calm.sum()
        return Decision(weights / weights.sum(), labels=labels)

    return decide


def equal_weights(past, number):
    return Decision(np.full(past.n_stocks, 1 / past.n_stocks))


def ring_diagrams(n_stocks, rng):
    """Many short H0 bars, a few H1 bars with one long, hardly any H2 bar."""
    found = []
    for _ in range(n_stocks):
        scale = rng.uniform(0.5, 1.5)
        deaths = np.sort(rng.gamma(4, 0.1 * scale, 80))
        births = rng.uniform(0.3, 0.8, 20) * scale
        ring = np.concatenate([[[0.4 * scale, 1.4 * scale]], np.stack([births, births + rng.gamma(1, 0.08, 20)], 1)])
        hollow = rng.uniform(0.8, 1.0, int(rng.integers(3)))
        voids = np.stack([hollow, hollow + 0.05], 1)
        found.append({0: np.stack([np.zeros(80), deaths], 1), 1: ring, 2: voids})
    return found


def relabelled(labels):
    """0, 1, ... by falling size."""
    values, counts = np.unique(labels, return_counts=True)
    return np.argsort(values[np.argsort(-counts, kind="stable")])[labels - values.min()]


def build_study(
    n_stocks=40,
    n_days=650,
    n_train=400,
    n_clusters=5,
    n_random=12,
    *,
    mode="causal",
    index=True,
    sectors=True,
    diagrams=True,
    more=0,
    cost_bps=10.0,
    seed=0,
):
    """A study with ``more`` additional controls; ``n_random`` random clusterings, and as many permuted ones."""
    rng = np.random.default_rng(seed)
    market = synthetic_study_market(n_stocks, n_days, rng, index=index, sectors=sectors)
    spread = np.nan_to_num(market.returns[:n_train]).std(0)
    shape = rng.normal(size=(n_stocks, 12)) + np.outer(spread / spread.std(), rng.normal(size=12))
    embedding = (shape - shape.mean(0)) / shape.std(0)

    def ward(rows):
        return relabelled(fcluster(linkage(rows, "ward"), n_clusters, "maxclust"))

    labels = ward(embedding)
    by_volatility = ward(spread[:, None])
    rows = month_starts(market.dates, n_train, n_days)

    def arm(name, kind, decide):
        plan = make_plan(name, market, decide, rows, n_days)
        return Arm(name, kind, hold(plan, market, cost_bps=cost_bps, drift=mode != "published"), plan)

    arms = [
        arm("model, ward", "model", pick_and_weigh(labels)),
        arm("model, k-means", "model", pick_and_weigh(relabelled(embedding[:, 0].argsort().argsort() % n_clusters))),
        arm("volatility only, ward", "clusters", pick_and_weigh(by_volatility)),
    ]
    if sectors:
        arms.append(arm("sectors", "clusters", pick_and_weigh(market.sectors)))
    arms.append(arm("1/N", "allocation", equal_weights))
    arms += [
        arm(
            f"a control with a long name, number {number}",
            "allocation",
            pick_and_weigh(np.arange(n_stocks) % 7, number),
        )
        for number in range(1, more + 1)
    ]
    if index:
        returns = market.index_returns[n_train - 1 :]
        none = np.zeros((len(rows), n_stocks))
        track = Track(
            name="index",
            dates=market.dates[n_train:],
            returns=returns,
            gross_returns=returns,
            rebalance_dates=market.dates[rows],
            targets=none,
            drifted=none,
            held=none[0],
            turnover=none[:, 0],
            cost_bps=0.0,
            flags={},
        )
        arms.append(Arm("index", "index", track, None))
    by_lot = [rng.integers(n_clusters, size=n_stocks) for _ in range(n_random)]
    exchanged = [np.random.default_rng([seed, number]).permutation(labels) for number in range(n_random)]
    return Study(
        mode=mode,
        market=market,
        train=(0, n_train),
        test=(n_train, n_days),
        arms=tuple(arms),
        random_arms=tuple(
            arm(f"random clusters {number}", "clusters", pick_and_weigh(lot)) for number, lot in enumerate(by_lot)
        ),
        columns=np.arange(n_stocks),
        embedding=embedding,
        labels=labels,
        diagrams=ring_diagrams(n_stocks, rng) if diagrams else None,
        scores={"ward": {"silhouette": 0.1, "davies_bouldin": 2.0, "calinski_harabasz": float("nan")}},
        risk_free=0.03,
        cost_bps=cost_bps,
        costs_bps=(0.0, 5.0, 10.0, 20.0, 50.0),
        drift=mode != "published",
        n_trials=3,
        flags=("prices: 2 gaps of at most 5 days filled",),
        seed=seed,
        permuted_arms=tuple(
            arm(f"permuted clusters {number}", "clusters", pick_and_weigh(lot)) for number, lot in enumerate(exchanged)
        ),
    )


@pytest.fixture(scope="session")
def make_study():
    """The builder: ``make_study(n_stocks=..., index=False, ...)``."""
    return build_study


@pytest.fixture(scope="session")
def study():
    """A study with everything in it."""
    return build_study()


ATTACKS = (
    ("ifgsm", "ifgsm", False),
    ("ifgsm sum", "ifgsm", True),
    ("ifgsm harmonic", "ifgsm", True),
    ("pgd", "pgd", False),
    ("pgd sum", "pgd", True),
    ("pgd norm sum with a long name", "pgd", True),
    ("sgm", "sgm", False),
    ("noise", "noise", False),
)

JUDGES = (
    ("ResCNN, seed 0", "attacked", True, 2.5),
    ("S4, seed 7", "held_out", True, 2.0),
    ("statistics", "held_out", False, 3.0),
    ("two statistics", "held_out", False, 8.0),
    ("nearest neighbour", "held_out", False, 1.5),
    ("one-class SVM", "held_out", False, 2.5),
    ("LSTM, seed 9", "held_out", True, 0.1),
)
"""Name, role, whether 0.5 is a threshold, and by how many deviations vanilla attacks stand out."""


def build_attack_study(
    n=40,
    n_steps=30,
    n_channels=1,
    n_classes=2,
    n_iterations=10,
    attacks=ATTACKS,
    judges=JUDGES,
    *,
    n_calibration=120,
    n_attacked=1,
    variable_length=False,
    saturation=3.0,
    seed=0,
):
    """Margins of the victim fall along a run; detectors see vanilla attacks, and concealed ones half as well.

    Args:
        n_attacked: Attacked detectors; the first of ``judges`` is copied, or left out at 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(n) % n_classes
    series = normal(n, n_steps, n_channels).cumsum(1).float()
    mask = torch.ones(n, n_steps, dtype=torch.bool)
    if variable_length:
        mask = torch.arange(n_steps) < torch.linspace(n_steps / 2, n_steps, n)[:, None]
        series = torch.where(mask[..., None], series, 0.0)
    first, *others = judges
    copies = [(f"{first[0]}{', copy' * number}", *first[1:]) for number in range(n_attacked)]
    judges = [*copies, *others]
    signs = 2.0 * torch.nn.functional.one_hot(labels, n_classes) - 1
    certain = normal(n).abs() + 0.5
    certain[: n // 20] = -0.5  # clean errors

    def victim(margin):  # (..., n) to (..., n, K')
        return margin[..., None] * signs if n_classes > 2 else (margin * signs[:, 1])[..., None]

    clean = {name: normal(n) for name, *_ in judges}

    def score(of, is_probability):
        return (2 * of - 3).sigmoid() if is_probability else of.exp()

    chosen = []
    for number, (name, family, concealed) in enumerate(attacks):
        speed = 0.0 if family == "noise" else 0.25
        course = torch.linspace(0, 1, n_iterations + 1, dtype=torch.float64)[:, None]
        strength = course * (1 - 0.8 * course) * 2 if concealed else course * 1.0
        seen = {
            judge: clean[judge] + (0.5 if concealed else 1.0) * shift * (speed > 0) for judge, _, _, shift in judges
        }
        margin = certain - speed * n_iterations * course
        detectors = (
            torch.stack(
                [
                    (2 * clean[judge] - 3) + 5 * strength * (speed > 0)
                    for judge, role, _, _ in judges
                    if role == "attacked"
                ],
                1,
            )
            if n_attacked
            else torch.zeros(n_iterations + 1, 0, n, dtype=torch.float64)
        )
        effect = torch.linspace(0, 1, n_iterations + 1, dtype=torch.float64).expand(4, -1) * torch.tensor(
            [[0.4], [0.6], [0.8], [1.0]], dtype=torch.float64
        )
        moved = 0.05 * n_iterations * normal(n, n_steps, n_channels).sign().float() * (speed > 0)
        chosen.append(
            ChosenAttack(
                name=name,
                family=family,
                concealed=concealed,
                step=0.05,
                radius=0.5 if family == "pgd" else None,
                alpha=0.1 if concealed else None,
                iteration=n_iterations - 2,
                x_adv=series + moved * mask[..., None],
                logits=victim(margin),
                detector_logits=detectors,
                scores={judge: score(seen[judge], is_probability) for judge, _, is_probability, _ in judges},
                n_bad_gradients=torch.zeros(n, dtype=torch.int64),
                n_zero_gradients=torch.arange(n) % 3,
                n_gradients=n_iterations,
                validation_effectiveness=effect,
                validation_concealability=1 - effect * (0.2 + 0.02 * number if concealed else 0.9),
                seconds=0.01 * n,
            )
        )
    return AttackStudy(
        series=series,
        mask=mask,
        labels=labels,
        index=torch.arange(n),
        class_names=tuple(f"class {number}" for number in range(n_classes)),
        clean_logits=victim(certain),
        judges=tuple(
            JudgeRecord(
                name=name,
                role=role,
                provenance={"architecture": name.split(",")[0]},
                clean=score(clean[name], is_probability),
                calibration=score(normal(n_calibration), is_probability),
                is_probability=is_probability,
            )
            for name, role, is_probability, _ in judges
        ),
        attacks=tuple(chosen),
        saturation=saturation,
        seed=seed,
    )


@pytest.fixture(scope="session")
def make_attack_study():
    """The builder: ``make_attack_study(n=..., n_classes=3, ...)``."""
    return build_attack_study


@pytest.fixture(scope="session")
def attack_study():
    """Eight attacks of four families before seven judges."""
    return build_attack_study()
