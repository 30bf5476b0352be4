"""What the architectures of the ``model`` section share."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section

NormOver = Literal["head", "width"]
NormPlaces = Literal["before", "after", "both"]
Activation = Literal["silu", "gelu_tanh"]


class LinearScaling(Section):
    """All rotary frequencies divided by one factor (arXiv 2306.15595)."""

    kind: Literal["linear"]
    factor: float = Field(ge=1.0, description="what frequencies are divided by")


class Llama3Scaling(Section):
    """Llama 3.1's: long wavelengths divided, short ones kept, between them a mixture.

    As Meta published it with the models (arXiv 2407.21783 names only the base).
    """

    kind: Literal["llama3"]
    factor: float = Field(ge=1.0, description="what low frequencies are divided by")
    original_length: Count = Field(gt=0, description="tokens of the sequences of before")
    low_freq_factor: float = Field(
        1.0, gt=0.0, description="wavelengths above original_length over this are divided"
    )
    high_freq_factor: float = Field(
        4.0, gt=0.0, description="wavelengths below original_length over this are kept"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        return self


class YarnScaling(Section):
    """YaRN (arXiv 2309.00071): by how often a frequency turns in the sequences of before."""

    kind: Literal["yarn"]
    factor: float = Field(ge=1.0, description="what low frequencies are divided by")
    original_length: Count = Field(gt=0, description="tokens of the sequences of before")
    beta_fast: float = Field(32.0, gt=0.0, description="turns from which frequencies are kept")
    beta_slow: float = Field(1.0, gt=0.0, description="turns up to which they are divided whole")
    attention_factor: float | None = Field(
        None,
        gt=0.0,
        description="multiplies rotated queries and keys; null: 0.1 ln(factor) + 1",
    )
    mscale_all_dim: float = Field(
        0.0,
        ge=0.0,
        description="multiplies all scores by (0.1 x this x ln(factor) + 1)^2, of numbers that are "
        "not rotated, too (DeepSeek-V3)",
    )
    truncate: bool = Field(
        True, description="bounds of the mixture are rounded outwards to whole frequencies"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}")
        return self


def mscale(factor: float, by: float) -> float:
    """Return 0.1 ``by`` ln(``factor``) + 1 (arXiv 2309.00071, section 3.4, where ``by`` is 1)."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class SlidingWindow(Section):
    """Layers whose queries see the nearest keys alone (arXiv 2004.05150), and which those are."""

    tokens: Count = Field(gt=0, description="keys that a query meets at most, its own among them")
    global_every: Count | None = Field(
        None,
        gt=1,
        description="each so many-th layer sees everything (6: after every five with a window); "
        "null: none does",
    )
    rope_theta: float | None = Field(
        None,
        gt=0.0,
        description="base of the rotary frequencies of layers with a window, which are then not "
        "scaled; null: all layers turn alike",
    )


class LatentAttention(Section):
    """Multi-head latent attention (arXiv 2405.04434, eq. 37-47): queries, keys, values of low rank.

    A key is ``qk_nope_head_dim`` numbers of each head and ``qk_rope_head_dim`` rotated ones that
    all heads share.
    """

    q_lora_rank: Count | None = Field(
        None, gt=0, description="width of the queries' latent; null: queries are a full product"
    )
    kv_lora_rank: Count = Field(gt=0, description="width of the latent of keys and values")
    qk_nope_head_dim: Count = Field(gt=0, description="numbers of a query that are not rotated")
    qk_rope_head_dim: Count = Field(gt=0, description="numbers of a query that are rotated")
    v_head_dim: Count = Field(gt=0, description="width of a value")
    norm_eps: float = Field(1e-6, gt=0.0, description="epsilon inside the RMSNorm of latents")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even, as RoPE turns pairs"
            )
        if self.v_head_dim > self.qk_nope_head_dim + self.qk_rope_head_dim:
            raise ValueError(
                f"v_head_dim={self.v_head_dim} must not exceed qk_nope_head_dim="
                f"{self.qk_nope_head_dim} + qk_rope_head_dim={self.qk_rope_head_dim}, the width "
                "that kernels of attention give to values as well"
            )
        return self


