"""Branched runs equal bitwise a run without a branch, or are refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.studies.certificate import rank as verify_rank
from allometry.studies.certificate.rank import Job
from allometry.trainer.state import checkpoint
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
TRUNK = ("schedule={kind: constant, warmup_steps: 3}", "checkpoint.keep_steps=[8, 14]")
KEYS = ("step", "tokens", "flops", "loss", "grad_norm", "lr", "s1", "s2", "tokens/up", "loss/down")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=torch.device("cpu"), callbacks=[], **options)
    return Path(config.run.folder)


def parent(trunk: Path, step: int) -> str:
    return f"run.parent={{folder: {trunk}, step: {step}}}"


def comparable(folder: Path) -> list[list[Any]]:
    return [[row.get(key) for key in KEYS] for row in rows(folder)]


def tensors(folder: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step}", scratch)
    saved: dict[str, torch.Tensor] = torch.load(scratch)
    return saved


def assert_same_run(one: Path, other: Path, step: int, scratch: Path) -> None:
    assert comparable(one) == comparable(other)
    first, second = tensors(one, step, scratch), tensors(other, step, scratch)
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.") for name in first)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    facts = [checkpoint.read_facts(f / "checkpoints" / f"step-{step}") for f in (one, other)]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["model.dropout=0.2"],
        pytest.param(
            ["optimizer={kind: muon, lr: 1e-2}", "training.compute_dtype=bf16"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_branch_is_the_straight_run_to_the_bit(
    tiny: Make, tmp_path: Path, extra: list[str]
) -> None:
    trunk = run(tiny(*TRUNK, *extra, folder=tmp_path / "trunk"), stop_at_step=16)
    straight = run(tiny(*extra, folder=tmp_path / "straight"))
    branch = run(tiny(*extra, parent(trunk, 14), folder=tmp_path / "branch"))
    assert_same_run(straight, branch, 20, tmp_path / "tensors.pt")
    assert events(branch)[0] | {"time": 0} == {
        "event": "branched",
        "time": 0,
        "step": 14,
        "parent": str(trunk),
    }
    described = json.loads((branch / "run.json").read_text())
    assert described["parent"] == {
        "folder": str(trunk),
        "step": 14,
        "changes": [],
        "schedule_from": 0,
    }
    assert described["launches"][0]["first_step"] == 15
    # The parent continues as without a branch.
    alone = run(tiny(*TRUNK, *extra, folder=tmp_path / "alone"))
    assert comparable(run(tiny(*TRUNK, *extra, folder=trunk))) == comparable(alone)
    assert comparable(branch)[14:] != comparable(trunk)[14:], "the decay does something"


def test_branch_of_a_branch_resumed_twice(tiny: Make, tmp_path: Path) -> None:
    """WSD of 12 steps decays after 8, of 20 after 14: the shorter run is the longer one's trunk."""
    short = run(
        tiny("training.total_steps=12", "checkpoint.keep_steps=[8]", folder=tmp_path / "short")
    )
    assert (short / "checkpoints/step-8").exists()
    config = tiny(parent(short, 8), "checkpoint.every_steps=null", folder=tmp_path / "long")
    shutil.copytree(short, tmp_path / "kept")
    run(config, stop_at_step=11)
    shutil.rmtree(short)  # a branch no longer needs its parent
    run(config, stop_at_step=16)
    run(config)
    straight = run(tiny(folder=tmp_path / "straight"))
    assert_same_run(straight, tmp_path / "long", 20, tmp_path / "tensors.pt")
    kinds = [event["event"] for event in events(tmp_path / "long")]
    assert [kind for kind in kinds if kind in ("branched", "resumed")] == [
        "branched",
        "resumed",
        "resumed",
    ]


REFUSED = (
    ("schedule={kind: cosine, warmup_steps: 3}", "gave step 4 another learning rate"),
    ("schedule.warmup_steps=2", "gave step 1 another learning rate"),
    ("training.total_steps=14", r"run\.parent\.step=14 is the last of the branch's 14 steps"),
    ("training.total_steps=9", "asks for 9 steps in all"),
    ("optimizer.lr=0.5", r"optimizer\.lr=0\.5 differs from 0\.01 of run\.parent\.folder="),
    ("run.seed=4", r"run\.seed=4 differs"),
    ("run.parent.step=13", r"run\.parent\.step=13: .* no such checkpoint; it has step-8, st"),
    ("run.parent.folder=nowhere", r"run\.parent\.folder=nowhere holds no run"),
    ("data.sources.0.train=OTHER", "token files of data source 'up' are not the ones"),
)


