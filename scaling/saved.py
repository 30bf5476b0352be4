"""What each operation of a block keeps for its backward pass: one table, without torch.

The estimate of memory reads it, and ``benchmarks/memory.py`` holds it against what autograd keeps.
Bytes are those of one token; a recipe that keeps something in another type is another
``ElementBytes``.
"""

# D width, N query heads, Q query features, K key features (and as many of values), F hidden width
# of a feed-forward or an expert, E experts, k of them that a token visits, W width experts read

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from allometry.configs.model import LatentExperts, ModelConfig, MoEModel

Checkpointing = Literal["none", "selective", "full"]

NORMS, QKV, ATTENTION, GATE_UP, SWIGLU = "norms", "q, k, v", "attention", "gate, up", "SwiGLU"
ROUTER, ROWS, RESIDUAL, GATHERED = "router", "expert rows", "residual", "gathered tokens"
OPERATIONS = (NORMS, QKV, ATTENTION, GATE_UP, SWIGLU, ROUTER, ROWS, RESIDUAL, GATHERED)
"""``norms``: what norms read (widened to fp32 where their kernel is not fused) and what they make
for the next product. ``q, k, v``: before their norm, and turned. ``attention``: its output and what
its back end keeps. ``SwiGLU``: silu(gate) and its product with up. ``router``: its input in fp32,
logits and gates. ``expert rows``: tokens sorted by expert, what experts made of them, the order.
``residual``: a block's input where something reads it again. ``gathered tokens``: a branch's input,
of all tensor-parallel ranks."""

_WHOLE = (GATHERED, ROWS)  # tensor parallelism cuts everything else
_INT64 = 8


