"""Conditions on what is known of documents: `near_duplicate == 0 and long_range > 0.02`.

A condition is read as a Python expression of names, numbers, words in quotes, comparisons, `and`, `or`, `not` and
`known(NAME)`; nothing else is in the language, and nothing of it is run as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.core.errors import ConfigError
from longspan.core.log import get_logger
from longspan.data.store.lengths import LengthTable
from longspan.data.store.measures import Measures

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALLOWED = "names, numbers, words in quotes, == != < <= > >=, and, or, not, known(NAME)"


class Chosen(NamedTuple):
    """Which documents fulfil a condition."""

    fulfils: NDArray[np.bool_]
    """[documents]."""
    unknown: dict[str, int]
    """Documents of which a measure that is compared is not known; a comparison with it does not hold."""


def parse_condition(text: str) -> ast.expr:
    """Return the condition, read but not worked out.

    Raises:
        ConfigError: it is no condition.
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _bad(text, str(getattr(error, "msg", error))) from None
    _check(expression, text)
    return expression


def names_in(text: str) -> set[str]:
    """Return what a condition asks about. Raises ConfigError: it is no condition."""
    found = ast.walk(parse_condition(text))
    return {node.id for node in found if isinstance(node, ast.Name) and node.id != "known"}


def documents_where(text: str, columns: Mapping[str, NDArray[Any]], documents: int) -> Chosen:
    """Return which documents fulfil a condition on columns [documents].

    Raises:
        ConfigError: it is no condition, names what is not known, or compares numbers with words.
    """
    expression = parse_condition(text)
    missing = sorted(names_in(text) - set(columns))
    if missing:
        raise ConfigError(
            f"the condition {text!r} asks for what is not known of the documents",
            found=", ".join(missing),
            allowed=", ".join(sorted(columns)),
            fix="an audit with --tokenizer or --model measures more",
        )
    unknown: dict[str, int] = {}
    fulfils = _work_out(expression, columns, documents, text, unknown)
    return Chosen(np.broadcast_to(fulfils, (documents,)).copy(), unknown)


def fulfilling(where: str, lengths: LengthTable, audit: Measures | None) -> NDArray[np.bool_]:
    """Return which documents of a length table fulfil a condition on what an audit measured, `tokens` and `source`.

    Says of how many documents something is not known.

    Raises:
        ConfigError: see `documents_where`.
        DataError: the audit is of other stores.
    """
    columns = {
        **({} if audit is None else audit.of(lengths)),
        "tokens": np.asarray(lengths.tokens),
        "source": np.array(lengths.source_names)[lengths.source],
    }
    chosen = documents_where(where, columns, len(lengths))
    for name, count in chosen.unknown.items():
        get_logger("data.mix").warning(
            "%s is not known of %d documents: comparisons with it do not hold of them; `not known(%s) or ...` "
            "keeps them",
            name, count, name,
        )  # fmt: skip
    return chosen.fulfils


def _check(node: ast.expr, text: str) -> None:
    match node:
        case ast.BoolOp():
            for value in node.values:
                _check(value, text)
        case ast.UnaryOp(op=ast.Not()):
            _check(node.operand, text)
        case ast.Compare():
            for part in (node.left, *node.comparators):
                if not (isinstance(part, ast.Name) or _is_value(part)):
                    raise _bad(text, ast.unparse(part))
            if any(type(kind) not in _COMPARISONS for kind in node.ops):
                raise _bad(text, ast.unparse(node))
        case ast.Call(func=ast.Name(id="known"), args=[ast.Name()], keywords=[]):
            pass
        case _:
            raise _bad(text, ast.unparse(node))


def _is_value(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float, str)


def _work_out(
    node: ast.expr, columns: Mapping[str, NDArray[Any]], documents: int, text: str, unknown: dict[str, int]
) -> NDArray[np.bool_]:
    match node:
        case ast.BoolOp():
            parts = [_work_out(value, columns, documents, text, unknown) for value in node.values]
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(join.reduce(parts))
        case ast.UnaryOp():
            return ~_work_out(node.operand, columns, documents, text, unknown)
        case ast.Call(args=[ast.Name(id=name)]):
            return ~_unknown(columns[name])
        case ast.Compare():
            return _compared(node, columns, documents, text, unknown)
    raise AssertionError(node)


def _compared(
    node: ast.Compare, columns: Mapping[str, NDArray[Any]], documents: int, text: str, unknown: dict[str, int]
) -> NDArray[np.bool_]:
    sides = [node.left, *node.comparators]
    values = [
        columns[side.id] if isinstance(side, ast.Name) else np.asarray(ast.literal_eval(side))
        for side in sides
    ]
    if len({value.dtype.kind == "U" for value in values}) > 1:
        raise ConfigError(f"the condition {text!r} compares a number with a word", found=ast.unparse(node))
    holds = np.ones(documents, bool)
    for side, value in zip(sides, values):
        if isinstance(side, ast.Name):
            lost = _unknown(value)
            if lost.any():
                unknown[side.id] = int(lost.sum())
            holds &= ~lost
    for kind, left, right in zip(node.ops, values, values[1:]):
        holds &= _COMPARISONS[type(kind)](left, right)
    return holds


def _unknown(column: NDArray[Any]) -> NDArray[np.bool_]:
    return column == "" if column.dtype.kind == "U" else np.isnan(column)


def _bad(text: str, found: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is not a condition on documents",
        found=found,
        allowed=_ALLOWED,
        fix="write for example: near_duplicate == 0 and tokens >= 4096",
    )
