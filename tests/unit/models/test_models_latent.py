"""Multi-head latent attention against its equations, one token and one head at a time."""

# T tokens, N heads, n, r components of a query without and with rotation, v width of a value

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.models.latent import LatentAttention
from allometry.models.rotary import Geometry, turn_of
from allometry.scaling.count import attention_flops, flops_per_token
from allometry.scaling.inventory import attention_specs, within
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.saved import Block, Kernels
from allometry.scaling.shapes import at_width, width_unit
from kept import kept_of_block

WIDTHS = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 8, "mscale_all_dim": 0.8}
L, LENGTHS = 12, [7, 5, 12]


def model(**more: Any) -> DenseModel:
    latent = WIDTHS | {"q_lora_rank": 14} | more.pop("latent", {})
    sizes = {"vocab_size": 64, "width": 32, "num_layers": 2, "num_heads": 4, "ffn_width": 48}
    return DenseModel(**sizes | {"latent_attention": latent, "rope_scaling": YARN} | more)


def attention(config: DenseModel) -> LatentAttention:
    specs = {spec.name: spec for spec in attention_specs(config, "attention")}
    made = LatentAttention(within(specs, "attention"), config, config.score_factor * 0.3, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return made.double()


def documents() -> Documents:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, L)
    return Documents(ends, max(LENGTHS), positions_BL)


