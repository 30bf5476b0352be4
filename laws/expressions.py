"""User expressions on columns: ``C/(6*N)``, ``loss < 3.44 or N in (1e7, 1e8)``.

Text is parsed by Python's grammar and evaluated from the syntax tree; no code is executed.
"""

# n: rows

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError

Column = NDArray[np.float64]

SYNTAX = (
    "use columns, numbers, + - * / **, log log2 log10 exp sqrt abs, parentheses, and backticks "
    "around a column's name that has other signs in it"
)
CONDITION = (
    "write as 'loss < 3.44', '1e7 <= N < 1e9', \"set in ('C4', 'Pile')\", joined by and, or, not"
)
_FUNCTIONS: dict[str, Callable[[Column], Column]] = {
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "abs": np.abs,
}
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
_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
Met = NDArray[np.bool_]
Texts = Callable[[str], NDArray[np.str_]]


@dataclass(frozen=True)
class _Parsed:
    text: str
    names: tuple[str, ...]
    _tree: ast.expr
    _quoted: tuple[str, ...]


class Expression(_Parsed):
    """Arithmetic on columns. ``names``: the columns in the expression, in order."""

    @classmethod
    def parse(cls, text: str, flag: str) -> Expression:
        """Parse arithmetic. Raises UserError, which names the option ``flag``, for other text.

        For example, ``Expression.parse("C/(6*N)", "--map")``.
        """
        tree, quoted = _parse(text, flag)
        _check(tree, text, flag)
        return cls(text, _names(tree, quoted), tree, quoted)

    def evaluate(self, column: Callable[[str], Column]) -> Column:
        """Return the value in each row; undefined values (0/0, an empty cell) are not finite."""
        with np.errstate(all="ignore"):
            return _evaluate(self._tree, self._quoted, column)


class Condition(_Parsed):
    """Comparisons joined by ``and``, ``or`` and ``not``: ``N > 1e8 and set in ('C4', 'Pile')``.

    A comparison is between arithmetic expressions, also chained, or between a column and a text by
    ``==`` and ``!=``; ``in`` compares with each item of a list.
    """

    @classmethod
    def parse(cls, text: str, flag: str = "--where") -> Condition:
        """Parse a condition. Raises UserError, which names ``flag``, for other text."""
        tree, quoted = _parse(text, flag)
        _check_condition(tree, text, flag)
        return cls(text, _names(tree, quoted), tree, quoted)

    def evaluate(self, column: Callable[[str], Column], texts: Texts) -> Met:
        """Return a mask of rows that satisfy the condition; missing numbers never do."""
        with np.errstate(all="ignore"):
            return self._met(self._tree, column, texts, opposite=False)

    def _met(
        self, node: ast.expr, column: Callable[[str], Column], texts: Texts, *, opposite: bool
    ) -> Met:
        """Return a mask of a node or its ``opposite``; missing numbers satisfy neither."""
        if isinstance(node, ast.UnaryOp):
            return self._met(node.operand, column, texts, opposite=not opposite)
        if isinstance(node, ast.BoolOp):
            parts = [self._met(part, column, texts, opposite=opposite) for part in node.values]
            every = isinstance(node.op, ast.And) is not opposite
            return reduce(np.logical_and if every else np.logical_or, parts)
        assert isinstance(node, ast.Compare), ast.dump(node)
        lefts = [node.left, *node.comparators[:-1]]
        pairs = list(zip(lefts, node.ops, node.comparators, strict=True))
        parts = []
        for left, operator, right in pairs:
            kind = _OPPOSITES[type(operator)] if opposite else type(operator)
            if kind in _COMPARISONS:
                parts.append(self._compared(left, kind, right, column, texts))
                continue
            one_by_one = ast.Eq if kind is ast.In else ast.NotEq
            some = [self._compared(left, one_by_one, x, column, texts) for x in _members(right)]
            parts.append(reduce(np.logical_or if kind is ast.In else np.logical_and, some))
        return reduce(np.logical_or if opposite else np.logical_and, parts)

    def _compared(
        self,
        left: ast.expr,
        kind: type[ast.cmpop],
        right: ast.expr,
        column: Callable[[str], Column],
        texts: Texts,
    ) -> Met:
        compare, sides = _COMPARISONS[kind], (left, right)
        if any(_is_text(side) for side in sides):
            cells = (
                texts(_name(side, self._quoted))
                if isinstance(side, ast.Name)
                else np.asarray(str(ast.literal_eval(side)))
                for side in sides
            )
            return np.asarray(compare(*cells))
        one, two = (_evaluate(side, self._quoted, column) for side in sides)
        return np.asarray(compare(one, two) & ~(np.isnan(one) | np.isnan(two)))


