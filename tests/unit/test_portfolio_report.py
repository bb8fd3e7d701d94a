"""The report of a portfolio test: numbers against plain formulas, and sentences that follow the numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_modules.callbacks import PortfolioReport
from lightning_modules.callbacks.portfolio_text import sentences, table
from lightning_modules.portfolio.backtest import hold
from lightning_modules.portfolio.findings import findings, median_arm, plain

DRAWS = 200  # enough for stable signs, cheap
RATE = 1.03 ** (1 / 252) - 1


def ratio(returns):
    return (returns.mean() - RATE) / returns.std(ddof=1) * 252**0.5


def text(found):
    return "\n".join(sentences(found))


def with_gain(study, gain):
    """The model in charge earns ``gain`` more a day than it did, whatever the others do."""
    model = study.arms[0]
    track = replace(model.track, returns=model.track.returns + gain)
    return replace(study, arms=(replace(model, track=track), *study.arms[1:]))


@pytest.fixture(scope="module")
def found(study):
    return findings(study, n_resamples=DRAWS)


def test_metrics_are_those_of_the_tracks(study, found):
    assert list(found["arms"])[: len(study.arms)] == [arm.name for arm in study.arms]
    for arm in study.arms:
        row, returns = found["arms"][arm.name], arm.track.returns
        value = np.concatenate([[1.0], np.cumprod(1 + returns)])
        deepest = min(value[day] / value[: day + 1].max() - 1 for day in range(len(value)))
        # 1e-12: the same sums in another order
        assert row["at_cost"]["sharpe"] == pytest.approx(ratio(returns), rel=1e-12)
        assert row["sharpe"][0] == pytest.approx(ratio(returns), rel=1e-12)
        assert row["at_0_bps"]["sharpe"] == pytest.approx(ratio(arm.track.gross_returns), rel=1e-12)
        assert row["at_cost"]["max_drawdown"] == pytest.approx(deepest, rel=1e-12)
        assert row["at_cost"]["annual_return"] == pytest.approx(value[-1] ** (252 / len(returns)) - 1, rel=1e-10)
        assert row["sharpe"][1] < row["sharpe"][0] < row["sharpe"][2]


def test_differences_are_the_model_minus_the_other(study, found):
    ours = ratio(study.model.track.returns)
    assert found["arms"][study.model.name]["model_minus_this"] is None
    for arm in study.arms[1:]:
        middle, low, high = found["arms"][arm.name]["model_minus_this"]["sharpe"]
        assert middle == pytest.approx(ours - ratio(arm.track.returns), abs=1e-12)  # rounding of two ratios near 1
        assert low < middle < high


def test_sharpe_by_cost_is_that_of_a_walk_at_that_cost(study, found):
    for arm in study.arms:
        by_cost = found["arms"][arm.name]["sharpe_by_cost_bps"]
        assert list(by_cost) == ["0", "5", "10", "20", "50"]
        if arm.plan is None:
            assert len(set(by_cost.values())) == 1
            continue
        dear = hold(arm.plan, study.market, cost_bps=50, drift=study.drift)
        assert by_cost["50"] == pytest.approx(ratio(dear.returns), rel=1e-12)  # sums in another order
        assert by_cost["10"] == found["arms"][arm.name]["at_cost"]["sharpe"]
        assert by_cost["0"] > by_cost["50"]


def test_share_of_volatility_between_clusters(study, found):
    returns = study.market.returns[1 : study.train[1]]
    volatility = returns.std(0, ddof=1)
    within = sum(
        ((volatility[study.labels == label] - volatility[study.labels == label].mean()) ** 2).sum()
        for label in set(study.labels.tolist())
    )
    expected = 1 - within / ((volatility - volatility.mean()) ** 2).sum()
    model = found["arms"][study.model.name]
    assert model["volatility_explained"] == pytest.approx(expected, rel=1e-10)  # sums of 40 squares in another order
    assert found["arms"]["1/N"]["volatility_explained"] is None
    assert found["arms"]["volatility only, ward"]["volatility_explained"] > 0.8  # Ward on that very number


@pytest.mark.parametrize("lot", ["random", "permuted"])
def test_clusters_by_lot_are_summed_up_and_the_model_is_ranked_among_them(study, found, lot):
    arms = getattr(study, f"{lot}_arms")
    ratios = np.array([ratio(arm.track.returns) for arm in arms])
    reached = (ratios >= ratio(study.model.track.returns)).sum()
    random = found[lot]
    assert random["n_at_least_model"] == reached
    assert random["p_value"] == pytest.approx((1 + reached) / 13)  # 12 seeds and the model
    assert random["sharpe"]["mean"] == pytest.approx(ratios.mean())
    assert random["sharpe"]["sd"] == pytest.approx(ratios.std(ddof=1))
    assert random["sharpe"]["quantiles"]["0.05"] == pytest.approx(np.quantile(ratios, 0.05))
    assert ratio(median_arm(arms, 0.03).track.returns) == np.sort(ratios)[5]  # the lower middle of twelve
    assert found["arms"][f"{lot} clusters, median of 12"]["sharpe"][0] == pytest.approx(np.sort(ratios)[5])
    assert f"{reached} of 12 reach the model's" in text(found)
    added = f"what the model's clusters add to that is {ratio(study.model.track.returns) - ratios.mean():+.2f}."
    assert (added in text(found)) == (lot == "permuted"), "beside clusters of the model's own sizes"


def test_what_the_model_adds_is_not_answered_by_clusters_of_other_sizes(study):
    said = text(findings(replace(study, permuted_arms=()), n_resamples=5))
    assert "whether the model's clusters add anything is not answered here" in said
    assert "Random clusters, sizes about equal, under the same rules (12 seeds)" in said
    sizes = ", ".join(map(str, np.bincount(study.labels)))
    assert f"the model's have {sizes} stocks at first, so this also compares sizes." in said


def test_what_is_not_a_number_is_null(study, found):
    assert found["clustering"]["ward"]["calinski_harabasz"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found  # raises on nan
    assert plain({1: (np.float64("inf"), np.int64(3), np.array([np.nan, 2.0]))}) == {"1": [None, 3, [None, 2.0]]}


def test_a_series_without_spread_has_no_ratio_and_ends_nothing(study):
    flat = replace(study.arms[-1].track, returns=np.zeros(len(study.dates)), gross_returns=np.zeros(len(study.dates)))
    still = replace(study, arms=(*study.arms[:-1], replace(study.arms[-1], track=flat)))
    found = findings(still, n_resamples=DRAWS)
    assert found["arms"]["index"]["sharpe"] == [None, None, None]
    assert "| index | 0.0% | 0.0% | not defined [not defined, not defined]" in "\n".join(table(found))
    assert "No interval, and so no verdict, as 250 days are too few or a series is constant" in text(found)
    assert "on most of them, against: index." in text(found)
    assert "index" not in text(found).split("holding zero, from: ")[1].split("\n")[0]


def test_random_clusters_without_a_ratio_are_no_finding(study):
    flat = np.zeros(len(study.dates))
    still = replace(study.model.track, returns=flat, gross_returns=flat)
    found = findings(replace(study, arms=(replace(study.model, track=still), *study.arms[1:])), n_resamples=DRAWS)
    assert found["random"]["p_value"] is None
    assert "a Sharpe ratio is not defined" in text(found)


def test_same_study_same_findings(study, found):
    assert findings(study, n_resamples=DRAWS) == found
    other = findings(replace(study, seed=study.seed + 1), n_resamples=DRAWS)
    assert other["arms"]["1/N"]["sharpe"][1:] != found["arms"]["1/N"]["sharpe"][1:]


def test_verdicts_flip_with_the_numbers(make_study):
    study = make_study(n_random=20)  # the least number that leaves room for p below 0.05
    # 75 % a year more, or less, than before; the arms differ by a few points
    rich, poor = (findings(with_gain(study, gain), n_resamples=DRAWS) for gain in (0.003, -0.003))
    ahead, behind = "interval of the difference above zero, than: ", "interval of the difference below zero, than: "
    assert ahead + "none of them." not in text(rich)
    assert behind + "none of them." in text(rich)
    assert ahead + "none of them." in text(poor)
    assert behind + "none of them." not in text(poor)
    for name in ("sectors", "1/N", "index", "random clusters, median of 20", "permuted clusters, median of 20"):
        assert name in text(rich).split(ahead)[1].split(".\n")[0]
        assert name in text(poor).split(behind)[1].split(".\n")[0]
    assert "earn more than clusters by lot" in text(rich)
    assert "do not stand out from clusters by lot" in text(poor)
    assert "it is not only volatility" in text(rich)
    assert "Clusters of volatility alone earn more than the model" in text(poor)
    assert rich["deflated_sharpe"]["probability"] > 0.99 > 0.01 > poor["deflated_sharpe"]["probability"]


def test_an_interval_that_holds_zero_is_left_open(study):
    twin = study.arms[1]
    same = replace(study, arms=(study.arms[0], replace(twin, track=study.arms[0].track, plan=study.arms[0].plan)))
    found = findings(same, n_resamples=DRAWS)
    assert found["arms"][twin.name]["model_minus_this"] == {"sharpe": [0.0, 0.0, 0.0], "ledoit_wolf_p": 1.0}
    assert f"holding zero, from: {twin.name}; random clusters" in text(found)


def test_few_random_seeds_are_said_to_be_few(study):
    found = findings(with_gain(study, 0.003), n_resamples=5)
    assert "0 of 12 reach the model's (p = 0.077): too few seeds to tell, 19 could." in text(found)


def test_published_mode_says_what_it_hides(make_study, found):
    published = findings(make_study(n_stocks=20, n_days=470, n_random=3, mode="published"), n_resamples=20)
    assert text(published).startswith("**Mode published looks ahead.**")
    assert "Nobody could have had these numbers" in text(published)
    mean = published["random"]["sharpe"]["mean"]
    assert f"mean Sharpe ratio of {mean:.2f}; 1/N, which selects nothing" in text(published)
    assert "worthless trials would show. It knows nothing of the look-ahead." in text(published)
    assert "look" not in text(found)


def test_survivorship_is_said_unless_stocks_leave(study, found):
    assert found["panel"]["n_left_in_test"] == 0
    assert "as in a list of survivors" in text(found)
    prices = study.market.prices.copy()
    prices[-30:, 7] = np.nan
    left = findings(replace(study, market=replace(study.market, prices=prices)), n_resamples=5)
    assert left["panel"]["n_left_in_test"] == 1
    assert "Of the 40 stocks that some method held, 1 have their last price inside the test" in text(left)
    assert "survivors" not in text(left)


def test_flags_are_listed_and_counted(study):
    flags = {"2016-08-01": ("infeasible: 1", "left: 2"), "2016-09-01": ("infeasible: 3",), "2016-10-03": ("left: 2",)}
    track = replace(study.model.track, flags=flags)
    flagged = replace(study, arms=(replace(study.model, track=track), *study.arms[1:]))
    said = text(findings(flagged, n_resamples=5))
    assert "- prices: 2 gaps of at most 5 days filled" in said
    assert f"- model, ward, 2 of {len(track.targets)} rebalances: infeasible: 1 (and alike)" in said
    assert f"- model, ward, 2 of {len(track.targets)} rebalances: left: 2\n" in said + "\n"


def test_table_has_one_row_an_arm(study, found):
    lines = table(found)
    assert len(lines) == 4 + len(study.arms) + 2  # heading, blank, two of the header; two medians of clusters by lot
    assert {line.count("|") for line in lines[2:]} == {10}
    model = found["arms"]["model, ward"]
    low, high = model["sharpe"][1:]
    assert f"| {model['at_cost']['sharpe']:.2f} [{low:.2f}, {high:.2f}] |" in lines[4]
    assert lines[4].endswith("|  |  |")


def test_few_days_give_no_verdict(make_study):
    """Two days resample to zero width, and the interval of a difference of anything lies to one side of 0."""
    found = findings(make_study(n_stocks=20, n_days=402, n_random=3, diagrams=False), n_resamples=DRAWS)
    for arm in found["arms"].values():
        assert arm["sharpe"][0] is not None
        assert arm["sharpe"][1:] == [None, None]
        assert arm["model_minus_this"] is None or arm["model_minus_this"]["ledoit_wolf_p"] is None
    assert found["deflated_sharpe"]["probability"] is None
    said = text(found)
    assert "No interval, and so no verdict, as 2 days are too few" in said
    assert "has a higher Sharpe ratio" not in said
    assert "by chance" not in said


def test_rounding_is_no_lead(study):
    twin = study.arms[1]
    track = replace(study.arms[0].track, returns=study.arms[0].track.returns - 1e-16)
    found = findings(
        replace(study, arms=(study.arms[0], replace(twin, track=track, plan=study.arms[0].plan))), n_resamples=DRAWS
    )
    assert f"holding zero, from: {twin.name}" in text(found)


def test_stocks_without_a_sector_are_counted(study):
    sectors = study.market.sectors.copy()
    sectors[:6] = -1
    found = findings(replace(study, market=replace(study.market, sectors=sectors)), n_resamples=5)
    assert found["panel"]["n_without_sector"] == 6
    assert "6 of the eligible have no sector and are in no cluster of sectors" in text(found)


def test_who_was_held_later_is_counted_among_those_that_leave(study):
    """Of a universe that is renewed, stocks eligible at the first rebalance are not all that are lost."""
    prices = study.market.prices.copy()
    prices[-30:, 7] = np.nan
    market = replace(study.market, prices=prices)
    kept = np.delete(np.arange(40), 7)
    late = replace(
        study, market=market, columns=kept, embedding=study.embedding[kept], labels=study.labels[kept], diagrams=None
    )
    assert findings(late, n_resamples=5)["panel"]["n_left_in_test"] == 1


@pytest.mark.parametrize("is_price", [False, True])
def test_a_price_index_is_said_to_lack_dividends(study, is_price):
    market = replace(study.market, index_is_price=is_price)
    said = text(findings(replace(study, market=market), n_resamples=5))
    assert ("every alpha against it holds about the dividend yield" in said) == is_price
    assert ("if its file is a price index" in said) != is_price


@pytest.mark.parametrize("bare", [{"index": False}, {"sectors": False}, {"n_random": 0}])
def test_works_without(make_study, bare):
    found = findings(make_study(n_stocks=20, n_days=470, **({"n_random": 3} | bare)), n_resamples=20)
    assert table(found)
    if "n_random" in bare:
        assert found["random"] is None
        assert found["permuted"] is None
        assert "No permuted clusters were run" in text(found)
    if "index" in bare:
        assert "beta" not in found["arms"]["1/N"]["at_cost"]
    assert ("The index is not traded" in text(found)) == ("index" not in bare)
    assert ("index" in text(found | {"index_is_price": True})) == ("index" not in bare)
    if "sectors" in bare:
        assert "sectors" not in found["arms"]


class Prices(LightningDataModule):
    """One batch, and facts of the panel."""

    def test_dataloader(self):
        return DataLoader(torch.zeros(1, 1))

    def report_facts(self):
        return {"prices": "close", "gaps": float("nan")}


class Outcome(LightningModule):
    """Returns what it was given."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def test_step(self, batch, batch_idx):
        return self.outcome


