"""Prices keep their digits whatever a network computes in."""

import pytest
from lightning import Trainer

from lightning_modules import TDAPortfolioClusterer
from lightning_modules.portfolio.clusterers import WardClusters
from lightning_modules.portfolio.representations import VolatilityOnly

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)


def set_up(precision):
    module = TDAPortfolioClusterer(representation=VolatilityOnly(), clusterers=[WardClusters(n_clusters=3)])
    module.trainer = Trainer(accelerator="cpu", precision=precision, **QUIET)
    module.setup("fit")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_precision_that_rounds_prices_is_refused(precision):
    with pytest.raises(ValueError, match=rf"^trainer.precision must not be {precision}, .*: b?f?16-mixed keeps them"):
        set_up(precision)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_others_pass(precision):
    set_up(precision)
