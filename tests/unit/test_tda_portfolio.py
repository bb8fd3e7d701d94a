"""The module itself, through the Trainer: any network, several clusterers, and advice that is the tested strategy's."""

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import synthetic_market
from lightning_modules import TDAPortfolioClusterer
from lightning_modules.portfolio.clusterers import KMeansClusters, SectorClusters, WardClusters
from lightning_modules.portfolio.representations import PrincipalComponents, VolatilityOnly
from lightning_modules.portfolio.strategy import eligible_stocks
from lightning_modules.portfolio.weighting import EqualWeight, MeanVariance, PublishedMeanVariance


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


def test_before_a_fit_nothing_can_be_tested(files):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="nothing was clustered: run `seqlit fit`"):
        trainer.test(module_of(), data_of(files), verbose=False)


def test_no_clusterer_is_refused():
    with pytest.raises(ValueError, match="clusterers must name at least one clusterer, got none"):
        module_of(clusterers=[])
