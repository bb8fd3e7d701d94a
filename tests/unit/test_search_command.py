"""A sweep file read strictly, and the search over it: draws, failures, early ends, second sittings, files."""

import csv
import json
import logging
import math
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules import search_process
from lightning_modules.run_folder import RunLogger
from lightning_modules.search_command import search, search_main
from lightning_modules.search_pictures import short_names
from lightning_modules.search_process import FitProcess, TrialFailed, logged_values
from lightning_modules.sweep import Parameter, read_sweep

optuna = pytest.importorskip("optuna", reason="the search needs seqlit[search]")
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "sweeps").glob("*.yaml"))
QUICK = settings(max_examples=25, deadline=None)


def a_sweep(**changes):
    """A sweep over two keys, as YAML would hold it."""
    return {
        "program": "seqlit",
        "command": ["seqlit", "fit", "--config", "toy.yaml", "${args}"],
        "method": "random",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model.a": {"min": 0.0, "max": 1.0}, "model.b": {"values": [1, 2]}},
    } | changes


@pytest.fixture
def written(tmp_path):
    """``written(**changes)``: the path of a sweep file."""

    def write(**changes):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(a_sweep(**changes)), encoding="utf-8")
        return path

    return write


def value_of(arguments, key):
    (found,) = [word.partition("=")[2] for word in arguments if word.startswith(f"--{key}=")]
    return found


class Fits:
    """Stands in for `seqlit fit`: the loss is (a - 0.3)^2 above its limit, reached over four epochs."""

    def __init__(self, failing=()):
        self.asked = []
        self.failing = failing

    def __call__(self, arguments, run, report):
        number = len(self.asked)
        self.asked.append((list(arguments), run))
        if number in self.failing:
            raise TrialFailed("seqlit: error: it burst")
        loss = (float(value_of(arguments, "model.a")) - 0.3) ** 2
        logged = []
        for epoch in range(4):
            logged.append(loss + 1 - epoch / 4)
            if report(logged):
                break
        return logged


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_read(path, project):
    sweep = read_sweep(path)
    assert sweep.command[:2] == ("fit", "--config")
    assert (project / sweep.command[2]).is_file()
    assert path.stem in sweep.command[2]


