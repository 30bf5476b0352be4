"""Decoder-only transformer in plain torch, without knowledge of ranks.

RMSNorm before each branch, rotary positions, grouped-query attention and SwiGLU (as in Llama,
arXiv 2302.13971), or the alternatives of ``configs.decoder``; ``moe.py`` replaces the feed-forward
by experts. The number of heads follows from the local output width of each linear layer, so tensor
parallelism can shard heads without changes in this file.
"""

# B batch, L length, D width, N query heads, K key/value heads, H head width, h = H/2,
# F feed-forward width, V vocabulary

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.configs.decoder import Activation
from allometry.configs.model import ModelConfig
from allometry.models.attention import Attend, attend
from allometry.models.documents import Documents
from allometry.models.head import Losses, OutputHead
from allometry.models.latent import LatentAttention
from allometry.models.layers import GATES, Embedding, Linear, RMSNorm, gated
from allometry.models.loss import IGNORE
from allometry.models.multi_token import Depths, ahead_of, followed
from allometry.models.products import Stacked, multiply, separate
from allometry.models.rotary import Geometry, rotate, turn_of
from allometry.models.router import RouterStatistics
from allometry.models.streams import Aggregator, Prefix, repeated, repeated_documents
from allometry.scaling.inventory import Specs, inventory, within
from allometry.scaling.parameterizations.base import ForwardScales


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional norms of queries and keys.

    Context parallelism replaces ``core``.
    """

    def __init__(self, specs: Specs, model: ModelConfig, scale: float, layer: int) -> None:
        super().__init__()
        self.core: Attend = attend
        self.head_width, self.scale = model.head_width, scale
        self.window = model.window_of(layer)
        self.wq, self.wk, self.wv = (
            Linear(specs[f"{w}.weight"], specs.get(f"{w}.bias")) for w in ("wq", "wk", "wv")
        )
        q_norm, k_norm = specs.get("q_norm.weight"), specs.get("k_norm.weight")
        self.q_norm = RMSNorm(q_norm, model.norm_eps) if q_norm else None
        self.k_norm = RMSNorm(k_norm, model.norm_eps) if k_norm else None
        self.norm_over = model.qk_norm_over
        self.wo = Linear(specs["wo.weight"])
        prefix = within(specs, "prefix")
        self.prefix = Prefix(prefix, model.streams) if prefix and model.streams else None
        self.qkv = Stacked(*((w, "weight") for w in (self.wq, self.wk, self.wv)))

    def forward(self, x_BLD: Tensor, geometry: Geometry) -> Tensor:
        """Return [B, L, D]."""
        made = self.project(x_BLD)
        if self.norm_over == "width":
            made = (*self.normed(*made[:2]), made[2])
        q_BLNH, k_BLKH, v_BLKH = (y.unflatten(2, (-1, self.head_width)) for y in made)
        if self.norm_over == "head":
            q_BLNH, k_BLKH = self.normed(q_BLNH, k_BLKH)
        if self.q_norm is None or self.qkv.saves:
            v_BLKH = v_BLKH.contiguous()  # a view would keep queries and keys until backward
        turn = geometry.turn if self.window is None else geometry.windowed
        q_BLNH, k_BLKH = rotate(q_BLNH, *turn), rotate(k_BLKH, *turn)
        given = q_BLNH, k_BLKH, v_BLKH, geometry.documents, self.scale
        if self.prefix is None:
            o_BLNH = self.core(*given, window=self.window)
        else:
            o_BLNH = self.prefix(self.core, *given)
        return self.wo(o_BLNH.flatten(2))

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, [B, L, N H] or [B, L, K H], token by token."""
        made = separate(multiply(x_BLD, self.qkv), self.qkv.rows())
        return tuple(
            linear.plus_bias(y) for linear, y in zip((self.wq, self.wk, self.wv), made, strict=True)
        )

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys after their norms, or unchanged without norms."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


