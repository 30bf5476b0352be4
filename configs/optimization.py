"""The ``optimizer``, ``schedule`` and ``training`` sections."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section


class AdamW(Section):
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0.0, description="peak learning rate, at the base dimensions")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0.0, description="decay of matrices; vectors have none")


OptimizerConfig = AdamW


class _Warmup(Section):
    warmup_steps: Count | None = Field(None, ge=0, description="linear warm-up, in steps")
    warmup_tokens: Count | None = Field(None, ge=0, description="linear warm-up, in tokens")

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError("give warmup_steps or warmup_tokens, not both")
        return self


class ConstantSchedule(_Warmup):
    """Warm-up, then constant."""

    kind: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    """Warm-up, then a straight line down to ``final_fraction`` at the end of the run."""

    kind: Literal["linear"] = "linear"
    final_fraction: float = Field(0.0, ge=0.0, le=1.0, description="last rate over peak rate")


class CosineSchedule(_Warmup):
    """Warm-up, then half a cosine down to ``final_fraction`` at the end of the run."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: float = Field(0.1, ge=0.0, le=1.0, description="last rate over peak rate")


class WSDSchedule(_Warmup):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395 section 4)."""

    kind: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(
        0.1, gt=0.0, le=1.0, description="share of the run's steps that the decay takes"
    )
    decay: Literal["exponential", "linear", "1-sqrt"] = Field(
        "1-sqrt",
        description="form of the decay, x from 0 to 1: final_fraction**x; a straight line; "
        "1 - sqrt(x) (arXiv 2405.18392)",
    )
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="last rate over peak rate; exponential needs > 0"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decay == "exponential" and self.final_fraction == 0.0:
            raise ValueError(
                "final_fraction=0 cannot be reached by an exponential decay; "
                "set it above 0 (0.1 is usual) or choose decay: 1-sqrt"
            )
        return self


ScheduleConfig = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule | WSDSchedule, Field(discriminator="kind")
]


class TrainingConfig(Section):
    """How long to train, and what happens inside a step."""

    total_tokens: Count | None = Field(None, gt=0, description="length of the run, in tokens")
    total_steps: Count | None = Field(None, gt=0, description="length of the run, in steps")
    clip_grad_norm: float | None = Field(
        1.0, gt=0.0, description="largest global gradient norm; null: do not clip"
    )
    compute_dtype: Literal["bf16", "fp32", "fp64"] = Field(
        "bf16", description="type of activations and matrix products; parameters are fp32"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what a block's backward computes again instead of keeping: nothing; all but "
        "matrix products, attention and communication; everything",
    )
    compile: bool = Field(False, description="torch.compile each block and the loss")

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.total_tokens is None) == (self.total_steps is None):
            raise ValueError(
                "give exactly one of total_tokens and total_steps, and set the other to null"
            )
        return self
