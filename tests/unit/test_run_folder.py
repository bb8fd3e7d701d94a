"""Runs are found again by what decides a result, and metrics of a resumed run are appended."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import yaml

from lightning_modules import callbacks, run_folder, run_identity
from lightning_modules.run_folder import (
    BEST,
    LAST,
    NothingToResumeError,
    RunLogger,
    _started,
    drop_rows_after,
    identity,
    is_less_than_asked,
    mark_running,
    newest_run,
    newest_unfinished_run,
    refuse_taken,
    runs_newest_first,
    write_whole,
)


def config(**changes):
    settings = {
        "seed_everything": 42,
        "trainer": {"max_epochs": 3},
        "model": {"class_path": "M", "init_args": {"d_model": 64, "loss": {"init_args": {"impl": "auto"}}}},
        "data": {"class_path": "D", "init_args": {"batch_size": 8, "paths": ["a.csv"]}},
    }
    for key, value in changes.items():
        part, name = key.split("__")
        settings[part]["init_args"][name] = value
    return settings


def add_run(root, number, settings, checkpoint=BEST):
    run = root / f"version_{number}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    if checkpoint:
        (run / "checkpoints" / checkpoint).write_bytes(b"")
    return run


def test_identity_is_what_decides_a_result():
    base = identity(config())
    assert identity(config(data__eval_batch_size=99, data__num_workers=4)) == base
    assert identity(config(data__batch_size=99)) != base
    assert identity(config() | {"trainer": {"max_epochs": 9}}) == base
    assert identity(config(model__d_model=32)) != base
    assert identity(config(data__paths=["b.csv"])) != base
    assert identity(config() | {"seed_everything": 1}) != base
    assert identity(config(model__predict_attack="pgd", model__keep_iterates=True, model__max_rows=9)) == base
    context = identity(config(model__context={"max_rows": 9}))
    assert context["model.init_args.context.max_rows"] == 9, "of a context it decides what is seen"


def with_trainer(**trainer):
    settings = config()
    settings["trainer"] |= trainer
    return settings


def named(name, **arguments):
    return {"class_path": f"somewhere.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    "trainer",
    [
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"callbacks": [named("ModelCheckpoint"), named("AdversarialTraining", mode="pgd")]},
        {"callbacks": [named("AdversarialTraining", mode="trades")]},
        {"callbacks": named("EarlyStopping", patience=3)},
        {"callbacks": [{"class_path": "somewhere.OfTheUser"}]},
    ],
    ids=str,
)
def test_a_trainer_that_decides_the_result_is_another_experiment(tmp_path, trainer):
    add_run(tmp_path, 0, config())
    changed = with_trainer(**trainer)
    with pytest.raises(FileNotFoundError, match=rf"differs: trainer\.({'|'.join(trainer)})"):
        newest_run(tmp_path, changed, BEST)
    run = add_run(tmp_path, 1, changed)
    assert newest_run(tmp_path, changed, BEST) == run
    assert newest_run(tmp_path, config(), BEST).name == "version_0"


@pytest.mark.parametrize(
    "trainer",
    [
        {"limit_train_batches": 2},
        {"limit_train_batches": 1},
        {"limit_val_batches": 0.5},
        {"limit_val_batches": 0},
        {"overfit_batches": 1},
    ],
    ids=str,
)
def test_limits_of_a_fit_need_not_be_those_of_a_command_after_it(tmp_path, trainer):
    """A run of a part of the data is asked for by its limits; with the limits of `validate` one of all is found."""
    limited, asked = with_trainer(**trainer), {"max_epochs": 3, "max_steps": -1}
    (key,) = trainer
    part = add_run(tmp_path, 1, limited)
    with pytest.raises(FileNotFoundError, match=rf"version_1, differs: trainer\.{key} is .* there, None here\)"):
        newest_run(tmp_path, config(), BEST)
    whole = add_run(tmp_path, 0, config(), LAST)
    (whole / "checkpoints" / BEST).write_bytes(b"")
    assert newest_run(tmp_path, limited, BEST) == part, "though an older one of all was found too"
    assert newest_run(tmp_path, config(), BEST) == whole
    assert newest_run(tmp_path, limited, LAST) == whole
    with pytest.raises(FileNotFoundError, match=r"differs: data.init_args.batch_size is 8 there, 9 here\)"):
        newest_run(tmp_path, limited | {"data": config(data__batch_size=9)["data"]}, LAST)
    (part / "config.yaml").unlink()
    with pytest.raises(NothingToResumeError, match=rf"version_0, differs: trainer\.{key} is None there"):
        newest_unfinished_run(tmp_path, limited, asked)


@pytest.mark.parametrize(
    "trainer",
    [
        {"precision": None, "gradient_clip_val": None, "gradient_clip_algorithm": None, "accumulate_grad_batches": 1},
        {"precision": "32-true", "gradient_clip_val": 0, "gradient_clip_algorithm": "norm", "callbacks": None},
        {"precision": 32, "gradient_clip_algorithm": "value"},  # an algorithm without a value clips nothing
        {"devices": 4, "num_nodes": 2, "strategy": "replicated", "accelerator": "gpu", "logger": False},
        {"max_time": "00:01:00:00", "max_epochs": 99, "max_steps": 7, "enable_progress_bar": True},
        {"callbacks": [named("ModelCheckpoint", monitor="x"), named("RankingReport"), named("WandbRun", tags=["a"])]},
        {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "overfit_batches": 0.0, "limit_test_batches": 3},
        {"limit_train_batches": None, "limit_val_batches": None, "overfit_batches": 0},
        {"callbacks": named("RichProgressBar")},
    ],
    ids=str,
)
def test_a_trainer_that_decides_nothing_is_the_same_experiment(tmp_path, trainer):
    run = add_run(tmp_path, 0, config())
    assert newest_run(tmp_path, with_trainer(**trainer), BEST) == run
    assert newest_run(tmp_path, config() | {"trainer": None}, BEST) == run, "as of a config without a trainer"


def test_two_callbacks_of_a_kind_count_each():
    both = [named("EarlyStopping", monitor="a"), named("EarlyStopping", monitor="b")]
    assert identity(with_trainer(callbacks=both)) != identity(with_trainer(callbacks=both[1:]))
    assert identity(with_trainer(callbacks=both)) != identity(with_trainer(callbacks=both[:1]))


def test_every_reporting_callback_exists():
    """A name that no class has any more would hide that its class counts."""
    known = set(vars(lightning.pytorch.callbacks)) | set(vars(callbacks))
    assert known >= run_identity._REPORTING
    shipped = {"AdversarialTraining"}
    assert set(callbacks.__all__) - run_identity._REPORTING == shipped, "does the new callback decide results?"


def test_words_for_one_precision_are_one():
    assert identity(with_trainer(precision="bf16")) == identity(with_trainer(precision="bf16-mixed"))
    assert identity(with_trainer(precision=16)) != identity(with_trainer(precision="16-true"))


def test_newest_is_by_number_not_by_name(tmp_path):
    for number in (2, 10, 9):
        add_run(tmp_path, number, config())
    (tmp_path / "version_11").mkdir()  # a folder without a config is no run
    assert [run.name for run in runs_newest_first(tmp_path)] == ["version_10", "version_9", "version_2"]
    assert newest_run(tmp_path, config(), BEST).name == "version_10"


def test_runs_without_the_checkpoint_or_of_another_config_are_passed_over(tmp_path):
    right = add_run(tmp_path, 0, config())
    add_run(tmp_path, 1, config(model__d_model=32))
    add_run(tmp_path, 2, config(), checkpoint=None)
    assert newest_run(tmp_path, config(), BEST) == right
    with pytest.raises(FileNotFoundError, match=r"version_1, differs: model.init_args.d_model is 32 there, 16 here\)"):
        newest_run(tmp_path, config(model__d_model=16), BEST)
    with pytest.raises(FileNotFoundError, match="no run of this config with a"):
        newest_run(tmp_path / "nowhere", config(), BEST)


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


def test_a_second_sitting_appends_to_the_metrics(tmp_path):
    for epoch, extra in ((0, {}), (1, {"val/loss": 2.0})):
        logger = RunLogger(str(tmp_path), "method", "version_0")
        logger.log_metrics({"train/loss": 1.5, "epoch": epoch}, step=epoch)
        if extra:
            logger.log_metrics(extra | {"epoch": epoch}, step=epoch)
        logger.save()
    lines = (tmp_path / "method" / "version_0" / "metrics.csv").read_text().splitlines()
    assert lines == ["epoch,step,train/loss,val/loss", "0,0,1.5,", "1,1,1.5,", "1,1,,2.0"]


ASKED = {"max_epochs": 4, "max_steps": -1}


def add_unfinished(root, number, settings, facts=None, checkpoint=LAST):
    run = add_run(root, number, settings, checkpoint)
    if facts:
        done = {"epochs": 4, "steps": 40, "finished": True, "stopped_early": False}
        (run / "fit.json").write_text(json.dumps(done | facts))
    return run


def test_the_newest_unfinished_run_is_gone_on_with(tmp_path):
    killed = add_unfinished(tmp_path, 0, config())
    stopped = add_unfinished(tmp_path, 1, config(), {"finished": False, "epochs": 4})
    short = add_unfinished(tmp_path, 2, config(), {"epochs": 3})
    add_unfinished(tmp_path, 3, config(), {})  # what it was asked for
    add_unfinished(tmp_path, 4, config(), {"epochs": 2, "stopped_early": True})
    add_unfinished(tmp_path, 5, config(model__d_model=32))
    add_unfinished(tmp_path, 6, config(), checkpoint=None)
    (tmp_path / "version_3" / "fit.json").write_text(json.dumps({"epochs": 4, "steps": 40, "finished": True}))
    for expected in (short, stopped, killed):
        assert newest_unfinished_run(tmp_path, config(), ASKED) == expected
        (expected / "checkpoints" / LAST).unlink()


@pytest.mark.parametrize(
    ("facts", "checkpoint", "words"),
    [
        ({"epochs": 4}, LAST, r"the newest, .*version_0, has finished: 4 epochs\)"),
        ({"epochs": 2, "stopped_early": True}, LAST, r"has finished: 2 epochs and stopped early\)"),
        (None, None, r"was ended before its first last\.ckpt\).*exit status 3"),
    ],
)
def test_where_none_is_unfinished_it_says_what_there_is(tmp_path, facts, checkpoint, words):
    add_unfinished(tmp_path, 0, config(), facts, checkpoint)
    with pytest.raises(FileNotFoundError, match="no unfinished run of this config in .*" + words) as raised:
        newest_unfinished_run(tmp_path, config(), ASKED)
    assert isinstance(raised.value, NothingToResumeError) == (facts is None), "one that has finished is no lost one"
    with pytest.raises(FileNotFoundError, match=r"differs: model.init_args.d_model is 64 there, 16 here"):
        newest_unfinished_run(tmp_path, config(model__d_model=16), ASKED)
    with pytest.raises(FileNotFoundError, match="there is no run"):
        newest_unfinished_run(tmp_path / "nowhere", config(), ASKED)


@pytest.mark.parametrize(
    ("epochs", "steps", "max_epochs", "max_steps", "less"),
    [(3, 30, 4, -1, True), (4, 40, 4, -1, False), (4, 40, -1, 41, True), (4, 40, 9, 40, False), (9, 9, -1, -1, True)],
)
def test_done_is_either_limit(epochs, steps, max_epochs, max_steps, less):
    done, asked = {"epochs": epochs, "steps": steps}, {"max_epochs": max_epochs, "max_steps": max_steps}
    assert is_less_than_asked(done, asked) == less


def checkpoint_at(stepped, *, amid=False):
    batches = {"processed": 9, "completed": 8 if amid else 9}
    loops = {
        "epoch_loop.state_dict": {"_batches_that_stepped": stepped},
        "epoch_loop.batch_progress": {"total": batches},
    }
    return {"loops": {"fit_loop": loops}}


@pytest.mark.parametrize(
    ("text", "checkpoint", "kept"),
    [
        ("step,x\r\n3,1\r\n7,2\r\n8,3\r\n", checkpoint_at(8), "step,x\r\n3,1\r\n7,2\r\n"),
        ("step,x\r\n3,1\r\n7,2\r\n8,3\r\n", checkpoint_at(7, amid=True), "step,x\r\n3,1\r\n7,2\r\n"),
        ("step,x\r\n3,1\r\n7,2", checkpoint_at(8), "step,x\r\n3,1\r\n"),  # a write that was cut off
        ("step,x\r\n3,1\r\n7\r\n", checkpoint_at(8), "step,x\r\n3,1\r\n"),
        ("step,x\r\n3,1\r\n,2\r\n", checkpoint_at(8), "step,x\r\n3,1\r\n"),
        ("step,x\r\n3,1\r\n", checkpoint_at(8), "step,x\r\n3,1\r\n"),
        ("ste", checkpoint_at(8), None),
    ],
)
def test_rows_behind_the_checkpoint_are_dropped(tmp_path, text, checkpoint, kept):
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode())
    drop_rows_after(tmp_path, checkpoint)
    assert (path.read_bytes().decode() if path.exists() else None) == kept


def test_a_new_column_keeps_the_rows_and_never_leaves_half_a_file(tmp_path, monkeypatch):
    logger = RunLogger(str(tmp_path), "method", "version_0")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    path = tmp_path / "method" / "version_0" / "metrics.csv"
    before = path.read_bytes()
    logger.log_metrics({"b": 2.0}, step=1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            logger.save()
    assert path.read_bytes() == before
    logger.experiment._rewrite_with_new_header(["a", "b", "step"])
    assert path.read_text().splitlines() == ["a,b,step", "1.0,,0"]


def test_the_newest_run_says_whether_there_is_nothing_to_resume(tmp_path):
    """A lost run behind a finished one of the same config may begin anew; a finished one behind a lost one may not."""
    add_unfinished(tmp_path, 0, config(), {"epochs": 4})
    add_unfinished(tmp_path, 1, config(), checkpoint=None)
    with pytest.raises(NothingToResumeError):
        newest_unfinished_run(tmp_path, config(), ASKED)
    add_unfinished(tmp_path, 2, config(), {"epochs": 4})
    with pytest.raises(FileNotFoundError) as raised:
        newest_unfinished_run(tmp_path, config(), ASKED)
    assert not isinstance(raised.value, NothingToResumeError)


def test_a_logger_removes_only_what_it_made(tmp_path):
    first = RunLogger(str(tmp_path / "runs"), "method")
    assert first.experiment is not None
    (tmp_path / "runs/method/version_0/config.yaml").write_text("")
    second = RunLogger(str(tmp_path / "runs"), "method", "version_0")
    assert second.experiment is not None
    second.remove_folder()
    assert (tmp_path / "runs/method/version_0/config.yaml").is_file()
    first.remove_folder()
    assert list(tmp_path.iterdir()) == []


def test_loggers_that_start_together_have_a_folder_each(tmp_path):
    loggers = [RunLogger(str(tmp_path), "method") for _ in range(3)]
    assert {logger.log_dir for logger in loggers} == {str(tmp_path / "method/version_0")}, "as none has been made yet"
    assert all(logger.experiment is not None for logger in loggers)
    assert [Path(logger.log_dir).name for logger in loggers] == ["version_0", "version_1", "version_2"]
    loggers[1].remove_folder()
    assert sorted(path.name for path in (tmp_path / "method").iterdir()) == ["version_0", "version_2"]


def test_a_number_that_is_no_folder_is_passed_over(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method/version_0").write_text("")
    logger = RunLogger(str(tmp_path), "method")
    assert logger.experiment is not None
    assert Path(logger.log_dir).name == "version_1"


@pytest.mark.parametrize(
    ("left", "asked", "advice"),
    [
        ("checkpoints/last.ckpt", None, r"go on with it by --ckpt_path last, or choose another trainer\.logger"),
        ("checkpoints/best.ckpt", None, r"without a last\.ckpt nothing goes on with it, choose another trainer"),
        ("checkpoints/last.ckpt", "a/last.ckpt", r"a fit from a/last\.ckpt is a run of its own, choose another"),
        ("fit.json", None, r"without a last\.ckpt nothing goes on with it"),
    ],
)
def test_a_folder_that_holds_a_run_is_taken(tmp_path, left, asked, advice):
    run = tmp_path / "version_7"
    refuse_taken(run)
    (run / left).parent.mkdir(parents=True)
    refuse_taken(run)
    (run / left).write_text('{"finished": true}')
    (run / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match=rf"version_7 holds a run already: {advice}"):
        refuse_taken(run, asked)
    with pytest.raises(ValueError, match="version_7 holds a run already"):
        RunLogger(str(tmp_path.parent), tmp_path.name, 7).claim(resumes=False)
    RunLogger(str(tmp_path.parent), tmp_path.name, 7).claim(resumes=True)
    assert sorted(path.name for path in run.iterdir()) == sorted({"config.yaml", "running.json", left.split("/")[0]})


@pytest.mark.parametrize("ended_by", ["a kill", "an error"])
def test_a_kill_between_the_best_checkpoint_and_the_last_blocks_nobody(tmp_path, ended_by):
    run = tmp_path / "method/version_7"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/best.ckpt").write_text("of the first epoch")
    (run / "config.yaml").write_text("{}")
    note = ("running.json", "{}") if ended_by == "a kill" else ("fit.json", '{"finished": false}')
    (run / note[0]).write_text(note[1])
    refuse_taken(run)
    RunLogger(str(tmp_path), "method", 7).claim(resumes=False)
    assert sorted(path.name for path in run.iterdir()) == ["lost_1", "running.json"]
    assert (run / "lost_1/checkpoints/best.ckpt").read_text() == "of the first epoch"


def test_what_was_ended_before_its_first_checkpoint_is_set_aside(tmp_path):
    """Nothing of the new run is added to what the old one left, however often it is ended."""
    run = tmp_path / "method/version_7"
    for text in ("first", "second"):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints/.last.123.ckpt").write_text("the draft of a writer that was killed")
        for name in ("config.yaml", "config_sitting_2.yaml", "metrics.csv", "wandb.json"):
            (run / name).write_text(text)
        (run / "fit.json").write_text('{"finished": false}')
        refuse_taken(run)
        RunLogger(str(tmp_path), "method", 7).claim(resumes=False)
    assert sorted(path.name for path in run.iterdir()) == ["lost_1", "lost_2", "running.json"]
    for number, text in ((1, "first"), (2, "second")):
        assert (run / f"lost_{number}/metrics.csv").read_text() == text
        assert (run / f"lost_{number}/config_sitting_2.yaml").read_text() == text
        assert not any((run / f"lost_{number}/checkpoints").iterdir())
    assert runs_newest_first(tmp_path / "method") == []


def test_a_folder_without_a_run_keeps_what_lies_there(tmp_path):
    run = tmp_path / "method/version_7"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("of the user")
    logger = RunLogger(str(tmp_path), "method", 7)
    logger.claim(resumes=False)
    assert sorted(path.name for path in run.iterdir()) == ["notes.txt", "running.json"]
    logger.remove_folder()
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_claimed_folder_goes_with_the_fit_that_made_it(tmp_path):
    logger = RunLogger(str(tmp_path / "runs"), "method", 7)
    logger.claim(resumes=False)
    assert logger.experiment is not None
    logger.remove_folder()
    assert list(tmp_path.iterdir()) == []


def claimed(folder, resumes, start, answers):
    """What one of two processes hears that claim a folder at the same moment."""
    start.wait(60)
    try:
        RunLogger(str(folder), "method", 7).claim(resumes=resumes)
        answers.put("claimed")
    except ValueError as error:
        answers.put(str(error))
    start.wait(60)  # both are alive until both have asked


@pytest.mark.filterwarnings("ignore:.*use of fork")
@pytest.mark.parametrize("found", ["nothing", "what was lost", "a run to resume"])
def test_of_fits_that_start_together_one_gets_the_folder(tmp_path, monkeypatch, found):
    pytest.importorskip("fcntl")
    run = tmp_path / "method/version_7"
    if found != "nothing":
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("{}")

    def after_a_while(*arguments, **named):
        time.sleep(0.2)  # without a lock the other looks in the meantime
        mark_running(*arguments, **named)

    monkeypatch.setattr(run_folder, "mark_running", after_a_while)
    context = multiprocessing.get_context("fork")  # a new process would import torch, which takes seconds
    start, answers = context.Barrier(2), context.Queue()
    arguments = (tmp_path, found == "a run to resume", start, answers)
    both = [context.Process(target=claimed, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    said = sorted(answers.get(timeout=60) for _ in both)
    for process in both:
        process.join(60)
    assert "version_7 is still being trained, by process" in said[0]
    assert said[1] == "claimed"
    assert [path.name for path in run.glob("lost_*")] == (["lost_1"] if found == "what was lost" else [])


def test_a_logger_keeps_folders_that_others_write_to(tmp_path):
    logger = RunLogger(str(tmp_path / "runs"), "method")
    assert logger.experiment is not None
    (tmp_path / "runs/method/version_1").mkdir()
    logger.remove_folder()
    assert [path.name for path in (tmp_path / "runs/method").iterdir()] == ["version_1"]


def test_a_run_that_is_still_at_work_is_left_alone(tmp_path):
    run, asked = add_run(tmp_path, 0, config(), LAST), {"max_epochs": 3, "max_steps": -1}
    mark_running(run, running=True)
    note = json.loads((run / "running.json").read_text())
    assert newest_unfinished_run(tmp_path, config(), asked) == run, "a note of this very process is an old one"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for started in ({"started": None}, {"started": _started(other.pid)}):
            (run / "running.json").write_text(json.dumps(note | {"pid": other.pid} | started))
            with pytest.raises(ValueError, match=rf"version_0 is still being trained, by process {other.pid}"):
                newest_unfinished_run(tmp_path, config(), asked)
        assert newest_unfinished_run(tmp_path, config(), asked, is_first=False) == run, "the first claimed it"
        (run / "running.json").write_text(json.dumps(note | {"pid": other.pid, "started": "1"}))
        if _started(other.pid) is not None:
            assert newest_unfinished_run(tmp_path, config(), asked) == run, "its number went to another process"
        (run / "running.json").write_text(json.dumps(note | {"pid": other.pid, "host": "elsewhere"}))
        assert newest_unfinished_run(tmp_path, config(), asked) == run
        (run / "running.json").write_text(json.dumps(note | {"pid": other.pid, "started": None}))
        other.communicate(b"\n")
    assert newest_unfinished_run(tmp_path, config(), asked) == run, "it was killed and left its note behind"
    mark_running(run, running=False)
    assert not (run / "running.json").exists()
