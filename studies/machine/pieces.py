"""Times of the pieces of a step on one process of this machine: products, attention, layers."""

# M rows, K inner and N outer side of a product, B sequences, L tokens in a sequence, T = B*L, D
# width, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allometry.configs.run import RunConfig
from allometry.models.attention import attend
from allometry.models.build import build_model, torch_dtype
from allometry.models.head import Losses
from allometry.models.init import initialize
from allometry.models.transformer import Part
from allometry.optim.offload.rates import adam_update
from allometry.scaling.parameterization import Parameterization

LEAST_REPEATS = 3
PRODUCTS = (
    *((2048, 1024, 1024), (2048, 512, 1536), (1024, 256, 704), (1024, 128, 384)),
    *((256, 512, 512), (64, 512, 1536), (256, 128, 128), (1024, 256, 8192)),
)
GPU_PRODUCTS = (
    *((8192, 8192, 8192), (16384, 2048, 5632), (16384, 2048, 2048), (4096, 1024, 4096)),
    *((512, 2048, 5632), (128, 2048, 5632), (16384, 256, 704), (8192, 2048, 32768)),
)
LENGTHS, GPU_LENGTHS = (128, 256, 512, 1024), (512, 1024, 2048, 4096, 8192)
DENSE = {"kind": "dense", "num_layers": 1}
LAYERS = ((32, 1, 1, 16), (128, 2, 4, 128), (256, 4, 4, 256), (512, 8, 2, 512), (256, 4, 1, 128))
"""(width, heads, sequences, length) of timed layers; the first one is dominated by launches."""
GPU_LAYERS = ((64, 1, 1, 16), (1024, 16, 8, 2048), (2048, 16, 4, 4096), (2048, 16, 1, 2048))
EXPERTS, TOP_K = 8, 2
VOCABULARIES = ((128, 4096, 512), (256, 8192, 1024))
"""(width, vocabulary, tokens) of timed heads."""
GPU_VOCABULARIES = ((1024, 32768, 8192), (2048, 32768, 16384))
COPY_BYTES, ADAM_ELEMENTS = 1 << 26, 1 << 23


@dataclass(frozen=True)
class Clock:
    """Timer for work on a device: the best of many calls, as an upper bound of the rate.

    On a CPU with one thread it measures the thread's CPU time: on a busy machine the wall time
    includes waiting for other processes.
    """

    device: torch.device
    seconds: float = 0.25

    def best(self, work: Callable[[], object]) -> float:
        """Return the seconds of the fastest call, after two untimed calls."""
        for _ in range(2):
            work()
        best, number, begun = float("inf"), 0, time.perf_counter()
        while number < LEAST_REPEATS or time.perf_counter() - begun < self.seconds:
            best, number = min(best, self._once(work)), number + 1
        return best

    def _once(self, work: Callable[[], object]) -> float:
        on_gpu = self.device.type == "cuda"
        alone = not on_gpu and torch.get_num_threads() == 1
        now = time.thread_time if alone else time.perf_counter
        if on_gpu:
            torch.cuda.synchronize(self.device)
        begun = now()
        work()
        if on_gpu:
            torch.cuda.synchronize(self.device)
        return now() - begun


def measured_at() -> str:
    """Return the current time as text, for a measured number."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def pieces(clock: Clock, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Time all pieces on this process's device; return seconds by piece (JSON).

    ``at``: time of each measurement. Layers and heads are those of this package's model, not
    compiled, in the first of ``dtypes``. For example,
    ``pieces(Clock(torch.device("cpu")), ("bf16", "fp32"))["adam_rate"]``.
    """
    found: dict[str, Any] = {"at": {}, "threads": torch.get_num_threads(), "dtypes": list(dtypes)}
    kinds: Mapping[str, Callable[[], object]] = {
        "products": lambda: [p for name in dtypes for p in products(clock, name)],
        "attention": lambda: list(attention(clock, dtypes[0])),
        "copy_bytes_per_s": lambda: copies(clock),
        "adam_rate": lambda: host_adam(clock),
        "layers": lambda: list(layers(clock, dtypes[0])),
        "heads": lambda: list(heads(clock, dtypes[0])),
    }
    for kind, measure in kinds.items():
        found[kind] = measure()
        found["at"][kind] = measured_at()
    if clock.device.type == "cuda":
        found["host_bytes_per_s"] = host_copies(clock)
        found["at"]["host_bytes_per_s"] = measured_at()
    return found


def products(clock: Clock, name: str) -> Iterator[dict[str, Any]]:
    """Time a linear layer's three products: forward, gradient of its input and of its weight."""
    on_gpu = clock.device.type == "cuda"
    for rows, k, n in GPU_PRODUCTS if on_gpu else PRODUCTS:
        x_MK, w_NK, g_MN = (
            torch.randn(shape, device=clock.device).to(torch_dtype(name))  # type: ignore[arg-type]
            for shape in ((rows, k), (n, k), (rows, n))
        )

        def three(x_MK: Tensor = x_MK, w_NK: Tensor = w_NK, g_MN: Tensor = g_MN) -> None:
            torch.mm(x_MK, w_NK.T)
            torch.mm(g_MN, w_NK)
            torch.mm(g_MN.T, x_MK)

        seconds = clock.best(three)
        yield {"dtype": name, "rows": rows, "k": k, "n": n, "seconds": seconds}


