"""Adversarial training: its losses in closed form on linear networks, and that the network is left as it was."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn.functional import softplus

from lightning_modules.attacks import frozen_networks
from lightning_modules.attacks.engine import Attack
from lightning_modules.attacks.objectives import SumReg, Vanilla
from lightning_modules.attacks.projections import Linf
from lightning_modules.attacks.steppers import PGDStep
from lightning_modules.callbacks import AdversarialTraining
from lightning_modules.callbacks.adversarial_training import class_divergence
from lightning_modules.networks import ResCNN
from lightning_modules.time_series_classifier import TimeSeriesClassifier

B, T, C, RADIUS = 10, 5, 2, 0.3


class Linear(nn.Module):
    """logits = W x + b over all steps and channels."""

    def __init__(self, n_logits=1, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(n_logits, T * C, generator=generator))
        self.bias = nn.Parameter(torch.randn(n_logits, generator=generator))

    def forward(self, series, mask=None):
        return series.flatten(1) @ self.weight.T + self.bias


def make_batch(n_classes=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return {
        "series": torch.randn(B, T, C, generator=generator, dtype=dtype),
        "mask": torch.ones(B, T, dtype=torch.bool),
        "labels": torch.arange(B) % n_classes,
        "index": torch.arange(B),
    }


def pgd(objective=None, n_steps=4, **changes):
    return Attack(objective or Vanilla(), PGDStep(), projection=Linf(RADIUS), n_steps=n_steps, **changes)


@pytest.mark.parametrize("n_logits", [1, 4])
def test_divergence_is_that_of_the_distributions(n_logits):
    clean, other = 3 * torch.randn(2, 20, n_logits, dtype=torch.float64)
    if n_logits == 1:
        expected = kl_divergence(Bernoulli(logits=clean), Bernoulli(logits=other)).squeeze(1)
    else:
        expected = kl_divergence(Categorical(logits=clean), Categorical(logits=other))
    # float64 rounding of a few exponentials
    torch.testing.assert_close(class_divergence(clean, other), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"logits must have the shape of the clean ones, \(20, \d\), got \(5, \d\)"):
        class_divergence(clean, other[:5])


def test_pgd_loss_of_a_linear_network_is_the_worst_of_the_ball():
    """max over |delta| <= r of softplus(-(2y - 1) (z + w delta)) = softplus(-(2y - 1) z + r |w|_1)."""
    network, batch = Linear(), make_batch()
    signs = 2 * batch["labels"] - 1
    expected = softplus(-signs * network(batch["series"])[:, 0] + RADIUS * network.weight.abs().sum()).mean()
    loss = AdversarialTraining(pgd()).loss(network, batch)
    torch.testing.assert_close(loss, expected)
    # Danskin: the gradient of the maximum is that of the loss at the worst series
    found = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(network.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_trades_attacks_the_divergence_and_not_the_label():
    """In a linear network the divergence grows to a corner of the ball, on the side where the start lay."""
    network, batch = Linear(), make_batch()
    clean = network(batch["series"])
    reach = RADIUS * network.weight.abs().sum()
    corners = torch.stack([class_divergence(clean, clean - reach), class_divergence(clean, clean + reach)])
    loss = AdversarialTraining(pgd(random_start=True), mode="trades", beta=2.5).loss(network, batch)
    signs = 2 * batch["labels"] - 1
    divergence = (loss - softplus(-signs * clean[:, 0]).mean()) / 2.5
    choices = torch.cartesian_prod(*corners.T).mean(1)  # either corner for each of the ten series
    assert (choices - divergence).abs().min() < 1e-4, "float32 sums of terms up to 10"
    assert divergence > corners.amin(0).mean() - 1e-4


def test_small_divergences_are_not_taken_for_probabilities():
    """Early in training every divergence lies in 0..1; the attack must neither refuse nor probe the victim."""
    network = Linear()
    network.weight.data *= 0.01
    loss = AdversarialTraining(pgd(random_start=True), mode="trades").loss(network, make_batch())
    assert loss.isfinite()


def test_trades_moves_through_clean_and_attacked_series():
    """Gradient of CE(clean) + beta KL(clean || attacked) with the attacked series held fixed."""
    network, batch = Linear(3), make_batch(3)
    callback = AdversarialTraining(pgd(random_start=True), mode="trades", beta=6.0)
    torch.manual_seed(8)
    found = torch.autograd.grad(callback.loss(network, batch), network.weight)[0]
    seen = []
    attacked = callback.attacked
    callback.attacked = lambda *arguments, **named: seen.append(attacked(*arguments, **named)) or seen[-1]
    torch.manual_seed(8)
    callback.loss(network, batch)
    p, q = network(batch["series"]).softmax(1), network(seen[0]).softmax(1)
    loss = -p[torch.arange(B), batch["labels"]].log().mean() + 6 * (p * (p / q).log()).sum(1).mean()
    # float32, logarithms of probabilities against differences of logits
    torch.testing.assert_close(found, torch.autograd.grad(loss, network.weight)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["pgd", "trades"])
def test_a_batch_that_a_cpu_attacks_in_several_passes_has_the_same_loss(monkeypatch, mode):
    network, batch = Linear(3), make_batch(3)
    callback = AdversarialTraining(pgd(random_start=True), mode=mode)
    callback._seed = 5
    expected = callback.loss(network, batch)
    monkeypatch.setattr(frozen_networks, "CPU_PASS_STEPS", 3 * T)
    # float32 sums of other shapes
    torch.testing.assert_close(callback.loss(network, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["pgd", "trades"])
def test_the_attack_leaves_flags_buffers_and_gradients(mode):
    network = ResCNN(n_channels=C, n_classes=2, n_steps=T, n_filters=4).train()
    network.first.norm.eval()  # someone trains with this one held fixed
    network.head.bias.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    flags = {name: module.training for name, module in network.named_modules()}
    batch = make_batch()
    callback = AdversarialTraining(pgd(random_start=True), mode=mode)
    loss = callback.loss(network, batch)
    assert flags == {name: module.training for name, module in network.named_modules()}
    assert not network.head.bias.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    passes = {"pgd": 1, "trades": 2}[mode]  # only the loss itself runs in training mode
    assert network.second.norm.num_batches_tracked == passes
    for name, buffer in network.first.norm.named_buffers():
        assert torch.equal(buffer, before[f"first.norm.{name}"])
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def test_padding_is_never_attacked():
    network, batch = Linear(), make_batch()
    batch["mask"][:, 3:] = False
    attacked = AdversarialTraining(pgd()).attacked(network, batch)
    assert torch.equal(attacked[:, 3:], batch["series"][:, 3:])
    assert (attacked[:, :3] != batch["series"][:, :3]).all()


def test_detectors_are_evaded_too():
    network, detector, batch = Linear(seed=1), Linear(seed=2), make_batch()
    plain = AdversarialTraining(pgd()).attacked(network, batch)
    aware = AdversarialTraining(pgd(SumReg(alpha=100.0)), detectors=[detector]).attacked(network, batch)
    assert (detector(aware) < detector(batch["series"])).all()
    assert (detector(aware) < detector(plain)).all()


def test_warm_up_and_teardown_give_and_take_the_adversary():
    module = TimeSeriesClassifier(n_channels=C, n_classes=2, n_steps=T)
    callback = AdversarialTraining(pgd(), warmup_epochs=2)
    callback.setup(None, module, "fit")
    for epoch, robust in enumerate([False, False, True, True]):
        callback.on_train_epoch_start(SimpleNamespace(current_epoch=epoch), module)
        assert (module.adversary is not None) is robust
    with pytest.raises(ValueError, match="needs a module with a free `adversary`, got TimeSeriesClassifier"):
        AdversarialTraining(pgd()).setup(None, module, "fit")
    callback.teardown(None, module, "fit")
    assert module.adversary is None


def test_an_interrupted_fit_leaves_no_adversary():
    class Broken(TimeSeriesClassifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError(f"broken, adversary {self.adversary is not None}")

    module = Broken(n_channels=C, n_classes=2, n_steps=T)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, enable_model_summary=False, callbacks=[AdversarialTraining(pgd())], **quiet
    )
    loader = torch.utils.data.DataLoader([make_batch()], batch_size=None)
    with pytest.raises(RuntimeError, match="broken, adversary True"):
        trainer.fit(module, loader, loader)
    assert module.adversary is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdversarialTraining(pgd(), mode="free"), "mode must be 'pgd' or 'trades', got 'free'"),
        (lambda: AdversarialTraining(pgd(), beta=0.0), "beta must be above 0, got 0.0"),
        (lambda: AdversarialTraining(pgd(), beta=float("nan")), "beta must be above 0, got nan"),
        (lambda: AdversarialTraining(pgd(), warmup_epochs=-1), "warmup_epochs must be at least 0, got -1"),
        (lambda: AdversarialTraining(pgd(), mode="trades"), "attack must have random_start true with mode 'trades'"),
        (lambda: AdversarialTraining(pgd(targeted=True)), "attack must not be targeted"),
        (
            lambda: AdversarialTraining(pgd()).setup(None, LightningModule(), "fit"),
            "needs a module with a free `adversary`, got LightningModule",
        ),
    ],
)
def test_bad_settings_end_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
