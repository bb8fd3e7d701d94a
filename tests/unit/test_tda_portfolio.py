"""The module itself, through the Trainer: any network, several clusterers, and advice that is the tested strategy's."""

from datetime import date
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import synthetic_market
from lightning_modules import TDAPortfolioClusterer
from lightning_modules.callbacks import PortfolioWriter
from lightning_modules.callbacks.portfolio_writer import orders_frame
from lightning_modules.portfolio.clusterers import KMeansClusters, SectorClusters, WardClusters
from lightning_modules.portfolio.representations import FinancialFeatures, PrincipalComponents, VolatilityOnly
from lightning_modules.portfolio.selection import TopSharpe
from lightning_modules.portfolio.strategy import ClusterStrategy, eligible_stocks
from lightning_modules.portfolio.weighting import EqualWeight, MeanVariance, NestedClusters, PublishedMeanVariance
from lightning_modules.tda_portfolio import Advice


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    market = synthetic_market(24, 420, delisted=0.1, seed=3)
    return {name: str(file) for name, file in market.write(tmp_path_factory.mktemp("market")).items()}


def data_of(files, **settings):
    return StockPricesDataModule(**files | {"test_start": "2016-01-01", "window_length": 40} | settings)


def run(module, data):
    """Fit, test and predict; the study and the advice."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    kept = {}

    def keep(outputs, *_):
        kept["study"] = outputs

    module.on_test_batch_end = keep
    trainer.test(module, data, verbose=False)
    (advice,) = trainer.predict(module, data)
    return kept["study"], advice


def module_of(**settings):
    return TDAPortfolioClusterer(
        **{
            "representation": VolatilityOnly(),
            "clusterers": [WardClusters(n_clusters=3)],
            "weighting": EqualWeight(),
            "n_random": 2,
        }
        | settings
    )


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging")


def test_takes_any_network_of_returns(files):
    """Panels are float64 and weights are not."""
    torch.manual_seed(1)
    n_returns = 260  # of the train window
    study, _ = run(module_of(representation=nn.Linear(n_returns, 4)), data_of(files))
    assert study.embedding.shape == (len(study.columns), 4)


def test_a_network_with_another_number_of_rows_is_refused(files):
    class Pooled(nn.Module):
        def forward(self, returns):
            return returns[:3]

    with pytest.raises(ValueError, match=r"one row for each of \d+ stocks, got shape \(3, 260\)"):
        run(module_of(representation=Pooled()), data_of(files))


def test_clusterers_of_one_kind_are_told_apart_and_only_some_read_the_embedding(files):
    clusterers = [
        WardClusters(n_clusters=2),
        WardClusters(n_clusters=4),
        SectorClusters(),
        KMeansClusters(n_clusters=3),
    ]
    study, _ = run(module_of(clusterers=clusterers), data_of(files))
    names = [arm.name for arm in study.arms]
    assert names[:4] == ["model, ward 2", "model, ward 4", "model, sectors", "model, k-means"]
    controls = [name for name in names if name.startswith("volatility only")]
    assert controls == ["volatility only, ward 2", "volatility only, ward 4", "volatility only, k-means"]


@pytest.mark.parametrize("mode", ["causal", "causal_rolling"])
def test_advice_is_what_the_tested_strategy_does_next(files, mode):
    """Predict on a panel that ends before a rebalance, and walk through that rebalance on a longer one."""
    settings = {"mode": mode, "refit_months": 3, "representation": PrincipalComponents(n_components=3)}
    study, _ = run(module_of(**settings), data_of(files))
    plan = study.model.plan
    for number in (1, 3):
        row = int(plan.rows[number])
        market = study.market.before(row)
        module = module_of(**settings)
        data = data_of(files)
        run_short = data.panel.batch() | {name: getattr(market, name) for name in ("prices", "returns", "member")}
        run_short |= {"dates": market.dates.astype(int), "index_prices": market.index_prices}
        run_short |= {"delisting_returns": market.delisting_returns, "test_stop": row}
        run(module, data)
        advice = module.predict_step(run_short, 0)
        np.testing.assert_array_equal(advice.target, plan.targets[number])
        np.testing.assert_allclose(advice.held, study.model.track.drifted[number], rtol=1e-12)
        assert str(advice.market.dates[-1]) == str(market.dates[-1])


def advised(files, last):
    """Advice on a panel that ends with the session ``last``, of a model fitted on the whole one."""
    data = data_of(files)
    module = module_of(mode="causal_rolling", refit_months=1)
    run(module, data)
    panel = data.panel
    row = int(np.searchsorted(panel.dates, np.datetime64(last), side="right"))
    batch = panel.before(row).batch() | {name: getattr(panel, name) for name in ("train_stop", "test_start")}
    return module, batch


def test_between_rebalances_it_holds_and_fits_nothing(files, monkeypatch):
    module, batch = advised(files, "2016-05-18")
    fits, refit = [], ClusterStrategy.refit
    monkeypatch.setattr(ClusterStrategy, "refit", lambda *given: fits.append(given[2]) or refit(*given))
    advice = module.predict_step(batch, 0)
    assert fits == [0, 1, 2, 3, 4], "those of January to May; that of June is not due"
    np.testing.assert_array_equal(advice.target, advice.track.held)
    assert not advice.is_rebalance
    assert (str(advice.session), str(advice.next_rebalance)) == ("2016-05-19", "2016-06-01")
    orders = orders_frame(advice)
    assert set(orders["side"]) == {"hold"}
    assert orders["next_rebalance"].unique().to_list() == [date(2016, 6, 1)]


def test_the_next_session_may_be_told(files):
    """The day after is a holiday, which no calendar of business days knows, and the month ends with it."""
    module, batch = advised(files, "2016-05-30")
    module.next_session = module_of(next_session="2016-06-01").next_session
    advice = module.predict_step(batch, 0)
    assert advice.is_rebalance
    assert advice.next_rebalance == np.datetime64("2016-06-01")
    assert len(advice.plan.rows) == 5
    module.next_session = None
    assert not module.predict_step(batch, 0).is_rebalance
    module.next_session = np.datetime64("2016-05-30")
    with pytest.raises(ValueError, match="must come after the last day of the prices, 2016-05-30, got 2016-05-30"):
        module.predict_step(batch, 0)
    with pytest.raises(ValueError, match="next_session must be a date such as 2023-01-03, got 'monday'"):
        module_of(next_session="monday")


def test_orders_hold_all_that_is_bought_and_the_line_says_until_when(tmp_path, capsys):
    """A stock picked earlier may have left the universe: no cluster, nothing held, and still to be bought."""
    labels, none = np.array([0, -1, -1]), np.zeros((1, 3))
    market = SimpleNamespace(dates=np.array(["2022-12-30"], "datetime64[D]"), tickers=("A", "B", "C"), n_stocks=3)
    track = SimpleNamespace(
        held=np.array([1.0, 0, 0]), targets=none, drifted=none, rebalance_dates=np.array(["2022-12-01"], "M8[D]")
    )
    common = {"market": market, "track": track, "labels": labels}
    common["plan"] = SimpleNamespace(decisions=[SimpleNamespace(labels=labels)])
    due = np.datetime64("2023-01-02")
    advice = Advice(target=np.array([0.4, 0.6, 0]), session=due, next_rebalance=due, **common)
    orders = orders_frame(advice)
    assert orders["ticker"].to_list() == ["B", "A"]
    assert orders["target"].sum() == pytest.approx(1)
    assert orders["side"].to_list() == ["buy", "sell"]
    PortfolioWriter._write(advice, tmp_path)
    assert "orders as of 2022-12-30 for 2023-01-02" in capsys.readouterr().out
    later = Advice(target=track.held, session=due, next_rebalance=np.datetime64("2023-02-01"), **common)
    PortfolioWriter._write(later, tmp_path)
    said = capsys.readouterr().out
    assert "hold, no orders for 2023-01-02: the next rebalance is at the first session of 2023-02, 2023-02-01" in said


def test_a_risk_free_rate_reaches_every_rule_that_names_none():
    nested = NestedClusters(inner=MeanVariance(), outer=MeanVariance(annual_target=0.05))
    features = nn.Sequential(FinancialFeatures())
    module = module_of(risk_free=0.01, selection=TopSharpe(n_per_cluster=3), weighting=nested, representation=features)
    assert module.rules.selection == TopSharpe(n_per_cluster=3, risk_free=0.01)
    assert module.rules.weighting.inner.annual_target == 0.01
    assert module.rules.weighting.outer.annual_target == 0.05, "what is given stays"
    assert features[0].risk_free == 0.01
    kept = module_of(
        risk_free=0.01, selection=TopSharpe(risk_free=0.02), representation=FinancialFeatures(risk_free=0.0)
    )
    assert (kept.rules.selection.risk_free, kept.representation.risk_free) == (0.02, 0.0)
    assert module_of(risk_free=0.01, weighting=None).rules.weighting == MeanVariance(annual_target=0.01)


def test_without_a_model_the_rate_is_the_published_one():
    random = np.random.default_rng(0)
    returns, labels = random.normal(0.0003, 0.01, (300, 8)), np.zeros(8, dtype=np.int64)
    pairs = ((TopSharpe(), TopSharpe(risk_free=0.03)), (MeanVariance(), MeanVariance(annual_target=0.03)))
    ours, given = (rule(labels, returns, None) for rule in pairs[0])
    assert np.array_equal(ours, given)
    ours, given = (rule(returns, labels).weights for rule in pairs[1])
    assert np.array_equal(ours, given)
    rows = torch.from_numpy(returns.T)
    ours, given = (network(rows, rows[0]) for network in (FinancialFeatures(), FinancialFeatures(risk_free=0.03)))
    assert torch.equal(ours, given)


def test_weights_are_estimated_on_returns_that_exist(files):
    """A stock listed within the months that weights look back on would look calm before its listing."""
    market = synthetic_market(24, 420, listed_late=0.5, seed=3)
    from lightning_modules.portfolio.market import Market

    past = Market.from_batch(market.fields()).before(400)
    short, long = (eligible_stocks(past, 100, months, 0.95) for months in (4, 18))
    assert set(long) < set(short)
    first_price = (~np.isnan(past.prices)).argmax(0)
    assert first_price[long].max() < first_price[short].max()


def test_published_mode_weighs_as_published_free_of_charge_unless_told():
    published, causal = module_of(mode="published", weighting=None), module_of(weighting=None)
    assert isinstance(published.rules.weighting, PublishedMeanVariance)
    assert isinstance(causal.rules.weighting, MeanVariance)
    assert (published.rules.cost_bps, causal.rules.cost_bps) == (0.0, 10.0)
    assert module_of(mode="published", cost_bps=5.0).rules.cost_bps == 5.0


def test_prices_that_end_without_a_last_return_are_said(files):
    study, _ = run(module_of(), data_of({key: file for key, file in files.items() if key != "delistings_path"}))
    assert any("end within the test, their last return unknown and taken as 0" in flag for flag in study.flags)


def test_a_stock_listed_after_the_train_window_that_vanishes_is_said(tmp_path):
    market = synthetic_market(16, 620, seed=5)
    market.prices[:270, 0] = np.nan
    market.prices[600:, 0] = np.nan
    files = {name: str(file) for name, file in market.write(tmp_path).items() if name != "delistings_path"}
    data = data_of(files)
    study, _ = run(module_of(mode="causal_rolling", refit_months=3, weight_months=6), data)
    assert 0 not in study.columns
    assert any("1 stocks end within the test" in flag and market.tickers[0] in flag for flag in study.flags)


def test_the_index_is_called_what_it_is(files):
    for is_price, name in ((True, "index (price only)"), (False, "index")):
        study, _ = run(module_of(), data_of(files, index_is_price=is_price))
        assert study.arms[-1].name == name


def test_before_a_fit_nothing_can_be_tested(files):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="nothing was clustered: run `seqlit fit`"):
        trainer.test(module_of(), data_of(files), verbose=False)


def test_no_clusterer_is_refused():
    with pytest.raises(ValueError, match="clusterers must name at least one clusterer, got none"):
        module_of(clusterers=[])
