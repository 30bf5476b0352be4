"""Commands are dataclasses: their fields are the options, and one function prints reports."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.launch.cli import COMMANDS, LADDER, app
from allometry.launch.command import (
    REQUIRED,
    Command,
    ConfigCommand,
    Report,
    argument,
    option,
    register,
)
from allometry.launch.text import table

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
SUB_ROOMS = ("laws", "report", "runs", "studies")
ALL = [(name, *entry, ()) for name, entry in COMMANDS.items()]
ALL += [(name, *entry, ("ladder",)) for name, entry in LADDER.items()]


def own_fields(command: type[Any]) -> Iterator[Field[Any]]:
    """Yield the fields of a command, including those of groups of options."""
    hints = get_type_hints(command)
    for field in fields(command):
        if is_dataclass(hints[field.name]):
            yield from own_fields(hints[field.name])
        else:
            yield field


@pytest.mark.parametrize(("name", "command", "work", "group"), ALL)
def test_fields_are_options(
    name: str, command: type[Command], work: str, group: tuple[str, ...]
) -> None:
    module, function = work.split(":")
    source = LAUNCH.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    (defined,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    assert [one.arg for one in defined.args.args] == ["asked"]
    assert ast.unparse(defined.returns or ast.Constant(None)) == "Report"
    shown: Any = typer.main.get_group(app)
    for part in (*group, name):
        shown = shown.commands[part]
    parameters = {one.name: one for one in shown.params}
    expected = {field.name: field for field in own_fields(command) if field.name != "overrides"}
    assert parameters.keys() == expected.keys()
    for key, field in expected.items():
        assert parameters[key].help == field.metadata["typer"]["help"], key
        assert parameters[key].required == (field.default is REQUIRED), key
        default = None if field.default in (REQUIRED, ()) else field.default
        assert parameters[key].default == default, key
        assert (parameters[key].param_type_name == "option") == ("names" in field.metadata), key
    assert shown.context_settings.get("allow_extra_args", False) == issubclass(
        command, ConfigCommand
    )
    assert shown.params[-1].name == "json"
    assert command.__doc__
    assert shown.help.splitlines()[0] == command.__doc__.splitlines()[0]


def modules() -> list[Path]:
    return sorted(LAUNCH.rglob("*.py"))


def arguments_of(tree: ast.AST) -> set[str]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.arguments))
    names = set()
    for node in calls:
        if isinstance(node, ast.Call):
            names |= {one.arg for one in node.keywords if one.arg}
        else:
            names |= {one.arg for one in (*node.posonlyargs, *node.args, *node.kwonlyargs)}
    return names


def prints(node: ast.AST) -> bool:
    """Return whether a node prints a report to standard output."""
    if isinstance(node, ast.Attribute):
        return node.attr == "echo"
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return called and node.func.id == "print" and not node.keywords  # type: ignore[attr-defined]


def test_one_place_decides_about_json() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
    assert not [path for path, tree in trees.items() if "as_json" in arguments_of(tree)]
    assert "as_json" in arguments_of(ast.parse("def f(*, as_json): ...")), "the check finds it"
    printing = {
        path.relative_to(LAUNCH).as_posix()
        for path, tree in trees.items()
        if any(prints(node) for node in ast.walk(tree))
    }
    assert printing == {"command.py", "cli.py"}  # cli.py prints the version


def test_sub_rooms_do_not_import_each_other() -> None:
    for path in modules():
        room = path.relative_to(LAUNCH).parts[0]
        others = [other for other in SUB_ROOMS if other != room]
        if room == "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            wrong = [other for other in others if name.startswith(f"allometry.launch.{other}")]
            assert not wrong, f"{path} imports {name}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Options shared by several commands."""

    most: int = option("at most", 3, min=1)
    names: tuple[str, ...] = option("names", (), "--name")


@dataclass(frozen=True, kw_only=True)
class Count(ConfigCommand):
    """Count things."""

    thing: Path | None = argument("a thing", None)
    limits: Limits
    loud_voice: bool = option("shout", False)


def counted(asked: Count) -> Report:
    if asked.limits.most > 8:
        raise UserError("--most is above 8")
    facts = {"config": asked.config, "overrides": list(asked.overrides)}
    facts |= {"most": asked.limits.most, "names": list(asked.limits.names)}
    facts |= {"thing": str(asked.thing), "loud": asked.loud_voice}
    return Report(facts, f"{asked.limits.most} things", passed=asked.limits.most > 1)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setitem(sys.modules, "counting", SimpleNamespace(counted=counted))
    made = typer.Typer()
    for name in ("count", "other"):
        register(made, name, Count, "counting:counted")
    return made


def test_a_command_gets_what_was_given(count: typer.Typer) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(count, ["count", *arguments])

    plain = call("a.yaml")
    assert (plain.exit_code, plain.output) == (0, "3 things\n")
    done = call("a.yaml", "--json")
    assert json.loads(done.output) == {
        "config": "a.yaml", "overrides": [], "most": 3, "names": [], "thing": "None", "loud": False,
    }  # fmt: skip
    assert done.output.splitlines()[1] == '  "config": "a.yaml",'
    every = ("a.yaml", "--json", "--most", "1", "--name", "x", "--name", "y", "--loud-voice", "b")
    done = call(*every, "--unknown")
    assert json.loads(done.output) == {
        "config": "a.yaml", "overrides": ["--unknown"], "most": 1, "names": ["x", "y"],
        "thing": "b", "loud": True,
    }  # fmt: skip
    assert done.exit_code == 1, "what was checked does not hold"
    assert call("a.yaml", "--most", "0").exit_code == 2
    assert isinstance(call("a.yaml", "--most", "9").exception, UserError)


def test_one_folder_draws_and_one_module_makes_tables() -> None:
    drawing, tables = set(), set()
    for path in modules():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(LAUNCH).as_posix()
        drawing |= {name} if "import matplotlib" in text or "from matplotlib" in text else set()
        tables |= {name} if ".ljust(" in text or ".rjust(" in text else set()
    assert drawing == {"figures/drawing.py", "figures/picture.py"}  # picture.py: colours of SVG
    assert tables == {"text.py"}


def test_a_table() -> None:
    rows = [["name", "steps", ""], ["a", "12345678", "x "], ["longer", "no steps at all: none"]]
    assert table(rows, right=(1,)).splitlines() == [
        "name       steps",
        "a       12345678  x",
        "longer  no steps at all: none",
    ]
    assert (
        table([["n", "m"], ["10", "2"]], right=(0, 1), least=(4, 3), gap="") == "   n  m\n  10  2"
    )
