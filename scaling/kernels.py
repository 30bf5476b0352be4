"""Availability of kernels of NVIDIA's apex and Triton, checked without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

BUILD = "build it from NVIDIA's sources with its CUDA extensions"


def apex_folder() -> Path | None:
    """Return the folder of NVIDIA's apex; None if apex is not installed."""
    spec = importlib.util.find_spec("apex")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    return folder if folder is not None and (folder / "optimizers").is_dir() else None


def apex_refusal(device: str, *, compiled: bool) -> str | None:
    """Return the reason why apex's kernel cannot be used, with a remedy; None if it can.

    ``compiled``: the kernel would be called in compiled code, where its calls are graph breaks.
    """
    if apex_folder() is None:
        other = importlib.util.find_spec("apex") is not None
        found = "the installed package of that name is another one" if other else "it is absent"
        return f"needs NVIDIA's apex ({found}); {BUILD} or use torch"
    if device != "cuda":
        return f"runs on cuda, not on {device}; use torch"
    if compiled:
        return "cannot be compiled; set training.compile: false or use torch"
    return None


def quantise_refusal(device: str, *, compiled: bool, rounds: bool) -> str | None:
    """Return the reason why Triton's kernels cannot round to FP8, with a remedy; None if they can.

    ``rounds``: True if the run rounds activations to FP8.
    """
    if not rounds:
        return (
            "has nothing to round, as precision keeps and multiplies in the compute type; use torch"
        )
    if device != "cuda":
        return f"runs on cuda, not on {device}; use torch"
    if compiled:
        return (
            "is for eager blocks, as torch's compiler fuses the same passes; set "
            "training.compile: false or use torch"
        )
    if importlib.util.find_spec("triton") is None:
        return "needs Triton (pip install triton); install it or use torch"
    return None