def attention(clock: Clock, name: str) -> Iterator[dict[str, Any]]:
    """Time causal attention, forward and backward, with the back end that ``attend`` chooses."""
    on_gpu = clock.device.type == "cuda"
    heads, width, tokens = (16, 128, 16384) if on_gpu else (4, 64, 1024)
    for length in GPU_LENGTHS if on_gpu else LENGTHS:
        shape = (tokens // length, length, heads, width)
        q, k, v = (
            torch.randn(shape, device=clock.device).to(torch_dtype(name)).requires_grad_()  # type: ignore[arg-type]
            for _ in range(3)
        )

        def both(qkv: tuple[Tensor, ...] = (q, k, v)) -> None:
            o_BLNH = attend(*qkv, None, width**-0.5)  # type: ignore[call-arg]
            torch.autograd.grad(o_BLNH, qkv, qkv[0].detach())

        seconds = clock.best(both)
        yield {"tokens": tokens, "length": length, "inner": heads * width, "seconds": seconds}


def copies(clock: Clock) -> float:
    """Return the bytes per second that a copy in the device's memory reads and writes."""
    nbytes = COPY_BYTES * (16 if clock.device.type == "cuda" else 1)
    source = torch.ones(nbytes // 4, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.best(lambda: target.copy_(source))


def host_adam(clock: Clock) -> float:
    """Return the parameters per second of AdamW on this process's CPU threads."""
    host = Clock(torch.device("cpu"), clock.seconds)
    return ADAM_ELEMENTS / host.best(adam_update(ADAM_ELEMENTS))


def host_copies(clock: Clock) -> float:
    """Return the bytes per second from pinned host memory to the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=clock.device)
    return COPY_BYTES / clock.best(lambda: target.copy_(source, non_blocking=True))


def model_of(
    width: int, heads: int, *, expert_ffn: int = 0, vocabulary: int = 256
) -> dict[str, Any]:
    """Return a small model's configuration section; with experts if ``expert_ffn`` is not 0."""
    shape = {"width": width, "num_heads": heads, "num_kv_heads": heads, "vocab_size": vocabulary}
    if not expert_ffn:
        return {**DENSE, **shape, "ffn_width": 3 * width}
    inside = {"kind": "swiglu", "num_experts": EXPERTS, "experts_per_token": TOP_K}
    return {
        **DENSE,
        **shape,
        "kind": "moe",
        "experts": {**inside, "width": expert_ffn},
        "router": {"balance": {"kind": "auxiliary", "coefficient": 0.01}},
    }


def layers(clock: Clock, name: str) -> Iterator[dict[str, Any]]:
    """Time full layers, dense and with experts, forward and backward."""
    shapes = GPU_LAYERS if clock.device.type == "cuda" else LAYERS
    for experts in (False, True):
        for index, (width, heads, sequences, length) in enumerate(shapes):
            # Narrow and wide experts separate the cost of visits from the cost of products.
            expert_ffn = width * (1 + index % 2) if experts else 0
            model = model_of(width, heads, expert_ffn=expert_ffn)
            part = Part(range(1), first=False, last=False)
            seconds = part_seconds(clock, model, part, name, (sequences, length))
            shape = {"width": width, "heads": heads, "sequences": sequences, "length": length}
            yield {**shape, "expert_ffn": expert_ffn, "seconds": seconds}


def heads(clock: Clock, name: str) -> Iterator[dict[str, Any]]:
    """Time final norm, head and loss, forward and backward."""
    shapes = GPU_VOCABULARIES if clock.device.type == "cuda" else VOCABULARIES
    for width, vocabulary, tokens in shapes:
        model = model_of(width, width // 64, vocabulary=vocabulary)
        part = Part(range(1, 1), first=False, last=True)
        seconds = part_seconds(clock, model, part, name, (1, tokens))
        yield {"width": width, "vocabulary": vocabulary, "tokens": tokens, "seconds": seconds}


def part_seconds(
    clock: Clock, model: Mapping[str, Any], part: Part, name: str, shape: tuple[int, int]
) -> float:
    """Return the seconds of forward and backward of a part of a model on a micro-batch, (B, L)."""
    config = RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": {"sequence_length": shape[1], "sources": [{"name": "none", "train": "none"}]},
            "batch": {"sequences": shape[0], "micro_batch_sequences": shape[0]},
            "training": {"total_steps": 1, "compute_dtype": name, "compile": False},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "constant"},
        }
    )
    parameterization = Parameterization.of_run(config)
    dtype, device = config.training.compute_dtype, clock.device
    with device:
        made = build_model(config.model, parameterization, dtype, part)
    initialize(made, parameterization, 0)
    vocabulary = config.model.vocab_size
    tokens_BL = torch.randint(vocabulary, shape, device=device)
    x_BLD = torch.randn(*shape, config.model.width, device=device).to(torch_dtype(dtype))
    x_BLD.requires_grad_()
    gradient_BLD = torch.randn_like(x_BLD)

    def once() -> None:
        out = made(tokens_BL, tokens_BL, None, x_BLD)
        if isinstance(out, Losses):
            out.total.backward()
        else:
            out.backward(gradient_BLD)
        made.take_statistics()
        made.zero_grad(set_to_none=True)
        x_BLD.grad = None

    return clock.best(once)
