"""Whether an SQL expression is computed row by row: a window or an aggregate inside one would read later rows.

It is decided by what the expression is made of. Values cannot tell: whether a user ever buys, or buys for more than
1000, stays the same in most samples of a file.
"""

import json
from pathlib import Path
from typing import Any

import polars as pl

_OPERANDS: dict[str, tuple[str | int, ...]] = {
    "Alias": (0,),
    "BinaryExpr": ("left", "right"),
    "Cast": ("expr",),
    "Column": (),
    "Eval": ("expr",),  # over the elements of a row's own list; what may be done to them is not asked
    "Function": ("input",),
    "Literal": (),
    "Ternary": ("predicate", "truthy", "falsy"),
}
"""Nodes of a serialised expression of Polars that read their own row, and where the nodes below them stand."""

_FAMILIES = frozenset({"ArrayExpr", "ListExpr", "Pow", "StringExpr", "StructExpr", "TemporalExpr", "Trigonometry"})
"""Families of functions that read their own row, all but ``_OTHERS``."""

_FUNCTIONS = frozenset(
    {
        *("Abs", "Atan2", "Ceil", "Clip", "Coalesce", "Erf", "Exp", "FillNull", "Floor", "Log", "Log1p"),
        *("MaxHorizontal", "MinHorizontal", "Negate", "Round", "RoundSF", "Sign", "Truncate"),
        *("Bitwise.CountOnes", "Bitwise.CountZeros", "Sql.Binary", "Sql.IsIn", "Sql.Round", "Sql.ToFloat"),
        *("Boolean.IsFinite", "Boolean.IsIn", "Boolean.IsInfinite", "Boolean.IsNan", "Boolean.IsNotNan"),
        *("Boolean.IsNotNull", "Boolean.IsNull", "Boolean.Not"),
    }
)
"""Other functions, or functions of other families, that read their own row."""

_OTHERS = frozenset({"ListExpr.Sample", "StringExpr.ConcatVertical"})


def part_of_other_rows(expression: pl.Expr) -> str | None:
    """The part of an expression that reads other rows or is not known to read its own alone; None if there is none.

    Known are all functions and operators of the SQL of Polars that give a value for each row. Polars' own
    ``is_row_separable`` sees the outermost part alone, and takes a constant list for other rows.

    Args:
        expression: Of columns, as :func:`polars.sql_expr` gives it.

    Returns:
        Polars' name of the part, such as ``Over`` or ``Agg.Max``.
    """
    try:
        nodes: list[Any] = [json.loads(expression.meta.serialize(format="json"))]
    except pl.exceptions.PolarsError:  # a function that Polars cannot write down
        return "a part that cannot be looked into"
    except RecursionError:
        return "nested too deep to be looked into"
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
            continue
        name, body = next(iter(node.items())) if isinstance(node, dict) else (node, {})
        part = _dotted(body["function"] if name == "Function" else node)
        if name == "Function":
            known = (part in _FUNCTIONS or part.split(".")[0] in _FUNCTIONS | _FAMILIES) and part not in _OTHERS
        else:
            # An `Eval` of another variant goes over a column.
            known = name in _OPERANDS and (name != "Eval" or body["variant"] == "List")
        if not known:
            return part
        nodes += [body[place] for place in _OPERANDS[name]]
    return None


def refuse_other_rows(path: Path, argument: str, text: str, expression: pl.Expr) -> None:
    """Refuse an expression that reads other rows, and so later ones: a leak that no audit of a model can see.

    Raises:
        ValueError: If it has a :func:`part_of_other_rows`; names file, argument, text and part.
    """
    part = part_of_other_rows(expression)
    if part is not None:
        raise ValueError(
            f"{path}: {argument}: {text!r} must be computed row by row, it changes with other rows ({part})"
        )


def _dotted(node: Any) -> str:
    """``Agg.Max`` of ``{"Agg": {"Max": ...}}``, ``CumSum`` of ``{"CumSum": {"reverse": ...}}`` and of ``"CumSum"``."""
    if isinstance(node, str):
        return node
    family, below = next(iter(node.items()))
    function = next(iter(below), "") if isinstance(below, dict) else below
    return f"{family}.{function}" if isinstance(function, str) and function[:1].isupper() else str(family)
