"""Loaded values equal the written ones, even if the disk or a cache reads them wrongly."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.weights import CheckpointWeights, chosen_checkpoint
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state import checkpoint, integrity, verified
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.integrity import ShardWriter, damage, listing, seal
from allometry.trainer.state.local import load_copy
from allometry.trainer.state.planners import State
from allometry.trainer.state.shards import ShardReader
from allometry.trainer.train import train
from run_folders import events, rows
from wrong_reads import wrong_reads

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
VALUES: State = {f"t{n}": torch.randn(n, 50, generator=torch.manual_seed(n)) for n in range(1, 6)}


def written(path: Path, state: State = VALUES) -> Path:
    """Write a checkpoint of ``state`` in the format of runs."""
    path.mkdir()
    writer = ShardWriter(path)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    seal(path, 5, writer.files, {"step": 5, "weights_only": True})
    return path


def empty() -> State:
    return {name: torch.zeros_like(value) for name, value in VALUES.items()}


def equal(one: State, other: State) -> bool:
    return all(torch.equal(one[name], value) for name, value in other.items())


def without_pieces(path: Path) -> None:
    """Write the list of files of earlier versions, without checksums of tensors."""
    content = json.loads((path / "complete.json").read_text())
    for entry in content["files"].values():
        entry.pop("pieces", None)
    (path / "complete.json").write_text(json.dumps(content))


def version_1(path: Path) -> None:
    content = json.loads((path / "complete.json").read_text())
    del content["block_bytes"]
    for name, entry in content["files"].items():
        del entry["crc32"]
        entry.pop("pieces", None)
        entry["crc32"] = zlib.crc32((path / name).read_bytes())
    (path / "complete.json").write_text(json.dumps(content))


def nothing(path: Path) -> None:
    """Keep the list of files."""


FORMATS = {"pieces": nothing, "blocks": without_pieces, "version 1": version_1}


def place_of(path: Path, value: Tensor) -> tuple[Path, int]:
    """Return the location of a tensor's values on disk: the file, and a byte in their middle."""
    wanted = value.numpy().tobytes()
    for file in sorted(path.glob("*.distcp")):
        at = file.read_bytes().find(wanted)
        if at >= 0:
            return file, at + len(wanted) // 2
    raise AssertionError("it is in no file")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks and parts that end within tensors."""
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(verified, "READ_BYTES", 300)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", VALUES)
def test_a_tensor_read_wrongly_is_refused(tmp_path: Path, how: str, name: str) -> None:
    path = written(tmp_path / "step-5")
    FORMATS[how](path)
    state = empty()
    load_copy(path, state)
    assert equal(state, VALUES)
    file, at = place_of(path, VALUES[name])
    with wrong_reads(file, at) as seen:
        with pytest.raises(UserError, match=rf"{file.name} has changed .*or is read wrongly"):
            load_copy(path, empty())
        assert seen, "it was read"
    assert damage(path, contents=True) is None, "the file is whole all the while"


def test_without_the_comparison_other_values_are_loaded(tmp_path: Path) -> None:
    path = written(tmp_path / "step-5")
    with wrong_reads(*place_of(path, VALUES["t3"])):
        state = empty()
        dcp.load(dict(state), storage_reader=FileSystemReader(path), no_dist=True)
    assert [n for n in VALUES if not torch.equal(state[n], VALUES[n])] == ["t3"]
    assert int((state["t3"] != VALUES["t3"]).sum()) == 1


@pytest.mark.parametrize("how", FORMATS)
def test_what_is_read_wrongly_once_is_read_again(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "step-5")
    FORMATS[how](path)
    state = empty()
    with wrong_reads(*place_of(path, VALUES["t4"]), times=1) as seen:
        load_copy(path, state)
    assert len(seen) >= 2
    assert equal(state, VALUES)
    assert "was read wrongly at first" in caplog.text


def test_so_is_a_block_when_contents_are_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "step-5")
    file, at = place_of(path, VALUES["t4"])
    found = set()
    for times in range(1, 9):  # buffers also read the byte for the blocks before its own
        caplog.clear()
        with wrong_reads(file, at, times=times):
            said = damage(path, contents=True)
        found.add((said is None, f"{file.name} was read wrongly at first" in caplog.text))
    assert (True, True) in found
    assert (False, False) in found
    with wrong_reads(file, at):
        assert damage(path, contents=True) == f"{file.name} has changed since it was written"


@pytest.mark.parametrize("name", [".metadata", "trainer.json"])
def test_other_files_read_wrongly_are_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "step-5")
    read: dict[str, Callable[[Path], Any]] = {
        ".metadata": lambda path: ShardReader(path).read_metadata(),
        "trainer.json": checkpoint.read_facts,
    }
    read[name](path)
    for at in range(0, (path / name).stat().st_size, 37):
        with wrong_reads(path / name, at), pytest.raises(UserError, match=rf"{name} has changed"):
            read[name](path)


def test_a_list_of_files_read_wrongly_loads_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "step-5")
    file = path / "complete.json"
    loaded = 0
    for at in range(0, file.stat().st_size, 7):
        state = empty()
        with wrong_reads(file, at):
            try:
                load_copy(path, state)
            except UserError:
                continue
        loaded += 1
        assert equal(state, VALUES)
    assert loaded, "what is no checksum may differ: spaces, the step"


def test_each_stored_tensor_has_a_checksum(tmp_path: Path) -> None:
    path = written(tmp_path / "step-5")
    places = ShardReader(path).read_metadata().storage_data.values()
    pieces = listing(path).pieces
    assert {place.relative_path for place in places} == set(pieces)
    for name, crcs in pieces.items():
        spans = sorted((p.offset, p.length) for p in places if p.relative_path == name)
        content = (path / name).read_bytes()
        assert crcs == [zlib.crc32(content[start : start + size]) for start, size in spans]


def test_a_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "step-5")
    read: list[tuple[str, verified.Span]] = []
    inner = verified.VerifiedFiles._read

    def counted(self: verified.VerifiedFiles, file: Any, name: str, span: verified.Span) -> bytes:
        read.append((name, span))
        return inner(self, file, name, span)

    monkeypatch.setattr(verified.VerifiedFiles, "_read", counted)
    load_copy(path, {"t2": torch.zeros(2, 50), "t5": torch.zeros(5, 50)})
    of_shards = [(name, span) for name, span in read if name.endswith(".distcp")]
    assert len(of_shards) == 2
    assert of_shards == sorted(of_shards)


@contextmanager
def wrong_while_loading(file: Path, at: int) -> Iterator[None]:
    """Make reads wrong after all checks have passed, while tensors are loaded."""
    inner = ShardReader.read_data

    def read(self: ShardReader, *args: Any) -> Any:
        with wrong_reads(file, at):
            return inner(self, *args)

    ShardReader.read_data = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardReader.read_data = inner  # type: ignore[method-assign]


class Crash(Callback):
    def before_step(self, step: int) -> None:
        if step == 4:
            raise ZeroDivisionError


@pytest.fixture
def run(tiny: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a run at a checkpoint of step 2, trained once for all tests."""
    once = tmp_path_factory.getbasetemp() / "verified"
    if not once.exists():
        train(tiny("checkpoint.every_steps=2", folder=once), device=CPU, stop_at_step=2)
    shutil.copytree(once, tmp_path / "run")
    return tiny("checkpoint.every_steps=2", folder=tmp_path / "run")


