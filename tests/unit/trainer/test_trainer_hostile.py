"""Hostile or damaged checkpoints are refused in one sentence, and none of their code runs."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.weights import CheckpointWeights, chosen_checkpoint
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.identity import stranger
from allometry.trainer.state.integrity import Checksum
from allometry.trainer.state.shards import ShardReader
from allometry.trainer.train import train
from thinned import thinned

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture
def run(tiny: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run stopped at step 4, trained once for all tests."""
    once = tmp_path_factory.getbasetemp() / "hostile"
    if not once.exists():
        train(tiny("checkpoint.every_steps=2", folder=once), device=CPU, stop_at_step=4)
    shutil.copytree(once, tmp_path / "run")
    return tmp_path / "run"


def go_on(tiny: Make) -> None:
    train(tiny("checkpoint.every_steps=2"), device=CPU, stop_at_step=6)


def seal_again(path: Path, **changes: Any) -> None:
    """Rebuild the list of files of a checkpoint, like an attacker."""
    content = json.loads((path / "complete.json").read_text())
    for name in content["files"]:
        if (path / name).is_file():
            checksum = Checksum()
            checksum.update((path / name).read_bytes())
            content["files"][name] = checksum.entry()
    (path / "complete.json").write_text(json.dumps(content | changes))


class Attack:
    """Object that runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def planted(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the metadata of a checkpoint and rebuild its list of files."""
    place = path / ".metadata"
    found = pickle.loads(place.read_bytes())
    found = change(found) or found
    place.write_bytes(pickle.dumps(found))
    seal_again(path)


def first(found: Any) -> tuple[Any, Any]:
    return next((i, place) for i, place in found.storage_data.items() if "embedding" in i.fqn)


def elsewhere(name: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        first(found)[1].relative_path = name

    return change


def beyond(found: Any) -> None:
    first(found)[1].length = 1 << 60


def before(found: Any) -> None:
    first(found)[1].offset = -5


def huge(found: Any) -> None:
    tensor = found.state_dict_metadata["model.embedding.weight"]
    tensor.size = torch.Size([1 << 40, 32])
    tensor.chunks[0].sizes = tensor.size


def larger(found: Any) -> None:
    found.state_dict_metadata["model.embedding.weight"].size = torch.Size([1 << 40, 32])


def bytes_instead(found: Any) -> None:
    found.state_dict_metadata["model.embedding.weight"] = BytesStorageMetadata()


def no_place(found: Any) -> None:
    del found.storage_data[first(found)[0]]


CHANGES = {
    "a list": lambda found: [1],
    "no tensors": lambda found: setattr(found, "state_dict_metadata", None),
    "no places": lambda found: setattr(found, "storage_data", {"x": 1}),
    "outside": elsewhere("../../../outside.distcp"),
    "absolute": elsewhere("/etc/passwd"),
    "another file": elsewhere("run.json"),
    "beyond": beyond,
    "before": before,
    "huge": huge,
    "larger": larger,
    "bytes": bytes_instead,
    "no place": no_place,
    "index": lambda found: found.storage_data.update({MetadataIndex("model.x"): 5}),
}


@pytest.mark.parametrize("how", CHANGES)
def test_metadata_that_were_changed(run: Path, tiny: Make, how: str) -> None:
    path = run / "checkpoints" / "step-4"
    planted(path, CHANGES[how])
    refused(tiny, path)


def test_nothing_that_metadata_name_is_run(run: Path, tiny: Make, tmp_path: Path) -> None:
    path, mark = run / "checkpoints" / "step-4", tmp_path / "mark"

    def attach(found: Any) -> None:
        found.planner_data = Attack(mark)

    planted(path, attach)
    pickle.loads((path / ".metadata").read_bytes())
    assert mark.exists()  # it would run
    mark.unlink()
    refused(tiny, path)
    assert not mark.exists()


def refused(tiny: Make, path: Path) -> None:
    """Refused by the reader, by a conversion and by a resuming run, which loses no file."""
    there = sorted(f for f in path.parent.parent.rglob("*") if f.suffix != ".yaml")
    with pytest.raises(UserError, match=r"checkpoint .*step-4 cannot be read \(\.metadata"):
        ShardReader(path).read_metadata()
    with pytest.raises(UserError):
        CheckpointWeights(path)
    with pytest.raises(UserError, match="step-4"):
        go_on(tiny)
    kept = set(path.parent.parent.rglob("*"))
    assert [f for f in there if f not in kept] == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".."])