class FeedForward(nn.Module):
    """Gated feed-forward down(activation(gate(x)) * up(x)): SwiGLU or GeGLU (arXiv 2002.05202)."""

    def __init__(self, specs: Specs, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = Linear(specs["gate.weight"])
        self.up = Linear(specs["up.weight"])
        self.down = Linear(specs["down.weight"])
        self.gate_up = Stacked((self.gate, "weight"), (self.up, "weight"))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return [B, L, D]."""
        if not self.gate_up.joins(x_BLD.dtype):  # each output is used while still in the cache
            return self.down(GATES[self.activation].forward(self.gate(x_BLD)) * self.up(x_BLD))
        gate_up = multiply(x_BLD, self.gate_up)
        saves, feeds = self.gate_up.saves, self.down.stacked
        return self.down(gated(gate_up, self.activation, saves=saves, feeds=feeds))


class Block(nn.Module):
    """Transformer block: attention and feed-forward (``ffn``), each added to the residual stream.

    Norms are before each branch, after each branch, or both; ``nn.Identity`` replaces the others.
    """

    def __init__(
        self,
        specs: Specs,
        model: ModelConfig,
        scales: ForwardScales,
        ffn: nn.Module,
        layer: int,
    ) -> None:
        super().__init__()
        self.residual_scale, self.dropout = scales.residual, model.dropout

        def norm(name: str) -> nn.Module:
            spec = specs.get(f"{name}.weight")
            return nn.Identity() if spec is None else RMSNorm(spec, model.norm_eps)

        self.attention_norm = norm("attention_norm")
        attention = Attention if model.latent_attention is None else LatentAttention
        self.attention = attention(within(specs, "attention"), model, scales.attention, layer)
        self.attention_post_norm = norm("attention_post_norm")
        self.ffn_norm = norm("ffn_norm")
        self.ffn = ffn
        self.ffn_post_norm = norm("ffn_post_norm")

    def forward(self, x_BLD: Tensor, geometry: Geometry) -> tuple[Tensor, RouterStatistics | None]:
        """Return [B, L, D] in x's type, and None for the router statistics of a dense block."""
        x_BLD = self.attended(x_BLD, geometry)
        return x_BLD + self._scaled(self.ffn_post_norm(self.ffn(self.ffn_norm(x_BLD)))), None

    def attended(self, x_BLD: Tensor, geometry: Geometry) -> Tensor:
        """Return x plus the attention branch."""
        y_BLD = self.attention(self.attention_norm(x_BLD), geometry)
        return x_BLD + self._scaled(self.attention_post_norm(y_BLD))

    def _scaled(self, branch_BLD: Tensor) -> Tensor:
        if self.dropout:
            branch_BLD = F.dropout(branch_BLD, self.dropout, self.training)
        return branch_BLD if self.residual_scale == 1.0 else branch_BLD * self.residual_scale


CallBlock = Callable[[nn.Module, Tensor, Geometry], tuple[Tensor, RouterStatistics | None]]
"""(block, x_BLD, geometry) -> output of the block."""


def call_block(
    block: nn.Module, x_BLD: Tensor, geometry: Geometry
) -> tuple[Tensor, RouterStatistics | None]:
    """Call a block directly."""
    return block(x_BLD, geometry)


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a model: a range of layers, with the embedding if ``first``, the head if ``last``."""

    layers: range
    first: bool = True
    last: bool = True


class Transformer(nn.Module):
    """Model or part of a model: embedding, blocks, final norm, head (tied or not).

    ``compute_dtype`` is the type of activations and products; parameters are fp32 (fp64 after
    ``.double()``), and each module casts its parameters in its forward. Parameters of a part have
    the same names as in the full model. If a part has a tied head but no embedding, the head has
    its own weight, and the code that splits the model must keep both weights equal. Activation
    offload replaces ``call_block``. For example, ``Transformer(model, scales, torch.bfloat16,
    Part(range(2, 4), first=False))`` is the last stage of a model of 4 layers.
    """

    embedding: Embedding | None
    final_norm: RMSNorm | None
    aggregator: Aggregator | None
    head: OutputHead | None

    def __init__(
        self,
        model: ModelConfig,
        scales: ForwardScales,
        compute_dtype: torch.dtype,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        part = part or Part(range(model.num_layers))
        self.part = part
        self.compute_dtype = compute_dtype
        self.call_block: CallBlock = call_block
        self._turn = partial(turn_of, rotary_width=model.rotary_width, dtype=compute_dtype)
        self.rope = (model.rope_theta, model.rope_scaling)
        local = model.window and model.window.rope_theta
        self.rope_windowed = (local, None) if local else self.rope
        self.embedding_scale = scales.embedding * model.embedding_scale
        self.tied = model.tied_embeddings and part.first and part.last
        self.mirrored = model.tied_embeddings and part.last and not part.first
        listed = inventory(model, part.layers, first=part.first, last=part.last)
        specs = {spec.name: spec for spec in listed}
        self.embedding = Embedding(specs["embedding.weight"], compute_dtype) if part.first else None
        self.blocks = nn.ModuleDict()
        depths = range(model.num_layers, model.num_blocks) if part.last else range(0)
        for layer in (*part.layers, *depths):
            of_block = within(specs, f"blocks.{layer}")
            self.blocks[str(layer)] = self._make_block(of_block, model, scales, layer)
        self.final_norm = RMSNorm(specs["final_norm.weight"], model.norm_eps) if part.last else None
        self.num_streams, self.aggregator = model.num_streams, None
        if model.streams is not None and part.last:
            self.aggregator = Aggregator(within(specs, "aggregator"), model.streams)
        head = specs.get("head.weight")
        # A tied head reads the embedding's weight through its owner instead of registering it
        # twice: with one owner, leaving the meta device or sharding cannot untie the weights.
        owner = self.embedding if self.tied else None
        self.head = OutputHead(head, model, scales.output, owner) if part.last else None
        self.mtp = Depths(specs, model, compute_dtype, mirrored=not part.first) if depths else None
        self._statistics: dict[int, RouterStatistics] = {}

    def _make_block(
        self, specs: Specs, model: ModelConfig, scales: ForwardScales, layer: int
    ) -> Block:
        ffn = FeedForward(within(specs, "ffn"), model.activation)
        return Block(specs, model, scales, ffn, layer)

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        documents: Documents | None = None,
        x_BLD: Tensor | None = None,
        *,
        ahead_MBL: Tensor | None = None,
        blocks_only: bool = False,
    ) -> Tensor | Losses:
        """Return logits [B, L, V] (fp32 or wider) without targets, else ``Losses``.

        Without ``documents`` each sequence is one document with positions from 0. A part without
        the embedding takes the output of the previous part as ``x_BLD``. A part without the head
        returns [B, L, D], and so does any part with ``blocks_only``, which also collects router
        statistics without gradients. Between parts, B counts the sequences of all streams.

        ``ahead_MBL`` [M + 1, B, L]: the tokens ahead for the M depths of multi-token prediction,
        which a part with the head computes if it has targets; None: ``multi_token.ahead_of``.
        """
        depths, count = self.mtp, len(tokens_BL)
        trained = torch.is_grad_enabled() or blocks_only
        if depths is None or targets_BL is None or not (trained or depths.comparing):
            depths = None
        elif ahead_MBL is None:
            ahead_MBL = ahead_of(targets_BL, documents, depths.number)
        inputs = [] if depths is None or ahead_MBL is None else depths.inputs(ahead_MBL)
        embedded: list[Tensor] = []
        if self.embedding is not None:
            # A single lookup, so that a sharded table is gathered once.
            read_BL = torch.cat([tokens_BL, *inputs]) if inputs else tokens_BL
            x_BLD = self._embedded(self.embedding, read_BL)
            if inputs:  # without them, a split would copy the gradient
                x_BLD, *embedded = x_BLD.split(count)
            x_BLD = repeated(x_BLD, self.num_streams)
        elif depths is not None and inputs:
            embedded = list(self._embedded(depths["embedding"], torch.cat(inputs)).split(count))
        assert x_BLD is not None
        if self.num_streams > 1 and documents is not None:
            documents = repeated_documents(documents, self.num_streams)
        geometry = self._geometry(tokens_BL, documents)
        for layer in self.part.layers:
            x_BLD = self._through(layer, x_BLD, geometry, blocks_only)
        if self.final_norm is None or self.head is None:
            return x_BLD
        if depths is None or ahead_MBL is None:
            if blocks_only:
                return x_BLD
            x_BLD = self.final_norm(x_BLD)
            x_BLD = x_BLD if self.aggregator is None else self.aggregator(x_BLD)
            return self.head(x_BLD, targets_BL)
        normed = self._through_depths(self.final_norm(x_BLD), embedded, geometry, blocks_only)
        return x_BLD if blocks_only else self._losses_ahead(normed, ahead_MBL, documents)

    def _through_depths(
        self, hidden_BLD: Tensor, embedded: list[Tensor], geometry: Geometry, blocks_only: bool
    ) -> list[Tensor]:
        """Return the head's input for the main loss and for each depth, [B, L, D]."""
        assert self.mtp is not None
        before, *embedded = self.mtp.joined(hidden_BLD, embedded)
        normed = [before]
        for depth, embedded_BLD in enumerate(embedded):
            joined_BLD = self.mtp[str(depth)](embedded_BLD, before)
            before = self._through(self.mtp.first + depth, joined_BLD, geometry, blocks_only)
            normed.append(self.mtp[str(depth)].final_norm(before))
        return normed

    def _losses_ahead(
        self, normed: list[Tensor], ahead_MBL: Tensor, documents: Documents | None
    ) -> Losses:
        """Return the losses, of all depths in ``total``; compare drafts without gradients."""
        assert self.mtp is not None
        assert self.head is not None
        losses = self.head(torch.cat(normed), ahead_MBL.flatten(0, 1), self.mtp.weights)
        nll_BL, *others = losses.nll_BL.split(len(normed[0]))
        if torch.is_grad_enabled():
            self.mtp.observe(others, ahead_MBL[1:])
        else:
            main_BL, drafts_BL = (self.head(x_BLD, choose=True) for x_BLD in normed[:2])
            counted_BL = (ahead_MBL[1] != IGNORE) & followed(ahead_MBL[0], documents)
            self.mtp.compare(main_BL, drafts_BL, counted_BL)
        return Losses(losses.total, nll_BL)

    def _embedded(self, embedding: nn.Module, tokens_BL: Tensor) -> Tensor:
        x_BLD: Tensor = embedding(tokens_BL)
        return x_BLD if self.embedding_scale == 1.0 else x_BLD * self.embedding_scale

    def _through(self, layer: int, x_BLD: Tensor, geometry: Geometry, blocks_only: bool) -> Tensor:
        """Return [B, L, D] after a block, and collect its router's statistics."""
        x_BLD, statistics = self.call_block(self.blocks[str(layer)], x_BLD, geometry)
        # Recomputation in a backward pass does not run this, so each token counts once.
        counting = blocks_only or (self.training and torch.is_grad_enabled())
        if statistics is not None and counting:
            self.add_statistics(layer, statistics)
        return x_BLD

    def take_statistics(self) -> dict[int, RouterStatistics]:
        """Return the router statistics by layer since the last call, and reset them.

        Sums in fp64 over all tokens of forward passes in training mode with gradients, or with
        ``blocks_only``.
        """
        taken, self._statistics = self._statistics, {}
        return taken

    def add_statistics(self, layer: int, statistics: RouterStatistics) -> None:
        """Add to the next result of ``take_statistics``; the tensors are not copied."""
        seen = RouterStatistics(*(value.double() for value in statistics))
        before = self._statistics.get(layer)
        if before is not None:
            seen = RouterStatistics(*(a + b for a, b in zip(before, seen, strict=True)))
        self._statistics[layer] = seen

    def _geometry(self, tokens_BL: Tensor, documents: Documents | None) -> Geometry:
        if documents is None:
            positions = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None]
        else:
            positions = documents.positions_BL
            _expect_any_number_of(documents)
        turn = self._turn(positions, *self.rope)
        alike = self.rope_windowed == self.rope
        windowed = turn if alike else self._turn(positions, *self.rope_windowed)
        return Geometry(turn, windowed, documents)


def _expect_any_number_of(documents: Documents) -> None:
    """Mark document tensors as dynamic: blocks compile once for any number of documents."""
    # Importing torch._dynamo takes seconds; it is imported already if any module was compiled.
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        mark: Callable[[Tensor, int], None] = sys.modules["torch._dynamo"].maybe_mark_dynamic
        for each in (documents.cu_lengths, documents.cu_host, documents.ring):
            if each is not None:
                mark(each, 0)
