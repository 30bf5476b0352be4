"""Measured times of a model's layers, used to balance pipeline stages."""

# B sequences of a micro-batch, L tokens in a sequence, D width, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from allometry.configs.run import RunConfig
from allometry.models.build import torch_dtype
from allometry.models.head import Losses
from allometry.models.transformer import Part, Transformer
from allometry.scaling.inventory import inventory

WARM_UP, REPEATS = 2, 5


def measure_costs(
    build: Callable[[Part], Transformer], config: RunConfig, device: torch.device
) -> list[float]:
    """Return seconds of forward and backward: embedding, each layer, and norm with head and loss.

    ``build(part)`` builds a part ready to run, with finite values, on ``device``; one part exists
    at a time. Times are medians of ``REPEATS`` runs on a random micro-batch of the run's shape.
    Layers with equal parameter shapes are measured once. Times differ between ranks, so one rank
    measures and broadcasts the result (``Layout.of(..., costs=...)``). For example, a model of 2
    layers gives 4 times.
    """
    model = config.model
    batch = config.batch.micro_batch_sequences
    tokens_BL = torch.randint(model.vocab_size, (batch, config.data.sequence_length), device=device)

    def cost(part: Part) -> float:
        return _seconds(
            build(part), tokens_BL, model.width, torch_dtype(config.training.compute_dtype)
        )

    shapes: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(model.num_layers)]
    for spec in inventory(model):
        if spec.name.startswith("blocks.") and not spec.ahead:
            _, layer, name = spec.name.split(".", 2)
            shapes[int(layer)].append((name, spec.shape))
    kinds = [tuple(of_layer) for of_layer in shapes]
    known: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = {}
    for layer, kind in enumerate(kinds):
        if kind not in known:
            known[kind] = cost(Part(range(layer, layer + 1), first=False, last=False))
    return [
        cost(Part(range(0), first=True, last=False)),
        *(known[kind] for kind in kinds),
        cost(Part(range(model.num_layers, model.num_layers), first=False, last=True)),
    ]


def _seconds(part: Transformer, tokens_BL: Tensor, width: int, dtype: torch.dtype) -> float:
    device = tokens_BL.device
    B, L = tokens_BL.shape
    shape_BLD = B * part.num_streams, L, width
    x_BLD = torch.randn(*shape_BLD, device=device).to(dtype).requires_grad_()
    gradient_BLD = torch.randn_like(x_BLD)
    if part.mtp is not None:
        part.mtp.set_targets(torch.ones(1 + part.mtp.number, device=device))

    def run() -> None:
        made = part(tokens_BL, tokens_BL, None, None if part.part.first else x_BLD)
        if isinstance(made, Losses):
            made.total.backward()
        else:
            made.backward(gradient_BLD)
        part.zero_grad(set_to_none=True)
        x_BLD.grad = None

    times = []
    for _ in range(WARM_UP + REPEATS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
