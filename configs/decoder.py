"""Keys of the ``model`` section that all architectures share."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section
from allometry.configs.streams import Streams

NormOver = Literal["head", "width"]
NormPlaces = Literal["before", "after", "both"]
Activation = Literal["silu", "gelu_tanh"]


class LinearScaling(Section):
    """Division of all rotary frequencies by one factor (arXiv 2306.15595)."""

    kind: Literal["linear"]
    factor: float = Field(ge=1.0, description="divisor of the frequencies")


class Llama3Scaling(Section):
    """Scaling of Llama 3.1: long wavelengths divided, short ones kept, interpolated in between.

    As published by Meta with the models (arXiv 2407.21783 gives only the base).
    """

    kind: Literal["llama3"]
    factor: float = Field(ge=1.0, description="divisor of low frequencies")
    original_length: Count = Field(
        gt=0, description="sequence length before the extension, in tokens"
    )
    low_freq_factor: float = Field(
        1.0, gt=0.0, description="wavelengths above original_length / low_freq_factor are divided"
    )
    high_freq_factor: float = Field(
        4.0, gt=0.0, description="wavelengths below original_length / high_freq_factor are kept"
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
    """YaRN (arXiv 2309.00071): scaling by a frequency's rotations over the original length."""

    kind: Literal["yarn"]
    factor: float = Field(ge=1.0, description="divisor of low frequencies")
    original_length: Count = Field(
        gt=0, description="sequence length before the extension, in tokens"
    )
    beta_fast: float = Field(
        32.0, gt=0.0, description="number of rotations from which frequencies are kept"
    )
    beta_slow: float = Field(
        1.0, gt=0.0, description="number of rotations up to which frequencies are divided by factor"
    )
    attention_factor: float | None = Field(
        None, gt=0.0, description="factor of rotated queries and keys; null: 0.1 ln(factor) + 1"
    )
    mscale_all_dim: float = Field(
        0.0,
        ge=0.0,
        description="multiply all scores, including those of unrotated components, by (0.1 x "
        "mscale_all_dim x ln(factor) + 1)^2 (DeepSeek-V3)",
    )
    truncate: bool = Field(
        True,
        description="round the bounds of the interpolated range outwards to integer frequencies",
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
    """Layers with sliding-window attention (arXiv 2004.05150)."""

    tokens: Count = Field(
        gt=0, description="maximum number of keys that a query attends to, its own included"
    )
    global_every: Count | None = Field(
        None,
        gt=1,
        description="interval of layers with full attention (6: one after every five with a "
        "window); null: all layers have a window",
    )
    rope_theta: float | None = Field(
        None,
        gt=0.0,
        description="base of the rotary frequencies in layers with a window, which are then not "
        "scaled; null: as in all other layers",
    )


class MultiToken(Section):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2; Ling 2.0, 2510.22115).

    Depth k predicts the token k + 1 ahead from the output of the previous depth and the embedding
    of the token k ahead, with a block of its own and the model's embedding and head.
    """

    depth: Count = Field(1, gt=0, le=8, description="number of tokens beyond the next to predict")
    weight: float = Field(
        0.1, ge=0.0, description="weight of the depths' mean loss, added to the main loss"
    )


class LatentAttention(Section):
    """Multi-head latent attention with low-rank queries, keys and values.

    arXiv 2405.04434, eq. 37-47. A key has ``qk_nope_head_dim`` components per head and
    ``qk_rope_head_dim`` rotated components that all heads share.
    """

    q_lora_rank: Count | None = Field(
        None, gt=0, description="width of the queries' latent; null: a full-rank query projection"
    )
    kv_lora_rank: Count = Field(gt=0, description="width of the latent of keys and values")
    qk_nope_head_dim: Count = Field(gt=0, description="number of unrotated components of a query")
    qk_rope_head_dim: Count = Field(gt=0, description="number of rotated components of a query")
    v_head_dim: Count = Field(gt=0, description="width of a value")
    norm_eps: float = Field(1e-6, gt=0.0, description="epsilon in the RMSNorm of latents")

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
    """Keys that all decoder-only transformers share: RMSNorm, RoPE, grouped-query attention.

    Differences between families of published models are options here; docs/families.md lists them.
    """

    vocab_size: Count = Field(
        gt=0, description="number of rows of the embedding; at least the tokenizer's vocabulary"
    )
    width: Count = Field(gt=0, description="width of the residual stream")
    num_layers: Count = Field(gt=0, le=65_536, description="number of transformer blocks")
    num_heads: Count = Field(gt=0, description="number of query heads")
    num_kv_heads: Count | None = Field(None, gt=0, description="key/value heads; null: num_heads")
    head_dim: Count | None = Field(None, gt=0, description="width of a head; null: width/num_heads")
    latent_attention: LatentAttention | None = Field(
        None,
        description="multi-head latent attention in every block; null: grouped-query attention",
    )
    qkv_bias: bool = Field(False, description="biases of the query, key and value projections")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys")
    qk_norm_over: NormOver = Field(
        "head",
        description="components over which qk_norm is computed: each head, or all heads of a token "
        "(width, arXiv 2501.00656)",
    )
    norms: NormPlaces = Field(
        "before",
        description="RMSNorm of each branch: of its input (before), of its output (after, arXiv "
        "2501.00656), or of both (arXiv 2408.00118)",
    )
    activation: Activation = Field(
        "silu",
        description="activation of the gate in feed-forwards and experts: silu (SwiGLU), or "
        "gelu_tanh (GeGLU; arXiv 2002.05202)",
    )
    embedding_scale: float = Field(
        1.0, gt=0.0, description="factor of the token embeddings (Gemma: square root of width)"
    )
    tied_embeddings: bool = Field(
        False, description="share the embedding matrix with the output head"
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout probability of each branch's output"
    )
    norm_eps: float = Field(1e-5, gt=0.0, description="epsilon in RMSNorm")
    rope_theta: float = Field(10_000.0, gt=0.0, description="base of the rotary frequencies")
    rope_fraction: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="fraction of each head's components to rotate, the first ones; the others "
        "carry no position (Ling 2.0, arXiv 2510.22115)",
    )
    rope_scaling: RopeScaling | None = Field(
        None, description="scaling of rotary frequencies for longer sequences; null: none"
    )
    window: SlidingWindow | None = Field(
        None, description="sliding-window attention; null: full attention in every layer"
    )
    z_loss: float = Field(0.0, ge=0.0, description="coefficient of the squared log partition")
    multi_token: MultiToken | None = Field(
        None, description="predict tokens beyond the next one, in training; null: do not"
    )
    streams: Streams | None = Field(
        None, description="parallel streams with learned prefixes (ParScale); null: one stream"
    )

    @property
    def num_streams(self) -> int:
        """Number of times that the blocks compute each token."""
        return 1 if self.streams is None else self.streams.count

    @property
    def prefix_tokens(self) -> int:
        """Number of learned keys of a stream in each layer."""
        return 0 if self.streams is None else self.streams.prefix_tokens

    @property
    def norms_before(self) -> bool:
        """True if a branch's input passes through a norm."""
        return self.norms != "after"

    @property
    def norms_after(self) -> bool:
        """True if a branch's output passes through a norm."""
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
    def num_depths(self) -> int:
        """Depths of multi-token prediction; the block of depth k is that of layer L + k - 1."""
        return 0 if self.multi_token is None else self.multi_token.depth

    @property
    def num_blocks(self) -> int:
        """Number of blocks, including those of multi-token prediction."""
        return self.num_layers + self.num_depths

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
        """Return True if this layer (counted from 0) has a window."""
        if self.window is None:
            return False
        every = self.window.global_every
        return every is None or (layer + 1) % every != 0

    def window_of(self, layer: int) -> int | None:
        """Return the maximum number of keys per query in this layer; None: full attention."""
        return self.window_tokens if self.windowed(layer) else None

    @property
    def window_tokens(self) -> int | None:
        """Maximum number of keys per query in layers with a window; None: no such layer."""
        return self.window.tokens if self.window is not None else None

    @property
    def num_windowed(self) -> int:
        """Number of layers with a window."""
        if self.window is None:
            return 0
        every = self.window.global_every
        return self.num_layers - (self.num_layers // every if every else 0)

    @model_validator(mode="after")
    def _check_streams(self) -> Self:
        prefixes = "prefixes are keys of grouped-query attention that every query sees"
        without = {"latent_attention": prefixes, "window": prefixes}
        without["multi_token"] = "blocks of multi-token prediction have no streams"
        for key, reason in without.items() if self.streams is not None else ():
            if getattr(self, key) is not None:
                raise ValueError(
                    f"streams={{count: {self.num_streams}, ...}} with {key}: {reason}; leave "
                    f"streams or {key} out"
                )
        return self

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
