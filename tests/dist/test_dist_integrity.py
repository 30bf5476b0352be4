"""All ranks report damage of each file alike, and each rank reads only its share."""

import builtins
import errno
import json
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.checkpoints import CheckpointConfig
from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.configs.run import RunConfig
from allometry.parallel.agree import from_main_rank
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.trainer.state import checkpoint, integrity
from allometry.trainer.state.checkpoint import Checkpointer
from allometry.trainer.state.folder import RunFolder
from run_folders import rows
from test_dist_runs import failing_launch, launch, losses

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
BLOCK = 4096  # gives a small shard several blocks


class Reads:
    """Count the bytes that this process reads from each file of a checkpoint."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.bytes: Counter[str] = Counter()
        self.delay_s = delay_s

    @contextmanager
    def counted(self) -> Iterator["Reads"]:
        """Count files opened for reading through any of Python's functions."""
        real, io_real = builtins.open, Path.open
        builtins.open = self._opening(real)  # type: ignore[assignment]
        Path.open = self._opening(io_real)  # type: ignore[method-assign, assignment]
        try:
            yield self
        finally:
            builtins.open = real
            Path.open = io_real  # type: ignore[method-assign]

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = real(path, mode, *args, **options)
            if "r" in mode and "step-" in str(path):
                self.bytes[Path(path).name] += 0  # opened
                take = file.read

                def read(*size: int) -> Any:
                    time.sleep(self.delay_s)
                    data = take(*size)
                    self.bytes[Path(path).name] += len(data)
                    return data

                # Buffered files accept no new attributes: a proxy forwards everything else.
                return _Passing(file, read)
            return file

        return opened


class _Passing:
    def __init__(self, file: Any, read: Callable[..., Any]) -> None:
        self._file, self.read = file, read

    def __enter__(self) -> "_Passing":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def state_of(rank: int, fill: float) -> dict[str, torch.Tensor]:
    """Return a rank's tensors: 40 kB, each element with its own value."""
    return {f"rank{rank}.{n}": torch.arange(5000.0) * fill + n for n in range(2)}


def save(folder: RunFolder, mesh: Mesh, step: int) -> Counter[str]:
    """Save a checkpoint; return the bytes that this process read back."""
    said: list[str] = []

    def report(kind: str, **details: Any) -> None:
        said.append(f"{kind} {details}")

    saver = Checkpointer(folder, CheckpointConfig(keep_last=9), mesh, report, needed_bytes=80_000)
    with Reads().counted() as reads:
        saver.save(step, state_of(mesh.rank, 1.0), {"step": step})
        saver.wait()
    assert said == [f"checkpoint_saved {{'step': {step}}}"]
    mesh.barrier("what follows a save")
    return reads.bytes


def resume(folder: RunFolder, mesh: Mesh) -> str:
    """Resume like a launch: return ``loaded``, or the sentence of the refusal."""
    try:
        path = from_main_rank(mesh, lambda: checkpoint.choose(folder, "auto"), "choosing")
        problem = integrity.damage_of_contents(path, mesh)
        if problem is not None:
            raise UserError(problem)
    except UserError as error:
        return str(error)
    state = state_of(mesh.rank, 0.0)
    checkpoint.load(path, state, mesh)
    wanted = state_of(mesh.rank, 1.0)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    return "loaded"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": Path.unlink,
    "extra": lambda file: (file.parent / f"__9{file.name}").write_bytes(file.read_bytes()),
}