def test_files_that_are_listed_outside(run: Path, tiny: Make, name: str) -> None:
    path = run / "checkpoints" / "step-4"
    content = json.loads((path / "complete.json").read_text())
    content["files"][name] = {"bytes": 5, "crc32": [1]}
    (path / "complete.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no name of a file"):
        go_on(tiny)


@pytest.mark.parametrize("name", ["__7_0.distcp", "more.pkl", "a folder"])
def test_files_that_nothing_lists(run: Path, tiny: Make, name: str) -> None:
    place = run / "checkpoints" / "step-4" / name
    place.write_bytes(b"x") if "." in name else place.mkdir()
    with pytest.raises(UserError, match=rf"does not list {name}"):
        go_on(tiny)


def test_a_link_in_the_place_of_a_file(run: Path, tiny: Make, tmp_path: Path) -> None:
    shard = run / "checkpoints" / "step-4" / "__0_0.distcp"
    shard.rename(tmp_path / "outside.distcp")
    shard.symlink_to(tmp_path / "outside.distcp")
    with pytest.raises(UserError, match="no file of this folder but a link"):
        go_on(tiny)


def test_a_checkpoint_under_another_name(run: Path, tiny: Make) -> None:
    there = run / "checkpoints"
    shutil.rmtree(there / "step-4")
    shutil.copytree(there / "step-2", there / "step-4")
    with pytest.raises(UserError, match="it is of step 2"):
        go_on(tiny)
    seal_again(there / "step-4", step=4)  # consistent with trainer.json
    with pytest.raises(UserError, match="it is of step 2"):
        go_on(tiny)


DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = {
    "empty": "",
    "torn": '{"step": ',
    "a list": "[1, 2]",
    "null": "null",
    "a number": "7",
    "deep": DEEP,
    "an empty object": "{}",
    "binary": b"\xff\xfe\x00\x9c" * 40,
    "not finite": '{"step": NaN, "files": Infinity}',
    "a huge number": '{"step": ' + "9" * 5000 + "}",
    "words": '{"step": "four", "files": "all", "plan": 5, "data": [], "reading": "x"}',
    "false kinds": '{"step": 4, "files": {"a": 5}, "reading": {"mixture": 3}, "launches": 7}',
}
FILES = (
    "checkpoints/step-4/complete.json",
    "checkpoints/step-4/trainer.json",
    "checkpoints/step-4/.metadata",
    "run.json",
    "latest",
    "metrics.jsonl",
    "events.jsonl",
    "config.yaml",
)


DAMAGE = [(file, how) for file in FILES for how in (*TEXTS, "missing", "a folder")]
QUICK = {(file, how) for file in FILES for how in ("deep", "false kinds", "missing")}


@pytest.mark.parametrize(("file", "how"), thinned(QUICK, DAMAGE))
def test_damage_is_a_sentence(run: Path, tiny: Make, file: str, how: str) -> None:
    """For any content of a file, the run continues or reports the error."""
    place = run / file
    place.unlink()
    if how == "a folder":
        place.mkdir()
    elif how != "missing":
        content = TEXTS[how]
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
        if place.name in ("trainer.json", ".metadata"):
            seal_again(place.parent)
    said = ""
    try:
        go_on(tiny)
    except UserError as error:
        said = str(error)
    assert len(said) < 600
    assert "\n" not in said
    if how == "missing":
        expected = {"metrics.jsonl": "metrics.jsonl is gone", "config.yaml": "config.yaml is gone"}
        assert expected.get(place.name, "") in said


def test_a_run_does_not_begin_again_in_silence(run: Path, tiny: Make) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="all of them are gone"):
        go_on(tiny)
    (run / "run.json").unlink()
    (run / "config.yaml").unlink()
    (run / "checkpoints" / "step-2").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml is gone"):
        go_on(tiny)


