import contextlib
import io
import zipfile

import pytest
import torch
from torch import nn

from lightning_modules.attacks import (
    Attack,
    DeepFool,
    SignStep,
    Vanilla,
    Victim,
    calibrate,
    check_logits,
    load_victim,
    refuse_probabilities,
)
from lightning_modules.attacks.frozen_networks import frozen

B, T, C = 5, 12, 2


@pytest.fixture
def x():
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))


def head(n_logits, *after):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(T * C, n_logits), *after)


def by_hand(scale):
    """A softmax without care for its range."""

    def probabilities(series):
        odds = (scale * head(3)(series)).exp()
        return odds / odds.sum(1, keepdim=True)

    return probabilities


@pytest.mark.parametrize(
    "network",
    [
        head(1, nn.Sigmoid()),
        head(3, nn.Softmax(dim=1)),
        nn.Sequential(head(1, nn.Sigmoid()), nn.Flatten()),
        lambda series: torch.sigmoid(head(1)(series)).clamp(1e-6, 1 - 1e-6),
        lambda series: torch.sigmoid(head(1)(series).detach()),  # no graph: judged by its outputs alone
        # not confident: outputs alone would not tell
        lambda series: torch.sigmoid(0.003 * head(3)(series)),  # a sigmoid for each of several labels
        lambda series: 0.98 * torch.sigmoid(0.003 * head(1)(series)) + 0.01,
        lambda series: 1 - torch.sigmoid(-0.003 * head(1)(series)),
        lambda series: torch.stack([torch.sigmoid(0.003 * k * head(1)(series)) for k in (1, 2)]).mean(0),
        by_hand(1.0),
        by_hand(40.0),  # inf / inf where series are large
    ],
)
def test_probabilities_are_refused(x, network):
    with pytest.raises(ValueError, match="the network returns probabilities") as caught:
        refuse_probabilities(network, x)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the network returns probabilities"):
        check_logits(network, x)


@pytest.mark.parametrize(
    "network",
    [
        head(1),
        head(3),
        head(3, nn.LogSoftmax(dim=1)),
        # logits that happen to lie in 0..1 on every series
        head(1, nn.Tanh(), nn.Linear(1, 1, bias=False), nn.Hardtanh(0.2, 0.8)),
        lambda series: 0.5 + 0.1 * torch.tanh(series.sum(dim=(1, 2)))[:, None],
        lambda series: torch.full((len(series), 1), 1.0),
        lambda series: torch.tensor([0.3, 0.7]).expand(len(series), 2),
        # a layer on a hidden sigmoid returns anything, though these weights happen to keep it inside
        lambda series: torch.nn.functional.linear(
            torch.sigmoid(head(1)(series)), torch.full((1, 1), 0.1), torch.full((1,), 0.5)
        ),
        # a gate times a value is no probability
        lambda series: torch.sigmoid(0.003 * head(1)(series)) * torch.tanh(series.sum(dim=(1, 2)))[:, None].abs() * 0.5,
    ],
)
def test_logits_pass_even_inside_the_unit_interval(x, network):
    refuse_probabilities(network, x)
    assert check_logits(network, x) in (2, 3)


def test_preprocessing_lies_inside_the_graph(x):
    """T14 for any victim: the gradient knows the statistics."""
    x = x.double()

    def standardise(series):
        return (series - series.mean(dim=1, keepdim=True)) / series.std(dim=1, keepdim=True)

    victim = Victim(head(1).double(), standardise)
    points = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(victim(points).sum(), points)
    assert slope.sum(dim=1).abs().max() < 1e-12  # a shift of a channel changes nothing, up to float64 rounding
    bump = torch.zeros_like(x)
    bump[1, 3, 1] = 1e-6
    difference = (victim(x + bump) - victim(x - bump)).sum() / 2e-6
    assert slope[1, 3, 1].item() == pytest.approx(difference.item(), rel=1e-6)  # central difference
    labels = torch.zeros(B, dtype=torch.int64)
    assert Attack(Vanilla(), SignStep(0.1), n_steps=3)(victim, x, labels).values[-1].mean() > 0


def test_channels_first_and_masks_reach_the_network(x):
    shapes = []

    class Network(nn.Module):
        def forward(self, series, mask=None):
            shapes.append((tuple(series.shape), None if mask is None else tuple(mask.shape)))
            return series.sum(dim=(1, 2))[:, None]

    Victim(Network(), channels_first=True)(x, mask=torch.ones(B, T, dtype=torch.bool))
    assert shapes == [((B, C, T), (B, T))]


def test_weights_by_class_path(x, tmp_path):
    source = nn.GRU(C, 4)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pt")
    loaded = load_victim(
        class_path="torch.nn.GRU", init_args={"input_size": C, "hidden_size": 4}, weights=tmp_path / "weights.pt"
    )
    assert all(torch.equal(loaded.network.state_dict()[name], value) for name, value in source.state_dict().items())