def with_every_fault(path: Path) -> dict[tuple[str, str], str]:
    """Return the outcome of each fault in each file except the list of files."""
    integrity.BLOCK_BYTES = BLOCK
    answers = {}
    with open_mesh(ParallelConfig(timeout_s=60), torch.device("cpu")) as mesh:
        folder = RunFolder(path)
        if mesh.is_main:
            folder.claim()
        mesh.barrier("saving")
        save(folder, mesh, 3)
        step = folder.checkpoints / "step-3"
        shards = [f"__{rank}_0.distcp" for rank in range(mesh.world_size)]
        for name in [*shards, ".metadata", "trainer.json"]:
            for fault, damaging in FAULTS.items():
                mesh.barrier("a fault")
                if mesh.is_main:
                    shutil.copytree(step, path / "kept")
                    damaging(step / name)
                mesh.barrier("resuming")
                answers[fault, name] = resume(folder, mesh)
                mesh.barrier("mending it")
                if mesh.is_main:
                    shutil.rmtree(step)
                    (path / "kept").rename(step)
        mesh.barrier("the last resume")
        answers["none", ""] = resume(folder, mesh)
        folder.release()
    integrity.BLOCK_BYTES = 64 << 20
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_fault_in_each_file_is_seen_alike_on_all_ranks(
    run_ranks: Ranks, tmp_path: Path, world_size: int
) -> None:
    answers = run_ranks(with_every_fault, world_size, tmp_path)
    assert all(answer == answers[0] for answer in answers)
    said = {"flipped": "{} has changed", "truncated": "{} has", "missing": "{} is missing"}
    assert len(answers[0]) == 4 * (world_size + 2) + 1
    for (fault, name), answer in answers[0].items():
        if fault in said:
            assert said[fault].format(name) in answer, (fault, name)
        elif fault == "extra":
            assert f"does not list __9{name}" in answer, (fault, name)
        else:
            assert answer == "loaded", (fault, name)