def test_what_cannot_branch_is_one_sentence_and_leaves_no_run(
    tiny: Make, tmp_path: Path, tiny_store: Path
) -> None:
    trunk = run(tiny(*TRUNK, folder=tmp_path / "trunk"), stop_at_step=15)
    for change, said in REFUSED:
        change = change.replace("OTHER", str(tiny_store / "down.train"))
        with pytest.raises(UserError, match=said):
            run(tiny(parent(trunk, 14), change, folder=tmp_path / "branch"))
        assert not (tmp_path / "branch").exists()
    # Existing files stay; files created on the way are removed.
    (tmp_path / "mine").mkdir()
    for place in (tmp_path / "mine", tmp_path / "a/b"):
        with pytest.raises(UserError, match="no such checkpoint"):
            run(tiny(parent(trunk, 13), folder=place))
    assert not list((tmp_path / "mine").iterdir())
    assert not (tmp_path / "a").exists()


def test_a_run_cannot_branch_from_itself(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the run's own folder"):
        run(tiny(parent(tmp_path / "run", 3)))


def test_rates_that_follow_the_length_of_the_run_cannot_be_shared(
    tiny: Make, tmp_path: Path
) -> None:
    hyperp = (
        "optimizer={kind: muonh, lr: 1e-2}",
        "parameterization={kind: hyperp, base_width: 32, base_layers: 2, base_head_dim: 8, "
        "base_batch_tokens: 256, base_tokens: 5120}",
    )
    trunk = run(tiny(*TRUNK, *hyperp, folder=tmp_path / "trunk"), stop_at_step=14)
    longer = tiny(*hyperp, parent(trunk, 14), "training.total_steps=40", folder=tmp_path / "long")
    said = r"parameterization\.kind=hyperp scales learning rates with the length"
    with pytest.raises(UserError, match=said):
        run(longer)
    # Nor may a run that continues be lengthened.
    with pytest.raises(UserError, match=said):
        run(tiny(*TRUNK, *hyperp, "training.total_steps=40", folder=trunk))
    # With equal length they are shared.
    assert len(rows(run(tiny(*hyperp, parent(trunk, 14), folder=tmp_path / "equal")))) == 20


def test_damaged_checkpoint_is_refused(tiny: Make, tmp_path: Path) -> None:
    trunk = run(tiny(*TRUNK, folder=tmp_path / "trunk"), stop_at_step=14)
    shard = next((trunk / "checkpoints/step-14").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be branched from \(__0_0.distcp has changed"):
        run(tiny(parent(trunk, 14), folder=tmp_path / "branch"))


def test_checkpoint_that_the_parent_forgets_meanwhile(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = run(tiny(*TRUNK, folder=tmp_path / "trunk"), stop_at_step=14)
    shutil.copytree(trunk, tmp_path / "kept")
    link = os.link

    def forget(file: Path, to: Path) -> None:
        link(file, to)
        shutil.rmtree(trunk / "checkpoints/step-14", ignore_errors=True)

    monkeypatch.setattr(os, "link", forget)
    config = tiny(parent(trunk, 14), folder=tmp_path / "branch")
    with pytest.raises(UserError, match=r"removed meanwhile.*keep_steps=\[14\]"):
        run(config)
    monkeypatch.undo()
    shutil.rmtree(trunk)
    (tmp_path / "kept").rename(trunk)
    assert len(rows(run(config))) == 20  # the same command on an existing branch


def test_another_disk_takes_copies(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = run(tiny(*TRUNK, folder=tmp_path / "trunk"), stop_at_step=14)

    def cross(file: Path, to: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", cross)
    branch = run(tiny(parent(trunk, 14), folder=tmp_path / "branch"))
    assert comparable(branch) == comparable(run(tiny(folder=tmp_path / "straight")))


def test_verification_of_a_branch_trains_from_scratch(tiny: Make, tmp_path: Path) -> None:
    job = Job("alone", 1, tiny(parent(tmp_path / "trunk", 3)), tmp_path / "job")
    assert verify_rank._named(job, "straight").run.parent is None


def test_kept_steps_are_saved_and_stay(tiny: Make) -> None:
    folder = run(tiny("checkpoint.every_steps=null", "checkpoint.keep_steps=[4, 9]"))
    assert [p.name for p in checkpoint.saved(RunFolder(folder))] == ["step-4", "step-9", "step-20"]
