"""DeepSeek-V3 files: keys and tensors of this family only, tensors left out, refused values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allometry.configs.errors import UserError
from allometry.interop.huggingface.config import (
    Text,
    attention_scale,
    choose_family,
    from_hf,
    to_hf,
)
from allometry.interop.huggingface.convert import export_hf, import_hf
from allometry.interop.huggingface.deepseek import rows_of
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.models.rotary import attention_factor
from allometry.trainer.train import train
from hf_models import logits, save
from hf_published import DEEPSEEK_V3
from hf_runs import TOKENS, Make, config_for, largest, our_logits, random_run

MODEL = {
    "kind": "moe",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "first_dense_layers": 1,
    "ffn_width": 40,
    "latent_attention": {
        **{"q_lora_rank": 12, "kv_lora_rank": 10, "v_head_dim": 6},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    },
    "rope_scaling": {
        **{"kind": "yarn", "factor": 4.0, "original_length": 16},
        **{"attention_factor": 0.9, "mscale_all_dim": 1.1},
    },
    "experts": {
        **{"kind": "swiglu", "num_experts": 8, "experts_per_token": 2, "width": 24},
        "num_shared_experts": 1,
    },
    "router": {
        **{"gate": "sigmoid", "normalize": True, "num_groups": 2, "groups_per_token": 1},
        "balance": {"kind": "bias"},
    },
}


def overrides(**more: Any) -> str:
    return f"model={json.dumps(MODEL | more)}"


def edit(folder: Path, **values: Any) -> None:
    """Change keys in a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.slow
def test_what_only_its_files_have_matters(tiny: Make, tmp_path: Path) -> None:
    """Negative controls: logits differ strongly if one of DeepSeek-V3's features is changed."""
    source = save(tmp_path / "hf", "deepseek_v3")
    theirs = logits(source, TOKENS)
    scaling = json.loads((source / "config.json").read_text())["rope_parameters"]
    edit(source, rope_parameters=scaling | {"mscale": 0.9, "mscale_all_dim": 1.2})
    assert largest(logits(source, TOKENS), theirs) > 1e-3 * theirs.abs().max()
    edit(source, rope_parameters=scaling)
    tensors = load_file(source / "model.safetensors")
    for part in ("e_score_correction_bias", "kv_a_proj_with_mqa.weight", "q_b_proj.weight"):
        wrong = {
            name: tensor.roll(-1, dims=0) if name.endswith(part) else tensor
            for name, tensor in tensors.items()
        }
        save_file(wrong, source / "model.safetensors", metadata={"format": "pt"})
        assert largest(logits(source, TOKENS), theirs) > 1e-3 * theirs.abs().max(), part


@pytest.mark.parametrize("mup", [False, True], ids=["sp", "mup"])
def test_a_run_exported(mup: bool, tiny: Make, tmp_path: Path) -> None:
    rules = ["parameterization={kind: completep, base_width: 8, base_layers: 1}"] if mup else []
    config = tiny(overrides(), *rules)
    folder = random_run(config)
    report = export_hf(folder, tmp_path / "hf", check=True)
    assert report.family == "deepseek_v3"
    assert {fold.split()[0] for fold in report.folds} == ({"residual", "output"} if mup else set())
    theirs = logits(tmp_path / "hf", TOKENS)
    ours = our_logits(config, folder / "checkpoints" / "step-4")
    assert largest(ours, theirs) <= 1e-5 * theirs.abs().max()
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "attention_factor" not in written["rope_scaling"], "as others read it: by mscale"
    again = from_hf(written, "x")[1].rope_scaling
    assert again is not None
    assert again.kind == "yarn"
    assert attention_factor(again) == pytest.approx(0.9, rel=1e-11)


def test_biases_stay_in_fp32(tiny: Make, tmp_path: Path) -> None:
    export_hf(random_run(tiny(overrides())), tmp_path / "hf", dtype="bf16", check=True)
    kept = load_file(tmp_path / "hf" / "model.safetensors")
    types = {tensor.dtype for name, tensor in kept.items() if name.endswith("correction_bias")}
    assert types == {torch.float32}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32, torch.bfloat16}


def test_layers_of_multi_token_prediction_are_left_out(tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "deepseek_v3")
    theirs = logits(source, TOKENS)
    tensors = load_file(source / "model.safetensors")
    ahead = {f"model.layers.3.{name}.weight": torch.ones(3) for name in ("eh_proj", "enorm")}
    save_file(tensors | ahead, source / "model.safetensors", metadata={"format": "pt"})
    config = config_for(tiny, source)
    with pytest.raises(UserError, match=r"layers\.3\.eh_proj\.weight has no counterpart"):
        import_hf(source, config, tmp_path / "refused")
    edit(source, num_nextn_predict_layers=1)
    report = import_hf(source, config, tmp_path / "run")
    said = "multi-token prediction: 2 tensors of layers after the model's own are left out"
    assert any(said in note for note in report.notes)
    step = tmp_path / "run" / "checkpoints" / "step-0"
    assert largest(our_logits(config, step), theirs) <= 1e-5 * theirs.abs().max()


