"""``seqlit audit``: a model found by its config, tables of other pipelines, truncated events, and what is refused."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from lightning_modules.audit_command import audit_main
from lightning_modules.context.audit_reading import read_embeddings, read_events

DAY = 86_400_000_000

# A model and its events, importable under a name of their own, as a user's would be.
MODULE = '''
import torch
from lightning import LightningDataModule, LightningModule

DAY = 86_400_000_000


class Events(LightningDataModule):
    def __init__(self, n_users: int = 20):
        super().__init__()
        self.n_users = n_users

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 1))

    def test_dataloader(self):
        random = torch.Generator().manual_seed(0)
        times = torch.randint(5, 40, (self.n_users, 12), generator=random).sort(1).values.flatten() * DAY
        events = {
            "categorical": torch.randint(2, 7, (len(times), 1), generator=random),
            "numeric": torch.randn(len(times), 1, generator=random),
            "times": times,
            "offsets": torch.arange(self.n_users + 1) * 12,
        }
        n_queries = 50
        queries = {
            "users": torch.randint(self.n_users, (n_queries,), generator=random),
            "times": torch.randint(6, 42, (n_queries,), generator=random) * DAY,
            "labels": torch.randint(2, (n_queries,), generator=random),
            "fold": (2 - (torch.arange(n_queries) % 5 == 0).int()).to(torch.int8),
        }
        batch = {
            "events": events,
            "user_ids": [f"user {user}" for user in range(self.n_users)],
            "queries": {"leaves": queries},
            "context_users": torch.arange(0, self.n_users, 2),
            "train_stop": 2**63 - 1,
        }
        return torch.utils.data.DataLoader([batch], batch_size=None)


class Sums(LightningModule):
    """Weighted sums of own events and of events of context users before a moment, or from a lead of it on."""

    def __init__(self, lead_days: int = 0, sees_itself: bool = False):
        super().__init__()
        self.lead, self.sees_itself = lead_days * DAY, sees_itself
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return ((self.weight - 2) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def _sums(self, events, seen):
        values = torch.cat([events["numeric"], events["categorical"].float()], 1) * self.weight
        return torch.stack([values[row].sum(0) for row in seen])

    def represent_context(self, own, others, users, times, context_times, context_users=None):
        rows = torch.arange(len(others["offsets"]) - 1).repeat_interleave(others["offsets"].diff())
        seen = (others["times"] < context_times.unsqueeze(1) + self.lead) & torch.isin(rows, context_users)
        if not self.sees_itself:
            seen &= rows != users.unsqueeze(1)
        return self._sums(others, seen)

    def represent(self, events, users, times, context_users=None):
        rows = torch.arange(len(events["offsets"]) - 1).repeat_interleave(events["offsets"].diff())
        own = self._sums(events, (events["times"] < times.unsqueeze(1)) & (rows == users.unsqueeze(1)))
        return torch.cat([own, self.represent_context(events, events, users, times, times, context_users)], 1)
'''


@pytest.fixture
def model(tmp_path, monkeypatch):
    """``model(**arguments)``: the config of a model that was not fitted yet."""
    (tmp_path / "sums_of_events.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def make(**arguments):
        logger = {"class_path": "lightning_modules.run_folder.RunLogger", "init_args": {"name": "sums"}}
        checkpoints = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "best", "enable_version_counter": False},
        }
        config = {
            "seed_everything": 1,
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": logger, "callbacks": [checkpoints]},
            "model": {"class_path": "sums_of_events.Sums", "init_args": arguments},
            "data": {"class_path": "sums_of_events.Events"},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return make


@pytest.mark.parametrize(
    ("arguments", "leaks"),
    [({}, set()), ({"lead_days": 2}, {"future", "same moment"}), ({"sees_itself": True}, {"self"})],
)
def test_a_fitted_model_is_found_and_audited(seqlit, model, tmp_path, capsys, arguments, leaks):
    config = model(**arguments)
    status, _, err = seqlit("fit", "--config", config)
    assert status == 0, err
    status = audit_main(["--config", config, "--n-cuts", "6", "--output", "found.json"])
    said = capsys.readouterr().out
    assert status == (1 if leaks else 0), said
    assert "version_0/checkpoints/best.ckpt" in said
    findings = json.loads((tmp_path / "found.json").read_text())
    assert {finding["name"] for finding in findings if finding["status"] == "leak"} == leaks
    assert "those of the right moment" in findings[-1]["words"]
    # Events came coded and labelled: nothing is claimed of what did that.
    unseen = {finding["name"] for finding in findings if "To see: " in finding["words"]}
    assert unseen == ({"labels"} if "future" in leaks else {"fitted statistics", "labels"})
    if leaks:
        assert "user user " in said


def test_a_model_that_was_not_fitted(model):
    with pytest.raises(FileNotFoundError, match="no run of this config"):
        audit_main(["--config", model()])


def events_and_tables(folder, *, leaky, ending="parquet"):
    """Events of 30 users, and a pipeline that sums a user's amounts before a time, or until a day after it."""
    random = np.random.default_rng(0)
    users, days = np.repeat(np.arange(30), 20), np.sort(random.integers(0, 100, (30, 20)), axis=1).ravel()
    frame = pl.DataFrame(
        {
            "client": [f"c{user}" for user in users],
            "when": pl.Series((days * DAY).astype("datetime64[us]")),
            "amount": random.normal(size=600),
            "shop": random.choice(["a", "b"], 600),
        }
    )
    asked = [(user, int(day)) for user in range(30) for day in random.integers(5, 95, 8)]

    def pipeline(events):
        rows = []
        for user, day in asked:
            known = events.filter(
                (pl.col("client") == f"c{user}") & (pl.col("when").dt.epoch("us") < (day + (1 if leaky else 0)) * DAY)
            )
            rows.append([float(len(known)), known["amount"].sum()])
        moments = pl.Series(np.array([day * DAY for _, day in asked]).astype("datetime64[us]"))
        return pl.DataFrame({"client": [f"c{user}" for user, _ in asked], "when": moments, "embedding": rows})

    def write(table, name):
        path = folder / f"{name}.{ending}"
        if ending == "csv":
            if "embedding" in table.columns:
                lists = table["embedding"].list
                table = table.drop("embedding").with_columns(lists.get(0).alias("e0"), lists.get(1).alias("e1"))
            table.write_csv(path)
        else:
            table.write_parquet(path)
        return str(path)

    return frame, pipeline, write


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("leaky", [False, True])
def test_tables_end_to_end(tmp_path, capsys, leaky, ending):
    frame, pipeline, write = events_and_tables(tmp_path, leaky=leaky, ending=ending)
    events, table = write(frame, "events"), write(pipeline(frame), "table")
    columns = ["--user_column", "client", "--time_column", "when"]
    out = str(tmp_path / f"before.{ending}")
    day = "1970-02-20"
    # A moment many queries have: those at the cut itself are the ones that a look of a day ahead gives away.
    assert audit_main(["--events", events, *columns, "--cut", day, "--write-truncated", out]) == 0
    earlier = pl.read_parquet(out) if ending == "parquet" else pl.read_csv(out, try_parse_dates=True)
    assert earlier.columns == frame.columns
    assert earlier["when"].cast(pl.Datetime("us")).dt.epoch("us").max() < 50 * DAY
    assert len(earlier) == (frame["when"].dt.epoch("us") < 50 * DAY).sum()

    truncated = write(pipeline(earlier.with_columns(pl.col("when").cast(pl.Datetime("us")))), "second")
    capsys.readouterr()
    status = audit_main(["--table", table, "--events", events, *columns, "--truncated", truncated, "--cut", day])
    said = capsys.readouterr().out
    assert status == int(leaky), said
    assert said.startswith("leak         truncated events" if leaky else "clean        truncated events")


