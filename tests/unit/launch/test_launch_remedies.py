"""Options and keys recommended by messages exist on the command line and in the config."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from allometry.configs.ladder import LadderConfig
from allometry.configs.loader import _all_keys
from allometry.configs.run import RunConfig
from allometry.data.prepare import PrepareRequest
from allometry.launch.cli import COMMANDS, LADDER, MIX, SELECT, app
from allometry.launch.runs.commands import Prepare

ROOT = Path(__file__).parents[3]
ROOMS = [link.name for link in sorted((ROOT / ".typing" / "allometry").iterdir())]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
SECTIONS = "|".join(RunConfig.model_fields)
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})(?:\.[a-z_][a-z_0-9]*)+(?![\w/(])")
# Options of other programs: git, sbatch, torchrun, pip, docker.
OF_OTHERS = {
    "trainer/record/writer.py": "--abbrev --always --dirty --error-unmatch --exclude",
    "studies/ladder/sbatch.py": "--dependency --job-name --kill-on-invalid-dep --nnodes --nodes "
    "--max-restarts --ntasks-per-node --open-mode --output --parsable --requeue --signal "
    "--rdzv-backend --rdzv-endpoint --rdzv-id",
    "studies/ladder/run.py": "--local-addr --standalone",
    "configs/ladder.py": "--gres --key --partition --time",
    "scaling/attention.py": "--no-build-isolation",
    "launch/runs/doctor.py": "--shm-size",
    "launch/report/page.py": "--narrow --wide",
    "configs/loader.py": "--help",
    "interop/harness.py": "--tasks",  # of ``allometry evaluate`` and of the harness itself
    "trainer/synthetic.py": "--split-key --validation-fraction",  # of ``allometry prepare``
}
OF_ADOPT = ("data/adopt.py", "data/shard_inputs.py")
"""Files in data/ whose messages are those of ``allometry adopt`` and not of ``prepare``."""
ANYWHERE = {"--nproc-per-node", "--version"}  # torchrun's; of allometry without a command
COMMAND = re.compile(r"(?<![\w./-])allometry ([a-z]+(?: [a-z]+)?)([^\n]*)")
NO_COMMANDS = {"is"}  # "allometry is tested with ..."
NO_KEYS = {  # names of files, tensors and modules that look like keys
    "run.json",
    "run.lock",
    "schedule.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model.embed_tokens.weight",
    "model.layers",
    "model.norm.weight",
    *("parallel.expert", "parallel.hdp.ring", "parallel.reduce", "parallel.stage"),
    *("parallel.tensor", "parallel.tensor_chunks", "parallel.tied"),
    "kernels.quantise",  # the earlier name of a key
    "record.plans",
    "record.rows",
    "record.states",
}


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield string constants except docstrings, including parts of f-strings."""
    holders = ast.Module, ast.ClassDef, ast.FunctionDef
    docstrings = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, holders)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


