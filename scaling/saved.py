"""Activations that each operation of a block saves for its backward; one table, without torch.

The memory estimate reads the table, and ``benchmarks/memory.py`` compares the table with the
tensors that autograd saves. Bytes are per token, in the types given by ``Kernels``.
"""

# D width, N query heads, Q query features, K key features (and as many of values), F hidden width
# of a feed-forward or an expert, E experts, k of them that a token visits, W input width of experts

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
STREAMS = "streams"  # inputs of their weighted sum
OPERATIONS = (NORMS, QKV, ATTENTION, GATE_UP, SWIGLU, ROUTER, ROWS, RESIDUAL, GATHERED, STREAMS)
"""Operations. ``norms``: inputs of norms (in fp32 if their kernel is not fused) and outputs that
the next product reads. ``q, k, v``: before their norm, and rotated. ``attention``: its output and
tensors saved by its back end. ``SwiGLU``: silu(gate) and its product with up. ``router``: its fp32
input, logits and gates. ``expert rows``: tokens sorted by expert, outputs of experts, the order.
``residual``: a block's input if read again. ``gathered tokens``: branch input of all tp ranks.
"""

_WHOLE = (GATHERED, ROWS)  # not sharded by tp; rows are with whole experts
_INT64 = 8
COMPUTE = PrecisionConfig()