def test_there_is_a_sweep_for_each_method():
    assert [path.stem for path in SHIPPED] == ["concealed_attack", "kernel_attention", "sasrec_cce", "tda_portfolio"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controller": {"type": "local"}}, "unknown key 'controller'"),
        ({"method": "annealing"}, "method must be one of bayes, random, grid, got 'annealing'"),
        ({"metric": {"name": "val/loss"}}, "metric: goal is missing"),
        ({"metric": {"name": "val/loss", "goal": "low"}}, "metric.goal must be minimize or maximize, got 'low'"),
        ({"metric": {"name": "x", "goal": "minimize", "target": 1}}, "metric: unknown key 'target'"),
        ({"command": ["python", "train.py", "${args}"]}, "command must be a list [seqlit, fit, ..., ${args}]"),
        ({"command": ["seqlit", "fit"]}, "command must be a list [seqlit, fit, ..., ${args}]"),
        ({"command": "seqlit fit ${args}"}, "command must be a list"),
        ({"command": ["seqlit", "fit", "${envvar:HOME}", "${args}"]}, "fills in ${args} alone, got ${envvar:HOME}"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type must be hyperband, got 'envelope'"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate needs min_iter, or max_iter and s, got []"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "early_terminate.min_iter must be a whole number"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "strict": True}}, "unknown key 'strict'"),
        ({"parameters": {}}, "parameters must name at least one key"),
        ({"parameters": {"k": 3}}, "k must be a mapping, got 3"),
        ({"parameters": {"k": {"parameters": {"a": {"value": 1}}}}}, "k: unknown key 'parameters'"),
        ({"parameters": {"k": {"values": [1], "probabilities": [1]}}}, "k: unknown key 'probabilities'"),
        ({"parameters": {"k": {"distribution": "normal", "mu": 0, "sigma": 1}}}, "k: unknown key 'mu'"),
        ({"parameters": {"k": {"distribution": "beta"}}}, "k: distribution must be one of constant, categorical"),
        ({"parameters": {"k": {"values": []}}}, "k: values must be numbers or words, got []"),
        ({"parameters": {"k": {"values": [[1]]}}}, "k: values must be numbers or words"),
        ({"parameters": {"k": {"min": 1.0}}}, "k: max is missing"),
        ({"parameters": {"k": {"min": 2.0, "max": 1.0}}}, "k: min must be below max"),
        ({"parameters": {"k": {"min": "1e-3", "max": 1.0}}}, "min must be a number (YAML reads 1e-3 as a word"),
        ({"parameters": {"k": {"min": float("nan"), "max": 1.0}}}, "k: min must be a number"),
        ({"parameters": {"k": {"distribution": "int_uniform", "min": 1, "max": 2.5}}}, "max must be a whole number"),
        ({"parameters": {"k": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}}, "q above 0"),
        ({"parameters": {"k": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "below max, above 0"),
        ({"method": "grid"}, "model.a: method grid needs values or whole steps, got uniform"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(written, changes, message):
    with pytest.raises(ValueError, match=r"sweep\.yaml") as error:
        read_sweep(written(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_sweep(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such sweep"):
        read_sweep(tmp_path / "none.yaml")
    path = tmp_path / "sweep.yaml"
    for text, message in (("a: [", "is no YAML"), ("- 1", "must hold keys such as"), ("method: grid", "is missing")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_sweep(path)


@QUICK
@given(
    low=st.integers(-20, 20),
    n_steps=st.integers(1, 40),
    step=st.sampled_from([0.1, 0.05, 0.25, 1, 5]),
    seed=st.integers(0, 5),
)
def test_steps_are_drawn_as_written_numbers(low, n_steps, step, seed):
    one = Parameter("k", "q_uniform", low=low * step, high=(low + n_steps) * step, step=step)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    value = one.draw(study.ask())
    assert low * step - 1e-9 <= value <= (low + n_steps) * step + 1e-9  # of rounding a product of two decimals
    assert len(str(abs(value))) <= 6, "0.3, not 0.30000000000000004"
    assert len(one.grid()) == n_steps + 1


@QUICK
@given(seed=st.integers(0, 10_000))
def test_draws_stay_within_their_bounds(seed):
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    assert 1e-4 <= Parameter("a", "log_uniform_values", low=1e-4, high=1e-2).draw(trial) <= 1e-2
    assert Parameter("b", "q_log_uniform_values", low=8, high=512, step=8).draw(trial) in range(8, 513, 8)
    assert Parameter("c", "int_uniform", low=1, high=3).draw(trial) in (1, 2, 3)
    assert Parameter("d", "categorical", values=("one", None, True)).draw(trial) in ("one", None, True)
    assert Parameter("e", "constant", values=("x",)).draw(trial) == "x"


def test_bounds_of_log_uniform_are_logarithms(written):
    parameters = {"k": {"distribution": "log_uniform", "min": -2, "max": 0}}
    (one,) = read_sweep(written(parameters=parameters)).parameters
    assert (one.low, one.high) == (math.exp(-2), 1.0)


def test_arguments_are_those_of_the_agent(written):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="wandb is an extra")
    values = {"model.a": 1e-05, "model.c": True, "model.d": "a b"}
    theirs = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    assert read_sweep(written()).arguments(values) == ["fit", "--config", "toy.yaml", *theirs["args"]]


def test_null_of_a_sweep_is_null_of_the_command_line(written):
    assert "--model.b=null" in read_sweep(written()).arguments({"model.b": None})


def test_early_terminate_is_that_of_hyperband(written):
    sweep = read_sweep(written(early_terminate={"type": "hyperband", "max_iter": 27, "s": 2}))
    assert (sweep.min_iter, sweep.eta) == (3, 3)
    sweep = read_sweep(written(early_terminate={"type": "hyperband", "min_iter": 4, "eta": 2}))
    assert (sweep.min_iter, sweep.eta) == (4, 2)


def test_a_search_writes_what_came_of_it(written, tmp_path, capsys):
    fits = Fits(failing=(1,))
    found = search(
        read_sweep(written()), fits, n_trials=5, folder=tmp_path / "out", overrides=["--trainer.max_epochs=4"]
    )
    assert found == 0
    home = tmp_path / "out" / "search_0"
    written_down = json.loads((home / "search.json").read_text())
    rows = written_down["trials"]
    assert [row["state"] for row in rows] == ["complete", "failed", "complete", "complete", "complete"]
    assert rows[1]["error"] == "seqlit: error: it burst"
    losses = [(row["values"]["model.a"] - 0.3) ** 2 + 0.25 for row in rows]
    for row, loss in zip(rows, losses, strict=True):
        if row["state"] == "complete":
            assert row["value"] == pytest.approx(loss, abs=1e-12)  # float64 sums of the stand-in, in another order
    best = min((row for row in rows if row["value"] is not None), key=lambda row: row["value"])
    assert written_down["best"] == best
    with (home / "search.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["model.b"] for row in table] == [str(row["values"]["model.b"]) for row in rows]
    for picture in ("objective.png", "parameters.png"):
        assert (home / picture).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "trial 1: failed: seqlit: error: it burst" in out
    assert f"seqlit test --config {best['run']}/config.yaml --ckpt_path {best['run']}/checkpoints/best.ckpt" in out
    arguments, run = fits.asked[0]
    assert run == home / "trial_0" / "version_0"
    assert arguments[-4:] == [
        f"--trainer.logger={RunLogger.__module__}.RunLogger",
        f"--trainer.logger.init_args.save_dir={home}",
        "--trainer.logger.init_args.name=trial_0",
        "--trainer.logger.init_args.version=version_0",
    ]
    assert "--trainer.max_epochs=4" in arguments
    search(read_sweep(written()), Fits(), n_trials=1, folder=tmp_path / "out")
    assert (tmp_path / "out" / "search_1" / "search.json").is_file(), "a second search leaves the first alone"


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_the_best_is_that_of_the_goal(written, tmp_path, goal):
    sweep = read_sweep(written(metric={"name": "val/loss", "goal": goal}))
    search(sweep, Fits(), n_trials=4, folder=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "search_0" / "search.json").read_text())
    values = [row["value"] for row in found["trials"]]
    assert found["best"]["value"] == (min if goal == "minimize" else max)(values)


def test_no_trial_that_ends_well_is_an_error(written, tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 trials ended well.*the first: seqlit: error: it burst"):
        search(read_sweep(written()), Fits(failing=(0, 1)), n_trials=2, folder=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "search_0" / "search.json").read_text())["best"] is None


def test_a_run_without_the_metric_fails(written, tmp_path):
    with pytest.raises(ValueError, match="the run logged no val/loss"):
        search(read_sweep(written()), lambda *_: [], n_trials=1, folder=tmp_path / "out")


def test_a_stopped_search_goes_on(written, tmp_path):
    sweep, storage = read_sweep(written()), str(tmp_path / "kept" / "search.db")
    stopping = threading.Event()

    def fits(arguments, run, report):
        if len(first.asked) == 2:
            stopping.set()
        return first(arguments, run, report)

    first, second = Fits(), Fits()
    settings = {"n_trials": 5, "folder": tmp_path / "out", "storage": storage}
    assert search(sweep, fits, **settings, stopping=stopping) == 130
    assert search(sweep, second, **settings) == 0
    assert (len(first.asked), len(second.asked)) == (3, 3), "the one that was stopped is made anew"
    found = json.loads((tmp_path / "out" / "search_0" / "search.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["complete", "complete", "failed", *["complete"] * 3]
    assert found["trials"][2]["error"] == "stopped"
    drawn = [row["values"]["model.a"] for row in found["trials"]]
    assert len(set(drawn)) == 6, "a second sitting draws other values"
    assert not (tmp_path / "out" / "search_1").exists()

    third = Fits()
    assert search(sweep, third, **settings) == 0
    assert third.asked == [], "all trials are made"
    with pytest.raises(ValueError, match="holds another sweep or other overrides"):
        search(sweep, Fits(), **settings, overrides=["--seed_everything=1"])
    Path(storage).write_text("no database, but a text of some length")
    with pytest.raises(ValueError, match=r"search.db is no file of a search"):
        search(sweep, Fits(), **settings)


def test_bad_trials_are_ended(written, tmp_path):
    sweep = read_sweep(written(early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2}))
    search(sweep, Fits(), n_trials=12, folder=tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "search_0" / "search.json").read_text())["trials"]
    assert {row["state"] for row in rows} == {"complete", "ended early"}
    for row in rows:
        before = [other["value"] for other in rows[: row["trial"]] if other["state"] == "complete"]
        if row["state"] == "complete":
            assert row["n_logged"] == 4
        else:
            assert row["n_logged"] in (2, 4), "after two values, and after twice as many"
            # At its second epoch a trial is 0.5 above its end.
            assert row["value"] - (0.5 if row["n_logged"] == 2 else 0) > min(before), "a better one came before"
    assert min(row["value"] for row in rows) == min(row["value"] for row in rows if row["state"] == "complete")


def test_a_grid_is_walked_once(written, tmp_path):
    parameters = {"model.a": {"values": [0.1, 0.2]}, "model.b": {"min": 1, "max": 3}, "model.c": {"value": "x"}}
    fits = Fits()
    search(read_sweep(written(method="grid", parameters=parameters)), fits, n_trials=50, folder=tmp_path / "out")
    seen = {(value_of(arguments, "model.a"), value_of(arguments, "model.b")) for arguments, _ in fits.asked}
    assert len(fits.asked) == len(seen) == 6


class GridFits(Fits):
    """Fits of points (a, b); ``stopping`` is set in the trial of this number, and those of ``failing`` burst."""

    def __init__(self, stopping=None, at=None, failing=()):
        super().__init__(failing)
        self.stopping, self.at, self.points = stopping, at, []

    def __call__(self, arguments, run, report):
        if len(self.asked) == self.at:
            self.stopping.set()
        self.points.append((value_of(arguments, "model.a"), value_of(arguments, "model.b")))
        return super().__call__(arguments, run, report)


def test_a_grid_that_was_stopped_is_made_whole(written, tmp_path):
    """Stopped at the fourth trial, then at the second of another sitting: nothing is lost, nothing made twice."""
    parameters = {"model.a": {"values": [0.1, 0.2, 0.3]}, "model.b": {"values": [1, 2, None]}}
    sweep = read_sweep(written(method="grid", parameters=parameters))
    settings = {"folder": tmp_path / "out", "storage": str(tmp_path / "search.db")}
    made = []
    for at, failing, n_asked in ((3, (1,), 4), (1, (), 2), (None, (), 5)):
        stopping = threading.Event()
        fits = GridFits(stopping, at, failing)
        n_trials = 99 if at is None else 9
        assert search(sweep, fits, n_trials=n_trials, **settings, stopping=stopping) == (0 if at is None else 130)
        assert len(fits.points) == n_asked
        made += fits.points[:at]
    assert len(made) == len(set(made)) == 9, "the one that failed for good is not made again"
    assert {point[1] for point in made} == {"1", "2", "null"}
    rows = json.loads((tmp_path / "out" / "search_0" / "search.json").read_text())["trials"]
    assert sorted(row["state"] for row in rows) == [*["complete"] * 8, *["failed"] * 3]


def test_a_part_of_a_grid_is_gone_on_with(written, tmp_path):
    parameters = {"model.a": {"values": [0.1, 0.2]}, "model.b": {"min": 1, "max": 2}}
    sweep = read_sweep(written(method="grid", parameters=parameters))
    settings = {"folder": tmp_path / "out", "storage": str(tmp_path / "search.db")}
    first, second = GridFits(), GridFits()
    search(sweep, first, n_trials=1, **settings)
    search(sweep, second, n_trials=3, **settings)
    assert (len(first.points), len({*first.points, *second.points})) == (1, 3)


def test_a_failed_trial_is_one_line(written, tmp_path):
    """Optuna would add a traceback of ours."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("optuna")
    log.addHandler(handler)
    try:
        search(read_sweep(written()), Fits(failing=(0,)), n_trials=2, folder=tmp_path / "out")
    finally:
        log.removeHandler(handler)
    assert records == []


def test_several_fits_at_a_time(written, tmp_path):
    both = threading.Barrier(2, timeout=30)
    calm = Fits()

    def fits(arguments, run, report):
        both.wait()  # passes only where two fits run at once
        return calm(arguments, run, report)

    assert search(read_sweep(written(method="bayes")), fits, n_trials=4, folder=tmp_path / "out", jobs=2) == 0
    assert len(calm.asked) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "search: the following arguments are required: --sweep"),
        (["--n_trials", "0"], "n_trials and jobs must be at least 1, got 0 and 1"),
        (["--n_trials", "many"], "invalid int value: 'many'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--", "--model.a=1"], "model.a is what the sweep varies"),
    ],
)
def test_wrong_arguments(written, arguments, message):
    path = written()
    with pytest.raises(ValueError, match="search: ") as error:
        search_main([*(["--sweep", str(path)] if arguments else []), *arguments])
    assert message in str(error.value)


@pytest.fixture
def process(monkeypatch, tmp_path):
    """``process(code)``: FitProcess whose `seqlit` is a few lines of Python; `log(loss)` logs in the run folder."""

    def make(code, **settings):
        script = tmp_path / "fit.py"
        script.write_text(
            "import pathlib, signal, sys, time\n"
            "path = pathlib.Path(sys.argv[1]) / 'metrics.csv'\n"
            "path.parent.mkdir(parents=True)\n"
            "def log(*losses):\n"
            "    path.write_text('epoch,val/loss\\n' + ''.join(f'{n},{x}\\n' for n, x in enumerate(losses)))\n" + code
        )
        monkeypatch.setattr(search_process, "_FIT", (sys.executable, str(script)))
        monkeypatch.setattr(search_process, "_POLL", 0.02)
        return FitProcess("val/loss", **settings)

    return make


def test_a_process_is_watched(process, tmp_path):
    run = tmp_path / "trial_0" / "version_0"
    assert process("print('fits')\nlog(3, 2, '')")([str(run)], run, lambda logged: False) == [3.0, 2.0]
    assert (run.parent / "fit.log").read_text() == "fits\n"


def test_a_process_that_fails_says_why(process, tmp_path):
    run = tmp_path / "trial_0" / "version_0"
    with pytest.raises(TrialFailed, match="seqlit: error: no such file"):
        process("log(1)\nprint('seqlit: error: no such file')\nsys.exit(2)")([str(run)], run, lambda logged: False)


def test_a_process_is_asked_to_end(process, tmp_path):
    run = tmp_path / "trial_0" / "version_0"
    code = "signal.signal(signal.SIGTERM, lambda *_: (log(3, 2), sys.exit(143)))\nlog(3)\ntime.sleep(60)"
    began = time.monotonic()
    assert process(code)([str(run)], run, lambda logged: logged == [3.0]) == [3.0, 2.0], "what it leaves is read"
    assert time.monotonic() - began < 50, "it was not waited for"


def test_a_stopped_search_ends_its_processes(process, tmp_path):
    run, stopping = tmp_path / "trial_0" / "version_0", threading.Event()
    fit = process("log(3)\ntime.sleep(60)", stopping=stopping)

    def seen(logged):
        stopping.set()
        return False

    with pytest.raises(TrialFailed, match="status -15"):
        fit([str(run)], run, seen)


def test_half_a_line_of_metrics_is_passed_over(tmp_path):
    assert logged_values(tmp_path, "val/loss") == []
    (tmp_path / "metrics.csv").write_text("epoch,val/loss\n0,0.5\n1,\n2,0.2e\n3")
    assert logged_values(tmp_path, "val/loss") == [0.5]
    assert logged_values(tmp_path, "val/other") == []


def test_names_are_as_short_as_they_differ():
    keys = ["model.init_args.dropout", "model.init_args.block.init_args.dropout", "model.init_args.lr"]
    assert short_names(keys) == ["model.dropout", "block.dropout", "lr"]