class Decoder(Section):
    """What all decoder-only transformers share: RMSNorm, RoPE, grouped-query attention.

    What families of published models differ in is an option here; docs/families.md says which.
    """

    vocab_size: Count = Field(gt=0, description="rows of the embedding; at least the tokenizer's")
    width: Count = Field(gt=0, description="width of the residual stream")
    num_layers: Count = Field(gt=0, le=65_536, description="transformer blocks")
    num_heads: Count = Field(gt=0, description="query heads")
    num_kv_heads: Count | None = Field(None, gt=0, description="key/value heads; null: num_heads")
    head_dim: Count | None = Field(None, gt=0, description="width of a head; null: width/num_heads")
    latent_attention: LatentAttention | None = Field(
        None, description="multi-head latent attention in every block; null: grouped queries"
    )
    qkv_bias: bool = Field(False, description="biases of the products to queries, keys and values")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys")
    qk_norm_over: NormOver = Field(
        "head",
        description="what qk_norm is the root mean square of: each head, or all heads of a token "
        "(width, arXiv 2501.00656)",
    )
    norms: NormPlaces = Field(
        "before",
        description="RMSNorm of each branch: of what it reads (before), of what it adds to the "
        "residual stream (after, arXiv 2501.00656), or both (arXiv 2408.00118)",
    )
    activation: Activation = Field(
        "silu",
        description="of the gate of feed-forwards and experts: silu (SwiGLU), or gelu_tanh (GeGLU; "
        "arXiv 2002.05202)",
    )
    embedding_scale: float = Field(
        1.0, gt=0.0, description="multiplies the embedded tokens (Gemma: root of its width)"
    )
    tied_embeddings: bool = Field(False, description="share the embedding with the output head")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on each branch's output")
    norm_eps: float = Field(1e-5, gt=0.0, description="epsilon inside RMSNorm")
    rope_theta: float = Field(10_000.0, gt=0.0, description="base of the rotary frequencies")
    rope_fraction: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="fraction of each head that turns: its first components; the others have no "
        "position (Ling 2.0, arXiv 2510.22115)",
    )
    rope_scaling: RopeScaling | None = Field(
        None, description="rotary frequencies of a model that goes on with longer sequences"
    )
    window: SlidingWindow | None = Field(
        None, description="sliding windows of attention; null: every layer sees everything"
    )
    z_loss: float = Field(0.0, ge=0.0, description="coefficient of the squared log partition")

    @property
    def norms_before(self) -> bool:
        """Whether a branch reads the residual stream through a norm."""
        return self.norms != "after"

    @property
    def norms_after(self) -> bool:
        """Whether what a branch adds to the residual stream comes out of a norm."""
        return self.norms != "before"

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head's queries and keys, with the default filled in."""
        if self.latent_attention is not None:
            return self.latent_attention.qk_nope_head_dim + self.latent_attention.qk_rope_head_dim
        return self.head_dim or self.width // self.num_heads

    @property
    def value_width(self) -> int:
        """Width of one head's values."""
        latent = self.latent_attention
        return self.head_width if latent is None else latent.v_head_dim

    @property
    def rotary_width(self) -> int:
        """Components of a head that are rotated with its position: the first ones."""
        latent = self.latent_attention
        if latent is not None:
            return latent.qk_rope_head_dim
        return round(self.rope_fraction * self.head_width)

    @property
    def score_factor(self) -> float:
        """Factor of all scores by ``rope_scaling``: 1 except with YaRN's ``mscale_all_dim``."""
        scaling = self.rope_scaling
        if not isinstance(scaling, YarnScaling):
            return 1.0
        return mscale(scaling.factor, scaling.mscale_all_dim) ** 2

    def windowed(self, layer: int) -> bool:
        """Whether this layer (counted from 0) has a window."""
        if self.window is None:
            return False
        every = self.window.global_every
        return every is None or (layer + 1) % every != 0

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer meets at most; None: all before it."""
        return self.window_tokens if self.windowed(layer) else None

    @property
    def window_tokens(self) -> int | None:
        """Keys that a query of a layer with a window meets at most; None: no layer has one."""
        return self.window.tokens if self.window is not None else None

    @property
    def num_windowed(self) -> int:
        """Layers that have a window."""
        if self.window is None:
            return 0
        every = self.window.global_every
        return self.num_layers - (self.num_layers // every if every else 0)

    @model_validator(mode="after")
    def _check_latent(self) -> Self:
        if self.latent_attention is None:
            return self
        usual_of = {"head_dim": None, "qkv_bias": False, "qk_norm": False, "rope_fraction": 1.0}
        for key, usual in usual_of.items():
            if getattr(self, key) != usual:
                raise ValueError(
                    f"{key}={getattr(self, key)} has no place in latent_attention, which has "
                    f"widths and norms of its own; leave {key} out"
                )
        if self.kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads}: with latent_attention each of num_heads="
                f"{self.num_heads} heads has keys of its own; leave num_kv_heads out"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        latent = self.latent_attention is not None
        if self.head_dim is None and not latent and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}; "
                "change one of them or set head_dim"
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ValueError(
                f"qk_norm_over={self.qk_norm_over} has no effect without qk_norm; set qk_norm: "
                "true or leave qk_norm_over out"
            )
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1.0:
            raise ValueError(
                f"rope_theta={self.rope_theta} must be above 1 for YaRN's rope_scaling"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        turned = self.rope_fraction * self.head_width
        if not latent and (abs(turned - self.rotary_width) > 1e-6 or self.rotary_width % 2):
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_width} is {turned:g} "
                "components, which must be an even number, as RoPE turns pairs; use a multiple of "
                f"{2 / self.head_width:g}"
            )
        return self