@dataclass(frozen=True, slots=True)
class ElementBytes:
    """Bytes of one element of what is kept, by who reads it; ``compute``: of activations."""

    compute: int
    norm_input: int
    product_input: int
    attention_input: int
    swiglu_input: int
    expert_rows: int

    @classmethod
    def as_computed(cls, compute_bytes: int) -> ElementBytes:
        """Everything in the type of activations."""
        return cls(compute_bytes, *[compute_bytes] * 5)

    @property
    def wide(self) -> int:
        """Bytes of what is computed in fp32 or wider."""
        return max(4, self.compute)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the operators of a device keep.

    ``fused_norm``: a norm keeps its input and a number for each row, as torch's CUDA kernel; on a
    CPU it keeps the quotient and, of half types, the input, both in fp32. ``scores``: bytes of a
    token that attention keeps besides its output.
    """

    element: ElementBytes
    fused_norm: bool
    scores: int


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a model on one of ``tp`` ranks; ``ep``: whether experts' rows travel."""

    model: ModelConfig
    layer: int
    kernels: Kernels
    tp: int = 1
    ep: int = 1

    def saved(self, tokens: int, checkpointing: Checkpointing) -> Counter[str]:
        """Return the bytes, by operation, that ``tokens`` keep until the block's backward."""
        match checkpointing:
            case "none":
                rows = self._attention() + self._ffn()
            case "selective":
                rows = self._selected()
            case "full":
                rows = Counter({RESIDUAL: self.kernels.element.compute * self.model.width})
        found = {name: tokens * n / (1 if name in _WHOLE else self.tp) for name, n in rows.items()}
        return Counter({name: round(n) for name, n in found.items()})

    @property
    def mixture(self) -> MoEModel | None:
        """The model, if this block has experts."""
        model = self.model
        return model if isinstance(model, MoEModel) and model.has_experts(self.layer) else None

    @property
    def hidden(self) -> int:
        """Hidden elements of a token in all its feed-forwards: F, or k·F and the shared ones."""
        if self.mixture is None:
            assert self.model.ffn_width is not None
            return self.model.ffn_width
        experts = self.mixture.experts
        return experts.width * (experts.experts_per_token + experts.num_shared_experts)

    @property
    def rows_width(self) -> int:
        """Elements of a token's rows on their way to experts, k·W."""
        assert self.mixture is not None
        return self.mixture.experts.experts_per_token * self._expert_input

    @property
    def _expert_input(self) -> int:
        assert self.mixture is not None
        experts = self.mixture.experts
        return experts.latent_width if isinstance(experts, LatentExperts) else self.model.width

    @property
    def _features(self) -> tuple[int, int]:
        model = self.model
        return model.num_heads * model.head_width, model.kv_heads * model.head_width

    def _attention(self) -> Counter[str]:
        element = self.kernels.element
        queries, keys = self._features
        rows = norm(self.model.width, self.kernels) + self._branch_input()
        rows[QKV] += element.attention_input * (queries + 2 * keys)
        rows[ATTENTION] += element.product_input * queries + self.kernels.scores
        if self.model.qk_norm:
            heads = self.model.num_heads + self.model.kv_heads
            normed = norm(queries + keys, self.kernels, heads)
            if element.compute < 4:  # values are a part of the one product that made all three
                rows[QKV] += element.compute * (queries + keys)
                if self.kernels.fused_norm:
                    normed[NORMS] -= element.norm_input * (queries + keys)
            rows += Counter({QKV: normed.pop(RESIDUAL, 0)}) + normed
        if self.model.dropout:
            rows[RESIDUAL] += 2 * self.model.width  # a mask of one byte for each branch
        return rows

    def _ffn(self) -> Counter[str]:
        element = self.kernels.element
        rows = norm(self.model.width, self.kernels)
        rows[GATE_UP] += 2 * element.swiglu_input * self.hidden
        rows[SWIGLU] += (element.swiglu_input + element.product_input) * self.hidden
        if self.mixture is None:
            return rows + self._branch_input()
        return rows + self._mixture(self.mixture)

    def _mixture(self, model: MoEModel) -> Counter[str]:
        element, experts = self.kernels.element, model.experts
        visits = experts.experts_per_token
        rows: Counter[str] = Counter()
        if experts.num_shared_experts or isinstance(experts, LatentExperts):
            rows += self._branch_input()
        elif element.compute == element.wide:
            rows[NORMS] += element.compute * model.width  # which the router reads as it is
        if element.compute < element.wide:
            rows[ROUTER] += element.wide * model.width
        logits = 2 if model.router.gate in ("softmax", "sigmoid") else 1
        rows[ROUTER] += logits * element.wide * experts.num_experts
        rows[ROUTER] += visits * (element.wide + _INT64)
        # As they are sorted here, as they came back and, over ep, as they arrived.
        rows[ROWS] += (3 if self.ep > 1 else 2) * element.expert_rows * self.rows_width
        rows[ROWS] += visits * 2 * _INT64 * (2 if self.ep > 1 else 1)
        if isinstance(experts, LatentExperts):
            rows[ROWS] += element.product_input * experts.latent_width
        return rows

    def _branch_input(self) -> Counter[str]:
        """A norm's output, which the products of a branch read; gathered from all of tp."""
        name = NORMS if self.tp == 1 else GATHERED
        return Counter({name: self.kernels.element.product_input * self.model.width})

    def _selected(self) -> Counter[str]:
        """What selective checkpointing keeps: results of products, attention and messages."""
        c, width = self.kernels.element.compute, self.model.width
        queries, keys = self._features
        rows: Counter[str] = Counter(
            {
                QKV: c * (queries + 2 * keys),
                ATTENTION: c * queries + self.kernels.scores,
                GATE_UP: 2 * c * self.hidden,
                RESIDUAL: 2 * c * width,  # the input, and what attention adds
            }
        )
        if self.tp > 1:
            rows[GATHERED] += 4 * c * width  # inputs of branches, and their sums before they go
        if self.mixture is None:
            rows[RESIDUAL] += c * width
            return rows
        experts = self.mixture.experts
        rows[ROUTER] += self.kernels.element.wide * experts.num_experts
        rows[ROWS] += c * self.rows_width * (3 if self.ep > 1 else 1)
        if isinstance(experts, LatentExperts):
            rows[ROWS] += c * (experts.latent_width + width)
        if experts.num_shared_experts:
            rows[RESIDUAL] += c * width
        return rows


def norm(width: int, kernels: Kernels, rows: int = 1) -> Counter[str]:
    """Return the bytes that a norm of ``rows`` rows, ``width`` elements in all, keeps of its input.

    What it reads as it is, unfused, is under ``RESIDUAL``.
    """
    element = kernels.element
    if kernels.fused_norm:
        return Counter({NORMS: element.norm_input * width + element.wide * rows})
    kept = Counter({NORMS: element.wide * (width + rows)})
    if element.compute < element.wide:
        kept[NORMS] += element.wide * width
    else:
        kept[RESIDUAL] += element.compute * width
    return kept
