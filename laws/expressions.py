"""Small arithmetic on columns, as users write it: ``C/(6*N)``, ``loss < 3.44``."""

# n rows

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError

Column = NDArray[np.float64]

SYNTAX = (
    "use columns, numbers, + - * / **, parentheses, and backticks around a column's name that has "
    "other signs in it"
)
_ARITHMETIC: dict[type[ast.operator], Callable[[Column, Column], Column]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[..., NDArray[np.bool_]]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}


@dataclass(frozen=True)
class _Parsed:
    text: str
    names: tuple[str, ...]
    _tree: ast.expr
    _quoted: tuple[str, ...]


class Expression(_Parsed):
    """Arithmetic on columns. ``names``: the columns it reads, in order."""

    @classmethod
    def parse(cls, text: str, flag: str) -> Expression:
        """Read arithmetic; UserError if it is none, naming ``flag``, the option it came from."""
        tree, quoted = _parse(text, flag)
        _check(tree, text, flag)
        return cls(text, _names(tree, quoted), tree, quoted)

    def evaluate(self, column: Callable[[str], Column]) -> Column:
        """Return the value in each row; what has none (0/0, an empty cell) is not finite."""
        with np.errstate(all="ignore"):
            return _evaluate(self._tree, self._quoted, column)


class Condition(_Parsed):
    """A comparison of two expressions, or of a column with a text: ``set == 'C4'``."""

    _tree: ast.Compare

    @classmethod
    def parse(cls, text: str, flag: str = "--where") -> Condition:
        """Read a condition. Raises UserError if it is none; the sentence names ``flag``."""
        tree, quoted = _parse(text, flag)
        if not isinstance(tree, ast.Compare) or len(tree.ops) != 1:
            raise UserError(
                f"{flag} {text!r} is not one comparison; write as 'loss < 3.44' and repeat {flag} "
                "for more of them"
            )
        if type(tree.ops[0]) not in _COMPARISONS:
            raise UserError(
                f"{flag} {text!r} compares by something else than < <= > >= == !=; use one of these"
            )
        sides = (tree.left, tree.comparators[0])
        texts = [side for side in sides if _is_text(side)]
        if texts:
            named = all(isinstance(side, ast.Name) for side in sides if not _is_text(side))
            equality = isinstance(tree.ops[0], ast.Eq | ast.NotEq)
            if len(texts) == 2 or not named or not equality:
                raise UserError(
                    f"{flag} {text!r}: a text in quotes is compared with one column, by == or != "
                    "(a column's name with other signs in it goes in backticks)"
                )
        for side in sides:
            if not _is_text(side):
                _check(side, text, flag)
        return cls(text, _names(tree, quoted), tree, quoted)

    def evaluate(
        self, column: Callable[[str], Column], texts: Callable[[str], NDArray[np.str_]]
    ) -> NDArray[np.bool_]:
        """Return whether it holds in each row; a comparison with a missing number does not."""
        compare = _COMPARISONS[type(self._tree.ops[0])]
        sides = (self._tree.left, self._tree.comparators[0])
        if any(_is_text(side) for side in sides):
            cells = (
                texts(_name(side, self._quoted))
                if isinstance(side, ast.Name)
                else np.asarray(str(ast.literal_eval(side)))
                for side in sides
            )
            return np.asarray(compare(*cells))
        with np.errstate(all="ignore"):
            one, two = (_evaluate(side, self._quoted, column) for side in sides)
            return np.asarray(compare(one, two) & ~(np.isnan(one) | np.isnan(two)))


def _parse(text: str, flag: str) -> tuple[ast.expr, tuple[str, ...]]:
    """The syntax tree, in which names in backticks stand by their number."""
    quoted: list[str] = []

    def number(match: re.Match[str]) -> str:
        quoted.append(match[1])
        return f" __quoted_{len(quoted) - 1} "

    try:
        return ast.parse(re.sub("`([^`]+)`", number, text).strip(), mode="eval").body, tuple(quoted)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{flag} {text!r} cannot be read; {SYNTAX}") from None


def _check(tree: ast.expr, text: str, flag: str) -> None:
    for node in ast.walk(tree):
        if not (
            (isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC)
            or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd))
            or (isinstance(node, ast.Constant) and type(node.value) in (int, float))
            or isinstance(node, ast.Name | ast.Load | ast.operator | ast.unaryop)
        ):
            raise UserError(f"{flag} {text!r} is more than arithmetic on columns; {SYNTAX}")


def _names(tree: ast.AST, quoted: tuple[str, ...]) -> tuple[str, ...]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return tuple(dict.fromkeys(_name(node, quoted) for node in nodes))


def _name(node: ast.Name, quoted: tuple[str, ...]) -> str:
    number = node.id.removeprefix("__quoted_")
    return quoted[int(number)] if number != node.id else node.id


def _evaluate(node: ast.expr, quoted: tuple[str, ...], column: Callable[[str], Column]) -> Column:
    if isinstance(node, ast.Name):
        return column(_name(node, quoted))
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, quoted, column)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = (_evaluate(side, quoted, column) for side in (node.left, node.right))
        return np.asarray(_ARITHMETIC[type(node.op)](left, right), np.float64)
    assert isinstance(node, ast.Constant), ast.dump(node)
    assert isinstance(node.value, int | float), ast.dump(node)
    try:
        return np.asarray(float(node.value), np.float64)
    except OverflowError:
        return np.asarray(np.inf)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
