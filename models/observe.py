"""Statistics of a forward pass, collected by hooks on blocks, attention cores and the head.

Hooks exist only while an observer is active. Compiled blocks then run uncompiled, so the compiled
training code contains no hooks. Models know no ranks: sums cover this rank's tokens, and the caller
reduces them.
"""

# B sequences, L tokens, l of them on this rank, D width, N query heads, K key/value heads,
# G = N/K, H head width, Q tokens observed as queries, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.models import fp8
from allometry.models.attention import Attend
from allometry.models.documents import Documents
from allometry.models.precision import inputs_by_role
from allometry.models.products import Stacked
from allometry.models.rotary import Geometry
from allometry.models.transformer import Block, Transformer
from allometry.scaling.roles import Role

SUMS = (
    "attention_squares",
    "attention_outliers",
    "ffn_squares",
    "ffn_outliers",
    "magnitudes",
    "elements",
    "squared_attention_log_z",
    "queries",
    "attention_logits",
    "pairs",
)
"""Columns of ``Observer.sums``, over a layer's counted tokens (and heads), see ``Observer``."""

MAXIMA = ("attention_logit", "activation")
OUTPUT = ("log_z", "squared_log_z", "tokens")
OUTLIER_SIGMAS = 5.0
ROUNDING = ("squares", "errors", "elements", "underflows", "saturated")
"""Columns of ``Observer.rounding``, one row for each of ``FP8_ROLES``, see ``Observer``."""

FP8_ROLES = (Role.HIDDEN, Role.EXPERT_UP, Role.EXPERT_DOWN)


