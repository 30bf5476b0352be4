"""What each operation of a block keeps for its backward pass: one table, without torch.

The estimate of memory reads it, and ``benchmarks/memory.py`` holds it against what autograd keeps.
Bytes are those of one token, in the types that ``Kernels`` says.
"""

# D width, N query heads, Q query features, K key features (and as many of values), F hidden width
# of a feed-forward or an expert, E experts, k of them that a token visits, W width experts read

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from allometry.configs.decoder import LatentAttention
from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
from allometry.configs.precision import PrecisionConfig
from allometry.scaling.precision import SAVED_GROUP
from allometry.scaling.roles import Role

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

_WHOLE = (GATHERED, ROWS)  # tensor parallelism cuts everything else; rows too of whole experts
_INT64 = 8
COMPUTE = PrecisionConfig()


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the operators of a device keep, and in which types.

    ``compute``: bytes of an activation. ``fused_norm``: a norm keeps its input and a number for
    each row, as torch's CUDA kernel; on a CPU it keeps the quotient and, of half types, the input,
    both in fp32. ``scores``: bytes of a token that attention keeps besides its output;
    ``windowed_scores``: the same in layers with a sliding window.
    ``precision``: what is kept or multiplied in FP8, of which ``auto`` is taken for compute.
    """

    compute: int
    fused_norm: bool
    scores: int
    precision: PrecisionConfig = COMPUTE
    windowed_scores: int = 0

    @property
    def wide(self) -> int:
        """Bytes of what is computed in fp32 or wider."""
        return max(4, self.compute)

    @property
    def saves(self) -> bool:
        """Whether inputs of norms, products and SwiGLU are kept in FP8."""
        return self.precision.saved_activations == "fp8"

    def recipe(self, role: Role, layer: int) -> str:
        """Return how products with weights of this role are scaled in FP8; "": they are not."""
        asked = self.precision
        high = asked.linears in ("compute", "auto") or layer in asked.compute_layers
        return "" if high or role not in asked.roles else asked.linears

    def product_input(self, width: int, recipe: str = "", rows: int = 1) -> int:
        """Return the bytes kept of a product's input, ``width`` elements in ``rows`` rows."""
        if not self.saves:
            return self.compute * width
        if not recipe:
            return fp8_bytes(width, rows)
        blocks = {"fp8_tensorwise": 0, "fp8_rowwise": rows, "fp8_blockwise": -(-width // 128)}
        return width + 4 * blocks[recipe]

    def product(self, recipe: str) -> int:
        """Return the bytes of a number that a product made: FP8 is emulated in fp32 on a CPU."""
        return self.wide if recipe and not self.fused_norm else self.compute


def fp8_bytes(width: int, rows: int = 1) -> int:
    """Return the bytes of ``width`` elements, in ``rows`` rows, that are saved in FP8."""
    return width + 2 * rows * -(-width // rows // SAVED_GROUP)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a model on one of ``tp`` ranks; ``ep``: whether experts' rows travel.

    ``whole_experts``: whether they do over tp. ``frozen``: parameters without gradients, by their
    names in the block without ".weight"; a product of such keeps no input.
    """

    model: ModelConfig
    layer: int
    kernels: Kernels
    tp: int = 1
    ep: int = 1
    whole_experts: bool = False
    frozen: frozenset[str] = frozenset()

    def saved(self, tokens: int, checkpointing: Checkpointing) -> Counter[str]:
        """Return the bytes, by operation, that ``tokens`` keep until the block's backward."""
        match checkpointing:
            case "none":
                rows = self._attention() + self._ffn()
            case "selective":
                rows = self._selected()
            case "full":
                rows = Counter({RESIDUAL: self.kernels.compute * self.model.width})
        whole = _WHOLE[: 1 if self.whole_experts else 2]
        found = {name: tokens * n / (1 if name in whole else self.tp) for name, n in rows.items()}
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
    def widest(self) -> int:
        """Hidden elements of a token that exist at once: of the experts or of the shared ones."""
        if self.mixture is None:
            return self.hidden
        experts = self.mixture.experts
        return experts.width * max(experts.experts_per_token, experts.num_shared_experts)

    @property
    def rows_width(self) -> int:
        """Elements of a token's rows on their way to experts, k·W."""
        assert self.mixture is not None
        return self.mixture.experts.experts_per_token * self._expert_input

    @property
    def travels(self) -> bool:
        """Whether experts of other ranks compute a token's rows."""
        return self.ep > 1 or (self.tp > 1 and self.whole_experts)

    @property
    def _expert_input(self) -> int:
        assert self.mixture is not None
        experts = self.mixture.experts
        return experts.latent_width if isinstance(experts, LatentExperts) else self.model.width

    @property
    def _scores(self) -> int:
        kernels = self.kernels
        return kernels.windowed_scores if self.model.windowed(self.layer) else kernels.scores

    @property
    def _features(self) -> tuple[int, int]:
        model = self.model
        return model.num_heads * model.head_width, model.kv_heads * model.head_width

    def _attention(self) -> Counter[str]:
        if self.model.latent_attention is not None:
            return self._latent_attention(self.model.latent_attention)
        kernels = self.kernels
        queries, keys = self._features
        rows = self._norms("attention") + self._branch_input(
            "attention.wq", "attention.wk", "attention.wv"
        )
        rows[QKV] += kernels.compute * (queries + 2 * keys)
        rows[ATTENTION] += kernels.compute * queries + self._scores
        # Else what attention returned is the next product's input.
        if kernels.saves and self._trains("attention.wo"):
            rows[ATTENTION] += kernels.product_input(queries, self._recipe())
        if self.model.qk_norm:
            normed = self._qk_norm()
            # Values are a part of the one product that made all three, unless a bias was added.
            if kernels.compute < 4 and not kernels.saves and not self.model.qkv_bias:
                rows[QKV] += kernels.compute * (queries + keys)
                if kernels.fused_norm and not self._norms_over_ranks:
                    normed[NORMS] -= kernels.compute * (queries + keys)
            rows += Counter({QKV: normed.pop(RESIDUAL, 0)}) + normed
        return rows + self._dropout()

    def _latent_attention(self, latent: LatentAttention) -> Counter[str]:
        """Latents, and queries, keys and values of one width, as most kernels want them."""
        kernels, queries = self.kernels, self._features[0]
        rank, latents = latent.q_lora_rank or 0, self._latents(latent)
        rows = self._norms("attention") + self._branch_input(
            "attention.latent_q", "attention.latent_kv", *(() if rank else ("attention.wq",))
        )
        of_norms = Counter[str]()
        for width, name in ((rank, "q_norm"), (latent.kv_lora_rank, "kv_norm")):
            if width:
                of_norms += norm(width, kernels, trained=self._trains(f"attention.{name}"))
        # What norms read as it is are parts of products' results, with what is to be rotated.
        as_it_is = not kernels.saves and (kernels.fused_norm or kernels.compute == kernels.wide)
        rows[QKV] += of_norms.pop(RESIDUAL, 0)
        rows[QKV] += kernels.compute * latent.qk_rope_head_dim * as_it_is
        rows += of_norms
        if self.tp > 1:
            if self._trains("attention.wq", "attention.wkv"):
                width = latents if rank else latents + self.model.width
                rows[GATHERED] += kernels.product_input(width, self._recipe())
        else:
            for width, name in ((rank, "wq"), (latent.kv_lora_rank, "wkv")):
                if width and self._trains(f"attention.{name}"):
                    rows[NORMS] += kernels.product_input(width, self._recipe())
        rows[QKV] += 3 * kernels.compute * queries
        rows[ATTENTION] += kernels.compute * queries + self._scores
        # Of narrower values the product reads a copy of the output's first columns.
        copied = kernels.saves or latent.v_head_dim < self.model.head_width
        if copied and self._trains("attention.wo"):
            values = self.model.num_heads * latent.v_head_dim
            rows[ATTENTION] += kernels.product_input(values, self._recipe())
        return rows + self._dropout()

    @staticmethod
    def _latents(latent: LatentAttention) -> int:
        """What the first products make of a token: latents, and what is rotated of keys."""
        return (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim

    def _dropout(self) -> Counter[str]:
        """A mask of one byte for each branch."""
        return Counter({RESIDUAL: 2 * self.model.width} if self.model.dropout else {})

    def _norms(self, branch: str) -> Counter[str]:
        """The norms before and after a branch, as many as there are."""
        model, rows = self.model, Counter[str]()
        for there, name in (
            (model.norms_before, f"{branch}_norm"),
            (model.norms_after, f"{branch}_post_norm"),
        ):
            if there:
                rows += norm(model.width, self.kernels, trained=self._trains(name))
        return rows

    @property
    def _norms_over_ranks(self) -> bool:
        """Whether queries' and keys' norm needs other ranks' heads: no kernel fuses that."""
        return self.model.qk_norm_over == "width" and self.tp > 1

    def _qk_norm(self) -> Counter[str]:
        """The norm of queries and keys."""
        model, kernels = self.model, self.kernels
        rows = model.num_heads + model.kv_heads if model.qk_norm_over == "head" else 2
        if self._norms_over_ranks:
            kernels = replace(kernels, fused_norm=False)
        trained = self._trains("attention.q_norm", "attention.k_norm")
        return norm(sum(self._features), kernels, rows, trained=trained)

    def _ffn(self) -> Counter[str]:
        mixture = self.mixture
        rows = self._norms("ffn")
        if mixture is None:
            rows += self._gated(self.hidden, self._recipe(), "ffn")
            return rows + self._branch_input("ffn.gate", "ffn.up")
        experts = mixture.experts
        visits, shared = experts.experts_per_token, experts.num_shared_experts
        down = self._recipe(Role.EXPERT_DOWN)
        rows += self._gated(visits * experts.width, down, "ffn.experts", visits)
        if shared:
            rows += self._gated(shared * experts.width, self._recipe(), "ffn.shared")
        return rows + self._mixture(mixture)

    def _gated(self, hidden: int, recipe: str, module: str, rows: int = 1) -> Counter[str]:
        """Gate and up, activation(gate), in FP8 not that, and the input of the product down."""
        kernels = self.kernels
        trained = self._trains(f"{module}.down")
        down = kernels.product_input(hidden, recipe, rows) if trained else 0
        if kernels.saves:
            return Counter({GATE_UP: fp8_bytes(2 * hidden, rows), SWIGLU: down})
        return Counter(
            {GATE_UP: 2 * kernels.compute * hidden, SWIGLU: kernels.compute * hidden + down}
        )

    def _mixture(self, model: MoEModel) -> Counter[str]:
        kernels, experts = self.kernels, model.experts
        visits, width = experts.experts_per_token, model.width
        latent = experts.latent_width if isinstance(experts, LatentExperts) else 0
        rows: Counter[str] = Counter()
        shared = ("ffn.shared.gate", "ffn.shared.up") if experts.num_shared_experts else ()
        beside = (*shared, *(("ffn.latent_down",) if latent else ()))
        routes = self._trains("ffn.router")
        if kernels.saves:
            # The router keeps it in FP8; what multiplies the same tensor as it is keeps no other.
            rows[ROUTER] += fp8_bytes(width)
            if experts.num_shared_experts and (self.tp > 1 or self._recipe()):
                rows += self._branch_input(*shared)
            if latent and self._recipe():
                rows += self._branch_input("ffn.latent_down")
        else:
            if beside:
                rows += self._branch_input(*beside)
            if kernels.compute < kernels.wide:
                rows[ROUTER] += kernels.wide * width if routes else 0
            elif not rows and routes:
                rows[NORMS] += kernels.compute * width  # which the router reads as it is
        logits = 2 if model.router.gate in ("softmax", "sigmoid") else 1
        rows[ROUTER] += logits * kernels.wide * experts.num_experts
        rows[ROUTER] += visits * (kernels.wide + _INT64)
        # As they are sorted here (where they travel, as they arrived) and as they came back.
        up = self._recipe(Role.EXPERT_UP)
        if not self._trains("ffn.experts.gate", "ffn.experts.up"):
            pass
        elif not kernels.saves or self.travels:
            rows[ROWS] += kernels.product_input(self.rows_width, up, visits)
        elif latent or up or self.tp > 1:  # else the router's; of tokens, not of their rows
            rows[ROWS] += kernels.product_input(self._expert_input, up)
        rows[ROWS] += kernels.compute * self.rows_width
        rows[ROWS] += visits * 2 * _INT64 * (2 if self.ep > 1 else 1)
        if latent and self._trains("ffn.latent_up"):
            rows[ROWS] += kernels.product_input(latent, self._recipe())
        return rows

    def _trains(self, *names: str) -> bool:
        """Whether any of these weights has a gradient, for which their product keeps its input."""
        return not self.frozen.issuperset(names)

    def _recipe(self, role: Role = Role.HIDDEN) -> str:
        return self.kernels.recipe(role, self.layer)

    def _branch_input(self, *weights: str) -> Counter[str]:
        """A norm's output, which products of a branch keep if one of their weights is trained;
        gathered from all of tp."""
        if not self._trains(*weights):
            return Counter()
        name = NORMS if self.tp == 1 else GATHERED
        return Counter({name: self.kernels.product_input(self.model.width, self._recipe())})

    def _selected(self) -> Counter[str]:
        """What selective checkpointing keeps: results of products, attention and messages."""
        c, width = self.kernels.compute, self.model.width
        queries, keys = self._features
        made, up, down = (
            self.kernels.product(self._recipe(role))
            for role in (Role.HIDDEN, Role.EXPERT_UP, Role.EXPERT_DOWN)
        )
        latent, gathered = self.model.latent_attention, width
        projected = queries + 2 * keys
        if latent is not None:
            own = latent.qk_nope_head_dim + latent.v_head_dim
            projected = queries + self.model.num_heads * own + self._latents(latent)
            gathered = self._latents(latent) + (0 if latent.q_lora_rank else width)
        rows: Counter[str] = Counter(
            {
                QKV: made * projected,
                ATTENTION: c * queries + self._scores,
                GATE_UP: 2 * made * self.hidden,
                RESIDUAL: (c + made) * width,  # the input, and what attention adds
            }
        )
        if self.tp > 1:
            # Inputs of branches, and their sums before they go.
            rows[GATHERED] += c * (3 * width + gathered)
        if self.mixture is None:
            rows[RESIDUAL] += made * width
            return rows
        experts = self.mixture.experts
        rows[GATE_UP] += 2 * (up - made) * experts.experts_per_token * experts.width
        rows[ROUTER] += self.kernels.wide * experts.num_experts
        rows[ROWS] += self.rows_width * (down + (2 * c if self.ep > 1 else 0))
        if isinstance(experts, LatentExperts):
            rows[ROWS] += made * (experts.latent_width + width)
        if experts.num_shared_experts:
            rows[RESIDUAL] += made * width
        return rows


def norm(width: int, kernels: Kernels, rows: int = 1, *, trained: bool = True) -> Counter[str]:
    """Return the bytes that a norm of ``rows`` rows, ``width`` elements in all, keeps of its input.

    What it reads as it is, unfused, is under ``RESIDUAL``; for a gain that is ``trained`` it keeps
    the quotient.
    """
    if kernels.saves:
        return Counter({NORMS: fp8_bytes(width, rows) + kernels.wide * rows})
    if kernels.fused_norm:
        return Counter({NORMS: kernels.compute * width + kernels.wide * rows})
    kept = Counter({NORMS: kernels.wide * (width * trained + rows)})
    if kernels.compute < kernels.wide:
        kept[NORMS] += kernels.wide * width
    else:
        kept[RESIDUAL] += kernels.compute * width
    return kept
