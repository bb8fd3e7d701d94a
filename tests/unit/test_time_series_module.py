"""TimeSeriesDataModule: published facts of real sets, batches, folds, normalisation, order of epochs, state."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer

from datamodules import TimeSeriesDataModule
from datamodules.series_preparation import pooled_moments, stratified_folds, stratified_holdout, z_norm_ddof, z_normed
from datamodules.synthetic_series import synthetic_series

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """23 + 9 raw series of two channels and different lengths, three classes."""
    drawn = synthetic_series(23, 9, n_steps=30, n_channels=2, n_classes=3, rule="mean", variable_length=True, seed=2)
    drawn.train.series[..., 1] = np.where(drawn.train.series[..., 1] != 0, 50 + 7 * drawn.train.series[..., 1], 0)
    return drawn, str(drawn.write(tmp_path_factory.mktemp("raw"), "Walk", ".ts"))


def module_of(real_data, name, **arguments):
    return TimeSeriesDataModule(folder=str(real_data / "ucr"), name=name, **arguments)


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)


# Facts of the specification, section 8


@pytest.mark.parametrize(
    ("name", "n_steps", "sizes", "low", "high", "roughness", "z_normed"),
    [
        ("Coffee", 286, (28, 28), -2.06, 2.18, 0.0380, True),
        ("GunPoint", 150, (50, 150), -2.37, 2.05, 0.0135, True),
        ("GunPointMaleVersusFemale", 150, (135, 316), -1.23, 2.61, 0.0072, False),
        ("PowerCons", 144, (180, 180), -0.99, 6.15, 0.1541, False),
        ("Strawberry", 235, (613, 370), -2.33, 3.68, 0.0236, True),
    ],
)
def test_published_facts(real_data, name, n_steps, sizes, low, high, roughness, z_normed):
    module = module_of(real_data, name, validation_fraction=0)
    series = module.arrays("train")["series"]
    assert (module.n_steps, module.n_channels, module.n_classes) == (n_steps, 1, 2)
    assert (len(series), len(module.arrays("test")["labels"])) == sizes
    assert module.is_z_normed is z_normed
    # Printed with two decimals, roughness with four.
    assert float(series.min()) == pytest.approx(low, abs=0.005)
    assert float(series.max()) == pytest.approx(high, abs=0.005)
    second = series[:, 2:] - 2 * series[:, 1:-1] + series[:, :-2]
    assert float(second.abs().mean()) == pytest.approx(roughness, abs=0.00005)
    if z_normed:
        assert (module.mean.tolist(), module.std.tolist()) == ([0], [1])
    else:
        assert float(module.std) > 1


@pytest.mark.parametrize("name", ["GunPoint", "Strawberry"])
def test_archive_form_is_the_sample_std(real_data, name):
    """|mean| < 5e-9 and |std - 1| < 6e-9 in the files; here with the rounding of float32 on top."""
    module = module_of(real_data, name, validation_fraction=0)
    assert module.z_norm_ddof == 1
    series = module.arrays("train")["series"].double()
    # float32 keeps 24 bits: 2^-25 of a value below 4, averaged.
    assert float(series.mean(1).abs().max()) < 1e-7
    assert float((series.std(1, correction=1) - 1).abs().max()) < 1e-7
    assert float((series.std(1, correction=0) - 1).abs().min()) > 1e-3


@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("GunPoint", "test", [76, 74]),
        ("PowerCons", "train", [90, 90]),
        ("PowerCons", "test", [90, 90]),
        ("Strawberry", "train", [219, 394]),
        ("Strawberry", "test", [132, 238]),
    ],
)
def test_class_counts(real_data, name, split, counts):
    module = module_of(real_data, name, validation_fraction=0)
    assert module.arrays(split)["labels"].bincount().tolist() == counts
    assert list(module.report_facts()["classes"][split].values()) == counts


# Batches


def test_batches_of_every_loader(raw):
    _, folder = raw
    module = TimeSeriesDataModule(folder=folder, batch_size=5, eval_batch_size=4)
    loaders = {
        "train": module.train_dataloader(),
        "validation": module.val_dataloader(),
        "test": module.test_dataloader(),
    }
    for split, loader in loaders.items():
        batches = list(loader)
        whole = module.arrays(split)
        n = len(whole["labels"])
        size = 5 if split == "train" else 4
        assert [len(batch["labels"]) for batch in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
        joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        order = joined["index"]
        assert order.sort().values.equal(torch.arange(n))
        assert order.equal(torch.arange(n)) is (split != "train")
        assert equal(joined, {key: tensor[order] for key, tensor in whole.items()})
        assert {key: (tuple(t.shape[1:]), t.dtype) for key, t in whole.items()} == {
            "series": ((30, 2), torch.float32),
            "mask": ((30,), torch.bool),
            "labels": ((), torch.int64),
            "index": ((), torch.int64),
        }
        assert not whole["series"][~whole["mask"]].any()
    assert equal(next(iter(module.test_dataloader())), next(iter(module.predict_dataloader())))


def test_series_are_those_of_the_file(raw):
    drawn, folder = raw
    module = TimeSeriesDataModule(folder=folder, normalise="none")
    for split in SPLITS:
        source = drawn.test if split == "test" else drawn.train
        rows, batch = module.rows(split), module.arrays(split)
        assert np.array_equal(batch["series"].numpy(), source.series[rows].astype(np.float32))
        assert batch["mask"].sum(1).tolist() == source.lengths[rows].tolist()
        assert batch["labels"].tolist() == source.labels[rows].tolist()
    assert sorted([*module.rows("train"), *module.rows("validation")]) == list(range(23))
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'val'"):
        module.arrays("val")


def test_arrays_are_copies(raw):
    module = TimeSeriesDataModule(folder=raw[1])
    before = {key: tensor.clone() for key, tensor in module.arrays("train").items()}
    module.arrays("train")["series"].zero_()
    next(iter(module.train_dataloader()))["series"].zero_()
    module.mean.zero_()
    assert equal(module.arrays("train"), before)
    assert module.mean.all()


def test_shorter_split_is_padded_and_long_series_are_cut(tmp_path):
    header = "@equalLength false\n@classLabel true a b\n@data\n"
    (tmp_path / "Walk_TRAIN.ts").write_text(header + "1,2:a\n3,4,5:b\n6:a\n")
    (tmp_path / "Walk_TEST.ts").write_text(header + "1,2,3,4,5:b\n")
    module = TimeSeriesDataModule(folder=str(tmp_path), normalise="none", validation_fraction=0)
    train = module.arrays("train")
    assert module.n_steps == 5
    assert train["series"][..., 0].tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 0, 0], [6, 0, 0, 0, 0]]
    assert train["mask"].sum(1).tolist() == [2, 3, 1]
    assert module.val_dataloader() == []
    short = TimeSeriesDataModule(folder=str(tmp_path), normalise="none", validation_fraction=0, max_length=2)
    assert short.arrays("train")["series"][..., 0].tolist() == [[1, 2], [3, 4], [6, 0]]
    assert short.arrays("test")["series"][..., 0].tolist() == [[1, 2]]
    assert short.arrays("train")["mask"].tolist() == [[True, True], [True, True], [True, False]]


def test_what_normalising_takes_beyond_float32_is_refused(tmp_path):
    (tmp_path / "Far_TRAIN.tsv").write_text("1\t0\t1e-30\n2\t1e-30\t0\n")
    (tmp_path / "Far_TEST.tsv").write_text("1\t0\t0\n2\t0\t3e30\n")
    module = TimeSeriesDataModule(folder=str(tmp_path), normalise="global", validation_fraction=0)
    with pytest.raises(
        ValueError, match=r"Far_TEST\.tsv: row 2, channel 1, step 2: 6e\+60 when normalised by training"
    ):
        module.arrays("test")


@pytest.mark.parametrize(
    ("classes", "ordered"),
    [(["10", "9", "-1"], ("-1", "9", "10")), (["walk", "Run", "10"], ("10", "Run", "walk"))],
)
def test_classes_are_ordered_as_numbers_or_as_text(tmp_path, classes, ordered):
    text = "".join(f"{name}\t{place}\t0\n" for place, name in enumerate(classes))
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"Walk_{part}.tsv").write_text(text)
    module = TimeSeriesDataModule(folder=str(tmp_path), validation_fraction=0)
    assert module.class_names == ordered
    assert module.arrays("test")["labels"].tolist() == [ordered.index(name) for name in classes]


# Normalisation


def test_global_statistics_are_of_training_values_by_channel(raw):
    drawn, folder = raw
    module = TimeSeriesDataModule(folder=folder)
    rows = module.rows("train")
    values = np.concatenate([drawn.train.series[row, : drawn.train.lengths[row]] for row in rows])
    # float64 sums in another order.
    assert np.allclose(module.mean, values.mean(0), rtol=1e-12)
    assert np.allclose(module.std, values.std(0), rtol=1e-12)
    test = module.arrays("test")
    expected = (drawn.test.series - values.mean(0)) / values.std(0)
    # Rounding to float32 of values below 100.
    assert np.allclose(test["series"][test["mask"]], expected[test["mask"].numpy()], rtol=1e-6, atol=1e-6)
    assert module.is_z_normed is False


def test_auto_leaves_normalised_series_and_global_does_not(tmp_path):
    drawn = synthetic_series(20, 5, n_steps=40, z_normed=True)
    folder = str(drawn.write(tmp_path, "Walk", ".tsv"))
    kept, scaled = (TimeSeriesDataModule(folder=folder, normalise=choice) for choice in ("auto", "global"))
    assert np.array_equal(kept.arrays("test")["series"], drawn.test.series.astype(np.float32))
    assert (kept.z_norm_ddof, scaled.z_norm_ddof) == (1, 0)
    # One std of all values of series with sample std 1.
    assert float(scaled.std) == pytest.approx(np.sqrt(39 / 40), rel=1e-9)


def test_per_series_form(raw):
    drawn, folder = raw
    module = TimeSeriesDataModule(folder=folder, normalise="per_series")
    assert module.z_norm_ddof == 1
    assert (module.mean.tolist(), module.std.tolist()) == ([0, 0], [1, 1])
    test = module.arrays("test")
    for series, source, length in zip(test["series"], drawn.test.series, drawn.test.lengths, strict=True):
        expected = (source[:length] - source[:length].mean(0)) / source[:length].std(0, ddof=1)
        assert np.allclose(series[:length], expected, rtol=1e-6, atol=1e-6)  # rounding to float32
        assert not series[length:].any()


def test_constant_channels_become_zero_instead_of_rounding_blown_up():
    series = np.full((3, 10, 2), 0.1)
    series[:, :, 1] = np.arange(10)
    mask = np.ones((3, 10), dtype=bool)
    mask[1, 6:] = mask[2, 1:] = False
    series[~mask] = 0
    found = z_normed(series, mask)
    assert not found[..., 0].any()
    assert not found[2].any()
    assert found[0, :, 1].std(ddof=1) == pytest.approx(1, rel=1e-12)
    mean, std = pooled_moments(np.full((3, 10, 1), 0.1), mask)
    assert (std.tolist(), mean.tolist()) == ([1], [pytest.approx(0.1)])


def test_a_constant_series_does_not_hide_that_the_others_are_normalised():
    series, mask = np.random.default_rng(0).normal(size=(5, 30, 2)), np.ones((5, 30), dtype=bool)
    series[1, :, 0] = 7.0
    normed = z_normed(series, mask)
    assert not normed[1, :, 0].any()
    assert z_norm_ddof(normed, mask) == 1
    normed[1, :, 0] = 7.0
    assert z_norm_ddof(normed, mask) is None, "its mean is not 0"
    assert z_norm_ddof(np.zeros_like(series), mask) is None, "nothing tells the std"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 12),
    st.sampled_from([0, 1]),
    st.sampled_from(["", "shift", "scale"]),
    st.booleans(),
)
def test_recognised_form(seed, n_series, ddof, change, varies):
    """One series among many that is shifted or scaled beyond the tolerance is enough to see raw series."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 60, size=n_series) if varies else np.full(n_series, 60)
    mask = np.arange(60) < lengths[:, None]
    series = np.zeros((n_series, 60, 1))
    for row, length in enumerate(lengths):
        values = rng.normal(3, 5, length)
        series[row, :length, 0] = (values - values.mean()) / values.std(ddof=ddof)
    row = rng.integers(n_series)
    if change == "shift":
        series[row, : lengths[row]] += 2e-4
    elif change == "scale":
        series[row] *= 1.002
    # At 60 steps the two forms differ by 1/120 in std, far more than the tolerance of 1e-3.
    assert z_norm_ddof(series, mask) == (None if change else ddof)