def test_events_may_name_their_columns_otherwise(tmp_path, capsys):
    """A table as ``predict`` writes it, with ``user`` and ``time``, beside events as a shop has them."""
    frame, pipeline, write = events_and_tables(tmp_path, leaky=True)
    table = write(pipeline(frame).rename({"client": "user", "when": "time"}), "table")
    seconds = write(frame.with_columns(when=pl.col("when").dt.epoch("s")), "events")
    names = ["--events-user-column", "client", "--events-time-column", "when", "--events-time-unit", "s"]
    status = audit_main(["--table", table, "--events", seconds, *names])
    said = capsys.readouterr().out
    plain = write(pipeline(frame), "plain"), write(frame, "plain_events")
    columns = ["--user_column", "client", "--time_column", "when"]
    assert status == audit_main(["--table", plain[0], "--events", plain[1], *columns])
    assert said == capsys.readouterr().out
    # A unit is for numbers: a column of dates has its own.
    assert status == audit_main(["--table", plain[0], "--events", seconds, *columns, "--time_unit", "s"])
    assert (
        audit_main(["--events", seconds, *names, "--cut", "1970-02-20", "--write-truncated", f"{tmp_path}/o.parquet"])
        == 0
    )
    with pytest.raises(ValueError, match="--events_user_column cannot be used with --config"):
        audit_main(["--config", "a.yaml", "--events_user_column", "client"])