def other_run(tiny: Make, tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    train(tiny("checkpoint.every_steps=2", "run.seed=9", folder=folder), device=CPU, stop_at_step=4)
    return folder


def test_another_runs_checkpoint_is_refused(run: Path, tiny: Make, tmp_path: Path) -> None:
    other = other_run(tiny, tmp_path)
    theirs = json.loads((other / "run.json").read_text())["identity"]["run"]
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.copytree(other / "checkpoints" / "step-4", run / "checkpoints" / "step-4")
    with pytest.raises(UserError, match=rf"another run, {theirs}, and this one.*resume=step-2"):
        go_on(tiny)
    with pytest.raises(UserError, match="another run"):
        chosen_checkpoint(RunFolder(run), 4)
    branch = tmp_path / "branch"
    parent = f"run.parent={{folder: {run}, step: 4}}"
    with pytest.raises(UserError, match=r"cannot be branched from \(it was written by another run"):
        train(tiny("checkpoint.every_steps=2", parent, folder=branch), device=CPU, stop_at_step=6)
    initial = f"run.initial={{folder: {run}, step: 4}}"
    with pytest.raises(UserError, match=r"cannot be begun with \(it was written by another run"):
        train(tiny("checkpoint.every_steps=2", initial, folder=branch), device=CPU)


def test_what_a_run_may_begin_or_go_on_with(run: Path, tiny: Make, tmp_path: Path) -> None:
    """A copy, a run without run.json, one from before run identities, a branch."""
    every = "checkpoint.every_steps=2"
    copied, lost, old = (tmp_path / name for name in ("copied", "lost", "old"))
    for folder in (copied, lost, old):
        shutil.copytree(run, folder)
    (lost / "run.json").unlink()
    for path in (old / "run.json", *old.glob("checkpoints/*/complete.json")):
        content = json.loads(path.read_text())
        del content["run" if path.name == "complete.json" else "identity"]
        path.write_text(json.dumps(content))
    for folder in (copied, lost, old):
        train(tiny(every, folder=folder), device=CPU, stop_at_step=6)
        train(tiny(every, "run.resume=step-4", folder=folder), device=CPU, stop_at_step=5)
    branch = tmp_path / "branch"
    begun = tiny(
        every, "checkpoint.keep_last=5", f"run.parent={{folder: {run}, step: 2}}", folder=branch
    )
    train(begun, device=CPU, stop_at_step=3)
    for step in (3, 2):
        again = begun.run.model_copy(update={"resume": f"step-{step}"})
        train(begun.model_copy(update={"run": again}), device=CPU, stop_at_step=4)
    identity = json.loads((branch / "run.json").read_text())["identity"]
    own = json.loads((run / "run.json").read_text())["identity"]["run"]
    assert (identity["parent"], identity["step"]) == (own, 2)
    assert identity["run"] != own
    shutil.copytree(run / "checkpoints" / "step-4", branch / "checkpoints" / "step-9")
    seal_again(branch / "checkpoints" / "step-9")
    assert "another run" in str(stranger(RunFolder(branch), branch / "checkpoints/step-9", 9))


def test_going_back_changes_nothing_before_loading(run: Path, tiny: Make) -> None:
    path = run / "checkpoints" / "step-2"

    def nowhere(found: Any) -> None:
        name = "model.final_norm.weight"
        del found.state_dict_metadata[name]
        for index in [i for i in found.storage_data if i.fqn == name]:
            del found.storage_data[index]

    planted(path, nowhere)  # intact and well formed, but without some of the model's tensors

    def contents() -> dict[Path, bytes]:
        kept = (f for f in run.rglob("*") if f.is_file() and f.name != "run.lock")
        return {f: f.read_bytes() for f in kept}

    before = contents()
    with pytest.raises(UserError, match=r"cannot be loaded \(.*final_norm"):
        train(tiny("checkpoint.every_steps=2", "run.resume=step-2"), device=CPU, stop_at_step=6)
    assert contents() == before
    go_on(tiny)
