"""Mixtures of experts against torch's compiler and recomputation, and transformers' models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from allometry.models.documents import Documents
from allometry.models.loss import IGNORE
from mixtures import SHARED, B, E, K, L, V, assert_same, small, tokens, train

SLOW = pytest.mark.slow


@pytest.mark.parametrize("selective", [False, True])
def test_recomputation_changes_nothing(selective):
    model, again = small("sqrt", "fp32"), small("sqrt", "fp32")
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kept = [torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    for block in again.blocks.values():
        block.forward = partial(checkpoint, block.forward, **options)
    assert_same(train(model), train(again), 0.0)
    for one, other in zip(
        model.take_statistics().values(), again.take_statistics().values(), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        ("latent", "aot_eager"),
        ("sqrt", "aot_eager"),
        pytest.param("sqrt", "inductor", marks=SLOW),
    ],
)
def test_blocks_compile_whole(form, backend):
    torch._dynamo.reset()
    model, compiled = (small(form, "fp32", num_layers=2) for _ in range(2))
    compiled.blocks["1"].compile(backend=backend, fullgraph=True)
    assert_same(train(model), train(compiled), 1e-5)
    (seen,), (again,) = (one.take_statistics().values() for one in (model, compiled))
    for one, other in zip(seen, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_blocks_compile_whole_with_filling():
    torch._dynamo.reset()
    model, compiled = (small("shared", "fp32", num_layers=2) for _ in range(2))
    compiled.blocks["1"].compile(backend="aot_eager", fullgraph=True)
    cuts = torch.tensor([0, L - 3, L, 2 * L - 5, 2 * L], dtype=torch.int32)
    counted = torch.arange(L) < torch.tensor([[L - 3], [L - 5]])
    documents = Documents(cuts, L, torch.arange(L).expand(B, L), counted_BL=counted)
    for each in (model, compiled):
        targets = tokens(1).masked_fill(~counted, IGNORE)
        (each(tokens(), targets, documents).total / (B * L)).backward()
    first, second = (
        {name: p.grad for name, p in each.named_parameters()} for each in (model, compiled)
    )
    assert_same(first, second, 1e-5)
    (seen,), (again,) = (one.take_statistics().values() for one in (model, compiled))
    for one, other in zip(seen, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert float(seen.tokens) == 2 * L - 8


NAMES = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "final_norm": "model.norm",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    **{f"w{x}": f"{x}_proj" for x in "qkvo"},
    "ffn": "mlp",
    "router": "gate",
    "shared": "shared_experts",
    **{x: f"{x}_proj" for x in ("gate", "up", "down")},
}


def renamed(model: nn.Module) -> dict[str, Tensor]:
    """Rename the state as in transformers, where gate and up of the experts are one tensor."""
    state = {}
    own = dict(model.state_dict())
    for name in list(own):
        if name.endswith("experts.gate"):
            up = own.pop(name.replace("gate", "up"))
            own[name.replace("gate", "gate_up")] = torch.cat([own.pop(name), up], dim=1)
        if name.endswith("router.load"):
            del own[name]
        if name.endswith("router.bias"):
            bias = own.pop(name)
            state[f"model.layers.{name.split('.')[1]}.mlp.gate.e_score_correction_bias"] = bias
    for name, value in own.items():
        parts = [NAMES.get(part, part) for part in name.split(".")]
        parts = ["gate_up_proj" if part == "gate_up" else part for part in parts]
        state[".".join(parts)] = value
    return state


OPTIONS = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
    "num_experts_per_tok": K,
}


NO_BALANCE = {"balance": {"kind": "none"}}


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_equals_hugging_face(family):
    """Logits, and gradients through routers and experts."""
    transformers = pytest.importorskip("transformers")
    common = {"num_layers": 2, "first_dense_layers": 0, "ffn_width": None}
    options = dict(OPTIONS)
    if family == "mixtral":
        model = small(dtype="fp32", router={"gate": "softmax_after_topk"} | NO_BALANCE, **common)
        options |= {"num_local_experts": E, "intermediate_size": 16}
        twin = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options))
    else:
        router = {"normalize": True, **NO_BALANCE}
        model = small(dtype="fp32", router=router, qk_norm=True, **common)
        options |= {"num_experts": E, "moe_intermediate_size": 16, "norm_topk_prob": True}
        twin = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**options))
    state = {n: v for n, v in renamed(model).items() if "correction" not in n}
    twin.load_state_dict(state)
    got, expected = model(tokens()), twin(tokens()).logits
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    mix = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * mix).sum().backward()
    (expected * mix).sum().backward()
    ours, theirs = model.blocks["0"].ffn, twin.model.layers[0].mlp
    pairs = (
        (ours.router.weight, theirs.gate.weight),
        (ours.experts.down, theirs.experts.down_proj),
    )
    for one, other in pairs:
        assert (one.grad - other.grad).abs().max() < 2e-5 * other.grad.abs().max()


def test_mixture_equals_deepseek_v3():
    """Sigmoid, groups, a bias for selection, scale and shared experts, as in Ling 2.0."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    experts = {**SHARED, "num_experts": 8, "experts_per_token": 3}
    router = {"gate": "sigmoid", "normalize": True, "scale": 2.5, "num_groups": 4}
    router |= {"groups_per_token": 2, "balance": {"kind": "bias"}}
    ffn = small(dtype="fp32", experts=experts, router=router).blocks["1"].ffn
    ffn.router.bias.copy_(torch.linspace(0, 0.3, 8))
    config = transformers.DeepseekV3Config(
        hidden_size=24,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    twin = DeepseekV3MoE(config)
    holder = nn.ModuleDict({"blocks": nn.ModuleDict({"0": nn.ModuleDict({"ffn": ffn})})})
    prefix = "model.layers.0.mlp."
    state = {name.removeprefix(prefix): v for name, v in renamed(holder).items()}
    twin.load_state_dict(state)
    x_BLD = torch.randn(B, L, 24, generator=torch.Generator().manual_seed(2))
    got, expected = ffn(x_BLD)[0], twin(x_BLD)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
