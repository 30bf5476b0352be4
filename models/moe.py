"""Mixture of experts without token dropping and without capacity factors.

A router sends each token to k of E experts (gated feed-forwards, arXiv 2401.04088). Shared experts,
if any, process every token (arXiv 2401.06066). Latent experts work in a narrower space, with one
projection down to this space and one back up. Models know no ranks: expert parallelism replaces
``Experts.exchange``.
"""

# B batch, L length, T = B*L, D width, E experts, k experts that a token visits, S = T*k rows
# sorted by expert, F hidden width of an expert

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from allometry.configs.decoder import Activation
from allometry.configs.model import AuxiliaryBalance, BiasBalance, MoEModel
from allometry.models.fp8 import Quantised
from allometry.models.grouped import Tokens, multiply_groups
from allometry.models.layers import Linear, RMSNorm, gated
from allometry.models.parameters import OwnsParameters
from allometry.models.products import Stacked
from allometry.models.rotary import Geometry
from allometry.models.router import Router, RouterStatistics
from allometry.models.transformer import Block, FeedForward, Transformer
from allometry.models.visits import gather_rows, sort_by_expert, spread_rows
from allometry.scaling.inventory import Specs, within
from allometry.scaling.parameterizations.base import ForwardScales

Compute = Callable[[Tensor, Tensor], Tensor]
"""(rows sorted by local expert, number of rows of each local expert) -> the experts' outputs."""

Finish = Callable[[Compute], Tensor]
"""Compute function -> outputs [S, D] of the experts for the rows that were sent, in their order."""

Exchange = Callable[[Tensor, Tensor], Finish]
"""(rows [S, D] sorted by expert, rows of each expert [E]) -> function that ends the exchange."""


def stay(x_SD: Tensor, counts_E: Tensor) -> Finish:
    """Exchange without communication, for a rank with all experts."""
    return lambda compute: compute(x_SD, counts_E)