def test_training_goes_on_with_imported_biases(tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "deepseek_v3")
    config = config_for(tiny, source)
    import_hf(source, config, tmp_path / "run")
    folder = config.run.model_copy(update={"folder": str(tmp_path / "run")})
    config = config.model_copy(update={"run": folder})
    assert train(config, device=torch.device("cpu"), callbacks=[]).step == 3
    first, last = (
        CheckpointWeights(tmp_path / "run" / "checkpoints" / step).read("blocks.1.ffn.router.bias")
        for step in ("step-0", "step-3")
    )
    assert first.abs().max() > 0.05
    moved = largest(first, last)
    assert 0 < moved <= 3 * 1e-3 * (1 + 1e-3), "three steps of the balance"


def test_biases_that_nothing_would_read_are_refused(tiny: Make, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "deepseek_v3")
    config = config_for(tiny, source)
    router = config.model.model_dump()["router"] | {"balance": {"kind": "none"}}
    wrong = config.model_copy(
        update={
            "model": type(config.model).model_validate(
                config.model.model_dump() | {"router": router}
            )
        }
    )
    with pytest.raises(
        UserError, match=r"e_score_correction_bias is not zero, and only model\.rou"
    ):
        import_hf(source, wrong, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"num_key_value_heads": 8}, "num_kv_heads=8: with latent_attention"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
    ],
)
def test_what_we_lack_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_hf({**DEEPSEEK_V3, **change}, "there/config.json")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"latent_attention": MODEL["latent_attention"] | {"norm_eps": 1e-5}}, "norm_eps=1e-05"),  # type: ignore[operator]
        ({"experts": MODEL["experts"] | {"num_shared_experts": 0}}, "num_shared_experts=0"),  # type: ignore[operator]
        ({"router": MODEL["router"] | {"gate": "softmax"}}, "router.gate=softmax"),  # type: ignore[operator]
        ({"norms": "both"}, "norms=both"),
    ],
)
def test_what_it_lacks_is_said(more: dict[str, Any], said: str, tiny: Make) -> None:
    with pytest.raises(UserError, match=said):
        choose_family(tiny(overrides(**more)).model)


def test_the_published_description(tiny: Make) -> None:
    model = from_hf(DEEPSEEK_V3, "x")[1]
    assert model.rope_scaling is not None
    assert model.rope_scaling.kind == "yarn"
    assert (attention_factor(model.rope_scaling), model.rope_scaling.mscale_all_dim) == (1.0, 1.0)
    # The query width is 192, and (0.1 ln 40 + 1)^2 = 1.8738.
    assert attention_scale({}, model, "deepseek_v3") == pytest.approx(0.135234, rel=1e-5)
    written = to_hf(model, "deepseek_v3", "bfloat16", Text(4096))
    for key in ("mscale", "mscale_all_dim", "factor"):
        assert written["rope_scaling"][key] == DEEPSEEK_V3["rope_scaling"][key]
    rows = rows_of(model, "blocks.0.attention.latent_kv.weight")
    assert rows is not None
    assert rows[510:516] == (510, 511, 512, 514, 516, 518)
    assert rows[-2:] == (573, 575)


@pytest.mark.slow
def test_multi_token_prediction_goes_out_and_in(tiny: Make, tmp_path: Path) -> None:
    depths = {"multi_token": {"depth": 2, "weight": 0.3}}
    config = tiny(overrides(**depths))
    folder = random_run(config)
    report = export_hf(folder, tmp_path / "hf", check=True)
    assert report.family == "deepseek_v3"
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 2
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    own = {name.removeprefix("model.layers.3.") for name in tensors if ".layers.3." in name}
    wanted = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens")
    assert {f"{name}.weight" for name in wanted} < own
    assert {"mlp.gate.e_score_correction_bias", "self_attn.q_a_proj.weight"} < own
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    notes = import_hf(tmp_path / "hf", config, tmp_path / "back", check=True).notes
    assert not any("multi-token prediction" in note for note in notes)
    ours, back = (
        CheckpointWeights(path / "checkpoints" / step)
        for path, step in ((folder, "step-4"), (tmp_path / "back", "step-0"))
    )
    for name in ours.shapes:
        if not name.endswith("router.load"):
            assert torch.equal(ours.read(name), back.read(name)), name
    # Without multi-token prediction in the run the layers are left out; a changed copy is refused.
    notes = import_hf(tmp_path / "hf", tiny(overrides()), tmp_path / "main", check=True).notes
    assert any("multi-token prediction" in note for note in notes)
    tensors["model.layers.3.embed_tokens.weight"][0, 0] += 1.0
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.3\.embed_tokens\.weight differs from model\.emb"):
        import_hf(tmp_path / "hf", config, tmp_path / "changed")


def test_other_families_take_the_main_model_alone(tiny: Make, tmp_path: Path) -> None:
    folder = random_run(tiny("model.multi_token={depth: 1}"))
    said = r"blocks\.2\..+ of multi-token prediction has no counterpart in a model of qwen3; add --"
    with pytest.raises(UserError, match=said):
        export_hf(folder, tmp_path / "hf")
    export_hf(folder, tmp_path / "hf", main_model=True)
    assert "num_nextn_predict_layers" not in json.loads((tmp_path / "hf/config.json").read_text())
