"""``allometry convert``: every wrong request gives one sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.run import RunConfig
from allometry.interop.huggingface import compare
from allometry.launch.runs.commands import Convert
from allometry.launch.runs.convert import converted
from allometry.trainer.train import train
from hf_models import make, save
from shell import Shell

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
ONE = ("training.total_steps=1", "schedule.warmup_steps=0")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def refused(said: str, source: Path, **more: Any) -> None:
    with pytest.raises(UserError, match=said) as caught:
        converted(Convert(source=source, **more))
    assert "\n" not in str(caught.value)


@pytest.fixture
def trained(tiny: Make) -> Path:
    """Return a run of one step."""
    config = tiny(*ONE)
    train(config, device=CPU, callbacks=[])
    return Path(config.run.folder)


def test_a_run_there_and_back_by_command(trained: Path, tmp_path: Path, shell: Shell) -> None:
    def allometry(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = allometry("convert", trained, "--out", tmp_path / "hf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "qwen3"
    printed = shell("convert", tmp_path / "hf", "--print-model")
    config = tmp_path / "run.yaml"
    described = load(trained / "config.yaml")
    text = dump(described).split("model:")
    assert printed.startswith("model:\n  vocab_size: 64\n")
    rest = text[1].split("parameterization:")[1]
    config.write_text(text[0] + printed + "parameterization:" + rest)
    done = allometry("convert", tmp_path / "hf", "--out", tmp_path / "new", "--config", config)
    assert done.returncode == 0, done.stderr
    command = done.stdout.strip().splitlines()[-1].split("allometry ")[1].split()
    done = allometry(*command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "checkpoints" / "step-1").exists()
    assert "is not empty" in shell.refusal("convert", trained, "--out", tmp_path / "hf")


def test_sources_that_are_none(trained: Path, tmp_path: Path) -> None:
    refused("neither config.yaml", tmp_path / "nowhere", out=tmp_path / "out")
    refused("is one checkpoint", trained / "checkpoints" / "step-1", out=tmp_path / "out")
    (trained / "config.json").write_text("{}")
    refused("holds both", trained, out=tmp_path / "out")


def test_wrong_exports(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refused("--out is missing", trained)
    refused("--config goes with a Hugging Face model", trained, out=out, config="x")
    refused("--print-model goes with", trained, print_model=True)
    refused("--dtype=int8", trained, out=out, dtype="int8")
    refused("--family=llama cannot hold", trained, out=out, family="llama")
    refused("no checkpoint step-7; it has step-1", trained, out=out, step=7)
    (tmp_path / "file").write_text("mine")
    refused("exists and is not empty", trained, out=tmp_path / "file")
    (tmp_path / "out.partial").mkdir()
    refused("command that runs or was interrupted", trained, out=out)
    (tmp_path / "out.partial").rmdir()
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    refused("transformers, which is not installed", trained, out=out, check=True)
    monkeypatch.undo()
    monkeypatch.setattr(compare, "TOLERANCE", 0.0)
    refused("--check: logits differ by", trained, out=out, check=True)
    monkeypatch.undo()
    shard = next((trained / "checkpoints" / "step-1").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-9])
    refused("step-1 is damaged", trained, out=out)
    shutil.rmtree(trained / "checkpoints" / "step-1")
    refused("has no checkpoint", trained, out=out)
    assert not list(tmp_path.glob("out*")), "nothing half-written"


def test_a_disk_that_is_full_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("allometry.interop.huggingface.weights.save_file", full)
    refused("No space left on device.*nothing is left", trained, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_wrong_models(tiny: Make, tmp_path: Path) -> None:
    source, out, config = save(tmp_path / "hf", "qwen3"), tmp_path / "out", tmp_path / "run.yaml"
    model = ("model.num_layers=3", "model.head_dim=16", "model.ffn_width=48")
    right = dump(tiny(*ONE, *model, "model.norm_eps=1e-6"))
    config.write_text(dump(tiny(*ONE, *model)))
    more: dict[str, Any] = {"out": out, "config": str(config)}
    refused(r"model\.norm_eps=1e-05 \(there 1e-06\)", source, **more)
    config.write_text(right)
    refused("needs --config", source, out=out)
    refused("--step goes with a run", source, **more, step=1)
    refused("--out does not go with --print-model", source, out=out, print_model=True)
    file = source / "model.safetensors"
    tensors, whole = load_file(file), file.read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    changes: dict[str, dict[str, torch.Tensor]] = {
        f"tensor {name} is missing": {k: v for k, v in tensors.items() if k != name},
        "tensor model.extra has no counterpart": {**tensors, "model.extra": torch.zeros(1)},
        f"tensor {name} has shape": {**tensors, name: torch.zeros(47, 32)},
        f"tensor {name} has type": {**tensors, name: torch.zeros(48, 32, dtype=torch.int8)},
    }
    for said, changed in changes.items():
        save_file(changed, file)
        refused(said, source, **more)
    file.write_bytes(whole[:100])
    refused("cannot be read", source, **more)
    file.unlink()
    refused("neither model.safetensors nor", source, **more)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("model-00001-of-00002.safetensors cannot be read", source, **more)
    (source / "config.json").write_text("[")
    refused("config.json cannot be read", source, **more)
    (left,) = tmp_path.glob("out*")
    assert [path.name for path in left.iterdir()] == ["conversion_refused.json"]


def test_training_does_not_begin_where_a_conversion_was_refused(tiny: Make, tmp_path: Path) -> None:
    source, file, out = save(tmp_path / "hf", "qwen3"), tmp_path / "run.yaml", tmp_path / "out"
    model = ("model.num_layers=3", "model.head_dim=16", "model.ffn_width=48")
    wrong, config = tiny(*ONE, *model), tiny(*ONE, *model, "model.norm_eps=1e-6")
    run = config.run.model_copy(update={"folder": str(out)})
    config = config.model_copy(update={"run": run})
    file.write_text(dump(wrong))
    refused(r"model\.norm_eps", source, out=out, config=str(file))
    with pytest.raises(UserError, match=r"out: the conversion of .*hf into it was refused"):
        train(config, device=CPU, callbacks=[])
    assert [path.name for path in out.iterdir()] == ["conversion_refused.json"]
    (tmp_path / "out.partial" / "checkpoints").mkdir(parents=True)  # a killed conversion
    (out / "conversion_refused.json").unlink()
    with pytest.raises(UserError, match=r"into it runs or was interrupted .*random weights"):
        train(config, device=CPU, callbacks=[])
    shutil.rmtree(tmp_path / "out.partial")
    refused("neither config.yaml", tmp_path / "typo", out=out, config=str(file))
    file.write_text(dump(config))
    converted(Convert(source=source, out=out, config=str(file)))
    assert not (out / "conversion_refused.json").exists()
    assert train(config, device=CPU, callbacks=[]).step == 1
    refused("is not empty", source, out=out, config=str(file))  # an existing run, which continues
    assert not (out / "conversion_refused.json").exists()


def test_random_weights_may_be_meant(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused("needs --config", save(tmp_path / "hf", "qwen3"), out=out)
    (out / "conversion_refused.json").unlink()
    run = tiny(*ONE).run.model_copy(update={"folder": str(out)})
    config = tiny(*ONE).model_copy(update={"run": run})
    assert train(config, device=CPU, callbacks=[]).step == 1


def test_a_tied_model_with_another_head(tiny: Make, tmp_path: Path) -> None:
    source, config = save(tmp_path / "hf", "llama_tied"), tmp_path / "run.yaml"
    model = ("model.num_layers=3", "model.ffn_width=48", "model.qk_norm=false")
    more = ("model.num_kv_heads=4", "model.tied_embeddings=true", "model.norm_eps=1e-6")
    config.write_text(dump(tiny(*ONE, *model, *more)))
    file = source / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    asked = Convert(source=source, out=tmp_path / "same", config=str(config))
    assert "llama: 29 parameters" in converted(asked).text
    save_file({**tensors, "lm_head.weight": embedding + 1}, file)
    refused("lm_head.weight differs", source, out=tmp_path / "out", config=str(config))


def test_another_tokenizer_is_refused(tiny: Make, tmp_path: Path) -> None:
    source, config = save(tmp_path / "hf", "qwen3"), tmp_path / "run.yaml"
    (source / "tokenizer.json").write_text('{"model": {"type": "one"}}')
    (tmp_path / "own.json").write_text('{"model": {"type": "two"}}')
    model = ("model.num_layers=3", "model.head_dim=16", "model.ffn_width=48")
    own = f"data.tokenizer={tmp_path / 'own.json'}"
    config.write_text(dump(tiny(*ONE, *model, "model.norm_eps=1e-6", own)))
    refused("is another tokenizer than", source, out=tmp_path / "out", config=str(config))


def test_unknown_architectures(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused("model_type='gpt2' cannot be imported", tmp_path, print_model=True)
    make("llama").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused("rope_type='dynamic'", tmp_path, print_model=True)
