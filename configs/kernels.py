"""The ``kernels`` section: implementations of operations that have several."""

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
    """Implementations by name; ``auto``: the fastest on this GPU, timed when a run begins.

    A resumed run uses the kernels in its record. On a CPU ``auto`` follows a fixed rule.
    """

    attention: Attention = Field(
        "auto", description="attention back end; docs/kernels.md lists what each back end supports"
    )
    norm: Literal["auto", "torch", "apex"] = Field(
        "auto", description="implementation of RMSNorm: torch or apex"
    )
    quantize: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="implementation of rounding to FP8: torch's operators, or Triton kernels fused "
        "with norms and SwiGLU (for eager code on CUDA; compiled code is fused without them)",
    )
    adamw: Literal["auto", "torch", "apex"] = Field(
        "auto", description="implementation of the fused AdamW step: torch or apex"
    )
