"""Tensor parallelism that overlaps communication with products by splitting tokens in chunks.

A branch all-gathers tokens, multiplies, and reduce-scatters the sums. Its products process tokens
independently, so they take a chunk of every rank's tokens while the next chunk is gathered and the
sums of the previous chunk are scattered; the backward pass likewise. Only the first all-gather and
the last reduce-scatter of a branch are exposed. Activations are bit-identical to unchunked ones; a
weight gradient is a sum over chunks, in another order than in one product (equal up to rounding).
The cost is one addition to each weight gradient for each chunk, and smaller products.
"""

# B sequences, L tokens in a sequence, l = L/tp of them, t tp ranks, c tokens of a chunk and rank,
# D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from allometry.models.latent import LatentAttention
from allometry.models.transformer import Attention, FeedForward
from allometry.parallel.in_two import InTwo, under_way
from allometry.parallel.mesh import Axis

CHUNKS = 4
"""Chunks of a branch's tokens: a quarter of the communication is exposed."""

Products = Callable[[Tensor], Tensor]


def chunk_feed_forward(module: FeedForward, axis: Axis) -> None:
    """Make a feed-forward [B, l, D] -> [B, l, D] process its tokens in chunks."""
    compute = module.forward

    def forward(x_BlD: Tensor) -> Tensor:
        def each() -> Iterator[tuple[InTwo, Tensor]]:
            for x_RD in _gathered(x_BlD, axis):
                scatter = _scatter(axis)
                yield scatter, scatter.send(compute(x_RD[None])[0])

        return _back([scatter.arrive(edge) for scatter, edge in list(each())], x_BlD.shape)

    module.forward = forward  # type: ignore[method-assign]


def chunk_attention(module: Attention | LatentAttention, axis: Axis) -> None:
    """Make the products before and after attention process their tokens in chunks."""
    project, output = module.project, module.wo.forward

    def gather_and_project(*parts: Tensor) -> tuple[Tensor, ...]:
        x_BlD, widths = joined(parts)
        chunks = [project(*separated(x_RD[None], widths)) for x_RD in _gathered(x_BlD, axis)]
        return tuple(
            _sequences([y[0] for y in made], len(x_BlD), axis.size)
            for made in zip(*chunks, strict=True)
        )

    def multiply_and_scatter(o_BLD: Tensor) -> Tensor:
        B, L, _ = o_BLD.shape
        begun = []
        for o_BtcD in o_BLD.unflatten(1, (axis.size, -1)).tensor_split(_count(L // axis.size), 2):
            scatter = _scatter(axis)
            rows_RD = o_BtcD.transpose(0, 1).flatten(0, 2)
            begun.append((scatter, scatter.send(output(rows_RD[None])[0])))
        made = [scatter.arrive(edge) for scatter, edge in begun]
        return _back(made, torch.Size((B, L // axis.size, made[0].shape[1])))

    module.project = gather_and_project  # type: ignore[method-assign]
    module.wo.forward = multiply_and_scatter  # type: ignore[method-assign]


def joined(parts: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return what travels in one message, [B, l, ...] side by side, and the width of each part."""
    widths = [part.shape[-1] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1), widths


def separated(x: Tensor, widths: list[int]) -> Sequence[Tensor]:
    """Return the parts of ``joined``; a single part is ``x``, whose gradient is not copied.

    The backward pass of ``Tensor.split`` concatenates, also when there is only one part.
    """
    return (x,) if len(widths) == 1 else x.split(widths, dim=-1)


def _count(tokens: int) -> int:
    return min(CHUNKS, tokens)


def _gathered(x_BlD: Tensor, axis: Axis) -> Iterator[Tensor]:
    """Yield chunks [t * B * c, D] of all ranks' tokens, while the next chunk is in flight."""
    chunks = x_BlD.tensor_split(_count(x_BlD.shape[1]), dim=1)
    gathers = [_gather(axis) for _ in chunks]
    edge = gathers[0].send(chunks[0].flatten(0, 1))
    for place, gather in enumerate(gathers):
        arriving = edge
        if place + 1 < len(chunks):
            edge = gathers[place + 1].send(chunks[place + 1].flatten(0, 1))
        yield gather.arrive(arriving)


def _sequences(chunks: Sequence[Tensor], batch: int, ranks: int) -> Tensor:
    """Return [B, L, D] from chunks [t * B * c, D]."""
    parts = [chunk.view(ranks, batch, -1, chunk.shape[1]) for chunk in chunks]
    return torch.cat(parts, dim=2).transpose(0, 1).flatten(1, 2)


def _back(chunks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Return [B, l, D] from chunks [B * c, D] of this rank's tokens."""
    return torch.cat([chunk.view(shape[0], -1, shape[2]) for chunk in chunks], dim=1)


def _gather(axis: Axis) -> InTwo:
    return InTwo(partial(_all_gather, axis), partial(_reduce_scatter, axis))


def _scatter(axis: Axis) -> InTwo:
    return InTwo(partial(_reduce_scatter, axis), partial(_all_gather, axis))


def _all_gather(axis: Axis, x: Tensor) -> Tensor:
    begun: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(
        x, axis.size, axis.group.group_name
    )
    return under_way(begun, axis)


def _reduce_scatter(axis: Axis, x: Tensor) -> Tensor:
    begun: Tensor = torch.ops._c10d_functional.reduce_scatter_tensor(
        x, "sum", axis.size, axis.group.group_name
    )
    return under_way(begun, axis)
