"""Tensor, sequence and loss parallelism on the ``tp`` axis.

Attention is sharded by heads, feed-forwards and experts by their hidden width, embedding and head
by the vocabulary (Megatron-LM, arXiv 1909.08053). Between these modules the tokens of a sequence
are sharded (arXiv 2205.05198), so norms, routers and the residual stream process 1/tp of the
tokens. Each branch starts with an all-gather of its tokens and ends with a reduce-scatter of its
sums: four of each, of one activation, for forward and backward of a block. Gathered tokens are
saved for the backward pass rather than gathered again as in that paper: one activation of all
tokens for each branch, in exchange for a third less communication. Parameters become DTensors;
modules compute with their ``local_weight``, so distributed arithmetic is confined to these
boundaries.

| parameter                     | placement over tp     |
|-------------------------------|-----------------------|
| wq, wk, wv, gate, up          | Shard(0)              |
| their biases                  | Shard(0)              |
| gains over all heads          | Shard(0)              |
| prefixes of streams           | Shard(0)              |
| wo, down                      | Shard(1)              |
| wq, wkv of latents, wo        | Shard(0), Shard(1)    |
| experts' gate, up [E, F, D]   | Shard(1)              |
| experts' down [E, D, F]       | Shard(2)              |
| the same, ``expert_tp: 1``    | Shard(0)              |
| embedding, head               | Shard(0), even or not |
| everything else               | Replicate             |

A replicated parameter processes other tokens or other heads on each rank, so its gradient is a
partial sum, which ``reduce.sum_over_tp`` sums over the tp ranks at the end of a step.
"""

# B sequences, L tokens in a sequence, l = L/tp of them, T = B*L, t = T/tp, D width, V vocabulary, v
# local columns or rows of it, k experts that a token visits

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from typing_extensions import override

from allometry.models.head import OutputHead
from allometry.models.latent import LatentAttention
from allometry.models.layers import Embedding, RMSNorm
from allometry.models.moe import Experts, MoEFeedForward
from allometry.models.parameters import local_weight
from allometry.models.transformer import Attention, FeedForward, Transformer
from allometry.models.vocabulary import SharedSoftmax, Vocabulary
from allometry.parallel.mesh import Axis, Mesh
from allometry.parallel.tensor_chunks import (
    chunk_attention,
    chunk_feed_forward,
    joined,
    separated,
)


def apply_tensor(
    model: Transformer, mesh: Mesh, *, whole_experts: bool = False, chunked: bool = False
) -> None:
    """Shard a model, or a part of one, over ``mesh.tp``, and its experts also over ``mesh.ep``.

    ``whole_experts``: tp shards experts by number, as ep does. Then, and with ep, each tp rank
    sends the rows of its own tokens (``expert.py``); otherwise all tokens are gathered before the
    experts. ``chunked``: branches process their tokens in chunks, so that communication of one
    chunk overlaps with computation of another.

    The model is changed in place, on the meta device or another one (then every rank must have the
    same values). All ranks of a tensor-parallel group pass the same unsharded tokens, targets and
    documents; the residual stream, which pipeline stages exchange, is [B, L/tp, D]. tp must divide
    heads, hidden widths and L; the vocabulary may have any size that gives each rank at least one
    row. Losses cover all tokens and are the same on all ranks of a tensor-parallel group: count
    them once. Logits are unsharded on all ranks. For example, tp = 2 gives each rank half of the
    heads and of the feed-forward width.
    """
    if mesh.tp.size > 1:
        tp = mesh.device_mesh["tp"]
        for module in list(model.modules()):
            match module:
                case Attention() | LatentAttention():
                    _cut_heads(module, tp)
                    if chunked:
                        chunk_attention(module, mesh.tp)
                    else:
                        _exchange_around_products(module, tp)
                case FeedForward():
                    _cut_weights(module, tp, {"gate": 0, "up": 0, "down": 1})
                    if chunked:
                        chunk_feed_forward(module, mesh.tp)
                    else:
                        _exchange_rows(module, tp)
                case Embedding():
                    _distribute(module, "weight", tp, [Shard(0)])
                    vocabulary = PartOfVocabulary(tp, mesh.tp, module.num_embeddings)
                    module.forward = partial(_look_up, module, vocabulary)
                case OutputHead():
                    _share_head(module, tp, mesh.tp)
                case RMSNorm():
                    module.feeds = None  # products use the tokens of all ranks
                case MoEFeedForward():
                    module.register_forward_pre_hook(partial(_cut_counted, mesh.tp))
                case Experts() if mesh.ep.size == 1 and not whole_experts:
                    module.register_forward_pre_hook(partial(_gather_rows, tp))
                    module.register_forward_hook(partial(_scatter_rows, tp))
    for module in list(model.modules()):
        if isinstance(module, Experts):
            shard_experts(module, mesh, whole=whole_experts)
    if mesh.tp.size > 1:
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    _distribute(module, name, mesh.device_mesh["tp"], [Replicate()])


