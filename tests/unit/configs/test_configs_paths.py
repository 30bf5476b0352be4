"""``~`` and variables in paths are expanded as in a shell, or refused."""

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from allometry.configs.base import PathText
from allometry.configs.errors import ConfigError
from allometry.configs.ladder import LadderConfig, load_ladder
from allometry.configs.loader import _sections, load
from allometry.configs.paths import expanded
from allometry.configs.run import RunConfig
from allometry.configs.tree import TreeConfig, load_tree
from allometry.launch.cli import COMMANDS, LADDER, MIX, SELECT
from allometry.launch.command import _made, _parameters
from allometry.launch.report.commands import WriteReport
from allometry.launch.runs.commands import Prepare

# Text keys of a config that are not paths: names, patterns and lines of scripts.
NO_PATHS = {"name", "resume", "project", "entity", "law", "loss", "schedule", "sources"}
NO_PATHS |= {
    "data",
    "batch",
    "model",
    "optimizer",
    "training",
    "precision",
    "parallel",
}  # of stages
NO_PATHS |= {"set", "options", "setup", "fix", "parent", "changes", "deepspeed_extra"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/big/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


def test_paths_are_expanded(home: Path) -> None:
    said = {
        "~": str(home),
        "~/runs/a": f"{home}/runs/a",
        "$DATA/x.train": "/big/data/x.train",
        "${DATA}2/x": "/big/data2/x",
        "a/~/b": "a/~/b",
        "./~": "./~",
        "cost$": "cost$",
        "a$1": "a$1",
        "plain": "plain",
    }
    assert {path: expanded(path) for path in said} == said
    for path, why in (
        ("$NOWHERE/x", r"\$NOWHERE, which is not set"),
        ("${NOWHERE}/x", r"\$NOWHERE, which is not set"),
        ("~nobody-here/x", "home folder that is not known"),
    ):
        with pytest.raises(ConfigError, match=why):
            expanded(path)


def test_every_path_of_a_run_is(tiny: Callable[..., RunConfig], home: Path) -> None:
    config = tiny(
        "run.folder=~/runs/a",
        "run.parent={folder: $DATA/parent, step: 5}",
        "data.tokenizer=~/tokenizer.json",
        "data.sources.0.train=$DATA/x",
        "data.sources.0.validation=${DATA}/y",
        "data.sources.0.select={scores: ~/x.a.scores.npy, keep: 0.1, side: top}",
        "schedule={kind: refined, file: ~/schedule.json, warmup_steps: 1}",
    )
    dumped = config.model_dump_json()
    assert config.run.folder == f"{home}/runs/a"
    assert "~" not in dumped
    assert "$" not in dumped
    with pytest.raises(ConfigError, match=r"run\.folder: \$NOWHERE/x names the variable \$NOWH"):
        tiny("run.folder=$NOWHERE/x")


def test_a_folder_whose_name_holds_a_dollar_is_meant_as_it_is(
    home: Path, tiny: Callable[..., RunConfig]
) -> None:
    (home / "of $DATA").mkdir()
    (home / "$x$").mkdir()
    for name in ("~/of $DATA/a", f"{home}/$x$", "~/$x$/b"):
        assert tiny(f"run.folder={name}").run.folder == name.replace("~", str(home))
    assert tiny("run.folder=~/of ${DATA}").run.folder == f"{home}/of /big/data"


def _texts(model: type[BaseModel], seen: set[type[BaseModel]]) -> list[tuple[str, str, Any]]:
    """Return (section, key, type) of keys that accept arbitrary text."""
    if model in seen:
        return []
    seen.add(model)
    found = []
    for key, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        if str in kinds or get_origin(field.annotation) is Annotated or PathText in kinds:
            found.append((model.__name__, key, (field.annotation, field.metadata)))
        for section in _sections(field.annotation):
            found += _texts(section, seen)
    return found


PATHS: dict[type[BaseModel], set[str]] = {
    RunConfig: {
        *("folder", "train", "validation", "tokenizer", "file", "nvme", "hf", "cluster"),
        *("url", "scores"),
    },
    LadderConfig: {"folder", "file", "base"},
    TreeConfig: {"folder", "base", "run", "config"},
}


@pytest.mark.parametrize("root", PATHS)
def test_no_key_that_is_a_path_is_forgotten(root: type[BaseModel]) -> None:
    texts = _texts(root, set())
    keys = {key for _, key, kind in texts if "expanded" in str(kind)}
    assert keys == PATHS[root]
    others = {key for _, key, kind in texts if "expanded" not in str(kind)}
    assert others <= NO_PATHS, "a path is PathText; what is none belongs to NO_PATHS"


def test_files_that_name_files(home: Path, tiny: Callable[..., RunConfig]) -> None:
    (home / "base.yaml").write_text("base: preset:demo\nrun: {folder: ~/runs/x}\n")
    (home / "below").mkdir()
    (home / "below" / "top.yaml").write_text("base: ~/base.yaml\n")
    assert load("~/below/top.yaml").run.folder == f"{home}/runs/x"
    (home / "below" / "top.yaml").write_text("base: $NOWHERE/base.yaml\n")
    with pytest.raises(ConfigError, match=r"top.yaml:1: base: .*NOWHERE, which is not set"):
        load("$HOME/below/top.yaml")
    ladder = "kind: ladder\nbase: ~/base.yaml\nfolder: ~/ladder\nwidths: [64]\ntokens: [1000]\n"
    (home / "ladder.yaml").write_text(ladder)
    loaded, _ = load_ladder("~/ladder.yaml")
    assert loaded.folder == f"{home}/ladder"
    assert loaded.base == os.path.join(home, "base.yaml")
    branches = "branches: [{name: a, at: 1, config: b.yaml}]\n"
    tree = "kind: tree\nfolder: ~/t\ntrunk: {run: $DATA/old}\n"
    (home / "tree.yaml").write_text(tree + branches)
    read, _ = load_tree("~/tree.yaml")
    assert (read.folder, read.trunk.run) == (f"{home}/t", "/big/data/old")
    assert read.branches[0].config == f"{home}/b.yaml"


def test_paths_on_the_command_line(home: Path) -> None:
    prepare = _made(
        Prepare, {"inputs": ["a=~/web", "~/b", "builtin:python-code"], "out": Path("~")}
    )
    assert prepare.inputs == (f"a={home}/web", f"{home}/b", "builtin:python-code")
    assert prepare.out == home
    report = _made(WriteReport, {"runs": [Path("$DATA/run")], "title": "$5 ~"})
    assert (report.runs, report.title) == ((Path("/big/data/run"),), "$5 ~")
    with pytest.raises(ConfigError, match=r"\$NOWHERE, which is not set"):
        _made(Prepare, {"inputs": ["a=$NOWHERE/web"], "out": Path("out")})


def test_no_argument_that_is_a_path_is_forgotten() -> None:
    """Arguments that commands use as paths are marked; all others are words and numbers."""
    marked = {
        f"{command.__name__}.{name}"
        for command, _ in (
            *(*COMMANDS.values(), *LADDER.values(), *MIX.values(), *SELECT.values()),
        )
        for name in _parameters(command)
        if _paths(command, name)
    }
    assert marked == {
        *("Adopt.shards", "Adopt.validation", "Betr.targets"),
        *(
            "Prepare.inputs",
            "Prepare.decontaminate",
            "Fit.sources",
            "Compare.sources",
            "Predict.arguments",
        ),
        *("IsoFlop.sources", "Sweeps.sources", "MixBest.fits", "MixCritical.sources"),
        *("MixFilterRate.fits", "MixOt.target", "Ot.target"),
        *("MixReplay.sources", "Fetch.url"),
        *("Run.file", "Status.file", "Fit.file", "Predict.file"),
    }


def _paths(command: type[Any], name: str) -> bool:
    holders = [command, *(get_type_hints(command)[one.name] for one in fields(command))]
    return any(
        one.name == name and bool(one.metadata.get("paths"))
        for holder in holders
        if is_dataclass(holder)
        for one in fields(holder)
    )