def by_formula(state: dict[str, Tensor], config: DenseModel, x_TD: Tensor) -> Tensor:
    """Compute DeepSeek-V2's eq. 37-47 on one document."""
    latent = config.latent_attention
    assert latent is not None
    n, r, v = latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.v_head_dim

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean() + latent.norm_eps).sqrt() * gain

    turn = turn_of(
        torch.arange(len(x_TD))[None], 1e4, config.rope_scaling, rotary_width=r, dtype=torch.float64
    )
    cos_Th, sin_Th = (each[0, :, 0] for each in turn)

    def rotated(x: Tensor, position: int) -> Tensor:
        z = torch.complex(x[: r // 2], x[r // 2 :])
        z = z * torch.complex(cos_Th[position], sin_Th[position])
        return torch.cat([z.real, z.imag])

    queries, keys, values = [], [], []
    for position, x in enumerate(x_TD):
        q = x
        if latent.q_lora_rank is not None:
            q = norm(state["latent_q.weight"] @ x, state["q_norm.weight"])
        q_NH = (state["wq.weight"] @ q).view(-1, n + r)
        shared = state["latent_kv.weight"] @ x
        c = norm(shared[: latent.kv_lora_rank], state["kv_norm.weight"])
        kv_NM = (state["wkv.weight"] @ c).view(-1, n + v)
        turned = rotated(shared[latent.kv_lora_rank :], position)
        queries.append([torch.cat([q[:n], rotated(q[n:], position)]) for q in q_NH])
        keys.append([torch.cat([kv[:n], turned]) for kv in kv_NM])
        values.append([kv[n:] for kv in kv_NM])
    window = config.window.tokens if config.window else len(x_TD)
    rows = []
    for t in range(len(x_TD)):
        seen = range(max(0, t + 1 - window), t + 1)
        heads = []
        for head in range(config.num_heads):
            scores = torch.stack([queries[t][head] @ keys[s][head] for s in seen])
            weights = (0.3 * config.score_factor * scores).softmax(0)
            heads.append(sum(w * values[s][head] for w, s in zip(weights, seen, strict=True)))
        rows.append(state["wo.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latent": {"q_lora_rank": None}},
        {"window": {"tokens": 5}},
        {"latent": {"v_head_dim": 10}},
    ],
    ids=["low rank", "full queries", "window", "equal widths"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_equals_the_formulas(options: dict[str, Any], packed: bool) -> None:
    config = model(**options)
    made = attention(config)
    generator = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(2, L, 32, dtype=torch.float64, generator=generator)
    there = documents() if packed else None
    positions_BL = there.positions_BL if there is not None else torch.arange(L)[None]
    turn = turn_of(positions_BL, 1e4, config.rope_scaling, rotary_width=4, dtype=torch.float64)
    y_BLD = made(x_BLD, Geometry(turn, turn, there))
    state = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    bounds = itertools.accumulate(LENGTHS if packed else [L, L], initial=0)
    parts = [
        by_formula(state, config, x_BLD.flatten(0, 1)[a:b]) for a, b in itertools.pairwise(bounds)
    ]
    wanted_TD = torch.cat(parts)
    torch.testing.assert_close(y_BLD.flatten(0, 1), wanted_TD, rtol=0, atol=1e-12)
    weights_TD = torch.randn(wanted_TD.shape, dtype=torch.float64, generator=generator)
    got = torch.autograd.grad((y_BLD.flatten(0, 1) * weights_TD).sum(), list(made.parameters()))
    expected = torch.autograd.grad((wanted_TD * weights_TD).sum(), list(state.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["blocked", "flash", "packed", "masked", "reference"])
def test_back_ends_take_narrow_values(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 12), (2, 12), (2, 7)
    q, k, v = (
        torch.randn(2, L, n, width, dtype=torch.float64, generator=generator).requires_grad_()
        for n, width in sizes
    )
    there = None if backend == "flash" else documents()
    o_BLNv = attend(q, k, v, there, 0.4, backend)
    wanted = attend(q, k, v, there, 0.4, "reference")
    assert o_BLNv.shape == (2, L, 4, 7)
    torch.testing.assert_close(o_BLNv, wanted, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(o_BLNv.square().sum(), (q, k, v)),
        torch.autograd.grad(wanted.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_scores_are_multiplied_by_yarns_factor() -> None:
    """DeepSeek-V3's factor is (0.1 m ln s + 1)^2 / sqrt(query width)."""
    config = model()
    scales = Parameterization(StandardParameterization(), config).forward
    assert scales.attention == pytest.approx(config.score_factor / 10**0.5, rel=1e-15)
    assert config.score_factor == pytest.approx((0.1 * 0.8 * math.log(4) + 1) ** 2, rel=1e-15)
    assert config.head_width == 10
    assert model(rope_scaling=None).score_factor == 1.0


def test_flops_count_narrow_values() -> None:
    config = model()
    assert attention_flops(config, 9) == 4 * (10 + 5) * 10
    products = 32 * 14 + 14 * 40 + 32 * 14 + 10 * 44 + 20 * 32
    forward = 2 * (2 * (products + 3 * 32 * 48) + 64 * 32) + 2 * attention_flops(config, 9)
    assert flops_per_token(config, 9).forward == forward


def test_ranks_grow_with_the_width() -> None:
    config = model()
    wide = at_width(config, 96)
    assert wide.latent_attention is not None
    assert (wide.latent_attention.q_lora_rank, wide.latent_attention.kv_lora_rank) == (42, 30)
    assert (wide.num_heads, wide.head_width, wide.value_width) == (12, 10, 5)
    assert width_unit(config) == 16


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "latent", [{}, {"q_lora_rank": None}, {"v_head_dim": 10}], ids=["low", "full", "equal widths"]
)
def test_the_memory_estimate_is_what_autograd_keeps(latent: dict[str, Any], compute: str) -> None:
    """Equal to the byte, except for copies of gains in the compute type."""
    config = model(latent=latent)
    tokens_BL = torch.zeros(4, L, dtype=torch.long)
    measured, of_gains = kept_of_block(
        config, compute, tokens_BL, lambda block, x, geometry: block.attended(x, geometry)
    )
    kernels = Kernels(2 if compute == "bf16" else 4, False, scores=4 * config.num_heads)
    rows = Block(config, 0, kernels)._attention()
    assert measured - of_gains == 4 * L * sum(rows.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads=2: with latent_attention"),
        ({"head_dim": 8}, "head_dim=8 has no place in latent_attention"),
        ({"qk_norm": True}, "qk_norm=True has no place"),
        ({"qkv_bias": True}, "qkv_bias=True has no place"),
        ({"rope_fraction": 0.5}, "rope_fraction=0.5 has no place"),
        ({"latent": {"v_head_dim": 11}}, "v_head_dim=11 must not exceed"),
        ({"latent": {"qk_rope_head_dim": 3}}, "qk_rope_head_dim=3 must be even"),
    ],
)
def test_what_cannot_be_is_said(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        model(**more)
