"""Parallel streams (ParScale, arXiv 2505.10475): learned prefixes, and the weighted sum of streams.

The streams are additional sequences of the batch, stream by stream: rows p B to (p + 1) B - 1 of a
batch of B sequences belong to stream p. Models know no ranks: context parallelism replaces
``Prefix.over_ring``.
"""

# P streams, B sequences, Z = P B, L length, T = Z L, D width, N query heads, K key/value heads,
# H head width, n tokens of a prefix, d documents, M = L + n

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from allometry.configs.streams import Streams
from allometry.models.attention import Attend
from allometry.models.documents import Documents
from allometry.models.layers import Linear
from allometry.models.parameters import OwnsParameters, local_weight
from allometry.scaling.inventory import Specs

OverRing = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Documents, float], Tensor]
"""(q, k, v, prefix keys, prefix values, documents, scale) -> attention output [Z, L, N, H]."""


def repeated(x_BLD: Tensor, count: int) -> Tensor:
    """Return the rows of ``count`` equal streams, [P B, L, D]; for one stream ``x_BLD`` itself."""
    return x_BLD if count == 1 else x_BLD.repeat(count, 1, 1)


def repeated_documents(documents: Documents, count: int) -> Documents:
    """Return the documents of all streams; ``ring`` still describes the documents of one stream."""
    if count == 1:
        return documents
    tokens = documents.positions_BL.numel()
    counted = documents.counted_BL
    host = documents.cu_host

    def bounds(cu_lengths: Tensor) -> Tensor:
        starts_P1 = torch.arange(count, device=cu_lengths.device, dtype=cu_lengths.dtype)[:, None]
        later = (starts_P1 * tokens + cu_lengths[1:]).flatten()
        return torch.cat([cu_lengths[:1], later])

    return replace(
        documents,
        cu_lengths=bounds(documents.cu_lengths),
        positions_BL=documents.positions_BL.repeat(count, 1),
        counted_BL=None if counted is None else counted.repeat(count, 1),
        cu_host=None if host is None else bounds(host),
    )


