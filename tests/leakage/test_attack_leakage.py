"""T1: a fit of ConcealedAttacker trains, calibrates and chooses without a single test series."""

import shutil

import pytest
import torch
from lightning import Callback, Trainer, seed_everything

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import Attack, Linf, PGDStep, SignStep, SumReg, Vanilla
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan
from lightning_modules.networks import LSTM, ResCNN

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*in eval mode at the start"
)


def res_cnn(**facts):
    return ResCNN(**facts, n_filters=2)


def lstm(**facts):
    return LSTM(**facts, hidden_size=3)


def attacker():
    """Every decision of a fit: epoch of the classifier, levels, a round, grid, iteration, scales, judges, folds."""
    schedule = {"start": 0.3, "gamma": 0.5, "n_levels": 2, "epochs_per_level": 1}
    vanilla = Attack(Vanilla(), SignStep(), n_steps=3)
    hidden = Attack(SumReg(), SignStep(), n_steps=3)
    return ConcealedAttacker(
        n_channels=1,
        n_classes=2,
        n_steps=24,
        z_norm_ddof=1,
        classifier=res_cnn,
        classifier_epochs=3,
        discriminators=[
            DiscriminatorPlan(
                name="a",
                network=res_cnn,
                attack=vanilla,
                training_attacks="ifgsm",
                n_rounds=1,
                round_attack=Attack(SumReg(), SignStep(0.1), n_steps=2),
                seed=1,
                **schedule,
            ),
            DiscriminatorPlan(
                name="h",
                role="held_out",
                network=lstm,
                attack=Attack(Vanilla(), PGDStep(), projection=Linf(), n_steps=3),
                training_attacks="pgd",
                seed=2,
                **schedule,
            ),
        ],
        attacks=[
            AttackPlan(name="vanilla", family="ifgsm", attack=vanilla, steps=[0.05, 0.2]),
            AttackPlan(name="sum", family="ifgsm", attack=hidden, steps=[0.05, 0.2], alphas=[0.1, 1.0], calibrate=True),
        ],
    )


def fit(folder, *callbacks):
    seed_everything(1, verbose=False)
    module = attacker()
    data = TimeSeriesDataModule(
        folder=str(folder), name="Toy", batch_size=16, validation_fraction=0.3, normalise="per_series"
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=module.classifier_epochs + module.discriminator_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    trainer.fit(module, data)
    return module, data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same training file beside two test files that share no series and differ in number."""
    one, other = (tmp_path_factory.mktemp(name) for name in ("one", "other"))
    synthetic_series(40, 20, n_steps=24, rule="bump", noise=0.5, seed=3).write(one, "Toy", ".tsv")
    synthetic_series(40, 50, n_steps=24, rule="bump", noise=2.0, seed=4).write(other, "Toy", ".tsv")
    shutil.copy(one / "Toy_TRAIN.tsv", other / "Toy_TRAIN.tsv")
    assert (one / "Toy_TEST.tsv").read_bytes() != (other / "Toy_TEST.tsv").read_bytes()
    return one, other


@pytest.fixture(scope="module")
def fits(folders, one_thread):
    return [fit(folder) for folder in folders]


def leaves(tree, where="found"):
    """Every tensor, number and string of a tree, with its place."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{where}/{key}")]
    if isinstance(tree, list | tuple):
        return [leaf for number, value in enumerate(tree) for leaf in leaves(value, f"{where}/{number}")]
    return [(where, tree)]


def test_weights_and_everything_found_do_not_depend_on_the_test_file(fits):
    (one, _), (other, _) = fits
    fresh = attacker().state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert not all(torch.equal(value, fresh[name]) for name, value in one.state_dict().items()), "nothing was trained"
    assert set(one.found) == {"chosen", "judges", "calibration", "levels", "saturation"}
    here, there = leaves(one.found), leaves(other.found)
    assert [where for where, _ in here] == [where for where, _ in there]
    for (where, value), (_, same) in zip(here, there, strict=True):
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same, where


def test_calibration_holds_training_and_validation_series_alone(fits):
    for module, data in fits:
        n_series = len(data.arrays("train")["labels"]) + len(data.arrays("validation")["labels"])
        sizes = {name: len(scores) for name, scores in module.found["calibration"].items()}
        assert set(sizes.values()) == {n_series}
        assert {"a", "h", "two statistics", "strict two statistics"} < set(sizes)


def test_the_test_files_do_make_a_difference_once_they_are_asked_for(fits):
    """Else the two folders would prove nothing."""
    sizes, accuracies = [], []
    for module, data in fits:
        study = module.test_step(data.arrays("test"), 0)
        sizes.append(len(study.labels))
        accuracies.append(study.attacks[0].scores["statistics"].mean())
    assert sizes == [20, 50]
    assert accuracies[0] != accuracies[1]


class Peek(Callback):
    """Asks for test series as an epoch begins or ends."""

    def __init__(self, way, when):
        self.way = way
        setattr(self, when, self.peek)

    def peek(self, trainer, pl_module):
        arguments = ("test",) if self.way == "arrays" else ()
        getattr(trainer.datamodule, self.way)(*arguments)


@pytest.mark.parametrize("way", ["test_dataloader", "predict_dataloader", "arrays"])
@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_validation_end"])
def test_a_fit_that_asks_for_test_series_fails(folders, way, when):
    with pytest.raises(ValueError, match="test series were asked for while the trainer fits"):
        fit(folders[0], Peek(way, when))


def test_test_series_are_handed_out_after_the_fit(fits):
    _, data = fits[0]
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 20
    assert len(next(iter(data.predict_dataloader()))["labels"]) == 20


def test_nothing_is_tested_or_predicted_before_attacks_were_chosen(fits):
    _, data = fits[0]
    for step in ("test_step", "predict_step"):
        with pytest.raises(ValueError, match="no attack was chosen: run `seqlit fit`, to its last epoch"):
            getattr(attacker(), step)(data.arrays("test"), 0)
