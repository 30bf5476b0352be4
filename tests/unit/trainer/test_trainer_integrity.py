"""Checksums computed while writing, and their division over ranks for verification."""

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state import integrity
from allometry.trainer.state.integrity import Checksum, ShardWriter, damage, seal, share
from allometry.trainer.train import train

Make = Callable[..., RunConfig]


def sealed(path: Path, sizes: dict[str, int]) -> Path:
    path.mkdir()
    files = {}
    for name, size in sizes.items():
        content = bytes(i * 7 % 251 for i in range(size))
        (path / name).write_bytes(content)
        checksum = Checksum()
        for start in range(0, size, 33):  # pieces that end within blocks and across them
            checksum.update(content[start : start + 33])
        files[name] = checksum.entry()
    seal(path, 5, files, {"step": 5})
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 100)


def test_checksums_are_of_blocks(tmp_path: Path) -> None:
    path = sealed(tmp_path / "step-5", {"a": 250, "b": 200, "empty": 0})
    listed = json.loads((path / "complete.json").read_text())["files"]
    content = (path / "a").read_bytes()
    assert listed["a"] == {
        "bytes": 250,
        "crc32": [zlib.crc32(content[start : start + 100]) for start in (0, 100, 200)],
    }
    assert len(listed["b"]["crc32"]) == 2
    assert damage(path, contents=True) is None
    (path / "empty").unlink()
    assert damage(path, contents=False) == "empty is missing"


def test_facts_are_checked_with_the_sizes(tmp_path: Path) -> None:
    path = sealed(tmp_path / "step-5", {"a": 250})
    facts = path / "trainer.json"
    facts.write_text(facts.read_text().replace("5", "6"))
    assert damage(path, contents=False) == "trainer.json has changed since it was written"


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_shares_are_even_and_complete(tmp_path: Path, world_size: int) -> None:
    sizes = {"a": 3000, "b": 1, "c": 0, "d": 555, "e": 100, "z": 0}
    blocks = integrity.listing(sealed(tmp_path / "step-5", sizes)).blocks
    shares = [share(blocks, rank, world_size) for rank in range(world_size)]
    assert [block for mine in shares for block in mine] == blocks
    total = sum(block.size for block in blocks)
    for mine in shares:
        assert abs(sum(block.size for block in mine) - total / world_size) <= 100


def test_a_rank_checks_the_file_that_it_wrote(tmp_path: Path) -> None:
    path = sealed(tmp_path / "step-5", {f"__{rank}_0.distcp": 2000 for rank in range(12)})
    blocks = integrity.listing(path).blocks
    for rank in range(12):
        mine = {block.name for block in share(blocks, rank, 12)}
        assert f"__{rank}_0.distcp" in mine
        assert len(mine - {".metadata", "trainer.json"}) <= 2


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    path = sealed(tmp_path / "step-5", {"a": 250})
    listed = json.loads((path / "complete.json").read_text())
    listed["files"]["a"]["crc32"].pop()
    for text in ("{", "[]", json.dumps(listed), '{"files": {"a": {}}}'):
        (path / "complete.json").write_text(text)
        assert damage(path, contents=False).startswith("complete.json cannot be read: ")
    (path / "complete.json").unlink()
    assert "never finished" in str(damage(path, contents=False))


def test_a_save_under_way_ends_though_the_run_fails(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write_data

    def slowly(self: ShardWriter, *args: Any) -> Any:
        time.sleep(1.0)
        return write(self, *args)

    class Failing(Callback):
        def on_row(self, row: dict[str, Any]) -> None:
            if row["step"] == 6:
                raise ZeroDivisionError

    monkeypatch.setattr(ShardWriter, "write_data", slowly)
    config = tiny("checkpoint.every_steps=5")
    with pytest.raises(ZeroDivisionError):
        train(config, device=torch.device("cpu"), callbacks=[Failing()])
    path = Path(config.run.folder) / "checkpoints" / "step-5"
    assert damage(path, contents=True) is None
