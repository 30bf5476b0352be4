"""The ``kernels`` section: which implementation computes what others compute too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from allometry.configs.base import Section

Attention = Literal[
    "auto",
    "blocked",
    "flash",
    "flash3",
    "flash2",
    "varlen",
    "cudnn",
    "flex",
    "packed",
    "masked",
    "reference",
]


class KernelsConfig(Section):
    """Implementations by name; ``auto``: the fastest on this GPU, measured when a run begins.

    A run that continues keeps the kernels of its record. On a CPU ``auto`` follows a fixed rule.
    """

    attention: Attention = Field(
        "auto", description="back end of attention; docs/kernels.md says what each can do"
    )
    norm: Literal["auto", "torch", "apex"] = Field("auto", description="RMSNorm: torch or apex")
    quantise: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="rounding to FP8: torch's operators, or Triton's kernels in one pass behind "
        "norms and SwiGLU (eager code on CUDA; compiled code is fused anyway)",
    )
    adamw: Literal["auto", "torch", "apex"] = Field(
        "auto", description="the fused AdamW step: torch or apex"
    )