def reads_of_a_resume(path: Path) -> dict[str, Any]:
    """Return this rank's reads while a checkpoint is saved, chosen and checked."""
    integrity.BLOCK_BYTES = BLOCK
    with open_mesh(ParallelConfig(timeout_s=60), torch.device("cpu")) as mesh:
        folder = RunFolder(path)
        if mesh.is_main:
            folder.claim()
        mesh.barrier("saving")
        saving = save(folder, mesh, 3)
        with Reads().counted() as choosing:
            step = from_main_rank(mesh, lambda: checkpoint.choose(folder, "auto"), "choosing")
        with Reads().counted() as checking:
            assert integrity.damage_of_contents(step, mesh) is None
        del checking.bytes["complete.json"]
        folder.release()
    integrity.BLOCK_BYTES = 64 << 20
    sizes = {file.name: file.stat().st_size for file in step.iterdir()}
    del sizes["complete.json"]
    return {"saving": saving, "choosing": choosing.bytes, "checking": checking.bytes} | {
        "sizes": sizes
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_saving_reads_nothing_choosing_no_shard_and_each_rank_its_share(
    run_ranks: Ranks, tmp_path: Path, world_size: int
) -> None:
    ranks = run_ranks(reads_of_a_resume, world_size, tmp_path)
    assert [rank["saving"] for rank in ranks] == [{}] * world_size
    assert set(ranks[0]["choosing"]) == {"complete.json", "trainer.json"}
    assert [rank["choosing"] for rank in ranks[1:]] == [{}] * (world_size - 1)
    read = sum((rank["checking"] for rank in ranks), Counter())
    assert dict(read) == ranks[0]["sizes"], "every byte once"
    even = sum(read.values()) / world_size
    for rank in ranks:
        assert abs(sum(rank["checking"].values()) - even) <= BLOCK


def slow(path: Path, delay_s: float) -> dict[str, str]:
    """Delay the disk of rank 1 (of the main rank for its own work) beyond the timeout."""
    real_write, real_read = integrity.ShardWriter.write_data, checkpoint.ShardReader.read_data
    real_seal = checkpoint.seal

    def delayed(real: Callable[..., Any], rank: int = 1) -> Callable[..., Any]:
        def work(*args: Any, **options: Any) -> Any:
            time.sleep(delay_s * (mesh.rank == rank))
            return real(*args, **options)

        return work

    said = {}
    with open_mesh(ParallelConfig(timeout_s=3), torch.device("cpu")) as mesh:
        folder = RunFolder(path)
        if mesh.is_main:
            folder.claim()
        mesh.barrier("saving")
        integrity.ShardWriter.write_data = delayed(real_write)  # type: ignore[method-assign]
        checkpoint.ShardReader.read_data = delayed(real_read)  # type: ignore[method-assign]
        checkpoint.seal = delayed(real_seal, rank=0)
        try:
            save(folder, mesh, 3)
            if mesh.rank == 1:
                integrity.READ_BYTES = 4096
            pieces = (folder.checkpoints / "step-3" / "__1_0.distcp").stat().st_size // 4096
            with Reads(delay_s * (mesh.rank == 1) / pieces).counted():
                said["checked"] = str(
                    integrity.damage_of_contents(folder.checkpoints / "step-3", mesh)
                )
            said["resumed"] = resume(folder, mesh)
        finally:
            integrity.ShardWriter.write_data = real_write  # type: ignore[method-assign]
            checkpoint.ShardReader.read_data = real_read  # type: ignore[method-assign]
            checkpoint.seal = real_seal
            integrity.READ_BYTES = 4 << 20
        said["from main"] = from_main_rank(
            mesh, lambda: str(time.sleep(delay_s) or "slow"), "working"
        )
        folder.release()
    return said


def test_a_slow_disk_is_not_a_dead_rank(run_ranks: Ranks, tmp_path: Path) -> None:
    assert (
        run_ranks(slow, 2, tmp_path, 4.2)
        == [{"checked": "None", "resumed": "loaded", "from main": "slow"}] * 2
    )


def launch_beside_another_disk(config: RunConfig) -> list[str]:
    """Return the shards that this rank copies if links are impossible."""
    copied: list[str] = []
    link, copy = os.link, shutil.copyfile

    def cross(file: Path, to: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def counted(file: Path, to: Path) -> Any:
        copied.extend([file.name] * (file.suffix == ".distcp"))
        return copy(file, to)

    os.link, shutil.copyfile = cross, counted  # type: ignore[assignment]
    try:
        launch(config)
    finally:
        os.link, shutil.copyfile = link, copy
    return copied


def test_a_parent_on_another_disk_is_copied_by_all_ranks(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    shared = ("parallel.zero.stage=3", "checkpoint.keep_steps=[14]")
    trunk = tiny(*shared, folder=tmp_path / "trunk")
    run_ranks(launch, 2, trunk, 16)
    parent = f"run.parent={{folder: {tmp_path / 'trunk'}, step: 14}}"
    branch = tiny(*shared, parent, folder=tmp_path / "branch")
    copied = run_ranks(launch_beside_another_disk, 2, branch)
    assert copied == [["__0_0.distcp"], ["__1_0.distcp"]]
    run_ranks(launch, 2, trunk)
    assert losses(branch) == losses(trunk)


def version_1(step: Path) -> None:
    """Write the list of files in the format of version 1: one checksum per file."""
    content = json.loads((step / "complete.json").read_text())
    del content["block_bytes"]
    for name, entry in content["files"].items():
        entry["crc32"] = zlib.crc32((step / name).read_bytes())
    (step / "complete.json").write_text(json.dumps(content))


def test_runs_resume_from_checkpoints_of_version_1_and_refuse_damaged_ones(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    config = tiny("parallel.zero.stage=3", folder=tmp_path / "run")
    straight = tiny("parallel.zero.stage=3", folder=tmp_path / "straight")
    run_ranks(launch, 2, straight, 14)
    run_ranks(launch, 2, config, 12)
    step = tmp_path / "run" / "checkpoints" / "step-12"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for change in (lambda step: None, version_1):
        change(step)
        for shard in ("__0_0.distcp", "__1_0.distcp"):
            flip(step / shard)
            before = rows(tmp_path / "run")
            said = run_ranks(failing_launch, 2, config)
            assert said[0] == said[1]
            assert f"step-12 is damaged ({shard} has changed" in said[0]
            assert "run.resume=step-10" in said[0]
            assert rows(tmp_path / "run") == before
            flip(step / shard)
    run_ranks(launch, 2, config, 14)
    assert losses(config) == losses(straight)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    run_ranks(launch, 2, config, 14)
    assert losses(config) == losses(straight)