@pytest.mark.parametrize(("ties", "leaks"), [("strict", {"own event at t"}), ("inclusive", set())])
def test_ties_of_a_table(tmp_path, ties, leaks):
    """The state after each event, stamped with its time, is known with inclusive ties alone."""
    frame, _, write = events_and_tables(tmp_path, leaky=False)
    table = frame.select("client", "when", pl.col("amount").alias("e0"))
    arguments = ["--user_column", "client", "--time_column", "when", "--output", str(tmp_path / "found.json")]
    files = ["--table", write(table, "table"), "--events", write(frame, "events")]
    assert audit_main([*files, *arguments, "--ties", ties]) == len(leaks)
    findings = json.loads((tmp_path / "found.json").read_text())
    assert {finding["name"] for finding in findings if finding["status"] == "leak"} == leaks


def test_both_formats_read_the_same(tmp_path):
    names = {"user_column": "client", "time_column": "when", "time_unit": None}
    read = {}
    for ending in ("parquet", "csv"):
        frame, pipeline, write = events_and_tables(tmp_path, leaky=False, ending=ending)
        table = read_embeddings(Path(write(pipeline(frame), "table")), embedding_column="embedding", **names)
        read[ending] = read_events(Path(write(frame, "events")), table, columns=None, **names)
    for one, other in zip(*read.values(), strict=True):
        np.testing.assert_array_equal(one.users, other.users)
        np.testing.assert_array_equal(one.times, other.times)
    events, table = read["csv"]
    np.testing.assert_array_equal(table.vectors, read["parquet"][1].vectors)
    assert list(events.values) == list(read["parquet"][0].values)
    assert set(events.values) == {"amount", "shop = a", "shop = b"}
    assert table.names[table.users[0]] == "c0"