# Validation


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=80),
    st.floats(0.01, 0.95),
    st.integers(-3, 10**12),
)
def test_holdout_is_stratified_and_leaves_every_class(labels, fraction, seed):
    labels = np.array([*labels, *range(5)])
    held_out = stratified_holdout(labels, fraction, seed)
    for label in range(5):
        n, n_held_out = (labels == label).sum(), held_out[labels == label].sum()
        assert n_held_out < n
        assert n == 1 or n_held_out >= 1
        # Nearest whole number, moved by the two limits above at most.
        assert abs(n_held_out - fraction * n) <= 1
    assert np.array_equal(held_out, stratified_holdout(labels, fraction, seed))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=4, max_size=80),
    st.integers(2, 8),
    st.integers(0, 10**12),
)
def test_folds_are_equal_in_size_and_classes(labels, n_folds, seed):
    labels = np.array([*labels, *range(4)])
    folds = stratified_folds(labels, n_folds, seed)
    assert np.ptp(np.bincount(folds, minlength=n_folds)) <= 1
    for label in range(4):
        assert np.ptp(np.bincount(folds[labels == label], minlength=n_folds)) <= 1


def test_folds_partition_the_official_training_series(raw):
    modules = [TimeSeriesDataModule(folder=raw[1], fold=fold, n_folds=4) for fold in range(4)]
    held_out = [module.rows("validation") for module in modules]
    assert sorted(np.concatenate(held_out)) == list(range(23))
    for module in modules:
        assert module.rows("train").tolist() == sorted(set(range(23)) - set(module.rows("validation")))
    again = TimeSeriesDataModule(folder=raw[1], fold=1, n_folds=4, validation_fraction=0.5).rows("validation")
    assert np.array_equal(again, held_out[1])
    other = TimeSeriesDataModule(folder=raw[1], fold=1, n_folds=4, seed=1).rows("validation")
    assert not np.array_equal(other, held_out[1])


