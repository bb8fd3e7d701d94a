"""Whether an SQL expression is computed row by row: a window or an aggregate inside one would read later rows."""

from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl

SAMPLED_ROWS = 1000
_ASKED, _VALUES = 12, 5


def reads_other_rows(sample: pl.DataFrame, expression: pl.Expr) -> bool:
    """Whether what an expression gives for a row changes with the rows beside it.

    Some rows are asked alone, then among copies of themselves in which one column or two hold other values of the
    sample: copies share every partition of a window and stand before and behind in every order, so that lags, first
    values, ranks, counts and aggregates, however deep in the expression, show. Polars' own ``is_row_separable`` sees
    the outermost part alone.

    Args:
        sample: Rows of a file with all columns that the expression names.
        expression: It.
    """
    columns = sorted({name for name in expression.meta.root_names() if name in sample.columns})
    if not sample.height or not columns:
        return False
    sample = sample.select(columns)
    values = {name: _spread(sample[name].unique().sort()) for name in columns}
    for place in np.unique(np.linspace(0, sample.height - 1, _ASKED).astype(int)).tolist():
        row = sample[place]
        crowd = [row, row]
        for names in (*combinations(columns, 1), *combinations(columns, 2)):
            other = values[names[0]].to_frame()
            for rest in (*(values[name].to_frame() for name in names[1:]), row.drop(names)):
                other = other.join(rest, how="cross") if rest.width else other
            crowd.append(other.select(columns))
        alone, among = row.select(expression.alias("given")), pl.concat(crowd)
        first = among.select(expression.alias("given"))[:1]
        last = among.reverse().select(expression.alias("given"))[-1:]
        if not (alone.equals(first) and alone.equals(last)):
            return True
    return False


def refuse_other_rows(path: Path, argument: str, text: str, sample: pl.DataFrame, expression: pl.Expr) -> None:
    """Refuse an expression that reads other rows, and so later ones: a leak that no audit of a model can see.

    Raises:
        ValueError: If :func:`reads_other_rows` of a sample of the file; names file, argument and text.
    """
    if reads_other_rows(sample, expression):
        raise ValueError(f"{path}: {argument}: {text!r} must be computed row by row, it changes with other rows")


def _spread(ordered: pl.Series) -> pl.Series:
    """The least value, the largest, and some between."""
    return ordered.gather(np.unique(np.linspace(0, len(ordered) - 1, _VALUES).astype(int)))
