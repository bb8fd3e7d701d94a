"""Training does what it must: fit one batch, repeat itself, draw fresh negatives, and learn a planted structure."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from datamodules import InteractionsDataModule
from datamodules.synthetic import best_ndcg, markov_interactions
from kernels.cce_minus import cce_minus_loss, cce_minus_negatives
from lightning_modules import SASRecCCE
from lightning_modules.losses import CCEMinusLoss
from lightning_modules.networks import PreNormBlock, PublishedBlock

# Some tests train on one batch alone.
pytestmark = pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`")
V, T = 50, 12
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def one_batch():
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(0, V, (8, T + 1), generator=generator)
    inputs, targets = items[:, :-1].clone(), items[:, 1:].clone()
    inputs[:4, :5], targets[:4, :5] = V, -100
    baskets = torch.arange(T).expand(8, T).masked_fill(inputs == V, -1)
    return {"item_ids": inputs, "basket_ids": baskets, "targets": targets}


def batches(n):
    return DataLoader([one_batch()] * n, batch_size=None)


def module(loss=None, lr=5e-3, **changes):
    torch.manual_seed(11)
    settings = {"n_items": V, "max_length": T, "d_model": 32, "dropout": 0.0, "cutoffs": [5]}
    settings["block"] = lambda width: PublishedBlock(width, dropout=0.0)
    settings["optimizer"] = lambda parameters: torch.optim.Adam(parameters, lr=lr)
    return SASRecCCE(**settings | {"loss": loss or CCEMinusLoss("all")} | changes)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (CCEMinusLoss("all"), {}),
        (CCEMinusLoss(64), {"block": lambda width: PreNormBlock(width, dropout=0.0)}),
        (CCEMinusLoss(64, sharing="tile", tile_size=16), {"repeat_mode": True, "recommend_seen": True}),
        (CCEMinusLoss(64, sharing="batch", correction="improved_logq"), {}),
        (CCEMinusLoss(64, popularity_alpha=0.5), {"item_counts": list(range(1, V + 1))}),
    ],
    ids=["full", "position pre-norm", "tile repeat", "batch improved", "popularity"],
)
def test_one_batch_is_learnt_by_heart(loss, changes):
    """96 positions against log(50) = 3.9 nats at the start: below 0.1 only if every target is told from the rest."""
    model = module(loss, **changes)
    batch = one_batch()
    model.eval()

    def full_loss():
        with torch.no_grad():
            items, baskets, targets = batch["item_ids"], batch["basket_ids"], batch["targets"]
            hidden = model(items, baskets)
            rows = CCEMinusLoss("all")(hidden, model.encoder.item_embeddings, targets, reduction="none")
            if model.repeat is not None:
                return model.repeat.loss(rows, hidden, items, baskets, targets).item()
            return (rows.sum() / (targets >= 0).sum()).item()

    start = full_loss()
    model.train()
    Trainer(max_epochs=1, **QUIET).fit(model, batches(250))
    model.eval()
    assert start > 3.0
    assert full_loss() < 0.1


@pytest.mark.parametrize("correction", ["none", "improved_logq", "classic_logq"])
def test_repeat_mode_takes_a_log_likelihood_alone(correction):
    said = f"repeat_mode needs a loss that is -log p: .* got correction '{correction}' with n_negatives 64"
    with pytest.raises(ValueError, match=said) as caught:
        module(CCEMinusLoss(64, correction=correction), repeat_mode=True, recommend_seen=True)
    assert "\n" not in str(caught.value)
    module(CCEMinusLoss("all", correction=correction), repeat_mode=True, recommend_seen=True)
    module(CCEMinusLoss(64, correction=correction), repeat_mode=True)  # own history is not recommended: no mixture


def test_popularity_without_a_proposal_is_refused():
    batch = one_batch()
    model = module(CCEMinusLoss(8, popularity_alpha=0.5))
    with pytest.raises(
        ValueError, match=r"popularity_alpha 0.5 needs a proposal, got none: call fit_proposal"
    ) as caught:
        model.training_step(batch, 0)
    assert "\n" not in str(caught.value)
    model.loss.fit_proposal(torch.arange(1, V + 1))
    states = model(batch["item_ids"], batch["basket_ids"])
    drawn = model.loss(states, model.encoder.item_embeddings, batch["targets"])
    assert drawn != CCEMinusLoss(8)(states, model.encoder.item_embeddings, batch["targets"])


def test_normaliser_of_evaluation_is_computed_without_autocast(monkeypatch):
    model = module(CCEMinusLoss(8), recommend_seen=True, repeat_mode=True).eval()
    seen = []

    def recorded(hidden, table, *arguments, **options):
        seen.append((torch.is_autocast_enabled("cpu"), hidden.dtype, table.dtype))
        return cce_minus_loss(hidden, table, *arguments, **options)

    monkeypatch.setattr("lightning_modules.sasrec_cce.cce_minus_loss", recorded)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model._log_normaliser(torch.randn(2, T, 32, dtype=torch.bfloat16))
    assert seen == [(False, torch.float32, torch.float32)]


def test_two_trainings_are_equal_bit_for_bit():
    results = []
    for _ in range(2):
        model = module(CCEMinusLoss(16), dropout=0.3, block=lambda width: PublishedBlock(width, dropout=0.3))
        Trainer(max_epochs=2, **QUIET).fit(model, batches(5))
        results.append(model.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_every_micro_batch_draws_fresh_negatives():
    """With the same batch twice in one accumulated step, the two draws must differ: the counter counts batches."""
    steps = []

    class Recording(CCEMinusLoss):
        def forward(self, *arguments, **keywords):
            steps.append(int(keywords["step"]))
            return super().forward(*arguments, **keywords)

    model = module(Recording(8))
    Trainer(max_epochs=2, accumulate_grad_batches=2, **QUIET).fit(model, batches(4))
    assert steps == list(range(8))
    assert int(model.micro_step) == 8
    assert int(model.state_dict()["micro_step"]) == 8
    targets = one_batch()["targets"]
    draws = [cce_minus_negatives(targets, V, n_negatives=8, seed=0, step=step)[0] for step in range(2)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("repeat_mode", [False, True])
def test_validation_loss_is_exact_whatever_is_drawn_in_training(repeat_mode):
    """Mean over all relevant items of -log p; users without any, and batches without users, have no weight."""
    model = module(CCEMinusLoss(2), recommend_seen=True, repeat_mode=repeat_mode)
    with torch.no_grad():
        model.encoder.item_table.weight.mul_(4)  # so that users differ
    batch = one_batch()
    del batch["targets"]
    relevant = torch.full((8, 3), -1)
    relevant[0, :3], relevant[2, :1], relevant[5, :2] = torch.tensor([4, 9, 1]), 7, torch.tensor([30, 2])
    history = batch["item_ids"] != V
    batch |= {"relevant": relevant, "user_index": torch.arange(8), "history_items": batch["item_ids"][history]}
    batch["history_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), history.sum(1).cumsum(0)])
    empty = {key: value[:0] for key, value in batch.items()} | {"history_offsets": torch.zeros(1, dtype=torch.int64)}
    loader = DataLoader([batch, empty], batch_size=None)
    (found,) = Trainer(max_epochs=1, **QUIET).validate(model, loader, verbose=False)
    model.eval()
    with torch.no_grad():
        states = model(batch["item_ids"], batch["basket_ids"])
        table = model.encoder.item_embeddings
        log_p = (states[:, -1] @ table.T).log_softmax(-1)
        if repeat_mode:
            everything = model._rank(states, batch, V)  # log-probabilities of all items, as they are recommended
            log_p = torch.empty(8, V).scatter_(1, everything.item_ids, everything.scores)
    wanted = -torch.stack([log_p[user, item] for user in range(8) for item in relevant[user] if item >= 0]).mean()
    # sums of 50 float32 terms in another order
    assert found["val/loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_negatives_move_and_the_padding_row_does_not():
    """Of all items only targets and drawn ids get a gradient from the head; the padding row never does."""
    model = module(CCEMinusLoss(2, sharing="batch"))
    batch = one_batch()
    hidden = model(batch["item_ids"], batch["basket_ids"]).detach()
    model.loss(hidden, model.encoder.item_embeddings, batch["targets"], step=0).backward()
    moved = set(model.encoder.item_table.weight.grad.abs().sum(1).nonzero()[:, 0].tolist())
    ids, _ = cce_minus_negatives(batch["targets"], V, n_negatives=2, seed=0, step=0, sharing="batch")
    assert moved == set(batch["targets"][batch["targets"] >= 0].tolist()) | set(ids.unique().tolist())


def test_bf16_autocast_trains_with_an_fp32_loss():
    model = module(CCEMinusLoss(16))
    before = model.encoder.item_table.weight.detach().clone()
    Trainer(max_epochs=1, precision="bf16-mixed", **QUIET).fit(model, batches(5))
    after = model.encoder.item_table.weight
    assert after.dtype == torch.float32
    assert (after[:V] != before[:V]).any(1).all()
    batch = one_batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch["item_ids"], batch["basket_ids"])
        assert model.loss(hidden, model.encoder.item_embeddings, batch["targets"]).dtype == torch.float32


@pytest.mark.parametrize("sharing", ["position", "tile"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_by_the_kernels_is_training_by_chunks(sharing, precision):
    """The same ids and sums on both paths, here in Triton's interpreter: weights part only by rounding."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled, not interpreted, where there is a GPU")
    weights = []
    for impl in ("torch", "triton"):
        loss = CCEMinusLoss(16, sharing=sharing, tile_size=32, impl=impl)
        # Adam would divide rounding errors by themselves where a gradient is zero
        model = module(loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        Trainer(max_epochs=1, precision=precision, **QUIET).fit(model, batches(3))
        weights.append(model.encoder.item_table.weight.detach())
    start = module().encoder.item_table.weight.detach()
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    assert (weights[0] - weights[1]).norm() < tolerance * (weights[0] - start).norm()


def test_learns_what_a_planted_chain_leaves_to_learn(tmp_path):
    """On a first-order Markov chain the oracle that knows the transitions is the ceiling; get most of the way there."""
    frame = markov_interactions(n_users=1500, n_items=30, seed=5)
    frame.write_parquet(tmp_path / "chain.parquet")
    data = InteractionsDataModule(
        paths=str(tmp_path / "chain.parquet"),
        user_column=frame.columns[0],
        item_column=frame.columns[1],
        time_column=frame.columns[2],
        recommend_seen=True,
        split="leave_last_out",
        max_length=10,
        batch_size=64,
        cache_dir=str(tmp_path / "cache"),
    )
    torch.manual_seed(0)
    model = SASRecCCE(
        n_items=data.n_items,
        max_length=data.max_length,
        recommend_seen=True,
        d_model=32,
        n_blocks=1,
        cutoffs=[10],
        loss=CCEMinusLoss(15),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    )
    trainer = Trainer(max_epochs=15, limit_val_batches=0, **QUIET)
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    ceiling = best_ndcg(10, n_items=30)
    assert result["test/ndcg@10"] > 0.9 * ceiling
    # Not above it either, but for the noise of 1500 users: 4 standard errors of at most 0.5 / sqrt(1500).
    assert result["test/ndcg@10"] < ceiling + 4 * 0.5 / 1500**0.5
