"""Which run a command takes up, by the real command: none is overwritten, and none is evaluated untrained."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

COMMANDS = "fit, validate, test, predict, audit, search"


INTO_SEVEN = ("--trainer.logger.init_args.version", 7)


@pytest.mark.parametrize("version", ["7", "version_7"])
def test_a_fresh_fit_into_a_folder_of_another_run_is_refused(refused, toys, tmp_path, version):
    file = tmp_path / "runs/sasrec_cce/version_7/checkpoints/last.ckpt"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    line = refused(toys.config("sasrec_cce"), "--trainer.logger.init_args.version", version)
    assert "runs/sasrec_cce/version_7 holds a run already: go on with it by --ckpt_path last" in line


def test_a_fresh_fit_into_the_folder_of_one_at_work_is_refused(refused, toys, tmp_path):
    run = tmp_path / "runs/sasrec_cce/version_7"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("{}")
        (run / "running.json").write_text(json.dumps({"host": socket.gethostname(), "pid": other.pid}))
        line = refused(toys.config("sasrec_cce"), *INTO_SEVEN)
        other.communicate(b"\n")
    assert f"version_7 is still being trained, by process {other.pid}: wait for it, or end it first" in line


def test_a_fit_ended_before_its_first_checkpoint_begins_anew_in_its_folder(seqlit, toys, tmp_path):
    """As a job that is queued again does: it resumes, is told that there is nothing to, and leaves the request out."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    fit = ("fit", "--config", "toy.yaml", *INTO_SEVEN)
    assert seqlit(*fit)[0] == 0
    run = tmp_path / "runs/sasrec_cce/version_7"
    metrics, files = (run / "metrics.csv").read_bytes(), sorted(path.name for path in run.iterdir())
    shutil.rmtree(run / "checkpoints")
    (run / "fit.json").unlink()
    status, _, err = seqlit(*fit, "--ckpt_path", "last")
    assert (status, "was ended before its first last.ckpt" in err) == (3, True), err
    status, out, err = seqlit(*fit)
    assert status == 0, err
    assert "left in runs/sasrec_cce/version_7 is now in runs/sasrec_cce/version_7/lost_1\n" in out
    assert sorted(path.name for path in run.iterdir()) == sorted([*files, "lost_1"]), "as of a first fit"
    assert (run / "lost_1/metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes() == metrics
    assert (run / "lost_1/config.yaml").is_file()


@pytest.mark.parametrize("resume", [(), ("--ckpt_path", "last")])
def test_a_debugging_run_is_refused_no_folder_and_changes_nothing_there(seqlit, toys, tmp_path, resume):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    fit = ("fit", "--config", "toy.yaml", *INTO_SEVEN)
    assert seqlit(*fit)[0] == 0
    run = tmp_path / "runs/sasrec_cce/version_7"
    with (run / "metrics.csv").open("a") as file:
        file.write("cut o")  # which a fit that goes on takes away
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, _, err = seqlit(*fit, *resume, "--trainer.max_epochs", 2, "--trainer.fast_dev_run", "true")
    assert status == 0, err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_is_named_begins_a_run_of_its_own(refused, seqlit, toys, tmp_path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    assert seqlit("fit", "--config", "toy.yaml", *INTO_SEVEN)[0] == 0
    best = "runs/sasrec_cce/version_7/checkpoints/best.ckpt"
    line = refused(toys.config("sasrec_cce"), *INTO_SEVEN, "--ckpt_path", best)
    assert f"holds a run already: a fit from {best} is a run of its own, choose another" in line
    assert "(null: the next free number); --ckpt_path last goes on in the same folder" in line


@pytest.mark.parametrize("limit", ["limit_val_batches", "limit_train_batches", "overfit_batches"])
def test_a_limit_of_batches_hides_no_run_from_validate(seqlit, toys, tmp_path, limit):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    assert seqlit("fit", "--config", "toy.yaml")[0] == 0
    status, out, err = seqlit("validate", "--config", "toy.yaml", f"--trainer.{limit}", 1)
    assert status == 0, err
    assert "version_0/checkpoints/best.ckpt, of a run of 1 epochs" in out


def test_a_run_of_a_chosen_folder_is_gone_on_with_there(seqlit, toys, tmp_path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    fit = ("fit", "--config", "toy.yaml", "--trainer.logger.init_args.version", 7)
    assert seqlit(*fit)[0] == 0
    status, _, err = seqlit(*fit, "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert status == 0, err
    (run,) = (tmp_path / "runs/sasrec_cce").iterdir()
    assert run.name == "version_7"
    assert (run / "config_sitting_2.yaml").is_file()
    assert json.loads((run / "fit.json").read_text())["epochs"] == 2


def test_all_processes_of_a_fit_go_on_with_the_run_that_the_first_claims(seqlit, toys, tmp_path):
    """The second process looks for it when the first is at work there already."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    assert seqlit("fit", "--config", "toy.yaml", *INTO_SEVEN)[0] == 0
    script, many = Path(sys.executable).with_name("seqlit"), ("--trainer.devices", "2", "--trainer.max_epochs", "2")
    resume = (script, "fit", "--config", "toy.yaml", "--ckpt_path", "last", *many)
    done = subprocess.run(resume, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/sasrec_cce/version_7"
    assert json.loads((run / "fit.json").read_text())["epochs"] == 2
    assert not (run / "running.json").exists()


# `true` is a logger of Lightning's.
@pytest.mark.parametrize(
    ("command", "logger", "asked"),
    [
        ("test", "false", ()),
        ("validate", "true", ()),
        ("test", "false", ("--ckpt_path", "best")),
        ("predict", "false", ("--ckpt_path", "last")),
    ],
)
def test_no_untrained_model_is_evaluated(refused, toys, command, logger, asked):
    line = refused(toys.config("sasrec_cce"), "--trainer.logger", logger, *asked, command=command)
    assert "ckpt_path: name a checkpoint: without a RunLogger as trainer.logger none is looked up" in line


def test_a_checkpoint_that_is_named_needs_no_logger(seqlit, toys, tmp_path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    assert seqlit("fit", "--config", "toy.yaml")[0] == 0
    best = tmp_path / "runs/sasrec_cce/version_0/checkpoints/best.ckpt"
    status, out, err = seqlit("validate", "--config", "toy.yaml", "--trainer.logger", "false", "--ckpt_path", best)
    assert status == 0, err
    assert "val/ndcg@10" in out


def test_a_fit_goes_on_from_the_last_checkpoint_alone(refused, toys):
    line = refused(toys.config("sasrec_cce"), "--ckpt_path", "best")
    assert "ckpt_path: a fit goes on from last or from the path of a checkpoint, got best" in line


@pytest.mark.parametrize(("arguments", "words"), [(["fitt"], "invalid choice: 'fitt'"), ([], "not provided")])
def test_a_wrong_command_is_told_of_all(seqlit, arguments, words):
    status, _, err = seqlit(*arguments)
    (line,) = err.splitlines()
    assert status == 2
    assert words in line
    assert COMMANDS in line
