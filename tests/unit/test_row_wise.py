"""What SQL expressions are refused since they read other rows: windows and aggregates, wherever they stand."""

import datetime

import numpy as np
import polars as pl
import pytest

from datamodules.sources.row_wise import reads_other_rows

OTHERS = [
    "LEAD(amount) OVER (PARTITION BY owner ORDER BY time)",
    "LAG(amount) OVER (PARTITION BY owner ORDER BY time)",
    "COALESCE(LEAD(amount) OVER (ORDER BY time), 0) + 1",
    "FIRST_VALUE(amount) OVER (PARTITION BY owner ORDER BY time)",
    "LAST_VALUE(amount) OVER (PARTITION BY owner ORDER BY time)",
    "amount - AVG(amount)",
    "amount >= MAX(amount) OVER (PARTITION BY owner)",
    "amount / MIN(amount) OVER (PARTITION BY name)",
    "SUM(amount) OVER (PARTITION BY owner)",
    "RANK() OVER (ORDER BY amount)",
    "ROW_NUMBER() OVER (ORDER BY time)",
    "amount + COUNT(*)",
    "COUNT(*) OVER (PARTITION BY owner)",
]
OWN = [
    "amount * 2",
    "amount * owner + amount",
    "CASE WHEN amount > 0 THEN 1 ELSE 0 END",
    "UPPER(name) || 'x'",
    "name IN ('a', 'b')",
    "name LIKE 'a%'",
    "amount IS NULL",
    "COALESCE(amount, 0)",
    "amount BETWEEN 1 AND 2",
    "EXTRACT(hour FROM time)",
    "amount > 0 AND name = 'a'",
]


@pytest.fixture(scope="module")
def sample():
    rng, start = np.random.default_rng(0), datetime.datetime(2020, 1, 1)
    amounts = [None, float("nan"), *rng.normal(size=298)]
    hours = rng.integers(0, 9999, 300).tolist()
    return pl.DataFrame(
        {
            "owner": rng.integers(0, 200, 300),
            "time": [start + datetime.timedelta(hours=hour) for hour in hours],
            "amount": amounts,
            "name": rng.choice(["a", "b", "c"], 300),
        }
    )


@pytest.mark.parametrize("text", OTHERS)
def test_windows_and_aggregates_read_other_rows(sample, text):
    assert reads_other_rows(sample, pl.sql_expr(text))


@pytest.mark.parametrize("text", OWN)
def test_what_is_computed_row_by_row_does_not(sample, text):
    assert not reads_other_rows(sample, pl.sql_expr(text))


def test_of_no_rows_nothing_is_said(sample):
    assert not reads_other_rows(sample[:0], pl.sql_expr("amount - AVG(amount)"))