class Observer:
    """Accumulates statistics of forward passes for each layer, in fp64 on the device.

    ``sums`` and ``maxima``, by layer: Σy² and outliers of the outputs y of attention and
    feed-forward (after the residual scale; an outlier is more than 5 standard deviations of its
    token away from its token's mean, arXiv 2603.28743), Σ|x| and the largest |x| of the block's
    output x, the number of elements of each of these; Σ(log Σ exp s)², Σs and the largest s of the
    attention logits s in the softmax. ``output``: Σ log Z and Σ log² Z of the logits.
    ``rounding``: of the inputs that products read or save in FP8, by the role of the weights: Σx²,
    Σ of squared errors, numbers, numbers rounded to 0, numbers clipped or not finite.

    Attention and output statistics use at most ``queries`` tokens of each sequence as queries,
    evenly spaced and including the last, and all keys visible to them. Tokens that are False in
    ``Documents.counted_BL`` are excluded, except in ``rounding`` of rows sorted by expert.
    ``own``: shards [B, L] like the residual stream. ``copies``: number of ranks with the same
    tokens in front of a weight that is sharded by rows. For example:
    ``with observer.watching([model]): model(tokens, targets)``.
    """

    def __init__(
        self,
        num_layers: int,
        device: torch.device,
        *,
        queries: int = 128,
        own: Callable[[Tensor], Tensor] = lambda x_BL: x_BL,
        copies: int = 1,
    ) -> None:
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.sums = torch.zeros(num_layers, len(SUMS), **wide)
        self.maxima = torch.full((num_layers, len(MAXIMA)), float("-inf"), **wide)
        self.output = torch.zeros(len(OUTPUT), **wide)
        self.rounding = torch.zeros(len(FP8_ROLES), len(ROUNDING), **wide)
        self._queries, self._own, self._copies = queries, own, copies
        self._documents: Documents | None = None

    @contextmanager
    def watching(self, parts: Iterable[Transformer]) -> Iterator[None]:
        """Observe all forward passes of these models or pipeline stages inside the context."""
        with ExitStack() as stack:
            for part in parts:
                for layer, block in part.blocks.items():
                    assert isinstance(block, Block)
                    stack.enter_context(_uncompiled(block))
                    self._watch_block(int(layer), block, stack)
                for role, inputs in inputs_by_role(part).items():
                    for stacked in inputs if role in FP8_ROLES else ():
                        stacked.watch = partial(self._see_input, stacked)
                        stack.callback(setattr, stacked, "watch", None)
                if part.head is not None:
                    handle = part.head.register_forward_pre_hook(self._see_head)
                    stack.callback(handle.remove)
            yield

    def _watch_block(self, layer: int, block: Block, stack: ExitStack) -> None:
        def enter(_: Any, inputs: tuple[Tensor, Geometry]) -> None:
            self._documents = inputs[1].documents

        def leave(_: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
            self._see_stream(layer, output[0])

        def branch(name: str) -> Callable[..., None]:
            def hook(_: Any, inputs: Any, output: Tensor) -> None:
                self._see_branch(layer, name, output, block.residual_scale)

            return hook

        core: Attend = block.attention.core
        prefix = getattr(block.attention, "prefix", None)
        before = 0 if prefix is None else prefix.tokens

        def observed_core(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            documents: Documents | None,
            scale: float,
            *,
            window: int | None = None,
        ) -> Tensor:
            filled = before if documents is None else 0  # queries without a token
            self._see_attention(layer, q, k, documents, scale, window, filled)
            return core(q, k, v, documents, scale, window=window)

        block.attention.core = observed_core
        stack.callback(setattr, block.attention, "core", core)
        for handle in (
            block.register_forward_pre_hook(enter),
            block.register_forward_hook(leave),
            block.attention_post_norm.register_forward_hook(branch("attention")),
            block.ffn_post_norm.register_forward_hook(branch("ffn")),
        ):
            stack.callback(handle.remove)

    @torch.no_grad()
    def _see_branch(self, layer: int, name: str, y_BlD: Tensor, scale: float) -> None:
        counted_Bl1 = self._counted(y_BlD)
        y_BlD = _wide(y_BlD) * scale
        away_BlD = (y_BlD - y_BlD.mean(2, keepdim=True)).abs()
        sigma_Bl1 = away_BlD.square().mean(2, keepdim=True).sqrt()
        outliers_BlD = (away_BlD > OUTLIER_SIGMAS * sigma_Bl1) & counted_Bl1
        self._add(layer, f"{name}_squares", (y_BlD.square() * counted_Bl1).sum())
        self._add(layer, f"{name}_outliers", outliers_BlD.sum())

    @torch.no_grad()
    def _see_stream(self, layer: int, x_BlD: Tensor) -> None:
        counted_Bl1 = self._counted(x_BlD)
        size_BlD = _wide(x_BlD).abs() * counted_Bl1
        self._add(layer, "magnitudes", size_BlD.sum())
        self._add(layer, "elements", counted_Bl1.sum() * x_BlD.shape[2])
        self._at_least(layer, "activation", size_BlD.amax())

    @torch.no_grad()
    def _see_attention(
        self,
        layer: int,
        q_BLNH: Tensor,
        k_BLKH: Tensor,
        documents: Documents | None,
        scale: float,
        window: int | None,
        filled: int = 0,
    ) -> None:
        assert documents is None or documents.ring is None, "keys of a ring are elsewhere"
        B, L, N, _ = q_BLNH.shape
        K = k_BLKH.shape[2]
        place_Q = self._places(L, q_BLNH.device)
        key_L = torch.arange(L, device=q_BLNH.device)
        first_BQ = torch.zeros(B, len(place_Q), dtype=torch.int64, device=q_BLNH.device)
        if documents is not None:
            first_BQ = place_Q - documents.positions_BL[:, place_Q]
        if window is not None:
            first_BQ = torch.maximum(first_BQ, place_Q - window + 1)
        visible_BQL = (key_L <= place_Q[:, None]) & (key_L >= first_BQ[:, :, None])
        counted_BL = self._counted_whole(documents, B, L, q_BLNH.device)
        counted_BQ = counted_BL[:, place_Q] & (place_Q >= filled)
        visible_BQL = visible_BQL & counted_BQ[:, :, None]
        q_BQKGH = _wide(q_BLNH[:, place_Q]).unflatten(2, (K, N // K))
        for head in range(K):  # one head at a time, to bound the memory of the logits
            keys_BLH = _wide(k_BLKH[:, :, head])
            logits_BQGL = scale * torch.einsum("bqgh,blh->bqgl", q_BQKGH[:, :, head], keys_BLH)
            seen_BQ1L = visible_BQL[:, :, None]
            log_z_BQG = logits_BQGL.masked_fill(~seen_BQ1L, float("-inf")).logsumexp(3)
            squares_BQG = log_z_BQG.square().where(counted_BQ[:, :, None], 0.0)
            self._add(layer, "squared_attention_log_z", squares_BQG.sum())
            self._add(layer, "attention_logits", logits_BQGL.where(seen_BQ1L, 0.0).sum())
            largest = logits_BQGL.where(seen_BQ1L, float("-inf")).amax()
            self._at_least(layer, "attention_logit", largest)
        self._add(layer, "queries", counted_BQ.sum() * N)
        self._add(layer, "pairs", visible_BQL.sum() * N)

    @torch.no_grad()
    def _see_head(self, head: Any, inputs: tuple[Any, ...]) -> None:
        x_BLD = inputs[0]
        B, L, _ = x_BLD.shape
        place_Q = self._places(L, x_BLD.device)
        logits_BQV = (
            _wide(F.linear(x_BLD[:, place_Q], head.stacked.joined(x_BLD.dtype))) * head.scale
        )
        largest_BQ = logits_BQV.amax(2)
        if head.vocabulary is not None:
            head.vocabulary.max_(largest_BQ)
        sums_BQ = (logits_BQV - largest_BQ[:, :, None]).exp().sum(2)
        if head.vocabulary is not None:
            head.vocabulary.sum_(sums_BQ)
        # The head reads the sum of the streams; ``documents`` are those of all streams.
        counted_BL = self._counted_whole(self._documents, B, L, x_BLD.device)[:B]
        counted_BQ = counted_BL[:, place_Q]
        log_z_BQ = (largest_BQ + sums_BQ.log()).where(counted_BQ, 0.0).double()
        self.output += torch.stack(
            [log_z_BQ.sum(), log_z_BQ.square().sum(), counted_BQ.sum().double()]
        )

    @torch.no_grad()
    def _see_input(self, stacked: Stacked, x: Tensor) -> None:
        if not (stacked.recipe or stacked.saves):
            return
        block = fp8.ACTIVATION_BLOCKS[stacked.recipe] if stacked.recipe else fp8.SAVED
        scale_dtype = torch.float32 if stacked.recipe else torch.bfloat16
        rows = _wide(x).reshape(-1, x.shape[-1])
        small = fp8.quantise(rows, block, scale_dtype=scale_dtype)
        kept = fp8.dequantise(small, block, rows.dtype)
        known = rows.isfinite() & kept.isfinite()
        counted = torch.ones_like(rows, dtype=torch.bool)
        documents = self._documents
        if documents is not None and documents.counted_BL is not None and x.dim() == 3:
            counted_BL = documents.counted_BL
            if counted_BL.shape != x.shape[:2]:
                counted_BL = self._own(counted_BL)
            counted = counted_BL.reshape(-1, 1).expand_as(rows)
        error = (kept - rows).where(known, 0.0)
        lost = ~known | (error.abs() > 2**-3 * rows.abs()) & (small.values.float().abs() >= 448.0)
        columns = torch.stack(
            [
                (rows.where(known, 0.0).square() * counted).sum(),
                (error.square() * counted).sum(),
                counted.sum(),
                ((kept == 0) & (rows != 0) & counted).sum(),
                (lost & counted).sum(),
            ]
        )
        owner, name = stacked.places[0]
        cut = stacked.weights()[0].shape[-2] < owner.specs[name].shape[-2]
        self.rounding[FP8_ROLES.index(stacked.role)] += columns / (self._copies if cut else 1)

    def _places(self, length: int, device: torch.device) -> Tensor:
        """Return the positions of the observed queries, the last token included."""
        apart = -(-length // self._queries)
        return torch.arange((length - 1) % apart, length, apart, device=device)

    @staticmethod
    def _counted_whole(documents: Documents | None, B: int, L: int, device: torch.device) -> Tensor:
        counted_BL = None if documents is None else documents.counted_BL
        if counted_BL is None:
            return torch.ones(B, L, dtype=torch.bool, device=device)
        return counted_BL

    def _counted(self, x_BlD: Tensor) -> Tensor:
        """Return True for the counted tokens of the local residual stream, [B, l, 1]."""
        counted_BL = None if self._documents is None else self._documents.counted_BL
        if counted_BL is None:
            return torch.ones(*x_BlD.shape[:2], 1, dtype=torch.bool, device=x_BlD.device)
        return self._own(counted_BL)[:, :, None]

    def _add(self, layer: int, name: str, value: Tensor) -> None:
        self.sums[layer, SUMS.index(name)] += value

    def _at_least(self, layer: int, name: str, value: Tensor) -> None:
        place = self.maxima[layer, MAXIMA.index(name)]
        place.copy_(torch.maximum(place, value.double()))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _uncompiled(block: Block) -> Iterator[None]:
    """Run a compiled block uncompiled inside the context."""
    compiled = block._compiled_call_impl
    block._compiled_call_impl = None
    try:
        yield
    finally:
        block._compiled_call_impl = compiled
