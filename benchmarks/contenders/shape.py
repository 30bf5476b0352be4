"""Model, batch and optimizer shared by all contenders, and the format of their results."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """Untied Llama model with 25.2M parameters; 4 sequences of 512 tokens per step."""

    vocab_size: int = 8192
    width: int = 384
    num_layers: int = 8
    num_heads: int = 6
    ffn_width: int = 1536
    sequence_length: int = 512
    sequences: int = 4
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.sequence_length


SHAPE = Shape()
SHAPES = {
    "25m": SHAPE,
    # The same blocks with a small vocabulary, so that the head does not outweigh a pipeline stage,
    # and shorter sequences, so that there are enough micro-batches.
    "layouts": Shape(vocab_size=2048, sequence_length=256, sequences=8),
    "tiny": Shape(
        vocab_size=512,
        width=64,
        num_layers=4,
        num_heads=4,
        ffn_width=128,
        sequence_length=64,
        sequences=8,
    ),
}


@dataclass(frozen=True)
class Task:
    """Settings of one run of a contender; steps before ``warmup`` are not reported."""

    shape: Shape
    dtype: str
    compile: bool
    warmup: int
    steps: int
    out: Path

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps


def parse_task() -> Task:
    """Parse the task from the command line of a contender's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    return Task(
        SHAPES[given.shape], given.dtype, given.compile, given.warmup, given.steps, given.out
    )


def report(task: Task, step_seconds: list[float], losses: list[float]) -> None:
    """Write the measurements of a contender: seconds of each step, warm-up included."""
    assert len(step_seconds) == task.total_steps, (len(step_seconds), task.total_steps)
    result = {"step_seconds": step_seconds, "losses": losses, "shape": asdict(task.shape)}
    task.out.write_text(json.dumps(result), encoding="utf-8")
