"""What the architectures of the ``model`` section share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section

NormOver = Literal["head", "width"]
NormPlaces = Literal["before", "after", "both"]
Activation = Literal["silu", "gelu_tanh"]


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
        """Width of one head, with the default filled in."""
        return self.head_dim or self.width // self.num_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}; "
                "change one of them or set head_dim"
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ValueError(
                f"qk_norm_over={self.qk_norm_over} has no effect without qk_norm; set qk_norm: "
                "true or leave qk_norm_over out"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} must be even, as RoPE turns pairs")
        return self
