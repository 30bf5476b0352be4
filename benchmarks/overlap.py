"""Count, without a device, the computation that can overlap each collective of a step, by layout.

    python benchmarks/overlap.py [--config preset:dense_7b] [--layout tp=2,zero.stage=1 ...]

One rank of each layout runs two micro-batches of the model, cut to a few layers, on tensors without
storage (``parallel/overlap_log.py``). For each kind of message and axis the script prints their
number and size, how many are started before and awaited after matrix products, and the FLOPs in
between per byte. A device that computes C FLOP/s and sends B bytes/s hides a message if these FLOPs
per byte exceed C / B (H100 in bf16 over 400 Gb/s: about 20,000; over NVLink: about 2,000). No
pipeline schedule runs here; tests/dist/test_dist_pipeline_overlap.py counts pipeline reductions.
"""

from __future__ import annotations

import argparse
import sys

import torch

from allometry.configs.layouts import parse_parallel
from allometry.configs.loader import load
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.launch.text import table
from allometry.models.moe import begin_step
from allometry.parallel.apply import parallelize
from allometry.parallel.overlap_log import Message, step_messages
from allometry.parallel.reduce import FlatReducer
from allometry.parallel.simulate import even_experts, simulated_rank, without_storage
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import build_part

DENSE = (
    "hdp=8,zero.stage=0,zero.bucket_mib=256",
    "hdp=8,zero.stage=1",
    "hdp=8,zero.stage=3",
    "hdp=2,tp=4,zero.stage=1",
    "hdp=2,tp=4,zero.stage=1,tp_overlap=chunked",
)
MOE = ("ep=8,zero.stage=1", "ep=4,tp=2,zero.stage=1", "ep=4,tp=2,expert_tp=1,zero.stage=1")


def messages(config: RunConfig, layout: str) -> list[Message]:
    """Return the messages of one rank."""
    parallel = parse_parallel(layout, config.parallel)
    training = config.training.model_copy(update={"compile": False})
    config = config.model_copy(update={"parallel": parallel, "training": training})
    assert isinstance(parallel.hdp, int)
    world_size = parallel.pp * parallel.hdp * parallel.tp
    plan = RunPlan.of(config, world_size)
    with simulated_rank(parallel, 0, world_size) as mesh:
        made = parallelize(lambda part: build_part(config, plan, part), config, plan.layout, mesh)
        if isinstance(made.sync, FlatReducer):
            made.sync._overlap = True  # as on a GPU
        with without_storage():
            made.materialize(mesh.device)
            shape = config.batch.micro_batch_sequences, config.data.sequence_length
            for part in made.parts.values():
                even_experts(part)
                if isinstance(config.model, MoEModel):
                    begin_step(part, 2 * shape[0] * shape[1] * parallel.hdp)
            tokens_BL = torch.zeros(shape, dtype=torch.int64)
            return step_messages(made, mesh, lambda _: (tokens_BL, tokens_BL)).messages


def rows(found: list[Message]) -> list[list[str]]:
    """Return a row for each kind and axis, without messages too small to matter."""
    kinds = sorted({(m.call.kind, m.call.axis) for m in found})
    made = []
    for kind, axis in kinds:
        some = [m for m in found if (m.call.kind, m.call.axis) == (kind, axis)]
        size = sum(m.call.bytes for m in some)
        behind = [m for m in some if m.behind > 0]
        hidden = sum(m.call.bytes for m in behind)
        if size < 2**20:
            continue
        made.append(
            [
                kind,
                axis,
                str(len(some)),
                f"{size / 2**20:,.0f}",
                str(len(behind)),
                f"{hidden / size:.0%}",
                f"{sum(m.behind for m in behind) / hidden:,.0f}" if hidden else "-",
            ]
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", nargs="+", default=["preset:dense_1b", "preset:moe_1b_a200m"])
    parser.add_argument("--layout", nargs="+", help="default: some for each kind of model")
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args(arguments)
    head = ["message", "axis", "number", "MiB", "behind products", "of bytes", "FLOPs per byte"]
    for name in asked.config:
        config = load(name, [f"model.num_layers={asked.layers}"])
        default = MOE if isinstance(config.model, MoEModel) else DENSE
        for layout in asked.layout or default:
            print(f"{name}, {asked.layers} layers, {layout}")
            print(table([head, *rows(messages(config, layout))]), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