@pytest.mark.parametrize(
    ("said", "unit", "expected"),
    [
        (["1970-01-02", "1970-01-01T00:00:01"], None, [DAY, 1_000_000]),
        (["1970-01-02 01:00:00+01:00", "1970-01-01T00:00:00.5Z"], None, [DAY, 500_000]),
        (["86400", "1.5"], "s", [DAY, 1_500_000]),
        ([1, 2], "days", [DAY, 2 * DAY]),
        ([9_007_199_254_740_993, 1], "us", [9_007_199_254_740_993, 1]),
    ],
)
def test_times(tmp_path, said, unit, expected):
    path = tmp_path / ("table.csv" if isinstance(said[0], str) else "table.parquet")
    frame = pl.DataFrame({"user": ["a", "b"], "time": said, "e0": [1.0, 2.0]})
    frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
    found = read_embeddings(path, user_column="user", time_column="time", embedding_column="embedding", time_unit=unit)
    assert found.times.tolist() == expected


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"who": ["a"], "time": ["1970-01-02"], "e0": [1.0]}, r"no column 'user' \(user_column\), nearest"),
        ({"user": ["a", None], "time": ["1970-01-02"] * 2, "e0": [1.0] * 2}, "'user', row 2: is missing"),
        ({"user": ["a"], "time": ["soon"], "e0": [1.0]}, "column 'time', row 1: 'soon' is not a time"),
        ({"user": ["a"], "time": [5], "e0": [1.0]}, "column 'time' holds Int64: name their unit by time_unit"),
        ({"user": ["a"], "time": ["1970-01-02"], "x": [1.0]}, "no column 'embedding' .* and no columns e0, e1"),
        ({"user": ["a"], "time": ["1970-01-02"], "embedding": [1.0]}, "'embedding' must hold lists of numbers"),
        ({"user": ["a"], "time": ["1970-01-02"], "embedding": ["[1.0]"]}, r"got String; .* or one number .* e0, e1, "),
        ({"user": ["a"] * 2, "time": ["1970-01-02"] * 2, "embedding": [[1.0], [1.0, 2.0]]}, "row 2: 2 numbers, 1 in"),
        ({"user": ["a"], "time": ["1970-01-02"], "e0": [float("nan")]}, "embedding, row 1: a number is missing or not"),
    ],
)
def test_tables_that_are_refused(tmp_path, frame, message):
    table, events = tmp_path / "table.parquet", tmp_path / "events.csv"
    pl.DataFrame(frame).write_parquet(table)
    events.write_text("user,time\na,1970-01-01\n")
    with pytest.raises(ValueError, match=message) as refused:
        audit_main(["--table", str(table), "--events", str(events)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config, or --events"),
        (["--events", "e.csv"], "--events needs --table or --write_truncated"),
        (["--events", "e.csv", "--table", "t.csv", "--cut", "2011-01-01"], "must be given together"),
        (["--events", "e.csv", "--write-truncated", "o.csv", "--cut", "june"], "--cut must be an ISO 8601 date"),
        (["--events", "e.csv", "--write-truncated", "o.csv"], "--write_truncated needs --events"),
        (["--events", "e.csv", "--write-truncated", "o.csv", "--cut", "2011-01-01"], r"e\.csv: no such file"),
        (["--events", "e.csv", "--write-truncated", "e.csv", "--cut", "2011-01-01"], "must be another file than"),
        (["--events", "e.csv", "--table", "t.txt"], r"t\.txt: must end in \.csv or \.parquet"),
        (["--ties", "loose"], "argument --ties: invalid choice"),
        (["--events", "e.csv", "--unheard", "1"], "unknown arguments: --unheard 1"),
        (
            ["--events", "e.csv", "--truncated", "t.csv", "--write-truncated", "o.csv", "--cut", "2011-01-01"],
            "no --table or --truncated",
        ),
        (["--config", "c.yaml", "--cut", "2011-01-01"], "^audit: --cut cannot be used with --config: "),
        (
            ["--config", "c.yaml", "--events=e.csv", "--write-truncated", "o.csv", "--table", "t.csv"],
            "^audit: --table, --events, --write_truncated cannot be used with --config: ",
        ),
        # Given, if only as they are by default.
        (
            ["--config", "c.yaml", "--user-column", "user", "--implausible", "0.5"],
            "--user_column, --implausible cannot",
        ),
        (["--table", "t.csv", "--events", "e.csv", "--tolerance", "0"], "--tolerance cannot be used without --config"),
        (["--target", "silent", "--ckpt_path", "x.ckpt"], "--ckpt_path, --target cannot be used without --config"),
    ],
)
def test_arguments_that_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        audit_main(arguments)
    assert "\n" not in str(refused.value)


def test_a_cut_outside_of_the_events(tmp_path):
    events = tmp_path / "events.csv"
    events.write_text("user,time\na,1970-01-01\nb,1970-01-05\n")
    for cut, message in (("1980-01-01", "every event is before the cut"), ("1970-01-01", "no event is before the cut")):
        with pytest.raises(ValueError, match=message):
            audit_main(["--events", str(events), "--write-truncated", str(tmp_path / "out.csv"), "--cut", cut])
    assert not (tmp_path / "out.csv").exists()
