"""One-line faults of arithmetic and reductions, found in the syntax tree of a source file.

``faults_of(text)`` enumerates all places where one of the operators below applies, in the order of
the file. A fault replaces a span of the source, so that only one line changes. Code that only
formats errors, logs or annotates is skipped, and so are assertions.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

SWAPPED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
}
COMPARED = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
RENAMED = {
    "sum": "mean",
    "mean": "sum",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "amin": "amax",
    "floor": "ceil",
    "ceil": "floor",
    "mul_": "div_",
    "div_": "mul_",
    "_foreach_mul_": "_foreach_div_",
    "float64": "float32",
    "float32": "bfloat16",
    "double": "bfloat16",
    "float": "bfloat16",
    "argmax": "argmin",
    "cumsum": "cumprod",
}
"""Methods, functions and types to exchange for similar ones; functions of modules as attributes."""
BUILTINS = {"max": "min", "min": "max"}
DROPPED = frozenset(("clamp", "detach", "abs", "sqrt", "square", "exp", "log", "neg", "roll"))
"""Methods to omit, so that the receiver itself is used."""
COLLECTIVES = frozenset(
    (
        *("all_reduce", "all_reduce_sum", "reduce_scatter_tensor", "all_gather_into_tensor"),
        *("all_to_all_single", "broadcast", "reduce_partial", "settle"),
    )
)
AXES = frozenset(
    (
        *("sum", "mean", "softmax", "log_softmax", "logsumexp", "cumsum", "flatten", "sort"),
        *("topk", "squeeze", "unsqueeze", "chunk", "split", "cat", "stack", "max", "amax"),
        *("gather", "scatter", "narrow", "index_select", "size"),
    )
)
"""Calls whose small integers are dimensions."""
SPEED = ("strict", "fused", "foreach", "non_blocking", "fullgraph", "maxsize", "slots", "frozen")
"""Arguments that affect speed or strictness, but not the result."""
QUIET = ("report", "warning", "info", "debug", "UserError", "ValueError", "RuntimeError", "event")


@dataclass(frozen=True)
class Fault:
    """Replacement of bytes ``start`` to ``stop`` by ``new``; ``place``: the enclosing function."""

    operator: str
    start: int
    stop: int
    new: str
    place: str


def faults_of(text: str) -> list[Fault]:
    """Return all faults of a file, in order, each with a different result."""
    finder = _Finder(text)
    finder.visit(ast.parse(text))
    made: dict[tuple[int, int, str], Fault] = {}
    for fault in finder.faults:
        if text.encode()[fault.start : fault.stop].decode() != fault.new:
            made.setdefault((fault.start, fault.stop, fault.new), fault)
    return sorted(made.values(), key=lambda f: (f.start, f.stop, f.operator, f.new))


class _Finder(ast.NodeVisitor):
    def __init__(self, text: str) -> None:
        self.faults: list[Fault] = []
        self._bytes = text.encode()
        self._lines = [0]
        for line in text.encode().splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._places: list[str] = []

    def _at(self, line: int, column: int) -> int:
        return self._lines[line - 1] + column

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._at(node.lineno, node.col_offset),
            self._at(node.end_lineno, node.end_col_offset),
        )

    def _text(self, node: ast.expr) -> str:
        start, stop = self._span(node)
        return self._bytes[start:stop].decode()

    def _add(self, operator: str, start: int, stop: int, new: str) -> None:
        if self._places:  # code outside functions consists of constants and tables
            self.faults.append(Fault(operator, start, stop, new, ".".join(self._places)))

    def _between(self, operator: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the operator sign between two operands."""
        start, stop = self._span(left)[1], self._span(right)[0]
        offset = self._bytes[start:stop].find(old.encode())
        if offset >= 0:
            self._add(operator, start + offset, start + offset + len(old.encode()), new)

    # Nodes to visit and to skip.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name.startswith("__") and node.name not in ("__init__", "__call__"):
            return
        if node.name in ("describe", "extra_repr"):
            return
        self._places.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._places.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self._places.append(node.name)
                self.visit(statement)
                self._places.pop()

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    # Operators.

    def visit_BinOp(self, node: ast.BinOp) -> None:
        kind = type(node.op)
        plain = not any(
            isinstance(side, ast.List | ast.Tuple | ast.JoinedStr | ast.ListComp)
            or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in (node.left, node.right)
        )
        if plain and kind in SWAPPED:
            old, new = SWAPPED[kind]
            self._between("arithmetic", node.left, node.right, old, new)
        if plain and kind in (ast.Mult, ast.Div) and "scale" in self._text(node.right):
            self._add("scale dropped", *self._span(node), self._text(node.left))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip(
            (node.left, *node.comparators), node.ops, node.comparators, strict=False
        ):
            if type(operator) in COMPARED:
                self._between("comparison", left, right, *COMPARED[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between("and or", left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self._add("sign dropped", *self._span(node), self._text(node.operand))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._negate(node.test)
        if not (len(node.body) == 1 and isinstance(node.body[0], ast.Raise)):
            self.generic_visit(node)
        else:
            for statement in node.orelse:
                self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare):  # comparisons have their own operators
            self._add("condition negated", *self._span(test), f"(not ({self._text(test)}))")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add("update dropped", *self._span(node), "pass")
        if type(node.op) in SWAPPED:
            old, new = SWAPPED[type(node.op)]
            self._between("arithmetic", node.target, node.value, old, new)
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            name = _name_of(node.value.func)
            if name in QUIET:
                return
            if name in COLLECTIVES or name.endswith("_"):
                self._add("update dropped", *self._span(node), "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name_of(node.func)
        if name in QUIET:
            return
        function = node.func
        if isinstance(function, ast.Attribute):
            if name in RENAMED:
                stop = self._span(function)[1]
                self._add("taken for another", stop - len(name), stop, RENAMED[name])
            if name in DROPPED and _is_value(function.value):
                self._add("call dropped", *self._span(node), f"({self._text(function.value)})")
            if name in COLLECTIVES and node.args:
                self._add("collective dropped", *self._span(node), self._text(node.args[0]))
        elif name in BUILTINS and isinstance(function, ast.Name):
            self._add("taken for another", *self._span(function), BUILTINS[name])
        for argument in (*node.args, *(k.value for k in node.keywords if k.arg == "dim")):
            method = isinstance(function, ast.Attribute) and name in AXES
            if method and _integer(argument) is not None:
                value = _integer(argument)
                other = 0 if value in (1, -1) else 1
                self._add("wrong axis", *self._span(argument), str(other))
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in SPEED:
            self.visit(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("float64", "float32"):
            stop = self._span(node)[1]
            self._add("narrow type", stop - len(node.attr), stop, RENAMED[node.attr])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if type(value) is int and abs(value) < 100:
            self._add("off by one", *self._span(node), str(value + 1))
        elif type(value) is float and value not in (0.0,):
            self._add("constant doubled", *self._span(node), repr(2 * value))
        elif type(value) is bool:
            self._add("constant negated", *self._span(node), str(not value))


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_value(node: ast.expr) -> bool:
    """Return whether a method is called on a value rather than on a module."""
    return not (isinstance(node, ast.Name) and node.id in ("torch", "np", "math", "F", "dist"))


def _integer(node: ast.expr) -> int | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _integer(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    return None


def apply(text: str, fault: Fault) -> str:
    """Return the file's text with the fault applied."""
    raw = text.encode()
    return (raw[: fault.start] + fault.new.encode() + raw[fault.stop :]).decode()


def changed_line(text: str, fault: Fault) -> tuple[int, str, str]:
    """Return the number of the first changed line, and the line before and after."""
    before, after = text.splitlines(), apply(text, fault).splitlines()
    number = text.encode()[: fault.start].count(b"\n")
    return number + 1, before[number].strip(), after[number].strip()
