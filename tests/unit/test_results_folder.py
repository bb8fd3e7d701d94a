"""Results of a part of the data do not take the place of those of all, and a debugging run leaves none."""

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lightning_modules.callbacks import results_folder as module
from lightning_modules.callbacks.results_folder import results_folder
from lightning_modules.callbacks.study_report import StudyReport

N_BATCHES = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging")


class Asked(Callback):
    """Keeps the folder, where results would be written."""

    folder = None

    def on_test_end(self, trainer, pl_module):
        self.folder = results_folder(trainer)

    on_predict_end = on_test_end


class Counts(StudyReport):
    """A report of how many batches there were."""

    study_type = dict

    def write(self, folder, studies, facts):
        folder.mkdir(parents=True)
        (folder / "n").write_text(str(len(studies)))


class Steps(BoringModel):
    def test_step(self, batch, batch_idx):
        return {}


def called(folder, command, callback, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[callback], **quiet, **settings)
    given = {} if command == "predict" else {"verbose": False}
    getattr(trainer, command)(Steps(), DataLoader(RandomDataset(32, N_BATCHES)), **given)
    return callback


@pytest.mark.parametrize(
    ("limit", "partial"), [(None, False), (1.0, False), (N_BATCHES, False), (99, False), (0.5, True), (1, True)]
)
@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_part_has_a_folder_of_its_own(tmp_path, command, limit, partial):
    asked = called(tmp_path, command, Asked(), **{f"limit_{command}_batches": limit})
    assert asked.folder == (tmp_path / "partial" if partial else tmp_path)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_limit_of_the_other_command_is_none_of_this(tmp_path, command):
    other = "predict" if command == "test" else "test"
    assert called(tmp_path, command, Asked(), **{f"limit_{other}_batches": 1}).folder == tmp_path


@pytest.mark.parametrize("others", [[False, False], [False, True]])
def test_a_part_in_any_process_is_a_part_in_all(tmp_path, monkeypatch, others):
    """Loaders of several processes need not be of one length: a limit may cut those of others alone."""
    monkeypatch.setattr(module, "gather_objects", lambda own: [own, *others])
    asked = called(tmp_path, "test", Asked(), limit_test_batches=N_BATCHES)
    assert asked.folder == (tmp_path / "partial" if any(others) else tmp_path)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_debugging_run_has_no_folder_and_says_so(tmp_path, capsys, command):
    assert called(tmp_path, command, Asked(), fast_dev_run=True).folder is None
    assert capsys.readouterr().out.count("seqlit: a fast_dev_run writes no results") == 1


def test_a_report_of_a_part_stands_beside_that_of_all(tmp_path):
    for settings in ({}, {"limit_test_batches": 2}, {"fast_dev_run": True}):
        called(tmp_path, "test", Counts(), **settings)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("n")}
    assert found == {"report/n": "4", "partial/report/n": "2"}