@pytest.fixture
def copied(tiny: Make, tmp_path: Path) -> RunConfig:
    """Return a run with a checkpoint of step 2 and local copies of step 3, crashed at step 4."""
    (tmp_path / "nodes").mkdir()
    local = f"checkpoint.local={{folder: {tmp_path / 'nodes'}, every_steps: 3}}"
    config = tiny("checkpoint.every_steps=2", "checkpoint.asynchronous=false", local)
    with pytest.raises(ZeroDivisionError):
        train(config, device=CPU, callbacks=[Crash()])
    return config


def where(shards: Path) -> tuple[Path, int]:
    """Return a byte in the model's largest tensor in a checkpoint's only shard."""
    (file,) = shards.glob("*.distcp")
    places = ShardReader(shards).read_metadata().storage_data
    of_model = [place for index, place in places.items() if index.fqn.startswith("model.")]
    largest = max(of_model, key=lambda place: place.length)
    return file, largest.offset + largest.length // 2


def refused_while_loading(config: RunConfig, shards: Path) -> None:
    """A resume with a wrong read changes no file; the next resume succeeds."""
    folder = Path(config.run.folder)

    def there() -> tuple[Any, ...]:
        return rows(folder), events(folder), (folder / "latest").read_text()

    before = there()
    with wrong_while_loading(*where(shards)), pytest.raises(UserError, match="read wrongly"):
        train(config, device=CPU)
    assert there() == before
    train(config, device=CPU, stop_at_step=4)
    (resumed,) = (each for each in events(folder) if each["event"] == "resumed")
    assert resumed["checkpoint"] == shards.name