class Experts(OwnsParameters):
    """Routed experts, down(activation(gate(x)) * up(x)) each, as grouped products.

    Weights may be DTensors; the local shard determines the experts and the part of F on this rank.
    Every weight gets a gradient, which is zero for experts without tokens.
    """

    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def __init__(self, specs: Specs, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.num_experts = specs["gate"].shape[0]
        self.exchange: Exchange = stay
        for name in ("gate", "up", "down"):
            self.own(name, specs[name])
        self.gate_up = Stacked((self, "gate"), (self, "up"))
        self.down_only = Stacked((self, "down"))

    def forward(
        self,
        x_TD: Tensor,
        gates_Tk: Tensor,
        experts_Tk: Tensor,
        beside: Callable[[], Tensor] | None = None,
        kept: Quantised | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (y, result of ``beside``): y [T, D] is the gate-weighted sum over experts.

        y has x's type. ``beside`` runs while rows are in transit; without ``beside`` the second
        result is None. ``kept``: the FP8 copy by ``fp8.save`` of ``x_TD``, or of the shard of
        ``x_TD`` before its all-gather.
        """
        sorting, tokens = sort_by_expert(experts_Tk, self.num_experts), None
        if self.gate_up.saves and self.exchange is stay and torch.is_grad_enabled():
            tokens = Tokens.of(x_TD, sorting.token_S, self.gate_up, kept)
        finish = self.exchange(spread_rows(x_TD, sorting), sorting.counts_E)
        made = None if beside is None else beside()
        return gather_rows(finish(partial(self.compute, tokens=tokens)), gates_Tk, sorting), made

    def compute(self, x_SD: Tensor, counts_E: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Return [S, D] for rows sorted by the experts of this rank."""
        gate_up = multiply_groups(x_SD, self.gate_up, counts_E, tokens)
        saves, feeds = self.gate_up.saves, self.down_only
        h_SF = gated(gate_up, self.activation, saves=saves, feeds=feeds)
        y_SD = multiply_groups(h_SF, self.down_only, counts_E)
        assert isinstance(y_SD, Tensor)
        return y_SD


class MoEFeedForward(nn.Module):
    """``scale`` x routed experts + shared experts; router and shared experts read the full width.

    With gate "sqrt" and shared experts, both terms are multiplied by sqrt(1/2) (arXiv 2603.28743).
    ``routed`` is the parameterization's multiplier of the routed experts.
    """

    def __init__(self, specs: Specs, model: MoEModel, routed: float = 1.0) -> None:
        super().__init__()
        experts, shared = model.experts, within(specs, "shared")
        self.shared_scale = math.sqrt(0.5) if model.router.gate == "sqrt" and shared else 1.0
        self.routed_scale = model.router.scale * self.shared_scale * routed
        self.router = Router(specs["router.weight"], model.router, experts.experts_per_token)
        down, gain, up = (specs.get(f"latent_{name}.weight") for name in ("down", "norm", "up"))
        self.latent_down = Linear(down) if down else None
        self.experts = Experts(within(specs, "experts"), model.activation)
        self.latent_norm = RMSNorm(gain, model.norm_eps) if gain else None
        self.latent_up = Linear(up) if up else None
        self.shared = FeedForward(shared, model.activation) if shared else None

    def forward(
        self, x_BLD: Tensor, counted_BL: Tensor | None = None
    ) -> tuple[Tensor, RouterStatistics]:
        """Return [B, L, D] and the router statistics of the tokens ``counted_BL``."""
        x_TD = x_BLD.flatten(0, 1)
        counted_T = None if counted_BL is None else counted_BL.flatten()
        gates_Tk, experts_Tk, statistics, kept = self.router(x_TD, counted_T)
        if self.routed_scale != 1.0 and self.latent_norm is None:
            gates_Tk = gates_Tk * self.routed_scale
        if kept is not None and self.shared is not None:
            self.shared.gate_up.offer(x_BLD, kept)
        if self.latent_down is None:
            h_TD = x_TD
        else:
            if kept is not None:
                self.latent_down.stacked.offer(x_TD, kept)
            h_TD, kept = self.latent_down(x_TD), None
        shared = None if self.shared is None else partial(self.shared, x_BLD)
        y_TD, shared_BLD = self.experts(h_TD, gates_Tk, experts_Tk, beside=shared, kept=kept)
        if self.latent_norm is not None:
            y_TD = self.latent_norm(y_TD)
            if self.routed_scale != 1.0:  # not in the gates: the norm would remove it
                y_TD = y_TD * self.routed_scale
        if self.latent_up is not None:
            y_TD = self.latent_up(y_TD)
        y_BLD = y_TD.view(x_BLD.shape)
        if shared_BLD is not None:
            y_BLD = y_BLD + (
                shared_BLD if self.shared_scale == 1.0 else shared_BLD * self.shared_scale
            )
        return y_BLD, statistics


class MoEBlock(Block):
    """Transformer block with a mixture of experts as its feed-forward."""

    def __init__(self, specs: Specs, model: MoEModel, scales: ForwardScales, layer: int) -> None:
        ffn = MoEFeedForward(within(specs, "ffn"), model, scales.experts)
        super().__init__(specs, model, scales, ffn, layer)

    def forward(self, x_BLD: Tensor, geometry: Geometry) -> tuple[Tensor, RouterStatistics]:
        """Return [B, L, D] in x's type, and the router statistics."""
        x_BLD = self.attended(x_BLD, geometry)
        documents = geometry.documents
        counted_BL = None if documents is None else documents.counted_BL
        y_BLD, statistics = self.ffn(self.ffn_norm(x_BLD), counted_BL)
        return x_BLD + self._scaled(self.ffn_post_norm(y_BLD)), statistics


class MoETransformer(Transformer):
    """Transformer with experts in all blocks after the first dense blocks."""

    @override
    def _make_block(
        self, specs: Specs, model: MoEModel, scales: ForwardScales, layer: int
    ) -> Block:
        if model.has_experts(layer):
            return MoEBlock(specs, model, scales, layer)
        return super()._make_block(specs, model, scales, layer)


def routers(model: Transformer) -> dict[int, Router]:
    """Return the routers of a model, or of a part of a model, by layer."""
    return {
        int(layer): module
        for layer, block in model.blocks.items()
        for module in block.modules()
        if isinstance(module, Router)
    }


@torch.no_grad()
def begin_step(model: Transformer, tokens: int | Tensor) -> None:
    """Set the routers' token count of the step, over all micro-batches and ranks; must be positive.

    Counts every token that passes through the model, with or without a target, except padding.
    Routers route a token once for each stream. For example, ``begin_step(model, 8 * 4096)`` for a
    global batch of 8 sequences.
    """
    for router in routers(model).values():
        router.tokens.fill_(tokens * model.num_streams)


@torch.no_grad()
def set_loads(model: Transformer, counts: Mapping[int, Tensor]) -> None:
    """Set the loads of the auxiliary loss from the visits [E], by layer."""
    by_layer = routers(model)
    assert counts.keys() == by_layer.keys(), (sorted(counts), sorted(by_layer))
    for layer, router in by_layer.items():
        router.load.copy_(loads_of(counts[layer].to(router.load.device)))


@torch.no_grad()
def end_step(model: Transformer, counts: Mapping[int, Tensor]) -> None:
    """Update each router with the visits [E] to its experts in the global batch, by layer.

    Sets the loads for the next step, and moves each bias by ``rate``: up for experts with fewer
    visits than the mean, down for experts with more (arXiv 2408.15664, algorithm 1). A frozen
    router also keeps its bias, so its routing does not change.
    """
    set_loads(model, counts)
    for layer, router in routers(model).items():
        balance = router.config.balance
        if isinstance(balance, BiasBalance) and router.weight.requires_grad:
            wanted_E = wanted_of(counts[layer].to(router.bias.device), balance)
            router.bias.add_(wanted_E.to(router.bias.dtype), alpha=balance.rate)


def loads_of(counts_E: Tensor) -> Tensor:
    """Return the fraction of visits of each expert, [..., E] fp64, from visits [..., E]."""
    wide_E = counts_E.double()
    return wide_E / wide_E.sum(-1, keepdim=True)


def wanted_of(counts_E: Tensor, balance: BiasBalance) -> Tensor:
    """Return 1 for experts with fewer visits [..., E] than the mean, -1 for more, 0 if equal; fp64.

    With ``balance.centered`` the mean of these values over experts is subtracted (Ling 2.0). For
    example, visits [1, 2, 6] give [1, 1, -1].
    """
    wide_E = counts_E.double()
    wanted_E = (wide_E.mean(-1, keepdim=True) - wide_E).sign()
    return wanted_E - wanted_E.mean(-1, keepdim=True) if balance.centered else wanted_E


def balance_record(statistics: RouterStatistics, model: MoEModel) -> dict[str, float | list[float]]:
    """Return the metrics of one router in one step, from statistics of the global batch.

    ``max_vio``: (largest - mean) / mean of the experts' loads (arXiv 2408.15664). ``entropy`` (in
    nats) and ``squared_log_z``: means over tokens. ``balance``: E x sum_e f_e P_e with the loads of
    this step, 1 for uniform loads. ``auxiliary_loss`` and ``z_loss``: balance and squared_log_z
    times their coefficients, if the model has them. ``load``: fraction of visits of each expert.
    """
    counts_E = statistics.counts_E.double().cpu()
    tokens = float(statistics.tokens)
    load_E = counts_E / counts_E.sum()
    mean_E = statistics.probabilities_E.double().cpu() / tokens
    balance = float(len(counts_E) * (load_E * mean_E).sum())
    squared_log_z = float(statistics.squared_log_z) / tokens
    record: dict[str, float | list[float]] = {
        "max_vio": float(counts_E.max() / counts_E.mean()) - 1.0,
        "entropy": float(statistics.entropy) / tokens,
        "squared_log_z": squared_log_z,
        "balance": balance,
        "load": load_E.tolist(),
    }
    if isinstance(model.router.balance, AuxiliaryBalance):
        record["auxiliary_loss"] = model.router.balance.coefficient * balance
    if model.router.z_loss:
        record["z_loss"] = model.router.z_loss * squared_log_z
    return record