def is_condition(text: str) -> bool:
    """Return True if a text has a comparison or a logical operator, rather than a single word."""
    return any(sign in text for sign in "<>=") or bool(re.search(r"\b(in|and|or|not)\b", text))


def _check_condition(node: ast.expr, text: str, flag: str) -> None:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check_condition(part, text, flag)
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_condition(node.operand, text, flag)
        return
    if not isinstance(node, ast.Compare):
        raise UserError(f"{flag} {text!r} is not one comparison, or several; {CONDITION}")
    lefts = [node.left, *node.comparators[:-1]]
    for left, operator, right in zip(lefts, node.ops, node.comparators, strict=True):
        if type(operator) not in _OPPOSITES:
            raise UserError(
                f"{flag} {text!r} compares by something else than < <= > >= == != in; {CONDITION}"
            )
        listed = isinstance(operator, ast.In | ast.NotIn)
        if listed and not (isinstance(right, ast.Tuple | ast.List | ast.Set) and right.elts):
            raise UserError(f"{flag} {text!r}: after in stands a list in parentheses; {CONDITION}")
        equality = listed or isinstance(operator, ast.Eq | ast.NotEq)
        for side in _members(right) if listed else [right]:
            _check_pair(left, side, text, flag, equality=equality)


def _check_pair(left: ast.expr, right: ast.expr, text: str, flag: str, *, equality: bool) -> None:
    texts = [side for side in (left, right) if _is_text(side)]
    if texts:
        named = all(isinstance(side, ast.Name) for side in (left, right) if not _is_text(side))
        if len(texts) == 2 or not named or not equality:
            raise UserError(
                f"{flag} {text!r}: a text in quotes is compared with one column, by == or != or in "
                "(a column's name with other signs in it goes in backticks)"
            )
    for side in (left, right):
        if not _is_text(side):
            _check(side, text, flag)


def _members(node: ast.expr) -> list[ast.expr]:
    assert isinstance(node, ast.Tuple | ast.List | ast.Set), ast.dump(node)
    return node.elts


def _parse(text: str, flag: str) -> tuple[ast.expr, tuple[str, ...]]:
    """Return the syntax tree, in which names in backticks are replaced by their number."""
    quoted: list[str] = []

    def number(match: re.Match[str]) -> str:
        quoted.append(match[1])
        return f" __quoted_{len(quoted) - 1} "

    try:
        return ast.parse(re.sub("`([^`]+)`", number, text).strip(), mode="eval").body, tuple(quoted)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{flag} {text!r} cannot be read; {SYNTAX}") from None


def _check(tree: ast.expr, text: str, flag: str) -> None:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not (
            (isinstance(node, ast.Call) and _function(node) is not None)
            or id(node) in called
            or (isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC)
            or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd))
            or (isinstance(node, ast.Constant) and type(node.value) in (int, float))
            or isinstance(node, ast.Name | ast.Load | ast.operator | ast.unaryop)
        ):
            raise UserError(f"{flag} {text!r} is more than arithmetic on columns; {SYNTAX}")


def _function(node: ast.Call) -> Callable[[Column], Column] | None:
    """Return the called function of one argument, None if unknown."""
    plain = isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords
    return _FUNCTIONS.get(node.func.id) if plain and isinstance(node.func, ast.Name) else None


def _names(tree: ast.AST, quoted: tuple[str, ...]) -> tuple[str, ...]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called]
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
    if isinstance(node, ast.Call):
        function = _function(node)
        assert function is not None, ast.dump(node)
        return np.asarray(function(_evaluate(node.args[0], quoted, column)), np.float64)
    assert isinstance(node, ast.Constant), ast.dump(node)
    assert isinstance(node.value, int | float), ast.dump(node)
    try:
        return np.asarray(float(node.value), np.float64)
    except OverflowError:
        return np.asarray(np.inf)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