def sources() -> Iterator[tuple[str, ast.AST]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def options(command: Any, name: str = "") -> Iterator[tuple[str, set[str]]]:
    for inner, one in getattr(command, "commands", {}).items():
        yield from options(one, f"{name} {inner}".strip())
    if not hasattr(command, "commands"):
        yield name, {option for parameter in command.params for option in parameter.opts}


COMMAND_OPTIONS: dict[str, set[str]] = dict(options(typer.main.get_command(app)))


def unknown_options(file: str, tree: ast.AST, known: set[str]) -> list[str]:
    allowed = known | ANYWHERE | set(OF_OTHERS.get(file, "").split())
    named = {option for text in texts(tree) for option in OPTION.findall(text)}
    return [f"{file}: {option}" for option in sorted(named - allowed)]


def unknown_keys(file: str, tree: ast.AST) -> list[str]:
    roots: tuple[Any, ...] = (RunConfig, LadderConfig)
    known = {".".join(key) for root in roots for key in _all_keys(root, ())}
    named = {key for text in texts(tree) for key in KEY.findall(text)}
    theirs = {key for key in named if key.startswith("parallel.zero.deepspeed_extra.")}
    return [f"{file}: {key}" for key in sorted(named - known - theirs - NO_KEYS)]


def test_every_option_that_is_named_exists() -> None:
    known = set().union(*COMMAND_OPTIONS.values())
    assert [one for file, tree in sources() for one in unknown_options(file, tree, known)] == []


def test_every_key_that_is_named_exists() -> None:
    assert [one for file, tree in sources() for one in unknown_keys(file, tree)] == []


@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("prepare", "data/*.py launch/runs/prepare.py"),
        ("adopt", f"{' '.join(OF_ADOPT)} data/examine.py launch/runs/adopt.py"),
        ("convert", "launch/runs/convert.py data/run_tokenizer.py interop/**/*.py"),
        ("train", "launch/runs/train.py launch/start.py trainer/*.py trainer/state/*.py"),
        ("plot", "launch/runs/plot.py launch/runs/gantt.py"),
        ("report", "launch/report/inputs.py launch/report/report.py"),
        ("forecast", "launch/runs/forecast.py"),
    ],
)
def test_a_command_has_the_options_that_its_own_messages_name(command: str, files: str) -> None:
    paths = [path for pattern in files.split() for path in sorted(ROOT.glob(pattern))]
    assert len(paths) >= len(files.split())
    unknown = []
    for path in paths:
        file = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if command == "adopt" or file not in OF_ADOPT:
            unknown += unknown_options(file, tree, COMMAND_OPTIONS[command])
    assert unknown == []


def named_commands(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield commands written as ``allometry NAME``, and the options that follow each."""
    for words, rest in COMMAND.findall(text.replace("\\\n", " ")):
        both = words.split()
        name = next((one for one in (" ".join(both[:2]), both[0]) if one in COMMAND_OPTIONS), None)
        if name is not None:
            yield name, set(OPTION.findall(re.split(r"\ballometry |[|`\n]", rest)[0]))
        elif both[0] not in {one.split()[0] for one in COMMAND_OPTIONS} | NO_COMMANDS:
            yield words, {"which is no command"}


def wrong_commands(place: str, text: str) -> list[str]:
    return [
        f"{place}: allometry {name} {option}"
        for name, found in named_commands(text)
        for option in sorted(found - COMMAND_OPTIONS.get(name, set()))
    ]


def test_options_that_are_named_with_a_command_are_its_own() -> None:
    """In messages, and in documents with shell commands."""
    places = [(file, text) for file, tree in sources() for text in texts(tree)]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    places += [(page.name, page.read_text(encoding="utf-8")) for page in pages]
    assert [one for place, text in places for one in wrong_commands(place, text)] == []
    assert wrong_commands("x", "run allometry plot --fit x") == ["x: allometry plot --fit"]
    assert wrong_commands("x", "allometry pepare a") == [
        "x: allometry pepare a which is no command"
    ]


def test_what_messages_of_prepare_call_by_its_field_is_an_option() -> None:
    without = {one.name for one in fields(PrepareRequest)} - {one.name for one in fields(Prepare)}
    assert without <= {"max_bytes"}, "which no message names unless code sets it"


def test_commands_and_options_are_found() -> None:
    assert COMMAND_OPTIONS.keys() == {
        *COMMANDS,
        *(f"ladder {name}" for name in LADDER),
        *(f"mix {name}" for name in MIX),
        *(f"select {name}" for name in SELECT),
    }
    assert {"--end-of-document", "--tokenizer", "--out", "-o"} <= COMMAND_OPTIONS["prepare"]
    wrong = ast.parse("raise UserError(f'{x}: give --no-such-thing or data.no_such=1')")
    assert unknown_options("x.py", wrong, COMMAND_OPTIONS["prepare"]) == ["x.py: --no-such-thing"]
    assert unknown_keys("x.py", wrong) == ["x.py: data.no_such"]
