"""Allowed imports between modules: the table of docs/architecture.md, enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "configs": set(),
    "scaling": {"configs"},
    "laws": {"configs", "scaling"},
    "data": {"configs"},
    "models": {"configs", "scaling"},
    "parallel": {"configs", "scaling", "models"},
    "optim": {
        *("configs", "scaling", "parallel.mesh", "parallel.buffers"),
        *("parallel.deepspeed", "parallel.folder"),
    },
    "trainer": {"configs", "scaling", "laws", "data", "models", "parallel", "optim"},
}
MAY_IMPORT["interop"] = {*MAY_IMPORT["trainer"], "trainer"}
MAY_IMPORT["studies"] = {*MAY_IMPORT["interop"], "interop"}
MAY_IMPORT["launch"] = {*MAY_IMPORT["studies"], "studies"}
# Sub-rooms and their allowed imports within their room. A room's own files use its sub-rooms and
# are above them, except for the files named here.
SUB_ROOM_MAY_IMPORT = {
    "scaling.parameterizations": {"scaling.roles", "scaling.update_rules"},
    "scaling.hdp": {"scaling.count", "scaling.memory", "scaling.saved", "scaling.offload"},
    "scaling.planner": set(),
    "scaling.search": {
        *("scaling.planner", "scaling.attention", "scaling.batch", "scaling.count"),
        *("scaling.degrees", "scaling.layout", "scaling.loads", "scaling.memory", "scaling.plan"),
        *("scaling.hdp", "scaling.context", "scaling.inventory", "scaling.offload"),
        *("scaling.stages", "scaling.update_rules"),
    },
    "data.select": {
        *("data.store", "data.manifest", "data.special_tokens", "data.tokenizer", "data.order"),
    },
    "data.tasks": {
        *("data.prepare", "data.corpora", "data.corpus", "data.encode", "data.hints"),
        *("data.joined", "data.kinds", "data.lock", "data.manifest", "data.output"),
        *("data.progress", "data.shards", "data.source_files", "data.store"),
        *("data.tokenizer", "data.writer"),
    },
    "laws.forms": {"laws.observations"},
    "laws.fit": {"laws.observations", "laws.registry", "laws.forms"},
    "parallel.hdp": set(),
    "parallel.deepspeed": {"parallel.folder", "parallel.mesh", "parallel.reduce"},
    "parallel.offload": {"parallel.buffers"},
    "optim.offload": {"optim.states"},
    "trainer.state": set(),
    "trainer.record": {
        *("trainer.state", "trainer.feed", "trainer.balance", "trainer.step", "trainer.evaluate"),
    },
    "trainer.watch": {"trainer.state", "trainer.record"},
    "interop.huggingface": set(),
    "studies.certificate": set(),
    "studies.selftest": {"studies.certificate", "studies.rehearse"},
    "studies.machine": {"studies.selftest"},
    "studies.memory": set(),
    "studies.sweeps": set(),
    "studies.ladder": set(),
    "launch.figures": {"launch.text"},
    "launch.runs": {
        "launch.command",
        "launch.text",
        "launch.start",
        "launch.fork_server",
        "launch.figures",
    },
    "launch.laws": {"launch.command", "launch.text", "launch.figures"},
    "launch.studies": {"launch.command", "launch.text", "launch.figures"},
    "launch.studies.ladder": {"launch.command", "launch.text"},
    "launch.select": {"launch.command", "launch.text"},
    "launch.report": {"launch.command", "launch.text", "launch.figures"},
}
WITHOUT_TORCH = ("configs", "scaling", "laws", "data")


def modules() -> dict[str, Path]:
    """Return every module by its name without ``allometry.``; a package is its ``__init__``."""
    found = {}
    for room in MAY_IMPORT:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> list[str]:
    """Return all imports of a file as written, including those inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def arrows() -> dict[str, set[str]]:
    """Return our modules imported by each of our modules."""
    ours = modules()
    graph = {}
    for module, path in ours.items():
        graph[module] = set()
        for name in imported(path):
            inner = name.removeprefix("allometry.")
            target = inner if inner in ours else inner.rpartition(".")[0]
            if name != inner and target in ours and target != module:
                graph[module].add(target)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules of an import cycle, an empty list if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(graph))), [])


def sub_room(module: str) -> str | None:
    """Return the innermost sub-room that contains a module."""
    inside = [r for r in SUB_ROOM_MAY_IMPORT if module == r or module.startswith(f"{r}.")]
    return max(inside, key=len, default=None)


def violations(room: str, path: Path, names: list[str]) -> list[str]:
    found = []
    for name in names:
        top, *rest = name.split(".")
        if top in MAY_IMPORT:
            found.append(f"{path}: bare import of {name} makes a second copy of its classes")
        if top != "allometry" or not rest or rest[0] == room:
            continue
        allowed = MAY_IMPORT[room]
        if rest[0] not in allowed and ".".join(rest[:2]) not in allowed:
            found.append(f"{path}: {room} may not import {name}")
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [line for path in files for line in violations(room, path, imported(path))]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_imported_by_what_it_imports() -> None:
    assert not circle(arrows())
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_sub_rooms_keep_to_their_floors() -> None:
    wrong = []
    for module, targets in arrows().items():
        room = sub_room(module)
        if room is None:
            continue
        allowed = {room, *SUB_ROOM_MAY_IMPORT[room]}
        for target in targets:
            same_room = target.split(".")[0] == module.split(".")[0]
            inside = any(target == name or target.startswith(f"{name}.") for name in allowed)
            if same_room and not (inside and sub_room(target) in {None, *allowed}):
                wrong.append(f"{module} may not import {target}")
    assert not wrong, "\n".join(wrong)
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in modules().values()}
    missing = {f for f in folders if "." in f} - set(SUB_ROOM_MAY_IMPORT)
    assert not missing, f"sub-rooms without a floor: {missing}"


def test_the_check_itself_finds_violations() -> None:
    path = Path("x.py")
    assert violations("models", path, ["allometry.parallel.mesh"])
    assert violations("optim", path, ["allometry.parallel.zero"])
    assert not violations("optim", path, ["allometry.parallel.mesh"])
    assert violations("trainer", path, ["data.stream"])


def test_every_room_is_packaged_and_linked() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for room in MAY_IMPORT:
        assert f'"{room}"' in setup
        assert (ROOT / ".typing" / "allometry" / room).resolve() == ROOT / room


def test_light_rooms_import_without_torch() -> None:
    modules = [
        f"allometry.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for room in WITHOUT_TORCH
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