def test_weights_of_a_module_that_holds_the_network(x, tmp_path):
    """As a checkpoint of TimeSeriesClassifier has them."""
    source = nn.GRU(C, 4)
    state = {f"network.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state | {"val_loss.total": torch.zeros(())}}, tmp_path / "best.ckpt")
    torch.save({"state_dict": state | {"network.other": torch.zeros(1)}}, tmp_path / "more.ckpt")
    of = {"class_path": "torch.nn.GRU", "init_args": {"input_size": C, "hidden_size": 4}}
    loaded = load_victim(**of, weights=tmp_path / "best.ckpt")
    assert all(torch.equal(loaded.network.state_dict()[name], value) for name, value in source.state_dict().items())
    with pytest.raises(ValueError, match="do not fit GRU"):
        load_victim(**of, weights=tmp_path / "more.ckpt")


def test_programs_can_be_attacked(x, tmp_path):
    network = head(1, nn.Dropout(0.5)).eval()
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, tmp_path / "network.pt2")
    victim = load_victim(program=tmp_path / "network.pt2", trusted=True, probe=x)
    labels = torch.zeros(B, dtype=torch.int64)
    attack = Attack(Vanilla(), SignStep(0.1), n_steps=2)
    # the exported matrix product may be fused otherwise: float32 rounding
    torch.testing.assert_close(attack(victim, x, labels).logits, attack(network, x, labels).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_programs(x, tmp_path):
    torch.jit.script(head(1)).save(tmp_path / "network.ts")
    victim = load_victim(program=tmp_path / "network.ts", trusted=True, probe=x)
    victim.train()
    labels = torch.zeros(B, dtype=torch.int64)
    assert Attack(Vanilla(), SignStep(0.1), n_steps=2)(victim, x, labels).x_adv.shape == x.shape
    assert not victim.network.training


def noisy(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(T * C, 1)).train()


def exported(network, x):
    return torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_saved_in_train_mode_is_attacked_in_evaluation_mode(x, tmp_path):
    network = noisy(nn.BatchNorm1d(T * C), nn.Dropout(0.5))
    torch.jit.script(network).save(tmp_path / "network.ts")
    victim = load_victim(program=tmp_path / "network.ts", trusted=True, probe=x)
    assert not any(module.training for module in victim.network.modules())
    before = [buffer.clone() for buffer in victim.network.buffers()]
    labels, attack = torch.zeros(B, dtype=torch.int64), Attack(Vanilla(), SignStep(0.1), n_steps=5)
    found = attack(victim, 3 + x, labels)
    assert torch.equal(found.x_adv, attack(network.eval(), 3 + x, labels).x_adv)
    assert all(torch.equal(buffer, old) for buffer, old in zip(victim.network.buffers(), before, strict=True))


class Counting(nn.Module):
    """Writes one buffer in place and replaces another, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(T * C, 1)
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, series):
        self.written += 1
        self.replaced = self.replaced + 1
        return self.head(series.flatten(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["script", "export", "counting script", "counting export", "train-mode export"])
def test_an_attack_leaves_flags_gradients_and_buffers_of_a_program(x, kind):
    network = Counting() if kind.startswith("counting") else noisy(nn.BatchNorm1d(T * C))
    if not kind.startswith("train"):
        network.eval()
    program = torch.jit.script(network) if kind.endswith("script") else exported(network, x).module()
    victim = Victim(program)
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    for module in program.modules():
        if hasattr(module, "training"):
            module.training = True
    refused = pytest.raises(ValueError, match="saved in train mode, a call writes its buffer")
    with contextlib.nullcontext() if kind in ("script", "export") else refused:
        Attack(Vanilla(), SignStep(0.1), n_steps=3)(nn.Sequential(victim), x, torch.zeros(B, dtype=torch.int64))
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in program.named_buffers())
    assert all(getattr(module, "training", True) for module in program.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in program.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ending", [".pt2", ".ts"])
@pytest.mark.parametrize(
    ("layer", "found"),
    [(nn.BatchNorm1d(T * C), "a call writes its buffer '1.running_"), (nn.Dropout(0.5), "two equal calls differ")],
)
def test_a_program_with_train_mode_in_its_graph_is_refused(x, tmp_path, layer, found, ending):
    network, file, message = noisy(layer), tmp_path / f"network{ending}", f"saved in train mode, {found}"
    if ending == ".pt2":
        torch.export.save(exported(network, x), file)
        direct = exported(network, x).module()
    else:
        direct = torch.jit.trace(network, x, check_trace=False)
        direct.save(file)
    with pytest.raises(ValueError, match=message) as caught:  # of a .pt2 the example in the file is enough
        load_victim(program=file, trusted=True, probe=x if ending == ".ts" else None)
    assert "\n" not in str(caught.value)
    y = torch.zeros(B, dtype=torch.int64)
    attack = Attack(Vanilla(), SignStep(0.1), n_steps=2)
    for victim in (direct, Victim(direct)):
        for use in (
            lambda victim: check_logits(victim, x),
            lambda victim: attack(victim, x, y),
            lambda victim: attack(head(1), x, y, detectors=[victim]),
            lambda victim: DeepFool(2)(victim, x, y),
        ):
            with pytest.raises(ValueError, match=message):
                use(victim)
    assert check_logits(Victim(exported(network.eval(), x).module()), x) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("kind", ["layer", "script", "export", "none"])
def test_cudnn_is_off_for_recurrent_programs_on_cuda(x, kind):
    """T4: the backward of its recurrent layers refuses evaluation mode."""
    network = head(1) if kind == "none" else nn.LSTM(C, 3, batch_first=True).eval()
    if kind == "script":
        network = Victim(torch.jit.script(network))
    elif kind == "export":
        network = Victim(exported(network, x).module())
    enabled = torch.backends.cudnn.enabled
    with frozen([network], torch.device("cuda")):
        assert torch.backends.cudnn.enabled == (enabled and kind == "none")
    assert torch.backends.cudnn.enabled == enabled


class Pickled:
    """Would run code when unpickled."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either class_path or program, got None and None"),
        ({"class_path": "torch.nn.Nothing"}, "class_path 'torch.nn.Nothing' cannot be imported"),
        ({"class_path": "pathlib.Path"}, "class_path must name an nn.Module, got 'pathlib.Path'"),
        ({"class_path": "torch.nn.Linear"}, "torch.nn.Linear does not take init_args {}"),
        ({"class_path": "torch.nn.ReLU", "weights": "absent.pt"}, "there is no file absent.pt"),
        ({"program": "absent.pt2", "trusted": True}, "there is no file absent.pt2"),
        ({"program": "absent.pt2"}, "the file of a program can run code: give trusted: true if absent.pt2 comes"),
        ({"program": "absent.pt2", "trusted": "no"}, "from where you trust, got 'no'"),
        ({"program": "absent.pt2", "weights": "absent.pt"}, "a program brings its arguments and weights"),
    ],
)
def test_victims_that_cannot_be_loaded_end_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_victim(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_that_hold_no_weights_are_refused_without_running_them(tmp_path, capsys):
    torch.save(Pickled(), tmp_path / "code.pt")
    with pytest.raises(ValueError, match="is not a file of plain weights"):
        load_victim(class_path="torch.nn.ReLU", weights=tmp_path / "code.pt")
    assert capsys.readouterr().out == ""
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"the weights of .*other\.pt do not fit ReLU") as caught:
        load_victim(class_path="torch.nn.ReLU", weights=tmp_path / "other.pt")
    assert "\n" not in str(caught.value)
    (tmp_path / "text.ts").write_text("no program")
    with pytest.raises(ValueError, match=r"text\.ts holds no program"):
        load_victim(program=tmp_path / "text.ts", trusted=True)
    for name in ("whole.pt", "whole.pt2"):
        torch.save(nn.ReLU(), tmp_path / name)
        with pytest.raises(
            ValueError, match=r"torch\.save wrote weights or a pickled object; save the network by"
        ) as caught:
            load_victim(program=tmp_path / name, trusted=True)
        assert "\n" not in str(caught.value)


