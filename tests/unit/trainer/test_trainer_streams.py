"""Runs with parallel streams: bit-exact resume, stage two as a branch, refusals, monitors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.convert import export_hf
from allometry.models.init import fill_random, local_box
from allometry.scaling.inventory import PREFIX_STD
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
STREAMS = "model.streams={count: 2, prefix_tokens: 3}"
TRUNK = ("schedule={kind: constant, warmup_steps: 3}", "checkpoint.keep_steps=[8]")
SHORT = "training.total_steps=12"


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=torch.device("cpu"), callbacks=[], **options)
    return Path(config.run.folder)


def tensors(folder: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step}", scratch)
    saved: dict[str, torch.Tensor] = torch.load(scratch)
    return saved


def assert_same_run(one: Path, other: Path, step: int, scratch: Path) -> None:
    losses = [[row["loss"] for row in rows(folder)] for folder in (one, other)]
    assert losses[0] == losses[1]
    first, second = (tensors(folder, step, scratch) for folder in (one, other))
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.slow
def test_a_resumed_run_with_streams_is_the_same_to_the_bit(tiny: Make, tmp_path: Path) -> None:
    straight = run(tiny(STREAMS, SHORT, folder=tmp_path / "straight"))
    resumed = tiny(STREAMS, SHORT, folder=tmp_path / "resumed")
    run(resumed, stop_at_step=7)
    assert_same_run(straight, run(resumed), 12, tmp_path / "tensors.pt")


def two_stages(tiny: Make, tmp_path: Path, name: str) -> RunConfig:
    """Return a branch with two streams of a trunk with one, which is trained if it is not there."""
    if not (tmp_path / "trunk").exists():
        run(tiny(*TRUNK, folder=tmp_path / "trunk"), stop_at_step=8)
    link = f"run.parent={{folder: {tmp_path / 'trunk'}, step: 8, changes: [model.streams]}}"
    return tiny(*TRUNK, STREAMS, SHORT, link, folder=tmp_path / name)


def test_a_branch_adds_streams_to_a_run_with_one(tiny: Make, tmp_path: Path) -> None:
    branch = two_stages(tiny, tmp_path, "branch")
    folder = run(branch, stop_at_step=9)
    told = {e["key"]: (e["before"], e["after"]) for e in events(folder) if "key" in e}
    assert told["model.streams.count"] == (None, 2)
    before, after = (
        tensors(place, step, tmp_path / "tensors.pt")
        for place, step in ((tmp_path / "trunk", 8), (folder, 9))
    )
    new = {name for name in after if name not in before and name.startswith("model.")}
    assert len(new) == 2 * 2 + 4
    for name in new:
        steps = after[f"optimizer.{name.removeprefix('model.')}.step"]
        assert float(steps) == 1.0, name
    assert float(after["optimizer.blocks.0.attention.wq.weight.step"]) == 9.0
    # The parameters start as in a new model: by seed and name, moved by one step at most.
    name = "blocks.0.attention.prefix.keys"
    fresh = torch.empty_like(after[f"model.{name}"])
    fill_random(local_box(fresh), "normal", PREFIX_STD, name, branch.run.seed)
    moved = (after[f"model.{name}"] - fresh).abs().max()
    assert 0.0 < float(moved) <= 1.1e-2
    straight = run(two_stages(tiny, tmp_path, "straight"))
    assert_same_run(straight, run(branch), 12, tmp_path / "tensors.pt")
    losses = [row["loss"] for row in rows(folder)]
    assert losses[:8] == [row["loss"] for row in rows(tmp_path / "trunk")]


@pytest.mark.slow
def test_other_changes_of_streams_are_refused(tiny: Make, tmp_path: Path) -> None:
    trunk = run(tiny(*TRUNK, STREAMS, folder=tmp_path / "trunk"), stop_at_step=8)
    changed = f"run.parent={{folder: {trunk}, step: 8, changes: [model.streams]}}"
    four = "model.streams={count: 4, prefix_tokens: 3}"
    with pytest.raises(UserError, match="has 2 streams: a branch can add streams to a run with"):
        run(tiny(*TRUNK, four, changed, folder=tmp_path / "four"))
    with pytest.raises(UserError, match="has 2 streams"):
        run(tiny(*TRUNK, "model.streams=null", changed, folder=tmp_path / "none"))
    plain = run(tiny(*TRUNK, folder=tmp_path / "plain"), stop_at_step=8)
    unnamed = f"run.parent={{folder: {plain}, step: 8}}"
    with pytest.raises(UserError, match=r"run\.parent\.changes does not name it"):
        run(tiny(*TRUNK, STREAMS, unnamed, folder=tmp_path / "unnamed"))
    with pytest.raises(UserError, match=r"model\.streams\.count=4 differs from 2"):
        run(tiny(*TRUNK, four, folder=trunk))


@pytest.mark.slow
def test_an_export_names_the_tensor_without_a_place(tiny: Make, tmp_path: Path) -> None:
    folder = run(tiny(STREAMS, folder=tmp_path / "run"), stop_at_step=5)
    with pytest.raises(UserError, match=r"no place for blocks\.0\.attention\.prefix\.keys"):
        export_hf(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenated", "per_document"])
def test_monitors_count_the_tokens_of_all_streams(tiny: Make, tmp_path: Path, packing: str) -> None:
    changes = (STREAMS, f"data.packing={packing}", "record.monitors={every_steps: 2}")
    folder = run(tiny(*changes, folder=tmp_path / "run"), stop_at_step=4)
    row = rows(folder)[-1]
    assert any(key.startswith("attention/") or "log_z" in key for key in row), sorted(row)