def shard_experts(experts: Experts, mesh: Mesh, *, whole: bool = False) -> None:
    """Shard experts over ep by number and over tp by hidden width.

    ``whole``: tp also shards by number. The mesh of the weights contains only axes longer than one,
    so that ZeRO can shard the weights over the ranks with the same shard: ``mesh.expert_zero_mesh``
    with ep, else ``mesh.zero_mesh``.
    """
    for name, hidden in (("gate", 1), ("up", 1), ("down", 2)):
        over_tp = Shard(0) if whole else Shard(hidden)
        if mesh.ep.size > 1 and mesh.tp.size > 1:
            cut_over, placements = mesh.expert_mesh["ep", "tp"], [Shard(0), over_tp]
        elif mesh.ep.size > 1:
            cut_over, placements = mesh.expert_mesh["ep"], [Shard(0)]
        elif mesh.tp.size > 1:
            cut_over, placements = mesh.device_mesh["tp"], [over_tp]
        else:
            return
        _distribute(experts, name, cut_over, placements)


class PartOfVocabulary(Vocabulary):
    """Local rows of embedding and head: implements ``models.vocabulary.Vocabulary``."""

    def __init__(self, mesh: DeviceMesh, axis: Axis, size: int) -> None:
        self.mesh, self._group, self._size = mesh, axis.group, size
        # As in Shard(0): equal shards, except that the last ones may be smaller.
        self.columns = -(-size // axis.size)
        self.first = axis.rank * self.columns
        if self.columns * (axis.size - 1) >= size:
            raise ValueError(
                f"parallel.tp={axis.size} leaves a rank without a row of model.vocab_size={size}; "
                "use a smaller parallel.tp or a larger vocabulary"
            )

    @override
    def max_(self, values: Tensor) -> None:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)

    @override
    def sum_(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self._group)

    @override
    def gather(self, logits_BLv: Tensor) -> Tensor:
        B, L, _ = logits_BLv.shape
        # Sizes are given; otherwise each rank would infer them from its own shard.
        whole = DTensor.from_local(
            logits_BLv,
            self.mesh,
            [Shard(2)],
            run_check=False,
            shape=torch.Size((B, L, self._size)),
            stride=(L * self._size, self._size, 1),
        )
        return whole.full_tensor()


def gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather the shards of ``x`` along ``dim``; the backward pass is a reduce-scatter."""
    parts = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def gather_tokens(x_BlD: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return [B, L, D]; a single sequence is gathered without a copy, several need one.

    For example, tp = 4 gathers 4 parts [B, 256, D] into [B, 1024, D].
    """
    if len(x_BlD) == 1:
        return gather(x_BlD[0], mesh, dim=0)[None]
    return gather(x_BlD, mesh, dim=1)


def scatter_sum(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """Reduce-scatter ``x`` along ``dim``; the backward pass is an all-gather."""
    summands = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return summands.redistribute(placements=[Shard(dim)]).to_local()


def _distribute(
    module: nn.Module, name: str, mesh: DeviceMesh, placements: list[Placement]
) -> None:
    """Replace a parameter by its DTensor, without communication."""
    parameter = module.get_parameter(name)
    tensor = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    module.register_parameter(name, nn.Parameter(tensor, parameter.requires_grad))


def _cut_weights(module: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    for name, dim in dims.items():
        linear = module.get_submodule(name)
        _distribute(linear, "weight", mesh, [Shard(dim)])
        if linear.bias is not None:
            assert dim == 0, f"a bias of {name} would be added on every rank"
            _distribute(linear, "bias", mesh, [Shard(0)])


def _cut_heads(module: Attention | LatentAttention, mesh: DeviceMesh) -> None:
    """Shard the products to and from heads; the products to latents stay replicated."""
    if isinstance(module, LatentAttention):
        _cut_weights(module, mesh, {"wq": 0, "wkv": 0, "wo": 1})
        return
    _cut_weights(module, mesh, {"wq": 0, "wk": 0, "wv": 0, "wo": 1})
    if module.norm_over == "width":
        _norm_over_ranks(module, mesh)
    for name in ("keys", "values") if module.prefix is not None else ():
        assert module.prefix is not None
        assert module.prefix.specs[name].of_heads
        _distribute(module.prefix, name, mesh, [Shard(0)])


def _norm_over_ranks(module: Attention, mesh: DeviceMesh) -> None:
    """Compute norms of queries and keys over the heads of all ranks.

    Each rank has the gains of its heads. One all-reduce sums the squares of queries and keys for
    each token, and one all-reduce sums their gradients in the backward pass.
    """
    norms = module.q_norm, module.k_norm
    for norm in norms:
        assert norm is not None
        assert norm.specs["weight"].of_heads
        _distribute(norm, "weight", mesh, [Shard(0)])

    def normed(*made: Tensor) -> tuple[Tensor, ...]:
        wide = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in made]
        own_BL2 = torch.stack([y.square().sum(-1) for y in wide], dim=-1)
        summands = DTensor.from_local(own_BL2, mesh, [Partial()], run_check=False)
        whole = summands.redistribute(placements=[Replicate()])
        squares = whole.to_local(grad_placements=[Partial()]).split(1, dim=-1)
        results = []
        for norm, x_BLM, y_BLM, square_BL1 in zip(norms, made, wide, squares, strict=True):
            assert norm is not None
            mean_BL1 = square_BL1 / norm.specs["weight"].shape[0]
            gain_M = local_weight(norm.weight).to(x_BLM.dtype)
            results.append((y_BLM * (mean_BL1 + norm.eps).rsqrt() * gain_M).to(x_BLM.dtype))
        return tuple(results)

    module.normed = normed  # type: ignore[assignment,method-assign]


def _exchange_around_products(module: Attention | LatentAttention, mesh: DeviceMesh) -> None:
    """Make attention [B, l, D] -> [B, l, D] gather tokens as rows and scatter sums as rows.

    Rows are in rank order, as in ``_exchange_rows``. Only the inputs and outputs of attention
    itself, 1/tp of the full width, are copied to sequence order and back. Latent attention
    computes its latents from local tokens and gathers the latents, in one message.
    """
    project, output = module.project, module.wo.forward

    def gather_and_project(*parts: Tensor) -> tuple[Tensor, ...]:
        x_BlD, widths = joined(parts)
        rows_TD = gather(x_BlD.flatten(0, 1), mesh, dim=0)
        made = project(*separated(rows_TD[None], widths))
        return tuple(in_sequences(y[0], len(x_BlD), mesh.size()) for y in made)

    def multiply_and_scatter(o_BLD: Tensor) -> Tensor:
        y_TD = output(in_rows(o_BLD, mesh.size())[None])[0]
        return scatter_sum(y_TD, mesh, dim=0).unflatten(0, (len(o_BLD), -1))

    module.project = gather_and_project  # type: ignore[method-assign]
    module.wo.forward = multiply_and_scatter  # type: ignore[method-assign]


def in_rows(x_BL: Tensor, ranks: int) -> Tensor:
    """Return [B * L, ...] in rank order; each rank has an equal part of each sequence.

    For example, with 2 ranks the tokens of sequences (a b) and (c d) are ordered a c b d.
    """
    return x_BL.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 2)