class Marking:
    """Makes a file when unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_program_that_runs_code_leaves_no_trace_unless_it_is_trusted(x, tmp_path):
    good, evil, trace = tmp_path / "good.pt2", tmp_path / "evil.pt2", tmp_path / "trace"
    torch.export.save(torch.export.export(head(1), (x,)), good)
    pickled = io.BytesIO()
    torch.save((Marking(trace),), pickled)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(evil, "w") as archive:
        members = source.namelist()
        (inputs,) = [name for name in members if "sample_inputs" in name and name.endswith(".pt")]
        for name in members:
            archive.writestr(name, pickled.getvalue() if name == inputs else source.read(name))
    with pytest.raises(ValueError, match="the file of a program can run code") as caught:
        load_victim(program=evil, probe=x)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    with contextlib.suppress(ValueError):  # whether torch still reads the archive is not the point
        load_victim(program=evil, trusted=True)
    assert trace.exists(), "the file is harmless: this proves nothing"


def test_calibration_is_the_median_confidence(x):
    single, several = head(1), head(3)
    assert calibrate(single, x) == pytest.approx(single(x)[:, 0].abs().median().item(), rel=1e-6)  # B is odd
    ordered = several(x).sort(dim=1, descending=True).values
    assert calibrate(several, x, batch_size=2) == pytest.approx(
        (ordered[:, 0] - ordered[:, 1]).median().item(), rel=1e-5
    )  # float32 rounding of other batch shapes
    with pytest.raises(ValueError, match=r"the median confidence of the network on 5 series must be above 0, got 0\.0"):
        calibrate(lambda series: torch.zeros(len(series), 1), x)
