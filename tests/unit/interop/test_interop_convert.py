"""Runs and Hugging Face folders compute the same function, and a conversion is never partial."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.interop.huggingface.config import differences
from allometry.interop.huggingface.convert import export_hf, import_hf
from allometry.interop.huggingface.families import TRAITS
from allometry.interop.huggingface.model import read_model
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.models.init import initialize
from allometry.trainer.state.integrity import damage
from allometry.trainer.train import train
from deepspeed_cases import STEADY, assert_close, needs_deepspeed
from hf_models import CASES, logits, save
from hf_runs import TOKENS, Make, config_for, largest, our_logits, random_run
from run_folders import rows

MUP = "parameterization={kind: mup, base_width: 8, base_head_dim: 4}"


@pytest.mark.parametrize("case", CASES)
def test_logits_of_fresh_models_agree_absolutely(case: str, tiny: Make, tmp_path: Path) -> None:
    """With usual initial weights (σ 0.02); other tests use larger ones to show differences."""
    source = save(tmp_path / "hf", case, std=0.02)
    config = config_for(tiny, source)
    import_hf(source, config, tmp_path / "run")
    ours = our_logits(config, tmp_path / "run" / "checkpoints" / "step-0")
    theirs = logits(source, TOKENS)
    assert largest(ours, theirs) <= 1e-5
    export_hf(tmp_path / "run", tmp_path / "back")
    assert largest(ours, logits(tmp_path / "back", TOKENS)) <= 1e-5
    assert largest(ours, ours.roll(1, dims=1)) > 1e-3, "logits that are not all alike"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", case)
    config = config_for(tiny, source)
    report = import_hf(source, config, tmp_path / "run", check=True)
    assert report.family == CASES[case][0]
    assert report.check is not None
    assert report.check.relative <= 1e-5
    step = tmp_path / "run" / "checkpoints" / "step-0"
    assert damage(step, contents=True) is None
    theirs = logits(source, TOKENS)
    assert theirs.abs().max() > 0.5, "something to compare"
    assert largest(our_logits(config, step), theirs) <= 1e-5 * theirs.abs().max()
    export_hf(tmp_path / "run", tmp_path / "back", check=True)
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        if TRAITS[report.family].gain_offset and name.endswith("norm.weight"):
            # 1 is added and subtracted: digits below the last one of the sum are lost.
            assert largest(before[name], after[name]) <= 2**-23
        else:
            assert torch.equal(before[name], after[name]), name
    assert torch.equal(logits(tmp_path / "back", TOKENS), theirs)
    assert not differences(read_model(tmp_path / "back")[1], read_model(source)[1])


def test_gemmas_scale_of_scores_is_folded(tiny: Make, tmp_path: Path) -> None:
    """As in Gemma 27B: 168, with heads of width 128."""
    source = save(tmp_path / "hf", "gemma3_text", query_pre_attn_scalar=10)
    config = config_for(tiny, source)
    report = import_hf(source, config, tmp_path / "run", check=True)
    assert report.unfolds == ["attention x 1.29099 into attention.q_norm (one rounding)"]
    export_hf(tmp_path / "run", tmp_path / "back", check=True)
    theirs, back = logits(source, TOKENS), logits(tmp_path / "back", TOKENS)
    assert largest(theirs, back) <= 1e-5 * theirs.abs().max()
    wrong = json.loads((tmp_path / "back" / "config.json").read_text())
    (tmp_path / "back" / "config.json").write_text(json.dumps(wrong | {"query_pre_attn_scalar": 9}))
    assert largest(theirs, logits(tmp_path / "back", TOKENS)) > 1e-3 * theirs.abs().max()


def test_negative_control_a_changed_weight_is_seen(tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "llama")
    config = config_for(tiny, source)
    import_hf(source, config, tmp_path / "run")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] += 0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    step = tmp_path / "run" / "checkpoints" / "step-0"
    theirs = logits(source, TOKENS)
    assert largest(our_logits(config, step), theirs) > 1e-4 * theirs.abs().max()


MOE = (
    "model={kind: moe, vocab_size: 64, width: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
    "qk_norm: %s, experts: {kind: swiglu, num_experts: 4, experts_per_token: 2, width: 24}, "
    "router: {gate: %s}}"
)
RUNS: dict[str, tuple[str, ...]] = {
    "qwen3": (),
    "llama": ("model.qk_norm=false",),
    "mixtral": (MOE % ("false", "softmax_after_topk"),),
    "qwen3_moe": (MOE % ("true", "softmax_after_topk"),),
}


@pytest.mark.parametrize("mup", [False, True], ids=["sp", "mup"])
@pytest.mark.parametrize("family", RUNS)
def test_a_run_exported(family: str, mup: bool, tiny: Make, tmp_path: Path) -> None:
    config = tiny(*RUNS[family], *([MUP] if mup else []))
    folder = random_run(config)
    report = export_hf(folder, tmp_path / "hf", check=True)
    assert (report.family, report.step) == (family, 4)
    assert [fold.split()[0] for fold in report.folds] == (["attention", "output"] if mup else [])
    theirs = logits(tmp_path / "hf", TOKENS)
    ours = our_logits(config, folder / "checkpoints" / "step-4")
    assert largest(ours, theirs) <= 1e-5 * theirs.abs().max()
    if mup:  # folding matters: without it the functions differ
        plain = our_logits(tiny(*RUNS[family]), folder / "checkpoints" / "step-4")
        assert largest(plain, theirs) > 1e-2 * theirs.abs().max()


def test_tied_run_exported(tiny: Make, tmp_path: Path) -> None:
    folder = random_run(tiny("model.tied_embeddings=true"))
    export_hf(folder, tmp_path / "hf", check=True)
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")


def test_bf16_shards_tokenizer_and_steps(tiny: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer

    words = {f"w{n}": n for n in range(64)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(tmp_path / "own.json"))
    config = tiny(f"data.tokenizer={tmp_path / 'own.json'}")
    folder = random_run(config, 4, 9)
    report = export_hf(folder, tmp_path / "hf", step=9, dtype="bf16", check=True, shard_bytes=9000)
    assert report.step == 9
    assert len(report.files) > 2
    assert report.check is not None
    assert report.check.rounding is not None
    assert 1e-5 < report.check.rounding < 0.1
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    held = {n: t for f in report.files for n, t in load_file(tmp_path / "hf" / f).items()}
    assert held.keys() == index["weight_map"].keys()
    assert sum(t.nbytes for t in held.values()) == index["metadata"]["total_size"]
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert tokenizer("w3 w5")["input_ids"] == [words["w3"], words["w5"]] or tokenizer.vocab == words
    again = import_hf(tmp_path / "hf", config, tmp_path / "again", check=True)
    assert again.tokenizer is not None


def test_training_from_imported_weights_is_training_from_those_weights(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in ("qwen3", "qwen3_moe"):
        source = save(tmp_path / f"hf-{case}", case)
        config = config_for(tiny, source)
        target = tmp_path / f"imported-{case}"
        import_hf(source, config, target)
        step = target / "checkpoints" / "step-0"
        kept = CheckpointWeights(step)
        imported = config.model_copy(
            update={"run": config.run.model_copy(update={"folder": str(target)})}
        )
        train(imported, device=torch.device("cpu"), callbacks=[])

        def by_hand(module: Any, rules: Any, seed: int, hold: Any, kept: Any = kept) -> None:
            initialize(module, rules, seed, hold)
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(kept.read(name))

        untouched = tmp_path / f"untouched-{case}"
        plain = imported.model_copy(
            update={"run": config.run.model_copy(update={"folder": str(untouched)})}
        )
        train(plain, device=torch.device("cpu"), callbacks=[])
        monkeypatch.setattr("allometry.parallel.apply.initialize", by_hand)
        hand = tmp_path / f"hand-{case}"
        set_by_hand = imported.model_copy(
            update={"run": config.run.model_copy(update={"folder": str(hand)})}
        )
        train(set_by_hand, device=torch.device("cpu"), callbacks=[])
        monkeypatch.undo()
        recorded = [
            [(r["loss"], r["grad_norm"]) for r in rows(f)] for f in (target, hand, untouched)
        ]
        assert len(recorded[0]) == 3
        assert recorded[0] == recorded[1]
        assert recorded[0] != recorded[2], "weights matter"


@needs_deepspeed
def test_the_deepspeed_engine_begins_with_imported_weights(tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "qwen3")
    runs = []
    for engine in ("fsdp2", "deepspeed"):
        zero = f"parallel.zero={json.dumps({'engine': engine, 'stage': 3})}"
        config = config_for(tiny, source, *STEADY, zero, f"run.folder={tmp_path / engine}")
        import_hf(source, config, tmp_path / engine)
        train(config, device=torch.device("cpu"), callbacks=[])
        runs.append(config)
    assert_close(*runs, steps=3)


def test_training_keys_may_change_before_the_first_step(tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "qwen3")
    config = config_for(tiny, source)
    import_hf(source, config, tmp_path / "run")
    stored = tmp_path / "run" / "config.yaml"
    with pytest.raises(UserError, match=r"model\.norm_eps"):
        train(load(stored, ["model.norm_eps=1e-3"]), device=torch.device("cpu"), callbacks=[])
    changed = load(stored, ["optimizer.lr=1e-3"])
    assert train(changed, device=torch.device("cpu"), callbacks=[]).step == 3