def in_sequences(x_T: Tensor, batch: int, ranks: int) -> Tensor:
    """Return [B, L, ...]: the inverse of ``in_rows``."""
    return x_T.unflatten(0, (ranks, batch, -1)).transpose(0, 1).flatten(1, 2)


def _exchange_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """Make a branch that processes tokens independently all-gather and reduce-scatter rows.

    Rows in rank order are gathered and scattered without copies; sequence order would need a copy
    on each side.
    """

    def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x_BlD,) = inputs
        return (gather(x_BlD.flatten(0, 1), mesh, dim=0).unflatten(0, (len(x_BlD), -1)),)

    def after(_: nn.Module, inputs: tuple[Any, ...], y_BLD: Tensor) -> Tensor:
        return scatter_sum(y_BLD.flatten(0, 1), mesh, dim=0).unflatten(0, (len(y_BLD), -1))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _cut_counted(axis: Axis, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a router only the flags of its own tokens."""
    x_BlD, *others = inputs
    return x_BlD, *(
        None if counted_BL is None else counted_BL.tensor_split(axis.size, dim=1)[axis.rank]
        for counted_BL in others
    )


def _gather_rows(
    mesh: DeviceMesh, _: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """All-gather tokens [t, ...], their gates and their experts before sharded experts.

    Rows are in rank order rather than token order: experts process rows independently, and
    ``_scatter_rows`` returns rows in the same order.
    """
    x_tD, gates_tk, experts_tk = inputs
    with torch.no_grad():
        experts_Tk = gather(experts_tk, mesh, dim=0)
    return gather(x_tD, mesh, dim=0), gather(gates_tk, mesh, dim=0), experts_Tk


def _scatter_rows(
    mesh: DeviceMesh, _: nn.Module, inputs: tuple[Any, ...], made: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    y_TD, beside = made
    return scatter_sum(y_TD, mesh, dim=0), beside


def _look_up(embedding: Embedding, vocabulary: PartOfVocabulary, tokens_BL: Tensor) -> Tensor:
    """Return [B, l, D]: local rows, and zeros for other rows, summed; one rank has each row."""
    weight_vD = local_weight(embedding.weight)
    own_T = in_rows(tokens_BL, vocabulary.mesh.size()) - vocabulary.first
    here_T = (own_T >= 0) & (own_T < len(weight_vD))
    x_TD = F.embedding(own_T.where(here_T, 0), weight_vD).to(embedding.dtype)
    x_tD = scatter_sum(x_TD.where(here_T[:, None], 0.0), vocabulary.mesh, dim=0)
    return x_tD.unflatten(0, (len(tokens_BL), -1))


def _share_head(head: OutputHead, mesh: DeviceMesh, axis: Axis) -> None:
    """Give the head all tokens and a shard of the vocabulary (of its own weight or a tied one)."""
    if head.weight is not None:
        _distribute(head, "weight", mesh, [Shard(0)])
    head.softmax = SharedSoftmax(PartOfVocabulary(mesh, axis, head.vocab_size))

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BlD, *others = inputs
        return gather_tokens(x_BlD, mesh), *others

    head.register_forward_pre_hook(before)