def test_a_resume_that_reads_wrongly_is_refused(run: RunConfig) -> None:
    refused_while_loading(run, Path(run.run.folder) / "checkpoints" / "step-2")


def test_a_resume_from_local_copies_that_reads_them_wrongly_is_refused(
    copied: RunConfig, tmp_path: Path
) -> None:
    (copy,) = (tmp_path / "nodes").rglob("step-3")
    refused_while_loading(copied, copy)


def test_a_resume_without_the_comparison_goes_on_with_other_values(
    run: RunConfig, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without the comparison the loss silently differs."""
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(run, device=CPU, stop_at_step=3)
    monkeypatch.setattr(ShardReader, "read_data", FileSystemReader.read_data)
    file, at = where(tmp_path / "other" / "checkpoints" / "step-2")
    with wrong_while_loading(file, at // 4 * 4 + 3):  # of an exponent
        other = tiny("checkpoint.every_steps=2", folder=tmp_path / "other")
        train(other, device=CPU, stop_at_step=3)
    losses = [rows(tmp_path / name)[-1]["loss"] for name in ("run", "other")]
    assert losses[0] != losses[1]


def test_an_export_that_reads_wrongly_is_refused(run: RunConfig) -> None:
    path = chosen_checkpoint(RunFolder(run.run.folder), 2)
    weights, refused = CheckpointWeights(path), []
    with wrong_while_loading(*where(path)):
        for name in weights.shapes:
            try:
                weights.read(name)
            except UserError as error:
                refused.append(str(error))
    assert len(refused) == 1
    assert "read wrongly" in refused[0]


def test_a_local_copy_of_another_run_is_not_used(copied: RunConfig, tmp_path: Path) -> None:
    folder = Path(copied.run.folder)
    (copy,) = (tmp_path / "nodes").rglob("step-3")
    listed = json.loads((copy / "complete.json").read_text())
    assert listed["run"] == json.loads((folder / "run.json").read_text())["identity"]["run"]
    (copy / "complete.json").write_text(json.dumps(listed | {"run": "another"}))
    train(copied, device=CPU, stop_at_step=4)
    (unused,) = (each for each in events(folder) if each["event"] == "local_copies_unused")
    assert "written by another run, another" in unused["reasons"][0]


def test_a_step_0_of_another_run_is_refused(run: RunConfig, tiny: Make, tmp_path: Path) -> None:
    initial = f"run.initial={{folder: {run.run.folder}}}"
    for name in ("b", "c"):
        train(tiny(initial, folder=tmp_path / name), device=CPU, stop_at_step=1)
    steps = [tmp_path / name / "checkpoints" / "step-0" for name in ("b", "c")]
    shutil.rmtree(steps[1])
    shutil.copytree(*steps)
    going_back = tiny(initial, "run.resume=step-0", folder=tmp_path / "c")
    with pytest.raises(UserError, match=r"step-0 .*was written by another run"):
        train(going_back, device=CPU)
