"""Compare peak memory and gradients of the chunked loss with the full-logits loss.

    python benchmarks/loss_memory.py [--vocabulary 131072 --tokens 4096 --width 256] [--json]

Prints one row per version and, with --json, one JSON line. The full version needs about 3 x 4 x
vocabulary x tokens bytes. On a CPU the peak is that of the process (VmHWM, reset before each run),
on CUDA that of the allocator; "extra" is the memory that forward and backward add to the inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from allometry.models.loss import linear_cross_entropy, reference_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux")


def measure(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> dict[str, object]:
    on_gpu = x.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
    start = time.perf_counter()
    total, _ = loss(x, weight, targets)
    total.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    assert x.grad is not None
    assert weight.grad is not None
    grads = (x.grad, weight.grad)
    x.grad = weight.grad = None
    return {"bytes": peak - before, "seconds": seconds, "total": total.item(), "grads": grads}


def worst_error(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> float:
    """Return the largest difference relative to the largest element, over all tensors."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()

    torch.manual_seed(0)
    dtype = torch.float32 if asked.dtype == "fp32" else torch.bfloat16
    x = torch.randn(asked.tokens, asked.width, device=asked.device).to(dtype).requires_grad_()
    weight = torch.randn(asked.vocabulary, asked.width, device=asked.device)
    weight = (weight / asked.width**0.5).requires_grad_()
    targets = torch.randint(asked.vocabulary, (asked.tokens,), device=asked.device)
    # Memory that the very first call keeps (thread pools, kernels) is not part of the loss.
    for loss in (linear_cross_entropy, reference_cross_entropy):
        small = targets[:64] % 64
        loss(x[:64], weight[:64], small)[0].backward()
    x.grad = weight.grad = None

    chunked = measure(linear_cross_entropy, x, weight, targets)
    full = measure(reference_cross_entropy, x, weight, targets)
    row = {
        "vocabulary": asked.vocabulary,
        "tokens": asked.tokens,
        "width": asked.width,
        "dtype": asked.dtype,
        "device": asked.device,
        "chunked_mib": chunked["bytes"] / 2**20,
        "full_mib": full["bytes"] / 2**20,
        "ratio": chunked["bytes"] / full["bytes"],
        "gradient_error": worst_error(chunked["grads"], full["grads"]),
        "chunked_s": chunked["seconds"],
        "full_s": full["seconds"],
    }
    for name in ("full", "chunked"):
        print(f"{name:8} extra {row[name + '_mib']:8.0f} MiB   {row[name + '_s']:7.2f} s")
    print(f"ratio {row['ratio']:.3f}, gradients differ by {row['gradient_error']:.1e} (relative)")
    if asked.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
