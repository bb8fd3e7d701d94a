"""What SQL expressions are refused since they read other rows: windows and aggregates, wherever they stand."""

import random

import polars as pl
import pytest

from datamodules.sources.row_wise import part_of_other_rows, refuse_other_rows

OTHERS = {
    "LEAD(amount) OVER (PARTITION BY owner ORDER BY time)": "Over",
    "LAG(amount) OVER (PARTITION BY owner ORDER BY time)": "Over",
    "COALESCE(LEAD(amount) OVER (ORDER BY time), 0) + 1": "Over",
    "FIRST_VALUE(amount) OVER (PARTITION BY owner ORDER BY time)": "Over",
    "LAST_VALUE(amount) OVER (PARTITION BY owner ORDER BY time)": "Over",
    "amount - AVG(amount)": "Agg.Mean",
    "amount >= MAX(amount) OVER (PARTITION BY owner)": "Over",
    "amount / MIN(amount) OVER (PARTITION BY name)": "Over",
    "SUM(amount) OVER (PARTITION BY owner)": "Over",
    "RANK() OVER (ORDER BY amount)": "",
    "ROW_NUMBER() OVER (ORDER BY time)": "Over",
    "ROW_NUMBER() OVER ()": "Range.IntRange",
    "amount + COUNT(*)": "Len",
    "COUNT(*) OVER (PARTITION BY owner)": "Over",
    "COUNT(*) OVER (PARTITION BY owner) > 5": "Over",
    "MAX(CASE WHEN name = 'k03' THEN 1 ELSE 0 END) OVER (PARTITION BY owner)": "Over",
    "MAX(name = 'k03')": "Agg.Max",
    "CASE WHEN MAX(name = 'k03') THEN amount ELSE 0 END": "Agg.Max",
    "SUM(amount) OVER (PARTITION BY owner) > 1000": "Over",
    "MAX(amount) OVER (PARTITION BY owner) > 99.9999": "Over",
    "SUM(amount) OVER (ORDER BY time ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)": "Over",
    "COUNT(DISTINCT name)": "Agg.NUnique",
    "CAST(MEDIAN(amount) AS INTEGER) = 3": "Agg.Median",
    "QUANTILE_CONT(amount, 0.5)": "Quantile",
    "CORR(amount, owner)": "Correlation",
    "UPPER(STRING_AGG(name, ','))": "Agg",
    "name IN (UPPER(name), FIRST(name))": "Agg.First",
    "UNNEST(parts)": "Explode",
    "(SELECT 1)": "SubPlan",
    "COLUMNS('name') = 'a'": "Selector",
}
OWN = [
    "amount * 2",
    "amount * owner + amount",
    "amount / owner",
    "amount // 2 % 3",
    "-amount",
    "NOT (amount > 0)",
    "CASE WHEN amount > 0 THEN 1 ELSE 0 END",
    "CASE name WHEN 'a' THEN 1 WHEN 'b' THEN 2 END",
    "UPPER(name) || 'x'",
    "name IN ('a', 'b')",
    "name NOT IN ('a', 'b')",
    "name LIKE 'a%'",
    "name ILIKE '%a'",
    "name ~ '^a'",
    "amount IS NULL",
    "amount IS NOT NULL",
    "amount IS NOT DISTINCT FROM owner",
    "COALESCE(amount, 0)",
    "NULLIF(amount, 0)",
    "IFNULL(amount, 0)",
    "IF(amount > 0, 1, 2)",
    "GREATEST(amount, owner)",
    "LEAST(amount, owner)",
    "amount BETWEEN 1 AND 2",
    "amount > 0 AND name = 'a'",
    "EXTRACT(hour FROM time)",
    "EXTRACT(epoch FROM time)",
    "DATE_PART('dow', time)",
    "STRFTIME(time, '%Y')",
    "time > DATE '2020-01-01'",
    "time + INTERVAL '1 day'",
    "DATE(name || '-' || name)",
    "STRPTIME(name, '%Y-%m-%d')",
    "CAST(name AS DATE)",
    "CAST(name AS INTEGER) > 3",
    "TRY_CAST(name AS DOUBLE)",
    "LN(amount) + LOG1P(amount) + LOG2(amount) + LOG(amount, 3)",
    "SQRT(amount) * POW(amount, 2) + CBRT(amount) + EXP(amount)",
    "ROUND(amount, 1) + CEIL(amount) + FLOOR(amount) + ABS(amount) + SIGN(amount)",
    "SIN(amount) + ATAN2(amount, owner) + DEGREES(ACOS(amount))",
    "owner & 3 | owner",
    "BIT_COUNT(owner) + MOD(owner, 3) + DIV(owner, 3)",
    "CONCAT(name, 'x') || CONCAT_WS('-', name, name)",
    "SUBSTR(name, 1, 2) || LEFT(name, 1) || RIGHT(name, 1) || REVERSE(name) || REPLACE(name, 'a', 'b')",
    "LENGTH(name) + OCTET_LENGTH(name) + STRPOS(name, 'a')",
    "TRIM(name) || LTRIM(name) || SPLIT_PART(name, 'a', 1) || INITCAP(name)",
    "ARRAY_LENGTH(parts) + ARRAY_SUM(parts) + ARRAY_GET(parts, 1)",
    "ARRAY_CONTAINS(ARRAY_REVERSE(ARRAY_UNIQUE(parts)), 1)",
    "1 = ANY(parts)",
    "record.x",
    "time < CURRENT_TIMESTAMP",
    '"Len" + "Agg"',
]


@pytest.mark.parametrize("text", OTHERS)
def test_windows_and_aggregates_read_other_rows_and_are_named(text):
    part = part_of_other_rows(pl.sql_expr(text))
    assert part is not None
    assert part.startswith(OTHERS[text])


@pytest.mark.parametrize("text", OWN)
def test_what_is_computed_row_by_row_does_not(text):
    assert part_of_other_rows(pl.sql_expr(text)) is None


def test_the_error_says_what_was_asked_where_and_what_part_of_it():
    with pytest.raises(ValueError, match=r"^e.csv: where: 'MAX\(a\) > 1' must be computed row by row, .* \(Agg.Max\)$"):
        refuse_other_rows("e.csv", "where", "MAX(a) > 1", pl.sql_expr("MAX(a) > 1"))


def test_a_window_deep_down_is_found_and_depth_itself_is_no_crash():
    terms = [f"amount = {number}" for number in range(3000)]
    assert part_of_other_rows(pl.sql_expr(" OR ".join(["amount = MAX(amount)", *terms]))) is not None
    part_of_other_rows(pl.sql_expr(" OR ".join(terms)))  # how deep can be looked depends on the release of Python


def test_functions_that_are_not_known_to_read_their_own_row_are_refused():
    column = pl.col("a")
    assert part_of_other_rows(column.cum_sum()) == "CumSum"
    assert part_of_other_rows(column.fill_null(strategy="backward")) == "FillNullWithStrategy.Backward"
    assert part_of_other_rows(column.map_elements(random.choice)) is not None
