import numpy as np
import pytest

from lightning_modules.portfolio.selection import MaxMean, Medoid, MinVolatility, RandomPick, TopSharpe

RULES = [TopSharpe(), MinVolatility(), MaxMean(), Medoid(), RandomPick(seed=3)]


def pick_one_by_one(labels, score, n_per_cluster):
    """The definition: within each cluster sort by falling score, then by column."""
    picked = []
    for cluster in sorted(set(labels.tolist()) - {-1}):
        members = [column for column in range(len(labels)) if labels[column] == cluster]
        picked += sorted(members, key=lambda column: (-score(column), column))[:n_per_cluster]
    return sorted(picked)


@pytest.fixture
def panel():
    random = np.random.default_rng(0)
    returns = 0.01 * random.standard_normal((60, 40)) * (1 + random.random(40))
    labels = random.integers(-1, 9, size=40)
    labels[labels == 8] = 7
    labels[5] = 8  # a cluster of one
    return labels, returns, random.standard_normal((40, 6))


@pytest.mark.parametrize("n_per_cluster", [1, 2, 5])
def test_rules_equal_their_definition(panel, n_per_cluster):
    labels, returns, embedding = panel
    rate = 1.03 ** (1 / 252) - 1

    def distance(column):
        return np.linalg.norm(embedding[column] - embedding[labels == labels[column]].mean(0))

    scores = {
        TopSharpe: lambda column: (returns[:, column].mean() - rate) / returns[:, column].std(ddof=1),
        MinVolatility: lambda column: -returns[:, column].std(ddof=1),
        MaxMean: lambda column: returns[:, column].mean(),
        # clusters of two are equally far from their centre but for rounding
        Medoid: lambda column: -round(distance(column), 12),
    }
    for rule, score in scores.items():
        picked = rule(n_per_cluster=n_per_cluster)(labels, returns, embedding)
        assert picked.dtype == np.int64
        assert picked.tolist() == pick_one_by_one(labels, score, n_per_cluster), rule.__name__


def test_equal_scores_go_to_the_lowest_column():
    random = np.random.default_rng(1)
    series = 0.01 * random.standard_normal((30, 1))
    returns = np.tile(series, 6)
    labels = np.array([1, 0, 1, 0, 1, -1])
    for rule in (TopSharpe(), MinVolatility(), MaxMean()):
        assert rule(labels, returns, None).tolist() == [0, 1, 2, 3]
    embedding = np.ones((6, 3))
    assert Medoid(n_per_cluster=1)(labels, returns, embedding).tolist() == [0, 1]


def test_of_a_cluster_of_two_the_medoid_is_the_first():
    embedding = np.random.default_rng(2).standard_normal((400, 7))  # rounding would pick the second of some
    labels = np.arange(400) // 2
    returns = np.zeros((2, 400))
    assert Medoid(n_per_cluster=1)(labels, returns, embedding).tolist() == list(range(0, 400, 2))


@pytest.mark.parametrize("rule", [TopSharpe(n_per_cluster=1), MinVolatility(n_per_cluster=1)])
def test_series_that_do_not_move_come_last(rule):
    falling = np.linspace(-0.01, -0.03, 50)
    returns = np.column_stack([np.full(50, 0.1), falling, np.zeros(50)])
    assert rule(np.zeros(3, dtype=np.int64), returns, None).tolist() == [1]
    # alone in its cluster it is still what the cluster has
    assert rule(np.array([0, 1, 2]), returns, None).tolist() == [0, 1, 2]


def test_risk_free_rate_decides_between_a_calm_and_a_wild_stock():
    wave = np.tile([1.0, -1.0], 126)
    returns = np.column_stack([0.0002 + 0.001 * wave, 0.001 + 0.01 * wave])  # daily ratios 0.2 and 0.1 over zero
    labels = np.zeros(2, dtype=np.int64)
    assert TopSharpe(n_per_cluster=1, risk_free=0.0)(labels, returns, None).tolist() == [0]
    assert TopSharpe(n_per_cluster=1, risk_free=0.05)(labels, returns, None).tolist() == [1]


def test_lot_depends_on_seed_and_number_of_stocks_alone(panel):
    labels, returns, embedding = panel
    rule = RandomPick(seed=7)
    first = rule(labels, returns, embedding)
    assert (rule(labels, -returns[::-1], None) == first).all()
    assert (RandomPick(seed=7)(labels, returns, None) == first).all()
    assert RandomPick(seed=8)(labels, returns, None).tolist() != first.tolist()
    drawn = [
        RandomPick(seed=seed, n_per_cluster=1)(np.zeros(4, dtype=np.int64), returns[:, :4], None)[0]
        for seed in range(400)
    ]
    # each of 4 stocks by lot: binomial(400, 1/4) has s.d. 8.7, five of them
    assert np.abs(np.bincount(drawn, minlength=4) - 100).max() < 44


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_nothing_to_pick_from_picks_nothing(rule):
    none = rule(np.full(3, -1), np.zeros((2, 3)), np.zeros((3, 2)))
    assert none.shape == (0,)
    assert none.dtype == np.int64
    assert rule(np.zeros(0, dtype=np.int64), np.zeros((2, 0)), np.zeros((0, 2))).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopSharpe(n_per_cluster=0), "n_per_cluster must be at least 1, got 0"),
        (lambda: MaxMean()(np.zeros(3), np.zeros((5, 2)), None), r"got \(5, 2\) and \(3,\)"),
        (lambda: MaxMean()(np.zeros(2), np.zeros((1, 2)), None), r"at least 2 days .* got \(1, 2\)"),
        (lambda: MaxMean()(np.zeros(2), np.array([[0, 0], [0, np.nan]]), None), "got nan on day 1 for stock 1"),
        (lambda: Medoid()(np.zeros(2), np.zeros((5, 2)), None), r"needs the embedding \(2, D\) .* got None"),
        (lambda: Medoid()(np.zeros(2), np.zeros((5, 2)), np.zeros((3, 1))), r"got \(3, 1\)"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_price_that_moves_by_rounding_alone_does_not_trade():
    """Sharpe ratio and volatility of 1e-16 noise would be the best of all."""
    random = np.random.default_rng(0)
    returns = np.column_stack([2.2e-16 * random.integers(0, 2, 60), 0.01 * random.standard_normal((60, 2))])
    for rule in (TopSharpe(n_per_cluster=2, risk_free=0.0), MinVolatility(n_per_cluster=2)):
        assert rule(np.zeros(3, dtype=np.int64), returns, None).tolist() == [1, 2]