def test_folds_need_two_series_a_class_and_as_many_series_as_folds(tmp_path):
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"Walk_{part}.tsv").write_text("1\t2\t3\n1\t4\t5\n2\t6\t7\n")
    with pytest.raises(ValueError, match=r"Walk_TRAIN.tsv: class '2' has one series, folds need at least 2"):
        TimeSeriesDataModule(folder=str(tmp_path), fold=0, n_folds=2).setup("fit")
    with pytest.raises(ValueError, match=r"n_folds must be in 2..3, the number of training series, got 4"):
        stratified_folds(np.zeros(3, dtype=np.int64), 4, 0)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": None}, "folder or name must be given, got neither"),
        ({"normalise": "minmax"}, "normalise must be one of 'auto', 'none', 'global', 'per_series', got 'minmax'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1, got 1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction must be at least 0 and below 1, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"n_folds": 1}, "n_folds must be at least 2, got 1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"fold": 5}, r"fold must be in 0\.\.4, got 5"),
        ({"fold": -1}, r"fold must be in 0\.\.4, got -1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimeSeriesDataModule(**({"folder": "ucr"} | arguments))


# Training and state


class Orders(LightningModule):
    """Remembers which series it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def on_train_epoch_start(self):
        self.seen.append([])

    def training_step(self, batch):
        self.seen[-1] += batch["index"].tolist()
        return self.layer(batch["series"].mean((1, 2))[:, None]).square().mean()

    def validation_step(self, batch):
        self.n_validated = len(batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fitted(module, folder, n_epochs, checkpoint=None):
    model = Orders()
    trainer = Trainer(
        max_epochs=n_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    trainer.fit(model, module, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return model, trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_order_of_epochs_depends_on_seed_and_epoch_and_survives_a_resume(raw, tmp_path):
    build = {"folder": raw[1], "batch_size": 4}
    model, _ = fitted(TimeSeriesDataModule(**build), tmp_path, 3)
    assert [sorted(epoch) for epoch in model.seen] == [list(range(len(model.seen[0])))] * 3
    assert len({tuple(epoch) for epoch in model.seen}) == 3
    assert model.n_validated == 23 - len(model.seen[0])
    torch.manual_seed(1)
    _, trainer = fitted(TimeSeriesDataModule(**build), tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fitted(TimeSeriesDataModule(**build), tmp_path, 3, tmp_path / "one.ckpt")
    assert resumed.seen == model.seen[1:]
    with pytest.raises(ValueError, match=r"checkpoint was trained with validation_fraction 0\.2, here it is 0\.3"):
        fitted(TimeSeriesDataModule(**build, validation_fraction=0.3), tmp_path, 3, tmp_path / "one.ckpt")


def test_state_holds_the_statistics_and_is_plain(raw):
    module = TimeSeriesDataModule(folder=raw[1])
    state = module.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["mean"], state["std"]) == (module.mean.tolist(), module.std.tolist())
    json.dumps(module.report_facts())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "checkpoint was trained with seed 0, here it is 1"),
        ({"normalise": "none"}, "checkpoint was trained with normalise 'auto', here it is 'none'"),
        ({"max_length": 9}, "checkpoint was trained with max_length None, here it is 9"),
        ({"fold": 0}, "checkpoint was trained with fold None, here it is 0"),
        ({"validation_fraction": 0}, "checkpoint was trained with validation_fraction 0.2, here it is 0"),
    ],
)
def test_state_of_another_split_is_refused(raw, arguments, message):
    state = TimeSeriesDataModule(folder=raw[1]).state_dict()
    TimeSeriesDataModule(folder=raw[1], batch_size=3).load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        TimeSeriesDataModule(folder=raw[1], **arguments).load_state_dict(state)


@pytest.mark.parametrize("change", ["value", "label", "name"])
def test_state_of_other_series_is_refused(tmp_path, change):
    rows = ["1\t2\t3", "1\t4\t5", "2\t6\t7", "2\t8\t8"]
    other = {
        "value": ["1\t2\t3", "1\t4\t5.0000001", *rows[2:]],
        "label": ["2\t2\t3", "1\t4\t5", "1\t6\t7", "2\t8\t8"],
        "name": [row.replace("1\t", "3\t", 1) for row in rows],
    }[change]
    modules = []
    for place, content in (("one", rows), ("two", other)):
        (tmp_path / place).mkdir()
        for part in ("TRAIN", "TEST"):
            (tmp_path / place / f"Walk_{part}.tsv").write_text("\n".join(content))
        modules.append(TimeSeriesDataModule(folder=str(tmp_path / place), validation_fraction=0))
    with pytest.raises(
        ValueError, match=r"checkpoint was trained on the series \w+, the files here give \w+: training"
    ):
        modules[1].load_state_dict(modules[0].state_dict())
