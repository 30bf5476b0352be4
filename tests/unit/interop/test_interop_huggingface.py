"""Names and configs: correspondences, and one sentence for unsupported values."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.model import DenseModel, ModelConfig, MoEModel
from allometry.interop.huggingface.config import (
    Text,
    choose_family,
    differences,
    from_hf,
    to_hf,
)
from allometry.interop.huggingface.families import FAMILIES, Family
from allometry.interop.huggingface.names import (
    Fold,
    check_names,
    counterparts,
    folded,
    folds,
    locate,
)
from allometry.scaling.count import count_parameters
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import ForwardScales, Parameterization
from hf_published import (
    DEEPSEEK_V3,
    GEMMA_3,
    LLAMA_2,
    MISTRAL,
    MODELS,
    MOE,
    OLMO_3,
    PUBLISHED,
    QWEN3,
    QWEN3_MOE,
)


def model(family: Family, **more: Any) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python({**MODELS[family], **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_published_descriptions_are_read(family: Family) -> None:
    read_family, described = from_hf(PUBLISHED[family], "config.json")
    assert read_family == family
    assert choose_family(described) == family
    again = from_hf(to_hf(described, family, "float32", Text(4096)), "config.json")
    assert again[0] == family
    assert not differences(again[1], described)


def test_what_the_descriptions_say() -> None:
    llama = from_hf(LLAMA_2, "x")[1]
    assert isinstance(llama, DenseModel)
    assert (llama.rope_theta, llama.head_width, llama.qk_norm) == (1e4, 128, False)
    qwen = from_hf(QWEN3, "x")[1]
    assert (qwen.head_width, qwen.qk_norm, qwen.tied_embeddings) == (128, True, True)
    olmo = from_hf(OLMO_3, "x")[1]
    assert olmo.window is not None
    assert olmo.rope_scaling is not None
    assert (olmo.window.tokens, olmo.window.global_every, olmo.window.rope_theta) == (4096, 4, 5e5)
    assert (olmo.rope_scaling.kind, olmo.rope_scaling.factor) == ("yarn", 8.0)
    assert [olmo.windowed(layer) for layer in range(4)] == [True, True, True, False]
    gemma = from_hf(GEMMA_3, "x")[1]
    assert gemma.window is not None
    assert (gemma.window.rope_theta, gemma.rope_theta, gemma.num_windowed) == (1e4, 1e6, 22)
    assert gemma.tied_embeddings
    assert from_hf({**MISTRAL, "sliding_window": None}, "x")[1].window is None
    moe = from_hf({**QWEN3_MOE, "mlp_only_layers": [0, 1]}, "x")[1]
    assert isinstance(moe, MoEModel)
    assert (moe.first_dense_layers, moe.ffn_width, moe.experts.width) == (2, 6144, 768)
    assert (moe.router.gate, moe.router.normalize) == ("softmax", True)
    renamed = {k: v for k, v in QWEN3_MOE.items() if k != "num_experts"}
    assert from_hf({**renamed, "num_local_experts": 128}, "x")[1] == from_hf(QWEN3_MOE, "x")[1]
    new = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": 1000000, "rope_type": "default"}
    assert from_hf(new, "x")[1] == qwen


def test_sizes_are_those_of_the_published_models() -> None:
    counted = {f: count_parameters(from_hf(PUBLISHED[f], "x")[1]).total for f in FAMILIES}
    assert counted["llama"] == 6_738_415_616
    assert counted["mistral"] == 7_241_732_096
    assert counted["qwen2"] == 494_032_768
    assert counted["qwen3"] == 596_049_920
    assert counted["gemma3_text"] == 999_885_952
    assert counted["mixtral"] == 46_702_792_704
    assert counted["qwen3_moe"] == 30_532_122_624
    # DeepSeek's tensors have a bias for each expert of 58 routers, which are no parameters of ours.
    assert counted["deepseek_v3"] + 58 * 256 == 671_026_419_200
    assert count_parameters(from_hf(DEEPSEEK_V3, "x")[1]).active == 37_552_282_624


@pytest.mark.parametrize(
    ("preset", "family", "total"),
    [
        ("llama3_2_1b", "llama", 1_235_814_400),
        ("qwen2_5_0_5b", "qwen2", 494_032_768),
        ("qwen3_0_6b", "qwen3", 596_049_920),
        ("olmo2_1b", "olmo2", 1_484_916_736),
        ("gemma3_1b", "gemma3_text", 999_885_952),
        ("moe_deepseek_v3", "deepseek_v3", 671_026_404_352),
    ],
)
def test_presets_have_the_sizes_of_the_published_models(
    preset: str, family: Family, total: int
) -> None:
    config = load(f"preset:{preset}")
    assert choose_family(config.model) == family
    assert count_parameters(config.model).total == total
    # Nothing is multiplied that weights of the family lack.
    assert not folds(config.model, Parameterization.of_run(config).forward)
    if family in ("qwen2", "qwen3", "gemma3_text"):
        assert not differences(config.model, from_hf(PUBLISHED[family], "x")[1])


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type='dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' without factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "x": 1}}, "x=1"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling"),
        ("llama", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("mistral", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 21}, "max_window_layers=21"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
        ("olmo3", {"layer_types": ["full_attention"] + ["sliding_attention"] * 31}, "layer_types"),
        ("olmo3", {"sliding_window": None}, "sliding_window is missing"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "wide"}, "width='wide'"),
        ("llama", {"num_key_value_heads": 5}, "num_kv_heads=5 must divide"),
        ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "differ"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("qwen3_moe", {"num_local_experts": 64}, "num_local_experts differ"),
    ],
)
def test_what_we_lack_is_said(family: Family, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        from_hf({**PUBLISHED[family], **change}, "there/config.json")
    assert "there/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "more", "asked", "said"),
    [
        ("llama", {}, "gpt2", "--family=gpt2"),
        ("llama", {}, "qwen3", "--family=qwen3 cannot hold"),
        ("qwen3", {}, "llama", "qk_norm=true"),
        ("qwen2", {"qk_norm": True}, None, "model.qk_norm=true has no counterpart in Qwen2For"),
        ("olmo2", {"qk_norm_over": "head"}, None, "model.norms=after has no counterpart in Qwen3"),
        ("olmo2", {}, "qwen3", "--family=qwen3 cannot hold model.qk_norm_over=width"),
        ("mistral", {}, "llama", "model.window.tokens=7"),
        ("mistral", {"window": {"tokens": 7, "global_every": 2}}, "mistral", "window.global_every"),
        ("mistral", {"window": {"tokens": 7, "rope_theta": 9.0}}, None, "window.rope_theta=9.0"),
        (
            "olmo3",
            {"rope_scaling": {"kind": "linear", "factor": 2.0}},
            None,
            "window.rope_theta=None has no counterpart in Olmo3",
        ),
        (
            "olmo3",
            {"window": {"tokens": 7, "rope_theta": 9.0}},
            None,
            "window.rope_theta=9.0 has no counterpart in Olmo3",
        ),
        ("gemma3_text", {"embedding_scale": 1.0}, None, "model.embedding_scale=1.0"),
        ("gemma3_text", {"tied_embeddings": True}, "olmo3", "--family=olmo3 cannot hold"),
        ("llama", {"rope_fraction": 0.5}, None, "model.rope_fraction=0.5 has no counterpart in Ll"),
        ("llama", {"norms": "both"}, None, "model.norms=both"),
        ("llama", {"activation": "gelu_tanh"}, None, "model.activation=gelu_tanh"),
        ("llama", {"embedding_scale": 2.0}, None, "model.embedding_scale=2.0"),
        ("llama", {"num_heads": 6, "head_dim": 8}, "llama", "must divide width=32"),
        ("mixtral", {"first_dense_layers": 1, "ffn_width": 8}, None, "first_dense_layers=1"),
        ("mixtral", {"router": {"gate": "softmax"}}, None, "router.normalize=false"),
        ("mixtral", {"router": {"gate": "sqrt"}}, None, "router.gate=sqrt"),
        ("qwen3_moe", {"router": {"gate": "sigmoid"}}, None, "router.gate=sigmoid"),
        ("qwen3_moe", {"router": {"scale": 2.0}}, None, "router.scale=2.0"),
        ("qwen3_moe", {"router": {"balance": {"kind": "bias"}}}, None, "balance.kind=bias"),
        (
            "qwen3_moe",
            {"router": {"num_groups": 2, "groups_per_token": 1}},
            None,
            "groups_per_token=1",
        ),
        ("qwen3_moe", {"experts": {**MOE["experts"], "num_shared_experts": 1}}, None, "shared"),
        (
            "qwen3_moe",
            {"experts": {**MOE["experts"], "kind": "latent", "latent_width": 8}},
            None,
            "experts.kind=latent",
        ),
    ],
)
def test_what_they_lack_is_said(
    family: Family, more: dict[str, Any], asked: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        choose_family(model(family, **more), asked)


def test_equal_windows_are_equal() -> None:
    one = model("mistral", window={"tokens": 7, "rope_theta": 1e4})
    assert not differences(one, model("mistral"))
    assert not differences(one, model("mistral", window={"tokens": 7, "global_every": 3}))
    assert differences(one, model("mistral", window={"tokens": 7, "global_every": 2}))
    scaled = {"rope_scaling": {"kind": "linear", "factor": 2.0}}
    assert differences(model("mistral", **scaled), model("mistral", **scaled, window=one.window))


def test_equal_gates_are_equal() -> None:
    chosen = model("qwen3_moe", router={"gate": "softmax_after_topk"})
    divided = model("qwen3_moe", router={"gate": "softmax", "normalize": True})
    plain = model("qwen3_moe", router={"gate": "softmax"})
    assert not differences(chosen, divided)
    assert [key for key, _, _ in differences(chosen, plain)] == ["router.normalize"]
    assert to_hf(plain, "qwen3_moe", "float32", Text(8))["norm_topk_prob"] is False
    assert not differences(model("llama"), model("llama", dropout=0.1, z_loss=1e-4, head_dim=8))


def tensors(family: Family) -> dict[str, torch.Tensor]:
    """Return our parameters and biases of routers with random values."""
    generator = torch.Generator().manual_seed(0)
    specs = [c.spec for c in counterparts(model(family), family)]
    assert [s for s in specs if not s.name.endswith("router.bias")] == [*inventory(model(family))]
    return {s.name: torch.randn(s.shape, generator=generator) for s in specs}


@pytest.mark.parametrize("family", FAMILIES)
def test_split_and_join_are_inverse(family: Family) -> None:
    ours, wanted = tensors(family), counterparts(model(family), family)
    assert [c.spec.name for c in wanted] == list(ours)
    theirs = {n: t for c in wanted for n, t in c.split(ours[c.spec.name]).items()}
    assert len(theirs) == sum(len(c.written) for c in wanted), "no name twice"
    shapes = {name: tuple(t.shape) for name, t in theirs.items()}
    places = locate(wanted, shapes, "there", tied=False)
    for counterpart in wanted:
        name = counterpart.spec.name
        joined = counterpart.join(places[name], theirs.__getitem__)
        if counterpart.offset:  # rounded when it was subtracted
            assert torch.equal(joined, counterpart.kept(ours[name], torch.float32))
            assert (joined - ours[name]).abs().max() <= 2**-23
        else:
            assert torch.equal(joined, ours[name])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_read(family: Family) -> None:
    ours, wanted = tensors(family), counterparts(model(family), family)
    theirs = {n: t for c in wanted for n, t in c.split(ours[c.spec.name]).items()}
    for layer in range(2):
        prefix = f"blocks.{layer}.ffn.experts"
        if f"{prefix}.gate" not in ours:
            continue
        kept = {
            n: t for n, t in theirs.items() if f"layers.{layer}." not in n or "experts" not in n
        }
        place = f"model.layers.{layer}.mlp"
        if family == "mixtral":
            kept[f"{place}.gate.weight"] = kept.pop(
                f"model.layers.{layer}.block_sparse_moe.gate.weight"
            )
        halves = [ours[f"{prefix}.gate"], ours[f"{prefix}.up"]]
        kept[f"{place}.experts.gate_up_proj"] = torch.cat(halves, dim=1)
        kept[f"{place}.experts.down_proj"] = ours[f"{prefix}.down"]
        theirs = kept
    shapes = {name: tuple(t.shape) for name, t in theirs.items()}
    places = locate(wanted, shapes, "there", tied=False)
    for c in wanted:
        joined = c.join(places[c.spec.name], theirs.__getitem__)
        assert torch.equal(joined, ours[c.spec.name]), c.spec.name


def test_tensors_without_a_place_are_named() -> None:
    wanted = counterparts(model("llama"), "llama")
    shapes = {c.written[0]: c.spec.shape for c in wanted}
    locate(
        wanted, {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}, "x", tied=False
    )
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias has no"):
        locate(wanted, {**shapes, "model.layers.0.self_attn.q_proj.bias": (4,)}, "x", tied=False)
    with pytest.raises(UserError, match=r"model.norm.weight is missing"):
        locate(
            wanted, {n: s for n, s in shapes.items() if n != "model.norm.weight"}, "x", tied=False
        )
    with pytest.raises(UserError, match=r"lm_head.weight has shape \[63, 32\].*\[64, 32\]"):
        locate(wanted, {**shapes, "lm_head.weight": (63, 32)}, "x", tied=False)


def test_a_parameter_without_a_place_is_named() -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.router\.weight has no counterpart"):
        counterparts(model("mixtral"), "llama")
    shared = model("mixtral", experts={**MOE["experts"], "num_shared_experts": 1})
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.shared\.gate\.weight has no counterpart"):
        counterparts(shared, "mixtral")


def test_a_checkpoint_holds_the_model_and_no_more() -> None:
    described = model("mixtral")
    shapes = {spec.name: spec.shape for spec in inventory(described)}
    router = "blocks.1.ffn.router"
    bias = check_names(described, {**shapes, f"{router}.load": (4,), f"{router}.bias": (4,)}, "x")
    assert bias == (f"{router}.bias",)
    with pytest.raises(UserError, match=r"tensor blocks\.0\.extra has no counterpart"):
        check_names(described, {**shapes, "blocks.0.extra": (1,)}, "x")
    with pytest.raises(UserError, match=r"final_norm\.weight has shape"):
        check_names(described, {**shapes, "final_norm.weight": (1,)}, "x")
    with pytest.raises(UserError, match=r"head\.weight is missing"):
        check_names(described, {n: s for n, s in shapes.items() if n != "head.weight"}, "x")


USUAL = 8**-0.5  # heads of width 8


def scales(**more: float) -> ForwardScales:
    return ForwardScales(**{"embedding": 1, "residual": 1, "attention": USUAL, "output": 1, **more})


def test_multipliers_find_their_weights() -> None:
    assert folds(model("llama"), scales(attention=1 / 8**0.5)) == ()
    assert folds(model("llama"), scales(attention=4**0.5 / 8 / 2**0.5)) != ()
    half = {"embedding": 0.5, "residual": 0.25, "attention": USUAL / 2, "output": 0.5}
    folding = folds(model("llama"), scales(**half))
    assert {fold.scale: fold.factor for fold in folding} == {**half, "attention": 0.5}
    assert all(fold.exact for fold in folding)
    by_scale = {fold.scale: fold.parameters for fold in folds(model("qwen3_moe"), scales(**half))}
    assert by_scale["attention"] == ("attention.q_norm",)
    assert by_scale["residual"] == ("attention.wo", "ffn.experts.down", "ffn.down")
    routed = {fold.scale: fold for fold in folds(model("qwen3_moe"), scales(experts=0.25))}
    assert routed["experts"] == Fold("experts", 0.25, ("ffn.experts.down",))
    with pytest.raises(UserError, match=r"multiplies the output by 0\.5"):
        folds(model("llama", tied_embeddings=True), scales(output=0.5))
    with pytest.raises(UserError, match="multiplies the embedding by 3"):
        folds(model("llama", tied_embeddings=True), scales(embedding=3))


def test_folding_rounds_once_and_touches_nothing_else() -> None:
    fold = Fold("residual", 1 / 3, ("attention.wo", "ffn.down"))
    assert not fold.exact
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exact = (tensor.double() / 3).float()
    assert torch.equal(folded("blocks.3.attention.wo.weight", tensor, [fold]), exact)
    assert torch.equal(folded("blocks.3.ffn.down.weight", tensor, [fold]), exact)
    for name in ("blocks.3.attention.wq.weight", "blocks.3.ffn.experts.down", "head.weight"):
        assert folded(name, tensor, [fold]) is tensor
