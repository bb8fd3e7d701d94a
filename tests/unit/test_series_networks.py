"""Networks of series: gradients by finite differences, padding, batch mates, and S4 against its own recurrence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_modules.networks import LSTM, S4, PatchTST, ResCNN, RNNAttention
from lightning_modules.networks.series_network import MaskedBatchNorm, TimeEncoderLayer, last_valid_step
from lightning_modules.networks.state_space import S4Kernel, dplr_kernel, hippo_legs

T = 21  # no multiple of PatchTST's stride
SMALL = {
    "rnn_attention": (RNNAttention, {"hidden_size": 8, "n_encoder_layers": 2}),
    "lstm": (LSTM, {"hidden_size": 6, "n_layers": 2}),
    "res_cnn": (ResCNN, {"n_filters": 4}),
    "s4": (S4, {"d_model": 8, "state_size": 8}),
    "patch_tst": (PatchTST, {"patch_length": 6, "stride": 4, "d_model": 8, "n_heads": 2, "d_feedforward": 12}),
}
ANY_LENGTH = ("lstm", "res_cnn", "s4")


def build(name, n_channels=2, n_classes=2, n_steps=T, **more):
    """A small network in evaluation mode whose batch normalisations are no identity."""
    torch.manual_seed(5)
    kind, sizes = SMALL[name]
    network = kind(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps, **sizes | more)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            module.momentum = 1.0  # one pass sets the running statistics, or activations fade with depth
    with torch.no_grad():
        network.train()(torch.randn(64, n_steps, n_channels))
    return network.eval()


def lengths_mask(lengths, n_steps=T):
    return torch.arange(n_steps) < torch.as_tensor(lengths)[:, None]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("n_channels", "n_classes", "n_logits"), [(1, 2, 1), (3, 2, 1), (2, 4, 4)])
def test_logits_have_one_column_for_two_classes(name, n_channels, n_classes, n_logits):
    network = build(name, n_channels, n_classes)
    series = torch.randn(5, T, n_channels)
    logits = network(series)
    assert logits.shape == (5, n_logits)
    assert logits.std(0).min() > 5e-4, "logits must depend on the series, far above rounding"
    # Rounding only: with a mask the sums over time run over the same numbers.
    torch.testing.assert_close(network(series, torch.ones(5, T, dtype=torch.bool)), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_input_gradients_are_those_of_finite_differences(name, masked):
    """Central differences in float64: rounding 1e-16 over eps = 1e-6, and eps^2 times a third derivative below 1e3."""
    network = build(name, n_channels=2, n_classes=3).double()
    series = torch.randn(2, T, 2, dtype=torch.float64, requires_grad=True)
    mask = lengths_mask([T, 13]) if masked else None
    assert torch.autograd.gradcheck(lambda x: network(x, mask), series, eps=1e-6, atol=1e-8, rtol=1e-5)
    (gradient,) = torch.autograd.grad(network(series, mask)[:, 0].sum(), series)
    assert gradient.abs().amax() > 1e-3, "far above the tolerance"


def test_gradients_of_the_denormalised_form_are_those_of_finite_differences():
    network = build("patch_tst", n_channels=1, denormalise=True).double()
    series = torch.randn(2, T, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, series, eps=1e-6, atol=1e-8, rtol=1e-5)  # as above


@pytest.mark.parametrize("name", SMALL)
def test_what_stands_in_the_padding_reaches_neither_logits_nor_gradients(name):
    network = build(name)
    mask = lengths_mask([T, 9, 1])
    series = torch.randn(3, T, 2)
    garbage = series.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    logits = network(garbage, mask)
    assert torch.equal(logits, network(series, mask))
    (gradient,) = torch.autograd.grad(logits.square().sum(), garbage)
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()
    assert (gradient[0] != 0).any(1).all(), "every step of the whole series must be read"


@pytest.mark.parametrize("name", ANY_LENGTH)
@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, T))
def test_a_padded_series_is_the_shorter_series(name, length):
    network = build(name)
    series = torch.randn(2, T, 2, generator=torch.Generator().manual_seed(length))
    padded = network(series, lengths_mask([length, T]))
    # float32: kernels of other lengths sum the same numbers in another order.
    torch.testing.assert_close(padded[:1], network(series[:1, :length]), rtol=1e-4, atol=1e-5)


def test_rnn_attention_reads_padded_steps_as_zeros():
    """A run over the valid steps alone, and zeros in the places of the others before the read-out."""
    network = build("rnn_attention").double()
    series = torch.randn(1, T, 2, dtype=torch.float64)
    states = network.recurrent(series[:, :9])[0]
    for layer in network.encoder:
        states, _ = layer(states, None)
    padded = nn.functional.pad(states, (0, 0, 0, T - 9))
    # float64: attention over 9 keys against 21 of which 12 weigh 0
    torch.testing.assert_close(network(series, lengths_mask([9])), network.head(padded), rtol=1e-10, atol=1e-12)


def test_patch_tst_reads_patches_of_padding_as_zeros():
    network = build("patch_tst").double()
    series = torch.randn(1, T, 2, dtype=torch.float64)
    x = series[:, :9].transpose(1, 2)
    scaled = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    patches = network._patches(nn.functional.pad(scaled, (0, T - 9)))
    n_visible = -((9 + network.n_repeats) // -4)  # patches that begin, every 4 steps, before the padding
    assert 0 < n_visible < patches.shape[2]
    states, scores = (network.embed(patches) + network.position)[0, :, :n_visible], None
    for layer in network.encoder:
        states, scores = layer(states, None, scores)
    padded = nn.functional.pad(states, (0, 0, 0, patches.shape[2] - n_visible)).flatten()[None]
    # float64: sums over fewer keys
    torch.testing.assert_close(network(series, lengths_mask([9])), network.head(padded), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_a_series_does_not_feel_its_batch(name):
    network = build(name).double()
    series = torch.randn(16, T, 2, dtype=torch.float64)
    mask = lengths_mask(torch.arange(16) % 7 + T - 6)
    order = torch.randperm(16)
    together = network(series, mask)
    alone = torch.cat([network(series[i : i + 1], mask[i : i + 1]) for i in range(16)])
    # float64: matrix products of other shapes may sum in another order, 1e-16 a term over about 1e3 terms.
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(series[order], mask[order]), together[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_padding_stays_out_of_training_too(name):
    """Same logits, gradients and running statistics whatever stands in the padding."""
    found = []
    for filling in (0.0, torch.nan):
        network = build(name).train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        mask = lengths_mask([T, 9, 4])
        series = torch.randn(3, T, 2, generator=torch.Generator().manual_seed(1)).masked_fill(~mask[..., None], filling)
        logits = network(series, mask)
        logits.sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        found.append([logits.detach(), *gradients, *network.buffers()])
    for zeros, garbage in zip(*found, strict=True):
        assert torch.equal(zeros, garbage)
        assert garbage.isfinite().all()


def test_masked_batch_norm_takes_its_statistics_from_valid_steps():
    norm, plain = MaskedBatchNorm(3), nn.BatchNorm1d(3)
    features = torch.randn(4, 3, 10) + 2
    mask = lengths_mask([10, 4, 7, 1], 10)
    normalised = norm(features, mask)
    rows = torch.cat([features[b, :, : mask[b].sum()].T for b in range(4)])  # the 22 valid steps
    expected = plain(rows)
    torch.testing.assert_close(torch.cat([normalised[b, :, : mask[b].sum()].T for b in range(4)]), expected)
    assert (normalised.transpose(1, 2)[~mask] == 0).all()
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_masked_batch_norm_maps_a_single_valid_step_as_in_evaluation():
    """It has no variance: torch refuses a batch of one."""
    norm = MaskedBatchNorm(3)
    norm(torch.randn(4, 3, 10) + 2, lengths_mask([10, 4, 7, 1], 10))
    nn.init.normal_(norm.weight)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    features, mask = torch.randn(2, 3, 5, requires_grad=True), lengths_mask([0, 1], 5)
    found = norm(features, mask)
    expected = norm.eval()(features)
    assert torch.equal(found[1, :, 0], expected[1, :, 0])
    assert not found.transpose(1, 2)[~mask].any()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items()), "statistics stay"
    found.sum().backward()
    assert torch.equal(features.grad.transpose(1, 2).any(-1), mask)


@pytest.mark.parametrize("residual_attention", [False, True])
def test_encoder_layer_is_torch_attention_with_batch_norm(residual_attention):
    torch.manual_seed(2)
    layer = TimeEncoderLayer(8, n_heads=2, d_feedforward=5, dropout=0.1, residual_attention=residual_attention).eval()
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(layer.projections.weight)
        attention.in_proj_bias.copy_(layer.projections.bias)
        attention.out_proj.weight.copy_(layer.out.weight)
        attention.out_proj.bias.copy_(layer.out.bias)
    states, mask = torch.randn(3, 7, 8), lengths_mask([7, 3, 5], 7)
    mixed = states + attention(states, states, states, key_padding_mask=~mask)[0]
    mixed = mixed / np.sqrt(1 + 1e-5)  # batch normalisation as initialised: mean 0, variance 1, eps 1e-5
    expected = (mixed + layer.feedforward(mixed)) / np.sqrt(1 + 1e-5)
    ours, scores = layer(states, mask)
    torch.testing.assert_close(ours[mask], expected[mask], rtol=1e-5, atol=1e-5)  # float32, another order of sums
    assert (scores is None) is not residual_attention


def test_residual_attention_adds_the_scores_of_the_layer_below():
    layer = TimeEncoderLayer(4, n_heads=1, d_feedforward=4, dropout=0.0, residual_attention=True).eval()
    states = torch.randn(1, 5, 4)
    _, scores = layer(states, None)
    below = torch.full((1, 1, 5, 5), -1e4)
    below[..., 2] = 0.0  # everyone looks at step 2 alone
    out, total = layer(states, None, below)
    torch.testing.assert_close(total, scores + below)
    value = layer.projections(states)[:, 2, 8:]
    mixed = layer.attention_norm((states + layer.out(value)[:, None]).transpose(1, 2)).transpose(1, 2)
    expected = layer.feedforward_norm((mixed + layer.feedforward(mixed)).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_res_cnn_is_the_written_out_network():
    network = build("res_cnn").double()
    x = torch.randn(3, T, 2, dtype=torch.float64)

    def block(part, features):
        width = part.conv.kernel_size[0]
        padded = np.pad(features, ((0, 0), (0, 0), (width // 2, width // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=2)  # (B, in, T, width)
        out = np.einsum("bitw,oiw->bot", windows, part.conv.weight.detach().numpy())
        norm = part.norm
        mean, variance = norm.running_mean.numpy()[:, None], norm.running_var.numpy()[:, None]
        weight, bias = norm.weight.detach().numpy()[:, None], norm.bias.detach().numpy()[:, None]
        return (out - mean) / np.sqrt(variance + norm.eps) * weight + bias

    series = x.numpy().transpose(0, 2, 1)
    hidden = np.maximum(block(network.second, np.maximum(block(network.first, series), 0)), 0)
    hidden = np.maximum(block(network.third, hidden) + block(network.shortcut, series), 0)
    hidden = block(network.tail[0], hidden)
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    hidden = block(network.tail[1], hidden)
    hidden = np.where(hidden > 0, hidden, 0.25 * hidden)  # PReLU starts at 0.25
    hidden = block(network.tail[2], hidden)
    hidden = np.where(hidden > 0, hidden, 0.3 * (np.exp(hidden) - 1))
    logits = hidden.mean(2) @ network.head.weight.detach().numpy().T + network.head.bias.detach().numpy()
    # float64 against float64: rounding of sums of at most 64 terms, eight layers deep
    np.testing.assert_allclose(network(x).detach().numpy(), logits, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("state_size", [2, 8])
def test_hippo_comes_back_from_its_diagonal_form(state_size):
    eigenvalues, low_rank, _ = (part.numpy() for part in hippo_legs(state_size))
    full = np.concatenate([eigenvalues, eigenvalues.conj()])
    p = np.concatenate([low_rank, low_rank.conj()])
    spectrum = np.linalg.eigvals(np.diag(full) - np.outer(p, p.conj()))
    # A is triangular with diagonal -1, ..., -N; the eigenvalues of a matrix this far from normal lose about 6 digits.
    np.testing.assert_allclose(np.sort(spectrum.real), -np.arange(state_size, 0, -1.0), atol=1e-8)
    np.testing.assert_allclose(spectrum.imag, 0, atol=1e-8)


def dense_system(kernel):
    """Ā (D, N, N), B̄ (D, N), C (D, N) in full, by solving and not by Woodbury."""
    with torch.no_grad():
        eigenvalues = (-kernel.log_decay.exp() + 1j * kernel.frequency).numpy()
        p, b, c = (torch.view_as_complex(part).numpy() for part in (kernel.low_rank, kernel.inputs, kernel.outputs))
        steps = kernel.log_dt.exp().numpy()
    full = [np.concatenate([part, part.conj()], -1) for part in (eigenvalues, p, b, c)]
    a = np.diag(full[0]) - np.outer(full[1], full[1].conj())
    eye = np.eye(len(a))
    backward = [np.linalg.inv(eye - step / 2 * a) for step in steps]
    a_bar = np.stack([inverse @ (eye + step / 2 * a) for inverse, step in zip(backward, steps, strict=True)])
    b_bar = np.stack([step * inverse @ full[2] for inverse, step in zip(backward, steps, strict=True)])
    truncated = eye - np.stack([np.linalg.matrix_power(each, kernel.n_steps) for each in a_bar])
    c = np.stack([row @ np.linalg.inv(each) for row, each in zip(full[3], truncated, strict=True)])
    return a_bar, b_bar, c


@pytest.mark.parametrize("n_steps", [1, 2, 16, 33])
def test_s4_kernel_is_the_step_by_step_recurrence(n_steps):
    torch.manual_seed(3)
    kernel = S4Kernel(3, state_size=8, n_steps=n_steps, dt_min=0.01, dt_max=0.5).double()
    with torch.no_grad():
        for parameter in kernel.parameters():  # away from HiPPO: nothing may rest on its start
            parameter.add_(0.1 * torch.randn_like(parameter))
    a_bar, b_bar, c = dense_system(kernel)
    inputs = np.random.default_rng(0).normal(size=(n_steps, 3))
    state = np.zeros(b_bar.shape, dtype=complex)
    outputs = []
    for step in inputs:
        state = np.einsum("dnm,dm->dn", a_bar, state) + b_bar * step[:, None]
        outputs.append(np.einsum("dn,dn->d", c, state))
    response = kernel().detach().numpy()
    convolved = [[response[d, : t + 1][::-1] @ inputs[: t + 1, d] for d in range(3)] for t in range(n_steps)]
    # float64; I - A^T is inverted, with a condition number of up to about 1e3 at one step
    np.testing.assert_allclose(convolved, np.real(outputs), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(np.imag(outputs), 0, atol=1e-10)


def test_s4_reads_the_recurrence_at_the_last_valid_step():
    network = build("s4", n_channels=1).double()
    series, lengths = torch.randn(3, T, 1, dtype=torch.float64), [T, 8, 1]
    a_bar, b_bar, c = dense_system(network.kernel)
    read = []
    for row, length in zip(series, lengths, strict=True):
        lifted = network.lift(row[:length]).detach().numpy()
        state = np.zeros(b_bar.shape, dtype=complex)
        for step in lifted:
            state = np.einsum("dnm,dm->dn", a_bar, state) + b_bar * step[:, None]
        read.append(np.einsum("dn,dn->d", c, state).real + network.skip.detach().numpy() * lifted[-1])
    gated = nn.functional.glu(network.gate(nn.functional.gelu(torch.tensor(np.array(read)))))
    # float64, a recurrence of 21 steps against one product
    torch.testing.assert_close(network(series, lengths_mask(lengths)), network.head(gated), rtol=1e-9, atol=1e-10)


def test_s4_kernel_of_the_published_size_is_finite_in_float32():
    torch.manual_seed(0)
    kernel = S4Kernel(128, state_size=64, n_steps=301)
    ours = kernel().detach()
    exact = kernel.double()().detach()
    assert ours.isfinite().all()
    # float32 rounding, 6e-8, of 64 terms, times the cancellation between them, measured below 20
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-4 * exact.abs().max().item())


def test_kernel_has_no_pole_at_the_highest_frequency():
    """With T = 2 the spectrum is taken at angles 0 and pi, where the textbook form divides by 1 + z = 0."""
    eigenvalues, low_rank, inputs = hippo_legs(4)
    outputs, steps = torch.ones(1, 2, dtype=torch.complex128), torch.tensor([0.1], dtype=torch.float64)
    assert dplr_kernel(eigenvalues, low_rank, inputs, outputs, steps, 2).isfinite().all()


@pytest.mark.parametrize("n_steps", [1, 5, 16, 21, 24, 200])
def test_every_step_stands_in_a_patch(n_steps):
    network = PatchTST(n_channels=1, n_classes=2, n_steps=n_steps, d_model=8, n_heads=2, d_feedforward=8).eval()
    patches = network._patches(torch.arange(1.0, n_steps + 1)[None])
    assert set(patches.flatten().tolist()) == set(range(1, n_steps + 1))
    assert patches[0, -1, -1] == n_steps
    assert network.n_repeats >= 8
    if n_steps == 200:
        assert patches.shape == (1, 25, 16)
        assert network.n_repeats == 8, "as published where the stride divides"


def test_patch_tst_does_not_feel_level_and_scale_unless_denormalised():
    network = build("patch_tst", n_channels=1).double()
    series = torch.randn(4, T, 1, dtype=torch.float64)
    # eps 1e-5 in the deviation moves a scale of 3 by about 1e-5 relative
    torch.testing.assert_close(network(3 * series + 7), network(series), rtol=1e-3, atol=1e-4)
    released = build("patch_tst", n_channels=1, denormalise=True).double()
    deviation = (series.var(1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(released(series), network(series) * deviation + series.mean(1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_gradients_in_evaluation_mode_exist_on_a_gpu(name):
    network, reference = build(name).cuda(), build(name)
    series = torch.randn(4, T, 2, requires_grad=True)
    on_gpu = series.detach().cuda().requires_grad_()
    with torch.backends.cudnn.flags(enabled=False):  # what recurrent layers need
        (gradient,) = torch.autograd.grad(network(on_gpu).sum(), on_gpu)
    (expected,) = torch.autograd.grad(reference(series).sum(), series)
    # float32 sums in another order, TF32 off
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-3, atol=1e-4)


def n_weights(network):
    return sum(parameter.numel() for parameter in network.parameters())


FACTS = {"n_channels": 1, "n_classes": 2, "n_steps": 200}


@pytest.mark.parametrize(
    ("network", "published", "tolerance"),
    [
        # The mean of released models of hidden size 256 and 32, with 1 or 3 layers; 256 with 1 layer comes nearest.
        (lambda: RNNAttention(**FACTS, hidden_size=256, n_heads=4, d_feedforward=128), 440e3, 0.05),
        # Given in thousands: half a unit of the last digit.
        (lambda: ResCNN(**FACTS, n_filters=64), 256e3, 0.5 / 256),
        # The mean over released widths, most of them 128, some smaller; 128 lies above it.
        (lambda: S4(**FACTS, d_model=128, state_size=64), 47e3, 0.25),
        # One digit after the point, and a head whose size follows T.
        (lambda: PatchTST(**FACTS, d_model=512, n_heads=8, d_feedforward=2048), 6.3e6, 0.01),
        # The stated hidden size of 50 has 10,651; 36 thousand belong to 93.
        (lambda: LSTM(**FACTS, hidden_size=93), 36e3, 0.01),
    ],
    ids=["rnn_attention", "res_cnn", "s4", "patch_tst", "lstm"],
)
def test_published_sizes(network, published, tolerance):
    assert n_weights(network()) == pytest.approx(published, rel=tolerance)


def test_wide_and_narrow_recurrent_sizes_enclose_the_published_mean():
    wide = RNNAttention(**FACTS, hidden_size=256, n_encoder_layers=3, n_heads=4, d_feedforward=128)
    assert n_weights(RNNAttention(**FACTS)) < 440e3 < n_weights(wide)
    assert n_weights(LSTM(**FACTS)) == 4 * 50 * (1 + 50 + 2) + 51


@pytest.mark.parametrize("kind", [RNNAttention, LSTM, ResCNN, S4, PatchTST])
def test_default_sizes_suit_a_cpu(kind):
    assert n_weights(kind(n_channels=3, n_classes=5, n_steps=301)) <= 300e3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LSTM(n_channels=0, n_classes=2, n_steps=9), "n_channels must be at least 1, got 0"),
        (lambda: LSTM(n_channels=1, n_classes=1, n_steps=9), "n_classes must be at least 2, got 1"),
        (lambda: LSTM(n_channels=1, n_classes=2, n_steps=9, dropout=1.0), "dropout must be at least 0 and below 1"),
        (lambda: RNNAttention(n_channels=1, n_classes=2, n_steps=9, n_heads=3), "n_heads must divide the width 32"),
        (lambda: ResCNN(n_channels=1, n_classes=2, n_steps=9, n_filters=0), "n_filters must be at least 1, got 0"),
        (lambda: S4(n_channels=1, n_classes=2, n_steps=9, state_size=7), "state_size must be even and at least 2"),
        (lambda: S4(n_channels=1, n_classes=2, n_steps=9, d_model=1), "d_model must be at least 2, got 1"),
        (lambda: S4Kernel(2, state_size=2, n_steps=3, dt_min=0.2), "dt_min must be above 0 and at most dt_max"),
        (lambda: PatchTST(n_channels=1, n_classes=2, n_steps=9, stride=17), "stride must be at most patch_length, 16"),
        (lambda: PatchTST(n_channels=2, n_classes=2, n_steps=9, denormalise=True), "denormalise is defined for one"),
        (lambda: build("lstm")(torch.zeros(4, T)), r"LSTM takes series of shape \(batch, time, 2\), got \(4, 21\)"),
        (lambda: build("lstm")(torch.zeros(4, T, 3)), r"LSTM takes series of shape \(batch, time, 2\)"),
        (lambda: build("lstm")(torch.zeros(4, 0, 2)), "LSTM was built for series of 21 steps, got 0"),
        (lambda: build("patch_tst")(torch.zeros(4, 20, 2)), "PatchTST was built for series of 21 steps, got 20"),
        (lambda: build("rnn_attention")(torch.zeros(4, 22, 2)), "RNNAttention was built for series of 21 steps, got"),
        (lambda: build("s4")(torch.zeros(4, 22, 2)), "S4 was built for series of at most 21 steps, got 22"),
        (lambda: build("s4")(torch.zeros(4, T, 2), torch.ones(4, T)), r"mask must be bool of shape \(4, 21\)"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_last_valid_step():
    assert last_valid_step(lengths_mask([1, 5, 3], 5)).tolist() == [0, 4, 2]
