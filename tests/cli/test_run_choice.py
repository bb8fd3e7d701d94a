"""Which run a command takes up, by the real command: none is overwritten, and none is evaluated untrained."""

import json

import pytest
import yaml

COMMANDS = "fit, validate, test, predict, audit, search"


@pytest.mark.parametrize(("version", "left"), [("7", "config.yaml"), ("version_7", "checkpoints/last.ckpt")])
def test_a_fresh_fit_into_a_folder_of_another_run_is_refused(refused, toys, tmp_path, version, left):
    file = tmp_path / "runs/sasrec_cce/version_7" / left
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    line = refused(toys.config("sasrec_cce"), "--trainer.logger.init_args.version", version)
    assert "runs/sasrec_cce/version_7 holds a run already: go on with it by --ckpt_path last" in line


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
