"""What of a report goes to wandb: its tables and its numbers."""

from lightning_modules.callbacks.wandb_run import markdown_tables, numbers

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