class Prefix(OwnsParameters):
    """Learned keys and values of each stream in one layer, seen by every query.

    Both are stored as vectors, [K, P, n, H] flattened, so that tensor parallelism shards heads.
    Neither is rotated, and the positions of tokens do not change. With documents, every document
    sees the complete prefix. For example, ``prefix(attend, q, k, v, None, scale)`` is causal
    attention to the prefix and to the earlier tokens.
    """

    keys: nn.Parameter
    values: nn.Parameter

    def __init__(self, specs: Specs, streams: Streams) -> None:
        super().__init__()
        self.over_ring: OverRing | None = None
        self.count, self.tokens = streams.count, streams.prefix_tokens
        for name in ("keys", "values"):
            self.own(name, specs[name])

    def forward(
        self,
        core: Attend,
        q_ZLNH: Tensor,
        k_ZLKH: Tensor,
        v_ZLKH: Tensor,
        documents: Documents | None,
        scale: float,
    ) -> Tensor:
        """Return [Z, L, N, H], computed by ``core`` on sequences with the prefix in front.

        The queries in front are zeros, and their output is dropped: with equally many queries and
        keys, every back end of causal attention computes the prefix, at the cost of n more queries
        for each document.
        """
        H = k_ZLKH.shape[-1]
        keys, values = (
            local_weight(x)
            .to(q_ZLNH.dtype)
            .view(-1, self.count, self.tokens, H)
            .permute(1, 2, 0, 3)
            for x in (self.keys, self.values)
        )
        if documents is not None and documents.ring is not None:
            assert self.over_ring is not None, "documents of a ring without context parallelism"
            return self.over_ring(q_ZLNH, k_ZLKH, v_ZLKH, keys, values, documents, scale)
        if documents is not None:
            return self._packed(core, q_ZLNH, k_ZLKH, v_ZLKH, keys, values, documents, scale)
        each = len(q_ZLNH) // self.count

        def extended(x_ZLKH: Tensor, before_PnKH: Tensor) -> Tensor:
            before_ZnKH = before_PnKH.repeat_interleave(each, dim=0)
            return torch.cat([before_ZnKH, x_ZLKH], dim=1)

        q_ZMNH = F.pad(q_ZLNH, (0, 0, 0, 0, self.tokens, 0))
        k_ZMKH, v_ZMKH = extended(k_ZLKH, keys), extended(v_ZLKH, values)
        return core(q_ZMNH, k_ZMKH, v_ZMKH, None, scale)[:, self.tokens :]

    def _packed(
        self,
        core: Attend,
        q_ZLNH: Tensor,
        k_ZLKH: Tensor,
        v_ZLKH: Tensor,
        keys_PnKH: Tensor,
        values_PnKH: Tensor,
        documents: Documents,
        scale: float,
    ) -> Tensor:
        """Return [Z, L, N, H]: every document of the flattened tokens begins with the prefix."""
        number = len(documents.cu_lengths) - 1
        longer, token_T, prefix_X = with_prefixes(documents, self.tokens)
        rows = q_ZLNH.shape[0] * q_ZLNH.shape[1] + number * self.tokens

        def extended(x_ZLKH: Tensor, before_PnKH: Tensor | None) -> Tensor:
            x_TKH = x_ZLKH.flatten(0, 1)
            made = x_TKH.new_zeros(rows, *x_TKH.shape[1:]).index_copy(0, token_T, x_TKH)
            if before_PnKH is not None:
                before_XKH = before_PnKH.repeat_interleave(number // self.count, dim=0)
                made = made.index_copy(0, prefix_X, before_XKH.flatten(0, 1))
            return made[None]

        q, k, v = (
            extended(x, prefix)
            for x, prefix in ((q_ZLNH, None), (k_ZLKH, keys_PnKH), (v_ZLKH, values_PnKH))
        )
        return core(q, k, v, longer, scale)[0].index_select(0, token_T).view(q_ZLNH.shape)


def with_prefixes(documents: Documents, tokens: int) -> tuple[Documents, Tensor, Tensor]:
    """Return the documents with ``tokens`` more tokens in front of each, as one sequence.

    Also returns the place of each old token (int64 [T]) and of each token of a prefix (int64
    [d x tokens]) in this sequence. The new tokens do not count. For example, documents of 3 and 5
    tokens with prefixes of 2 have ``cu_lengths`` [0, 5, 12].
    """
    cu_lengths = documents.cu_lengths
    device = cu_lengths.device
    number, total = len(cu_lengths) - 1, documents.positions_BL.numel()

    def bounds(cu: Tensor) -> Tensor:
        return cu + tokens * torch.arange(len(cu), device=cu.device, dtype=cu.dtype)

    place_T = torch.arange(total, device=device)
    document_T = torch.bucketize(place_T, cu_lengths[1:], right=True)
    token_T = place_T + tokens * (document_T + 1)
    longer = bounds(cu_lengths)
    inside_n = torch.arange(tokens, device=device)
    prefix_X = (longer[:-1].long()[:, None] + inside_n).flatten()
    rows = total + number * tokens
    positions = torch.empty(rows, dtype=documents.positions_BL.dtype, device=device)
    positions[token_T] = documents.positions_BL.flatten() + tokens
    positions[prefix_X] = inside_n.to(positions.dtype).repeat(number)
    counted = torch.zeros(rows, dtype=torch.bool, device=device)
    before = documents.counted_BL
    counted[token_T] = True if before is None else before.flatten()
    made = Documents(
        longer,
        documents.max_length + tokens,
        positions[None],
        counted[None],
        cu_host=None if documents.cu_host is None else bounds(documents.cu_host),
    )
    return made, token_T, prefix_X


class StreamWeights(OwnsParameters):
    """Weights of the streams from the mixed hidden state, [..., D] -> [..., P], in fp32 or wider.

    w = (1 - ε) softmax(W x + b) + ε / P, with ``smoothing`` ε.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, specs: Specs, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.own("weight", specs["weight"])
        self.own("bias", specs["bias"])

    @override
    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the weights [B, L, P], which sum to 1."""
        wide = torch.promote_types(x_BLD.dtype, torch.float32)
        weight, bias = (local_weight(each).to(wide) for each in (self.weight, self.bias))
        chosen_BLP = F.linear(x_BLD.to(wide), weight, bias).softmax(dim=-1)
        return (1.0 - self.smoothing) * chosen_BLP + self.smoothing / len(weight)


class Aggregator(nn.Module):
    """Weighted sum of the streams; the weights follow from all streams of the same token.

    w = weights(silu(W1 [x_1; ...; x_P] + b1)). Column d P + p of W1 multiplies component d of
    stream p, as in the authors' code.
    """

    def __init__(self, specs: Specs, streams: Streams) -> None:
        super().__init__()
        self.count = streams.count
        self.mix = Linear(specs["mix.weight"], specs["mix.bias"])
        of_choice = {name: specs[f"choice.{name}"] for name in ("weight", "bias")}
        self.choice = StreamWeights(of_choice, streams.smoothing)

    @override
    def forward(self, x_ZLD: Tensor) -> Tensor:
        """Return [B, L, D] for streams [P B, L, D] after the final norm, in their type."""
        x_PBLD = x_ZLD.unflatten(0, (self.count, -1))
        weights_BLP = self.choice(F.silu(self.mix(x_PBLD.movedim(0, -1).flatten(2))))
        weights_PBL1 = weights_BLP.movedim(-1, 0)[..., None]
        return (weights_PBL1.to(x_ZLD.dtype) * x_PBLD).sum(0)
