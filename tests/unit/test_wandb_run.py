"""What of a report goes to wandb: its tables and its numbers."""

import json
from types import SimpleNamespace

import pytest

from lightning_modules.callbacks import WandbRun
from lightning_modules.callbacks.wandb_run import IDENTITY, markdown_tables, numbers

REPORT = """# Test report: 48 users

| | NDCG@10 | NDCG@10 | note |
|---|---:|:---|---|
| model | 0.5 | 1 | +0.1 [0.0, 0.2] |
| most popular | 0.25 | 2 | |

Text with | a bar, and
| a row without a rule |

| a |
|---|
| 1e-3 |

## Costs, in bps
| cost |
|---|
"""


def test_tables_of_a_report():
    first, second, third = markdown_tables(REPORT)
    assert first == (
        "test_report",
        ["row", "NDCG@10", "NDCG@10 3", "note"],
        [["model", 0.5, 1.0, "+0.1 [0.0, 0.2]"], ["most popular", 0.25, 2.0, ""]],
    )
    assert second == ("test_report_2", ["a"], [[0.001]])
    assert third == ("costs_in_bps", ["cost"], [])


def test_numbers_of_a_report():
    found = {"model": {"ndcg@10": 0.5, "name": "x", "interval": [0, 1]}, "n": 3, "none": None, "is": True}
    assert dict(numbers(found)) == {"model/ndcg@10": 0.5, "n": 3}


@pytest.fixture
def wandb():
    return pytest.importorskip("wandb", reason="wandb is an extra")


def test_no_login_is_one_line(wandb, monkeypatch, tmp_path):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"^wandb: No API key configured.*; with WANDB_MODE=offline it needs no login"):
        WandbRun()._begin(tmp_path)


@pytest.mark.parametrize("known", [None, {"id": "run1", "project": "mine", "entity": None}])
def test_a_disabled_run_is_not_gone_on_with(wandb, monkeypatch, tmp_path, known):
    """Its entity is made up: a later run would ask the server for it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    path = tmp_path / IDENTITY
    if known:
        path.write_text(json.dumps(known))
    WandbRun()._begin(tmp_path).finish()
    assert (json.loads(path.read_text()) if path.exists() else None) == known


@pytest.mark.parametrize(("limit", "sent"), [(0.5, 0), (1.0, 1)])
def test_a_part_of_a_test_is_not_sent(wandb, monkeypatch, tmp_path, limit, sent):
    begun = []
    monkeypatch.setattr(WandbRun, "_send_report", lambda self, folder, logged: begun.append(folder))
    trainer = SimpleNamespace(
        fast_dev_run=False, log_dir=str(tmp_path), is_global_zero=True, callback_metrics={}, predicting=False
    )
    trainer.limit_test_batches, trainer.num_test_batches, trainer.test_dataloaders = limit, [1], [range(2)]
    run = WandbRun()
    run.setup(trainer, None, "test")
    run.on_test_start(trainer, None)
    run.teardown(trainer, None, "test")
    assert len(begun) == sent