@dataclass(frozen=True, slots=True)
class Kernels:
    """Tensors saved by the operators of a device, and their types.

    ``compute``: bytes per activation element. ``fused_norm``: a norm saves its input and one number
    per row, like torch's CUDA kernel; on a CPU it saves the quotient and, for half types, the
    input, both in fp32. ``scores``: bytes per token saved by attention in addition to its output;
    ``windowed_scores``: the same for layers with a sliding window. ``precision``: FP8 settings;
    ``auto`` is treated as compute. ``prefix_share``: tokens of a prefix by tokens of a sequence.
    """

    compute: int
    fused_norm: bool
    scores: int
    precision: PrecisionConfig = COMPUTE
    windowed_scores: int = 0
    prefix_share: float = 0.0

    @property
    def wide(self) -> int:
        """Bytes per element of values computed in fp32 or wider."""
        return max(4, self.compute)

    @property
    def saves(self) -> bool:
        """True if inputs of norms, products and SwiGLU are saved in FP8."""
        return self.precision.saved_activations == "fp8"

    def recipe(self, role: Role, layer: int) -> str:
        """Return the FP8 scaling of products with weights of this role; "" if not in FP8."""
        asked = self.precision
        high = asked.linears in ("compute", "auto") or layer in asked.compute_layers
        return "" if high or role not in asked.roles else asked.linears

    def product_input(self, width: int, recipe: str = "", rows: int = 1) -> int:
        """Return saved bytes of a product's input, ``width`` elements in ``rows`` rows."""
        if not self.saves:
            return self.compute * width
        if not recipe:
            return fp8_bytes(width, rows)
        blocks = {"fp8_tensorwise": 0, "fp8_rowwise": rows, "fp8_blockwise": -(-width // 128)}
        return width + 4 * blocks[recipe]

    def product(self, recipe: str) -> int:
        """Return bytes per element of a product's output: a CPU emulates FP8 in fp32."""
        return self.wide if recipe and not self.fused_norm else self.compute


def fp8_bytes(width: int, rows: int = 1) -> int:
    """Return bytes of ``width`` elements, in ``rows`` rows, that are saved in FP8.

    For example, 32 elements in one row take 36 bytes.
    """
    return width + 2 * rows * -(-width // rows // SAVED_GROUP)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a model on one of ``tp`` ranks; ``ep`` > 1: experts on other ranks.

    ``whole_experts``: rows are also sent over tp. ``frozen``: parameters without gradients, by name
    in the block without ".weight"; their products do not save an input.
    """

    model: ModelConfig
    layer: int
    kernels: Kernels
    tp: int = 1
    ep: int = 1
    whole_experts: bool = False
    frozen: frozenset[str] = frozenset()

    def saved(self, tokens: int, checkpointing: Checkpointing) -> Counter[str]:
        """Return bytes, by operation, that ``tokens`` tokens save until the block's backward."""
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
        """The model if this block has experts, else None."""
        model = self.model
        return model if isinstance(model, MoEModel) and model.has_experts(self.layer) else None

    @property
    def hidden(self) -> int:
        """Hidden elements of a token in all its feed-forwards: F, or k·F and the shared experts."""
        if self.mixture is None:
            return self.model.ffn_width or 0
        experts = self.mixture.experts
        return experts.width * (experts.experts_per_token + experts.num_shared_experts)

    @property
    def widest(self) -> int:
        """Maximum hidden elements of a token at one time: of routed or of shared experts."""
        if self.mixture is None:
            return self.hidden
        experts = self.mixture.experts
        return experts.width * max(experts.experts_per_token, experts.num_shared_experts)

    @property
    def rows_width(self) -> int:
        """Elements of a token's rows sent to experts, k·W."""
        assert self.mixture is not None
        return self.mixture.experts.experts_per_token * self._expert_input

    @property
    def travels(self) -> bool:
        """True if experts of other ranks compute rows of a token."""
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
        weights = "attention.wq", "attention.wk", "attention.wv"
        rows = self._norms("attention") + self._branch_input(*weights)
        longer = 1.0 + kernels.prefix_share
        rows[QKV] += round(longer * kernels.compute * (queries + 2 * keys))
        rows[ATTENTION] += round(longer * (kernels.compute * queries + self._scores))
        # Else the product reads the attention output itself; of a longer output it reads a copy.
        if (kernels.saves or kernels.prefix_share) and self._trains("attention.wo"):
            rows[ATTENTION] += kernels.product_input(queries, self._recipe())
        if self.model.qk_norm:
            normed = self._qk_norm()
            # Values are part of the output of one product for all three, unless a bias is added.
            if kernels.compute < 4 and not kernels.saves and not self.model.qkv_bias:
                rows[QKV] += kernels.compute * (queries + keys)
                if kernels.fused_norm and not self._norms_over_ranks:
                    normed[NORMS] -= kernels.compute * (queries + keys)
            rows += Counter({QKV: normed.pop(RESIDUAL, 0)}) + normed
        return rows + self._dropout()

    def _latent_attention(self, latent: LatentAttention) -> Counter[str]:
        """Return bytes of latent attention, with values padded to the width of keys."""
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
        if self.tp > 1 and self._trains("attention.wq", "attention.wkv"):
            width = latents if rank else latents + self.model.width
            rows[GATHERED] += kernels.product_input(width, self._recipe())
        for width, name in ((rank, "wq"), (latent.kv_lora_rank, "wkv")) if self.tp == 1 else ():
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
        """Return the elements per token of the latents and of the rotated part of keys."""
        return (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim

    def _dropout(self) -> Counter[str]:
        """Return the bytes of a mask for each branch: bool on CUDA, compute dtype on a CPU."""
        element = 1 if self.kernels.fused_norm else self.kernels.compute
        return Counter({RESIDUAL: 2 * element * self.model.width} if self.model.dropout else {})

    def _norms(self, branch: str) -> Counter[str]:
        """Return bytes of the norms before and after a branch, if present."""
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
        """True if the norm of queries and keys needs heads of other ranks; never fused."""
        return self.model.qk_norm_over == "width" and self.tp > 1

    def _qk_norm(self) -> Counter[str]:
        """Return bytes of the norm of queries and keys."""
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
        """Return bytes of gate and up, activation(gate) (not in FP8), and the input of down."""
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
            # The router saves it in FP8; products that use the same tensor unchanged save no other
            # copy.
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
                rows[NORMS] += kernels.compute * width  # the router reads it unchanged
        logits = 2 if model.router.gate in ("softmax", "sigmoid") else 1
        rows[ROUTER] += logits * kernels.wide * experts.num_experts
        rows[ROUTER] += visits * (kernels.wide + _INT64)
        # Rows sorted by expert (as received, if sent between ranks) and rows returned.
        up = self._recipe(Role.EXPERT_UP)
        if not self._trains("ffn.experts.gate", "ffn.experts.up"):
            pass
        elif not kernels.saves or self.travels:
            rows[ROWS] += kernels.product_input(self.rows_width, up, visits)
        elif latent or up or self.tp > 1:  # else shared with the router; by token, not by row
            rows[ROWS] += kernels.product_input(self._expert_input, up)
        rows[ROWS] += kernels.compute * self.rows_width
        rows[ROWS] += visits * 2 * _INT64 * (2 if self.ep > 1 else 1)
        if latent and self._trains("ffn.latent_up"):
            rows[ROWS] += kernels.product_input(latent, self._recipe())
        if isinstance(experts, LatentExperts) and experts.norm:
            rows += norm(latent, kernels, trained=self._trains("ffn.latent_norm"))
        return rows

    def _trains(self, *names: str) -> bool:
        """Return True if any of these weights is trained, so that their product saves its input."""
        return not self.frozen.issuperset(names)

    def _recipe(self, role: Role = Role.HIDDEN) -> str:
        return self.kernels.recipe(role, self.layer)

    def _branch_input(self, *weights: str) -> Counter[str]:
        """Return bytes of a norm's output, gathered over tp, if a product of the branch saves it.

        A product saves its input if one of its ``weights`` is trained.
        """
        if not self._trains(*weights):
            return Counter()
        name = NORMS if self.tp == 1 else GATHERED
        return Counter({name: self.kernels.product_input(self.model.width, self._recipe())})

    def _selected(self) -> Counter[str]:
        """Return bytes that selective checkpointing saves: products, attention, collectives."""
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
                ATTENTION: round((1.0 + self.kernels.prefix_share) * (c * queries + self._scores)),
                GATE_UP: 2 * made * self.hidden,
                RESIDUAL: (c + made) * width,  # the input, and the output of attention
            }
        )
        if self.tp > 1:  # branch inputs, and sums before the reduce-scatter
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
    """Return saved bytes of a norm of ``rows`` rows with ``width`` elements in total.

    An unfused norm's input that is read unchanged counts as ``RESIDUAL``; for a ``trained`` gain
    the norm saves the quotient.
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
