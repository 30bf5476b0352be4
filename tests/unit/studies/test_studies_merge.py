"""Merged checkpoints: coefficients, every tensor against a reference, and loading of merges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.studies.merge import DECAYS, coefficients
from allometry.trainer.state.shards import ShardReader
from allometry.trainer.train import train
from run_folders import rows
from shell import Shell

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
CONSTANT = "schedule={kind: constant, warmup_steps: 2}"
SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "sqrt": lambda x: 1 - np.sqrt(x),
}
MIXTURE = (
    "{kind: moe, vocab_size: 64, width: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
    "first_dense_layers: 1, ffn_width: 64, experts: {kind: swiglu, num_experts: 4, "
    "experts_per_token: 2, width: 16}, router: {gate: sigmoid, normalize: true, "
    "balance: {kind: bias, rate: 0.01, centered: true}}}"
)
HYPERP = "{kind: hyperp, base_width: 32, base_layers: 2}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_coefficients_by_hand() -> None:
    assert coefficients([10, 20, 30, 40], "mean") == [0.25] * 4
    # The weights of the two updates are 3/4 and 1/4: means of a line over its two halves.
    assert coefficients([0, 5, 10], "linear") == pytest.approx([0.25, 0.5, 0.25])
    assert coefficients([0, 10], "linear") == pytest.approx([0.5, 0.5])
    # The means over the first fifth and the other four fifths are 0.9 and 0.4.
    assert coefficients([0, 2, 10], "linear") == pytest.approx([0.1, 0.5, 0.4])
    assert coefficients([0, 10], "sqrt") == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("decay", DECAYS)
def test_a_merge_weighs_updates_as_the_decay_does(decay: str) -> None:
    """The merge is theta_0 plus each interval's update times the decay's mean over the interval."""
    steps = [100, 130, 140, 180, 260]
    found = coefficients(steps, decay)
    assert sum(found) == pytest.approx(1.0, abs=1e-15)
    assert min(found) > 0
    theta = np.random.default_rng(0).standard_normal(5)
    if decay == "mean":
        assert found @ theta == pytest.approx(theta.mean())
        return
    wanted = theta[0]
    for i, update in enumerate(np.diff(theta), 1):
        x = (np.linspace(steps[i - 1], steps[i], 20_001) - steps[0]) / (steps[-1] - steps[0])
        middle = (x[1:] + x[:-1]) / 2
        wanted += SHAPES[decay](middle).mean() * update
    assert np.array(found) @ theta == pytest.approx(wanted, abs=1e-6)


def run(config: RunConfig) -> Path:
    train(config, device=CPU, callbacks=[])
    return Path(config.run.folder)


def at(folder: Path, step: int) -> CheckpointWeights:
    return CheckpointWeights(folder / "checkpoints" / f"step-{step}")


def norms(values: Tensor) -> Tensor:
    wide = values.double()
    return wide.flatten(-2).norm(dim=-1) if wide.dim() > 1 else wide.norm()


def test_every_tensor_of_a_mixture_on_spheres(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (
        *(f"model={MIXTURE}", f"parameterization={HYPERP}", CONSTANT, "training.total_steps=8"),
        "optimizer={kind: muonh, lr: 0.05, weight_decay: 0}",
        "checkpoint={every_steps: 2, keep_last: 4}",
    )
    config = tiny(*asked)
    folder, shell = run(config), Shell(capsys)
    out = tmp_path / "merged"
    report = shell.json("merge", folder, "--last", 4, "--decay", "cosine", "--out", out)
    assert report["steps"] == [2, 4, 6, 8]
    assert report["coefficients"] == coefficients([2, 4, 6, 8], "cosine")
    made, there = at(out, 0), [at(folder, step) for step in (2, 4, 6, 8)]
    assert made.shapes == there[-1].shapes
    assert made.types() == there[-1].types()
    rules = Parameterization.of_run(config)
    spheres = {spec.name for spec in inventory(config.model) if rules.resolve(spec).sphere}
    assert report["rescaled"] == len(spheres) > 5
    for name in made.shapes:
        values = [weights.read(name) for weights in there]
        wanted = sum(c * v.double() for c, v in zip(report["coefficients"], values, strict=True))
        if name.endswith(".load"):
            wanted = values[-1]
            assert not torch.equal(values[-1], values[-2]), "another step's is another load"
        if name in spheres:
            shrunk = norms(wanted)
            assert (shrunk < 0.999 * norms(values[-1])).all(), "a mean is off its sphere"
            wanted = wanted * (norms(values[-1]) / shrunk)[..., None, None]
            torch.testing.assert_close(norms(made.read(name)), norms(values[0]), rtol=1e-5, atol=0)
        assert torch.equal(made.read(name), wanted.to(values[-1].dtype)), name
    assert made.read("blocks.1.ffn.router.bias").any()
    # A run starts from the merge, buffers included.
    more = f"run.initial={{folder: {out}}}", "training.total_steps=2", "optimizer.lr=1e-9"
    anew = run(tiny(*asked, *more, folder=tmp_path / "anew"))
    name = "blocks.1.ffn.router.bias"
    bias = at(anew, 2).read(name) - made.read(name)
    assert (bias.abs() <= 0.0301).all(), "two steps from the merged biases"


LENGTH = ("optimizer.lr=3e-2", "data.sources.1.weight=0")


def dense(tiny: Make, folder: Path, steps: int, every: int) -> Path:
    """Train a run at a constant rate that keeps six checkpoints; return its folder."""
    kept = f"checkpoint={{every_steps: {every}, keep_last: 6}}"
    length = f"training.total_steps={steps}", f"evaluation.every_steps={every}"
    return run(tiny(CONSTANT, kept, *LENGTH, *length, folder=folder))


@pytest.mark.slow
def test_what_loads_a_merged_checkpoint(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, out = Shell(capsys), tmp_path / "merged"
    trunk, branch = dense(tiny, tmp_path / "dense", 28, 4), tmp_path / "branch"
    decayed = "schedule={kind: wsd, decay_fraction: 0.999, decay: linear}"
    parent = f"run.parent={{folder: {trunk}, step: 16, changes: [schedule]}}"
    length = (*LENGTH, "training.total_steps=28")
    run(tiny(decayed, parent, *length, "evaluation.every_steps=4", folder=branch))
    asked = ("merge", trunk, "--last", 4)
    forecast = shell.json(*asked, "--forecast", "--against", branch)
    assert [one["number"] for one in forecast["merges"]] == [1, 2, 4]
    last, _, four = forecast["merges"]
    assert last["mixture"] == pytest.approx(rows(trunk)[-1]["validation/up"], rel=1e-6)
    (other,) = forecast["branches"]
    assert (other["first"], other["last"]) == (16, 28)
    assert other["sources"]["up"] == pytest.approx(rows(branch)[-1]["validation/up"], rel=1e-6)
    assert four["mixture"] < last["mixture"], "what a decay is for"
    assert [one["sd"] > 0 for one in forecast["decays"]] == [True, True]
    assert "no decay was recorded" in forecast["notes"][0]
    assert not out.exists()
    assert "decay linear: coefficients 0.1667 0.3333 0.3333 0.1667" in shell(*asked, "--out", out)
    # The written weights are the measured weights.
    exported = shell.json("convert", out, "--out", tmp_path / "hf")
    assert exported["step"] == 0
    still = ("optimizer.lr=1e-12", length[1], "training.total_steps=2", "evaluation.every_steps=1")
    begun = tiny(CONSTANT, *still, f"run.initial={{folder: {out}}}", folder=tmp_path / "begun")
    row = rows(run(begun))[0]
    assert row["validation/up"] == pytest.approx(four["mixture"], rel=1e-5)
    origin = json.loads((tmp_path / "begun" / "run.json").read_text())["origin"]["origin"]
    assert origin["merged"]["steps"] == [16, 20, 24, 28]
    train(load(out / "config.yaml"), device=CPU, callbacks=[], stop_at_step=2)
    assert rows(out)[0]["step"] == 1


def place_of_tensor(checkpoint: Path, name: str) -> tuple[Path, int]:
    """Return a file of a checkpoint and the offset of the middle of a tensor in the file."""
    places = ShardReader(checkpoint).read_metadata().storage_data
    (place,) = [place for index, place in places.items() if index.fqn == name]
    return checkpoint / place.relative_path, place.offset + place.length // 2


def test_what_cannot_be_merged_is_said(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refusals, on a run with six checkpoints, of steps 2 to 7."""
    shell, out = Shell(capsys), tmp_path / "merged"
    trunk = dense(tiny, tmp_path / "dense", 7, 1)

    def said(*more: object, run: Path = trunk) -> str:
        sentence = shell.refusal("merge", run, *more)
        assert not any(tmp_path.glob("merged*")), "nothing is left"
        return sentence

    assert "--out is missing" in said("--last", 2)
    for number in (0, 1):
        assert f"--last={number} merges nothing" in said("--last", number, "--out", out)
    assert "has 6 checkpoints to merge (step-2, " in said("--last", 9, "--out", out)
    assert "has 2 checkpoints to merge" in said("--last", 3, "--step", 3, "--out", out)
    assert "has no such checkpoint; it has step-2" in said("--step", 13, "--out", out)
    assert "--decay=root is not known; use linear" in said(
        "--last", 2, "--decay", "root", "--out", out
    )
    assert "has no config.yaml" in said("--out", out, run=tmp_path)
    assert "goes with --forecast" in said("--against", trunk, "--out", out)
    assert "does not go with --forecast" in said("--forecast", "--out", out)
    assert "does not branch from" in said("--last", 2, "--forecast", "--against", trunk)
    assert "exists and is not empty" in shell.refusal("merge", trunk, "--last", 2, "--out", trunk)
    shard, middle = place_of_tensor(trunk / "checkpoints" / "step-6", "model.embedding.weight")
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    sentence = said("--last", 3, "--out", out)
    assert "step-6 is damaged" in sentence
    assert "has changed since it was written" in sentence
    shard.write_bytes(whole[:-1])
    assert "step-6 is damaged" in said("--last", 3, "--out", out)
    shutil.rmtree(shard.parent)
    report = shell.json("merge", trunk, "--last", 2, "--out", out)
    assert report["steps"] == [5, 7]
