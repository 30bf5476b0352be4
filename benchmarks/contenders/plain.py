"""Hand-written loop: ``python -m contenders.plain --dtype bf16 [--compile] --out FILE``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders.llama import Llama
from contenders.shape import Shape, Task, parse_task, report


def precision(task: Task) -> AbstractContextManager[object]:
    if task.dtype == "fp32":
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)


def optimizer_of(model: nn.Module, shape: Shape) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=shape.lr,
        betas=(shape.beta1, shape.beta2),
        weight_decay=shape.weight_decay,
        fused=True,
    )


def step(
    task: Task,
    forward: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
) -> float:
    """Take one step on ``tokens`` [B, L + 1]; return the loss."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with precision(task):
        logits = forward(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, task.shape.clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def random_tokens(shape: Shape, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(
        0, shape.vocab_size, (count, shape.sequence_length + 1), generator=generator
    )


def main() -> None:
    task = parse_task()
    torch.manual_seed(0)
    model = Llama(task.shape)
    forward = torch.compile(model) if task.compile else model
    optimizer = optimizer_of(model, task.shape)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(task.total_steps):
        start = time.perf_counter()
        tokens = random_tokens(task.shape, task.shape.sequences, generator)
        losses.append(step(task, forward, parameters, optimizer, tokens))
        seconds.append(time.perf_counter() - start)
    report(task, seconds, losses)


if __name__ == "__main__":
    main()
