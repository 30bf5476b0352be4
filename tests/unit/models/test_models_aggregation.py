"""Weights of the sum over experts as their number grows: gates of HyperP and rules of MSSP."""

# T tokens, E experts, k experts per token, N width, M number of experts relative to the base

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.support.scaled import optimizer, parameterization
from torch import Tensor

from allometry.configs.model import MoEModel, RouterConfig
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.models.moe import MoEFeedForward
from allometry.models.router import gates, scores, select
from allometry.optim.build import build_optimizer
from allometry.scaling.parameterization import Parameterization


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def mixed(gate: str, k: int) -> float:
    """Return the RMS of a sum over k experts whose outputs are independent normal numbers."""
    generator = torch.Generator().manual_seed(k)
    config = RouterConfig.model_validate({"gate": gate})
    logits_TE = 0.2 * torch.randn(256, 128, generator=generator)
    scores_TE = scores(logits_TE, config)
    gates_Tk = gates(logits_TE, scores_TE, select(scores_TE, None, config, k), config)
    outputs_TkD = torch.randn(256, k, 128, generator=generator)
    return rms((gates_Tk[:, :, None] * outputs_TkD).sum(1))


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 32, 64])
def test_gates_under_a_root_keep_the_size_of_a_sum_of_experts(k: int) -> None:
    assert mixed("sqrt", k) == pytest.approx(1.0, rel=0.02)
    assert mixed("softmax_after_topk", k) == pytest.approx(k**-0.5, rel=0.2)
    if k == 1:
        assert mixed("sqrt", 1) == mixed("softmax_after_topk", 1)


REGIMES = {
    # width, experts, top-k and expert width relative to the base, for a scale s
    "I": lambda s: (s, 1, 1, s),
    "II": lambda s: (s, s, s, 1),
    "III": lambda s: (s, s, s, s),
}
WIDTH, EXPERTS, EXPERT_WIDTH = 32, 32, 8


def grown(regime: str, s: int, visits: int) -> tuple[MoEModel, Parameterization]:
    """Return a one-block model, s times the base, and MSSP's rules for it."""
    width, experts, k, expert_width = REGIMES[regime](s)
    model = MoEModel.model_validate(
        {
            "vocab_size": 256,
            "width": WIDTH * width,
            "num_layers": 1,
            "num_heads": 2 * width,
            "head_dim": 16,
            "experts": {
                "num_experts": EXPERTS * experts,
                "experts_per_token": visits * k,
                "width": EXPERT_WIDTH * expert_width,
                "kind": "swiglu",
            },
            "router": {"gate": "sigmoid", "balance": {"kind": "none"}},
        }
    )
    config = parameterization(
        f"mssp-{regime}",
        base_width=WIDTH,
        base_experts=EXPERTS,
        base_experts_per_token=visits,
        base_expert_width=EXPERT_WIDTH,
    )
    return model, Parameterization(config, model)


@torch.no_grad()
def slope_at_the_start(regime: str, visits: int, scales: list[int], kept: bool = True) -> float:
    """Return the power of s in the RMS of the routed sum; ``kept`` False: muP's expert init."""
    sizes = []
    for s in scales:
        model, rules = grown(regime, s, visits)
        module = build_model(model, rules, "fp32")
        initialize(module, rules, seed=s)
        ffn = module.blocks["0"].ffn
        assert isinstance(ffn, MoEFeedForward)
        if regime == "III":
            assert torch.equal(ffn.experts.down, ffn.experts.down[:1].expand_as(ffn.experts.down))
        if not kept and regime == "II":
            ffn.experts.down.div_(math.sqrt(s))
        if not kept and regime == "III":
            for weight in (ffn.experts.gate, ffn.experts.up, ffn.experts.down):
                generator = torch.Generator().manual_seed(weight.shape[1])
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) / weight.shape[2] ** 0.5
                )
        x_BLD = torch.randn(1, 64, model.width, generator=torch.Generator().manual_seed(0))
        sizes.append(rms(ffn(x_BLD)[0]))
    return float(np.polyfit(np.log2(scales), np.log2(sizes), 1)[0])


@pytest.mark.parametrize("visits", [EXPERTS, EXPERTS // 4])
@pytest.mark.parametrize("regime", ["II", "III"])
def test_sums_over_more_experts_keep_their_size(regime: str, visits: int) -> None:
    scales = [1, 2, 4]
    assert slope_at_the_start(regime, visits, scales) == pytest.approx(0.0, abs=0.15)
    # The control: with independent experts and without the root of M, averages shrink.
    drawn_apart = slope_at_the_start(regime, visits, scales, kept=False)
    assert drawn_apart == pytest.approx(-0.5, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["II", "III"])
def test_sums_over_many_experts_keep_their_size(regime: str) -> None:
    scales = [1, 2, 4, 8]
    assert slope_at_the_start(regime, EXPERTS, scales) == pytest.approx(0.0, abs=0.15)
    drawn_apart = slope_at_the_start(regime, EXPERTS, scales, kept=False)
    assert drawn_apart == pytest.approx(-0.5, abs=0.15)


def test_fixed_numbers_of_experts_keep_their_size() -> None:
    """Regime I; its routers start at zero, so that all gates are one half."""
    model, rules = grown("I", 2, 4)
    module = build_model(model, rules, "fp32")
    initialize(module, rules, seed=0)
    assert not module.blocks["0"].ffn.router.weight.any()
    assert slope_at_the_start("I", EXPERTS, [1, 2, 4]) == pytest.approx(0.0, abs=0.15)


@pytest.mark.parametrize("visits", [EXPERTS, EXPERTS // 4])
def test_experts_that_start_alike_part_in_a_few_steps(visits: int) -> None:
    model, without = grown("III", 1, visits)
    config = optimizer("adamw", lr=3e-3)
    rules = Parameterization(without.config, model, config)
    module = build_model(model, rules, "fp32")
    initialize(module, rules, seed=0)
    updates = build_optimizer(module.named_parameters(), parameter_specs(module), rules, config)
    tokens_BL = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))
    experts = module.blocks["0"].ffn.experts
    for weight in (experts.gate, experts.up, experts.down):
        assert torch.equal(weight, weight[:1].expand_as(weight))
    for _ in range(3):
        updates.zero_grad()
        module(tokens_BL[:, :-1], tokens_BL[:, 1:].contiguous()).total.div(256).backward()
        updates.step()
    for weight in (experts.gate, experts.up, experts.down):
        assert torch.isfinite(weight).all()
        flat = weight.detach().flatten(1)
        apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        apart.fill_diagonal_(math.inf)
        assert apart.min() > 1e-6
