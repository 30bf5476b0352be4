"""The ``model`` and ``parameterization`` sections."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section


class DenseModel(Section):
    """A dense decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    kind: Literal["dense"] = Field("dense", description="architecture family")
    vocab_size: Count = Field(gt=0, description="rows of the embedding; at least the tokenizer's")
    width: Count = Field(gt=0, description="width of the residual stream")
    num_layers: Count = Field(gt=0, description="transformer blocks")
    num_heads: Count = Field(gt=0, description="query heads")
    num_kv_heads: Count | None = Field(None, gt=0, description="key/value heads; null: num_heads")
    head_dim: Count | None = Field(None, gt=0, description="width of a head; null: width/num_heads")
    ffn_width: Count = Field(gt=0, description="hidden width of the SwiGLU feed-forward")
    qk_norm: bool = Field(False, description="RMSNorm on each head's queries and keys")
    tied_embeddings: bool = Field(False, description="share the embedding with the output head")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on each branch's output")
    norm_eps: float = Field(1e-5, gt=0.0, description="epsilon inside RMSNorm")
    rope_theta: float = Field(10_000.0, gt=0.0, description="base of the rotary frequencies")
    z_loss: float = Field(0.0, ge=0.0, description="coefficient of the squared log partition")

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
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} must be even, as RoPE turns pairs")
        return self


ModelConfig = DenseModel


class StandardParameterization(Section):
    """Standard parameterization: one learning rate and 1/sqrt(fan_in) initialisation for all."""

    kind: Literal["sp"] = "sp"
    embedding_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial embedding"
    )


class MaximalUpdateParameterization(Section):
    """muP: what is tuned at ``base_width`` holds at any width (arXiv 2203.03466, Table 8)."""

    kind: Literal["mup"] = "mup"
    embedding_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial embedding"
    )
    base_width: Count = Field(gt=0, description="width at which hyperparameters were tuned")
    base_head_dim: Count | None = Field(
        None, gt=0, description="head width at the base; null: the model's own"
    )
    weight_decay_rule: Literal["coupled", "mup"] = Field(
        "mup",
        description="hidden weight decay: 'coupled' keeps it, 'mup' multiplies it by the width "
        "ratio so that lr x decay stays constant",
    )


ParameterizationConfig = Annotated[
    StandardParameterization | MaximalUpdateParameterization, Field(discriminator="kind")
]
