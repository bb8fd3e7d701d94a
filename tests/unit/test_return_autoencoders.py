"""Autoencoders of windows: shapes, what the loss means, and that a stock is the mean of its windows."""

import pytest
import torch

from lightning_modules.networks import ConvAutoencoder, LSTMAutoencoder
from lightning_modules.networks.return_autoencoders import trailing_windows

NETWORKS = {
    "conv": lambda: ConvAutoencoder(window_length=20, code_size=6, channels=(8, 4, 1)),
    "conv, linear": lambda: ConvAutoencoder(window_length=20, code_size=6, channels=(8, 1), activation="none"),
    "lstm": lambda: LSTMAutoencoder(window_length=20, code_size=6, hidden_size=12),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(1)
    return NETWORKS[request.param]()


def test_windows_end_on_the_last_day():
    returns = torch.arange(23.0).repeat(2, 1)
    windows = trailing_windows(returns, 10)
    assert windows.shape == (2, 2, 10)
    assert windows[0].flatten().tolist() == list(range(3, 23))
    with pytest.raises(ValueError, match="window_length must be at most the number of days, 23, got 24"):
        trailing_windows(returns, 24)


def test_a_stock_is_the_mean_of_its_windows(network):
    network.eval()
    returns = 0.01 * torch.randn(5, 47, dtype=torch.float64)  # panels are float64, networks are not
    rows = network(returns)
    codes = torch.stack([network.encode(network.scaled(returns[:, start : start + 20])) for start in (7, 27)])
    assert rows.shape == (5, 6)
    torch.testing.assert_close(rows, codes.mean(0))


def test_loss_is_the_error_of_each_day_and_not_of_a_broadcast(network):
    """The released code compared (B, L, 1) with (B, 1, L), which compares every day with every other."""
    network.eval()
    windows = 0.01 * torch.randn(7, 20)
    scaled = network.scaled(windows)
    rebuilt = network.decode(network.encode(scaled))
    assert rebuilt.shape == (7, 20)
    by_hand = sum((rebuilt[b, t] - scaled[b, t]) ** 2 for b in range(7) for t in range(20)) / 140
    torch.testing.assert_close(network.loss(windows), by_hand)


def test_a_constant_code_costs_one(network):
    """The pooled variance is the unit: predicting 0 costs 1 in training mode, by the normaliser's definition."""
    scaled = network.scaled(0.02 * torch.randn(64, 20) + 0.001)
    assert scaled.square().mean().item() == pytest.approx(1.0, abs=0.05)  # batch normalisation adds 1e-5 to 4e-4
    assert scaled.mean().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["conv", "lstm"])
def test_overfits_one_batch(kind):
    """Over five seeds and one or two threads the LSTM ends between 0.01 and 0.08, the convolutions far below."""
    torch.manual_seed(2)
    wide_enough = LSTMAutoencoder(window_length=20, code_size=8, hidden_size=32)
    network = wide_enough if kind == "lstm" else NETWORKS[kind]()
    # Three shapes and their multiples: a code of a few numbers can tell them apart.
    shapes = torch.randn(3, 20)
    windows = 0.01 * torch.randn(24, 1) * shapes[torch.arange(24) % 3]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss = network.loss(windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.3, "predicting nothing costs 1"


def test_the_published_size_has_88_places_before_the_bottleneck():
    network = ConvAutoencoder(channels=(512, 256, 128, 64, 32, 1), activation="none")
    assert network.encoder[-1].in_features == 88
    assert network.encoder[-1].out_features == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvAutoencoder(window_length=6, channels=(4, 4, 4)), "channels must be 1 to 2 numbers"),
        (lambda: ConvAutoencoder(channels=()), "channels must be"),
        (lambda: LSTMAutoencoder(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (lambda: LSTMAutoencoder(window_length=1), "window_length must be at least 2"),
    ],
)
def test_wrong_sizes_end_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
