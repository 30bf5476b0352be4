"""Runs that start from a Hugging Face model, by ``run.initial`` or ``allometry convert``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.convert import export_hf, import_hf
from allometry.interop.huggingface.model import import_model
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
LENGTH = ("training.total_steps=4", "schedule={kind: constant, warmup_steps: 0}")
MUP = "parameterization={kind: mup, base_width: 8, base_head_dim: 2}"


@pytest.fixture
def model(tiny: Make, tmp_path: Path) -> Path:
    """Return a run of three steps as a Hugging Face folder."""
    folder = run(tiny(*LENGTH, folder=tmp_path / "first"), stop_at_step=3)
    export_hf(folder, tmp_path / "hf", optimizer_state=True)
    return tmp_path / "hf"


def run(config: RunConfig, **options: Any) -> Path:
    options = {"device": torch.device("cpu"), "callbacks": [], "importer": import_model, **options}
    train(config, **options)
    return Path(config.run.folder)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


@pytest.mark.parametrize(
    "parameterization",
    [pytest.param((), id="sp"), pytest.param((MUP,), id="mup", marks=pytest.mark.slow)],
)
def test_it_is_what_a_conversion_gives(
    tiny: Make, model: Path, tmp_path: Path, parameterization: tuple[str, ...]
) -> None:
    section = f"run.initial={{hf: {model}}}"
    config = tiny(*LENGTH, *parameterization, section, folder=tmp_path / "new")
    run(config, stop_at_step=1)
    shutil.copytree(model, tmp_path / "kept")
    shutil.rmtree(model)  # no longer needed
    run(config, stop_at_step=2)
    new = run(config)
    (tmp_path / "kept").rename(model)
    plain = tiny(*LENGTH, *parameterization, folder=tmp_path / "converted")
    import_hf(model, plain, tmp_path / "converted")
    # The explicit key is accepted if it agrees.
    converted = run(tiny(*LENGTH, *parameterization, section, folder=tmp_path / "converted"))
    assert losses(new) == losses(converted)
    origins = [json.loads((f / "run.json").read_text())["origin"] for f in (new, converted)]
    assert origins[0] == origins[1]
    assert origins[0]["source"] == str(model)
    assert len(origins[0]["hash"]) == 16
    for folder, stated in ((new, True), (converted, True)):
        said = [event for event in events(folder) if event["event"] == "initial"]
        assert [(e["source"], e["stated"]) for e in said] == [(str(model), stated)]


def test_what_a_conversion_left_is_said_and_checked(
    tiny: Make, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "converted"
    import_hf(model, tiny(*LENGTH, folder=out), out, optimizer_state=True)
    for section, said in (
        ("{hf: elsewhere}", rf"run\.initial\.hf=elsewhere, but .*holds the model of {model}"),
        (f"{{folder: {tmp_path}/first}}", r"run\.initial\.folder=.*, but .*say run\.initial\.hf="),
        (f"{{hf: {model}}}", r"keep=\[weights\], but .* with the optimizer's states"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            run(tiny(*LENGTH, f"run.initial={section}", folder=out))
        assert "\n" not in str(refused.value)
    run(tiny(*LENGTH, folder=out), stop_at_step=1)
    (said,) = [event for event in events(out) if event["event"] == "initial"]
    assert said["keep"] == ["weights", "optimizer"]
    assert said["stated"] is False
    assert said["source"] == str(model)
    with pytest.raises(UserError, match=r"run\.initial.* may not change when a run continues"):
        run(tiny(*LENGTH, f"run.initial={{hf: {model}}}", folder=out))
    other = tiny(*LENGTH, "run.initial={hf: elsewhere}", folder=tmp_path / "other")
    with pytest.raises(UserError, match=r"run\.initial\.hf=elsewhere is what the run is to begin"):
        import_hf(model, other, tmp_path / "other")


def test_refused_and_nothing_is_left(tiny: Make, model: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"

    def refused(section: str, *more: str, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            run(tiny(*LENGTH, *more, f"run.initial={section}", folder=new), **options)
        assert not new.exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    named = f"{{hf: {model}}}"
    assert "give train() its importer" in refused(named, importer=None)
    assert "model.ffn_width=48 (there 64)" in refused(named, "model.ffn_width=48")
    assert "nowhere holds no Hugging Face model" in refused("{hf: nowhere}")
    first = tmp_path / "first"
    assert f"say run.initial.folder={first}" in refused(f"{{hf: {first}}}")
    assert f"say run.initial.hf={model}" in refused(f"{{folder: {model}}}")
    (file,) = model.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    assert "model.safetensors cannot be read" in refused(named)
