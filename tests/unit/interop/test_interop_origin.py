"""Re-imported runs of ours: muP stays muP, with optimizer states and the origin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.optimization import Fp8StatesConfig, Fp32States
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.convert import export_hf, import_hf
from allometry.interop.huggingface.weights import OPTIMIZER, CheckpointWeights
from allometry.launch.runs.commands import Convert
from allometry.launch.runs.convert import converted
from allometry.trainer.state.checkpoint import read_facts
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
MUP = "parameterization={kind: mup, base_width: 8, base_head_dim: 2}"
ODD = "parameterization={kind: mup, base_width: 24, base_head_dim: 4}"
DEEP = (
    "parameterization={kind: completep, base_width: 8, base_head_dim: 2, base_layers: 1, "
    "depth_alpha: 1.0}"
)
LENGTH = ("training.total_steps=4", "schedule={kind: constant, warmup_steps: 0}")


def run_of(tiny: Make, folder: Path, *overrides: str) -> RunConfig:
    return tiny(*LENGTH, f"run.folder={folder}", *overrides)


def trained(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=CPU, callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


def tensors(checkpoint: Path, prefix: str = "model.") -> dict[str, Tensor]:
    held = CheckpointWeights(checkpoint, prefix)
    return {name: held.read(name) for name in held.shapes}


@pytest.mark.parametrize(
    ("mup", "dtype"),
    [(MUP, "fp32"), (ODD, "fp32"), (MUP, "bf16"), (DEEP, "fp32")],
    ids=["mup", "roundings", "bf16", "completep"],
)
def test_mup_comes_back_as_mup(mup: str, dtype: Any, tiny: Make, tmp_path: Path) -> None:
    config = run_of(tiny, tmp_path / "run", mup)
    export_hf(trained(config), tmp_path / "hf", dtype=dtype, check=True)
    again = run_of(tiny, tmp_path / "again", mup)
    report = import_hf(tmp_path / "hf", again, tmp_path / "again", check=True)
    unfolded = ["attention", *(["residual"] if mup == DEEP else []), "output"]
    assert [unfold.split()[0] for unfold in report.unfolds] == unfolded
    assert report.check is not None
    assert report.check.relative <= 1e-5
    before = tensors(tmp_path / "run" / "checkpoints" / "step-4")
    after = tensors(tmp_path / "again" / "checkpoints" / "step-0")
    for name, tensor in after.items():
        if dtype == "fp32" and mup != ODD:  # factors are powers of two
            assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(
            tensor, before[name], rtol=1e-6 if dtype == "fp32" else 1e-2, atol=0
        )
    head = before["head.weight"]
    plain = run_of(tiny, tmp_path / "sp")
    said = import_hf(tmp_path / "hf", plain, tmp_path / "sp", check=True)
    assert said.unfolds == []
    kind = "completep" if mup == DEEP else "mup"
    assert said.notes[1].startswith(f"parameterization.kind=sp (there {kind}): the model computes")
    moved = tensors(tmp_path / "sp" / "checkpoints" / "step-0")["head.weight"]
    assert not torch.allclose(moved, head, rtol=0.1), "what is divided out matters"


def test_printed_sections_are_those_of_the_run(tiny: Make, tmp_path: Path) -> None:
    config = run_of(tiny, tmp_path / "run", MUP)
    export_hf(trained(config, stop=1), tmp_path / "hf")
    said = converted(Convert(source=tmp_path / "hf", print_model=True))
    assert said.facts["parameterization"] == config.parameterization.model_dump(mode="json")
    assert "parameterization:\n" in said.text
    assert "  base_width: 8\n" in said.text
    export_hf(trained(run_of(tiny, tmp_path / "sp"), stop=1), tmp_path / "hf-sp")
    assert list(converted(Convert(source=tmp_path / "hf-sp", print_model=True)).facts) == ["model"]


def test_a_run_of_stages_imports_the_model_of_its_first(tiny: Make, tmp_path: Path) -> None:
    export_hf(trained(run_of(tiny, tmp_path / "run", "model.rope_theta=50000")), tmp_path / "hf")
    stages = "stages=[{name: a, steps: 1, model: {rope_theta: 50000}}, {name: b, steps: 1}]"
    length = ("training.total_steps=null", stages)
    config = run_of(tiny, tmp_path / "new", *length)
    import_hf(tmp_path / "hf", config, tmp_path / "new", check=True)
    length = ("training.total_steps=null", stages.replace("50000", "60000"))
    with pytest.raises(UserError, match=r"rope_theta=60000\.0 .*convert .* --print-model"):
        import_hf(tmp_path / "hf", run_of(tiny, tmp_path / "no", *length), tmp_path / "no")


def test_states_of_the_optimizer_come_back(tiny: Make, tmp_path: Path) -> None:
    run = trained(run_of(tiny, tmp_path / "run", MUP), stop=2)
    hf = tmp_path / "hf"
    converted(Convert(source=run, out=hf, optimizer_state=True))
    config = run_of(tiny, tmp_path / "new", MUP)
    file = tmp_path / "new.yaml"
    file.write_text(dump(config))
    asked: dict[str, Any] = {"source": hf, "config": str(file)}
    report = converted(Convert(**asked, out=tmp_path / "new", optimizer_state=True))
    assert "and the optimizer's states" in report.text
    converted(Convert(**asked, out=tmp_path / "fresh"))
    before = tensors(run / "checkpoints" / "step-2", OPTIMIZER)
    after = tensors(tmp_path / "new" / "checkpoints" / "step-0", OPTIMIZER)
    assert before.keys() == after.keys()
    assert any(tensor.any() for name, tensor in before.items() if "exp_avg" in name)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tensors(tmp_path / "fresh" / "checkpoints" / "step-0", OPTIMIZER) == {}

    # The first step equals the step that the run would have taken on these documents.
    other = load(file, ["optimizer.kind=muon"])
    with pytest.raises(UserError, match=r"optimizer\.kind='muon' differs from 'adamw'"):
        train(other, device=CPU, callbacks=[])
    fresh = config.run.model_copy(update={"folder": str(tmp_path / "fresh")})
    trained(config, stop=1)
    trained(config.model_copy(update={"run": fresh}), stop=1)
    loss = [rows(tmp_path / name)[0]["loss"] for name in ("new", "fresh")]
    assert loss[0] == loss[1]
    moved = [tensors(tmp_path / name / "checkpoints" / "step-1") for name in ("new", "fresh")]
    name = "blocks.0.ffn.up.weight"
    assert not torch.equal(moved[0][name], moved[1][name])
    states = tensors(tmp_path / "new" / "checkpoints" / "step-1", OPTIMIZER)
    assert states[f"{name}.step"].item() == 3  # two in the run, one here


@pytest.mark.parametrize("fp8_first", [True, False])
def test_states_come_back_into_another_format(tiny: Make, tmp_path: Path, fp8_first: bool) -> None:
    def made(name: str, fp8: bool) -> RunConfig:
        config = run_of(tiny, tmp_path / name)
        states = Fp8StatesConfig() if fp8 else Fp32States()
        optimizer = config.optimizer.model_copy(update={"states": states})
        return config.model_copy(update={"optimizer": optimizer})

    run = trained(made("run", fp8_first), stop=2)
    export_hf(run, tmp_path / "hf", optimizer_state=True)
    config = made("new", not fp8_first)
    import_hf(tmp_path / "hf", config, tmp_path / "new", optimizer_state=True)
    trained(config, stop=1)
    told = [e for e in events(tmp_path / "new") if e["event"] == "states_converted"]
    assert [e["change"] for e in told] == ["fp8 -> fp32" if fp8_first else "fp32 -> fp8"]


def test_states_that_do_not_fit_are_refused(tiny: Make, tmp_path: Path) -> None:
    run = trained(run_of(tiny, tmp_path / "run"), stop=1)
    export_hf(run, tmp_path / "plain")
    export_hf(run, tmp_path / "full", optimizer_state=True)
    config, out = run_of(tiny, tmp_path / "new"), tmp_path / "new"
    for source, more, said in (
        ("plain", (), r"plain holds none; export it with --optimizer-state"),
        ("full", ("optimizer.kind=muon",), r"optimizer\.kind=muon \(there adamw\), for which"),
        ("full", (MUP,), r"parameterization\.kind=mup \(there sp\), for which"),
    ):
        config = run_of(tiny, tmp_path / "new", *more)
        with pytest.raises(UserError, match=said):
            import_hf(tmp_path / source, config, out, optimizer_state=True)
    import_hf(tmp_path / "full", run_of(tiny, out), out)  # weights only
    with pytest.raises(UserError, match=r"step-0 holds none; leave the option out"):
        export_hf(out, tmp_path / "no", optimizer_state=True)


def test_origin_and_documents_that_are_read_again(tiny: Make, tmp_path: Path) -> None:
    run = trained(run_of(tiny, tmp_path / "run"), stop=3)
    export_hf(run, tmp_path / "hf")
    for name, seed, told in (("same", 3, ["up", "down"]), ("other", 4, None)):
        config = run_of(tiny, tmp_path / name, f"run.seed={seed}")
        import_hf(tmp_path / "hf", config, tmp_path / name)
        trained(config, stop=1)
        trained(config)
        content = json.loads((tmp_path / name / "run.json").read_text())
        assert len(content["launches"]) == 2
        origin = content["origin"]
        assert origin["source"] == str(tmp_path / "hf")
        assert (origin["run"], origin["step"], origin["seed"]) == (str(run), 3, 3)
        assert origin["tokens"] == 3 * 8 * 32
        said = [event for event in events(tmp_path / name) if event["event"] == "same_documents"]
        assert [event["sources"] for event in said] == ([told] if told else [])
    assert "origin" not in json.loads((run / "run.json").read_text())
    # The grandparent counts as well, and a branch has its parent's origin.
    export_hf(tmp_path / "other", tmp_path / "hf-other")
    config = run_of(tiny, tmp_path / "third", "run.seed=3")
    import_hf(tmp_path / "hf-other", config, tmp_path / "third")
    trained(config, stop=1)
    said = [event for event in events(tmp_path / "third") if event["event"] == "same_documents"]
    assert [event["sources"] for event in said] == [["up", "down"]]
    parent = f"run.parent={{folder: {tmp_path / 'third'}, step: 1}}"
    trained(run_of(tiny, tmp_path / "branch", "run.seed=3", parent), stop=2)
    content = json.loads((tmp_path / "branch" / "run.json").read_text())
    assert content["origin"]["source"] == str(tmp_path / "hf-other")
    assert content["origin"]["origin"]["source"] == str(tmp_path / "hf")


def test_a_damaged_origin_is_said(tiny: Make, tmp_path: Path) -> None:
    export_hf(trained(run_of(tiny, tmp_path / "run"), stop=1), tmp_path / "hf")
    (tmp_path / "hf" / "allometry.json").write_text('{"kind": "allometry.origin"}')
    with pytest.raises(UserError, match=r"allometry\.json was not written by this version"):
        import_hf(tmp_path / "hf", run_of(tiny, tmp_path / "new"), tmp_path / "new")


def test_sources_go_on_after_the_run_that_weights_come_from(tiny: Make, tmp_path: Path) -> None:
    run = trained(run_of(tiny, tmp_path / "run"), stop=3)
    export_hf(run, tmp_path / "hf")
    there = read_facts(run / "checkpoints" / "step-3")["reading"]["ledger"]
    wanted = "data.continue_sources=true"
    child = run_of(tiny, tmp_path / "child", wanted)
    import_hf(tmp_path / "hf", child, tmp_path / "child")
    trained(child, stop=2)
    trained(child)  # a resume reads it from its own checkpoint
    here = read_facts(tmp_path / "child" / "checkpoints" / "step-4")["reading"]
    assert here["starts"] == {name: read["samples"] for name, read in there.items()}
    for name, read in here["ledger"].items():
        assert read["samples"] == there[name]["samples"] + read["tokens"] // 32
        assert read["unique_tokens"] == read["tokens"]  # the parent read none of them
        assert read["epochs"] > there[name]["epochs"]
    said = [event["event"] for event in events(tmp_path / "child")]
    assert said.count("sources_continued") == 1
    assert "same_documents" not in said
    assert "mixture_changed" not in said
    other = run_of(tiny, tmp_path / "other", wanted, "run.seed=4")
    import_hf(tmp_path / "hf", other, tmp_path / "other")
    with pytest.raises(UserError, match=r"cannot go on .*run\.seed=3.*run\.seed=4"):
        trained(other)