def run_test(outcome, folder, **arguments):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PortfolioReport(**arguments)],
    )
    trainer.test(Outcome(outcome), Prices(), verbose=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callback_writes_a_report(make_study, tmp_path, capsys):
    study = make_study(n_stocks=20, n_days=470, n_random=3, diagrams=False)
    run_test(study, tmp_path, n_resamples=20)
    folder = tmp_path / "report"
    assert f"seqlit: report in {folder}" in capsys.readouterr().out
    written = json.loads((folder / "metrics.json").read_text())
    assert written["arms"] == findings(study, n_resamples=20)["arms"]
    assert written["data"] == {"prices": "close", "gaps": None}
    assert written["seconds"]["fit"] is None
    report = (folder / "report.md").read_text()
    assert report.startswith("# Test report: 20 stocks, 2016-07-15 to 2016-10-20, mode causal")
    assert "Fit unknown, test " in report
    assert not list(folder.glob(".*"))  # no draft is left


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callback_refuses_other_outputs(tmp_path):
    with pytest.raises(ValueError, match="PortfolioReport needs Study from test_step, got dict"):
        run_test({"loss": torch.zeros(())}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_resamples": 0}, "n_resamples must be at least 1, got 0"), ({"level": 1.0}, "level must be .*, got 1.0")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PortfolioReport(**arguments)


def test_a_study_is_checked(study):
    with pytest.raises(ValueError, match=r"first arm of a study must be the model's, got \['clusters'\]"):
        replace(study, arms=study.arms[2:])
    with pytest.raises(ValueError, match="names of arms must differ"):
        replace(study, arms=(study.arms[0], study.arms[0]))
    with pytest.raises(ValueError, match=r"kind of arm '1/N' must be one of model, .*, got 'weights'"):
        replace(study, arms=(study.arms[0], replace(study.arms[4], kind="weights")))
    short = replace(study.arms[1].track, dates=study.dates[1:])
    with pytest.raises(ValueError, match="same days, 'model, k-means' is not"):
        replace(study, arms=(study.arms[0], replace(study.arms[1], track=short)))
