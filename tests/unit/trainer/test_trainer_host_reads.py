"""No step makes the host wait for a GPU: no tensor value is read in it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from allometry.configs.run import RunConfig
from allometry.data.stream import Stream
from allometry.models.head import Losses
from allometry.models.transformer import Transformer
from allometry.optim.schedule import resolve_schedule
from allometry.parallel.mesh import open_mesh
from allometry.scaling.plan import RunPlan
from allometry.scaling.update_rules import OPTIMIZER_KINDS
from allometry.trainer.assemble import make_model, make_optimizer, make_train_step
from allometry.trainer.bad_steps import Judge
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.step import TrainStep
from host_reads import host_reads
from small_experts import experts_model

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
EXPERTS = experts_model()
BIASED = EXPERTS | {
    "router": {"gate": "sigmoid", "balance": {"kind": "bias", "rate": 1e-3}},
}
MODELS = {
    "dense": (),
    "experts": (f"model={json.dumps(EXPERTS)}",),
    "biased": (f"model={json.dumps(BIASED)}",),
    "judged": (f"model={json.dumps(BIASED)}", "training.bad_steps={}"),
    "offloaded": (
        f"model={json.dumps(experts_model(width=128, num_layers=4))}",
        *("training.activation_offload=1.0", "batch.micro_batch_sequences=4"),
        "data.sequence_length=64",
    ),
}


def reads_of_a_step(
    config: RunConfig, change: Callable[[TrainStep, Transformer], None]
) -> list[str]:
    """Return the reads of the third step, after states were created."""
    plan = RunPlan.of(config, 1)
    stream = Stream(config.data, config.run.seed)
    size = plan.micro_batch_sequences
    with open_mesh(config.parallel, CPU) as mesh:
        parallel = make_model(config, plan, mesh)
        optimizer = make_optimizer(config, plan, parallel, mesh)
        schedule = resolve_schedule(config, plan.batch)
        judge = Judge.of(config.training, CPU, None)
        take = make_train_step(config, plan, parallel, optimizer, schedule, mesh, judge)
        change(take, parallel.parts[0])
        for step in range(1, 4):
            first = plan.batch.sequences_before(step)
            batches = [
                DeviceBatch.of(stream.batch(at, size), CPU, at)
                for at in range(first, first + plan.batch.sequences(step), size)
            ]
            counts = [x["step"] for x in optimizer.state.values() if "step" in x]
            with host_reads(counts) as found:
                take(step, batches).to_host()
        assert all(store.bytes_out > 0 for store in parallel.stores)
    return found


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *(("dense", kind) for kind in OPTIMIZER_KINDS),
        *((model, kind) for model in ("experts", "biased") for kind in ("adamw", "muonh")),
        ("offloaded", "adamw"),
        ("judged", "adamw"),
    ],
)
def test_a_step_reads_no_value(tiny: Make, model: str, optimizer: str) -> None:
    config = tiny(
        *MODELS[model],
        f"optimizer.kind={optimizer}",
        "data.packing=concatenated",
        "training.clip_grad_norm=0.01",
    )
    assert reads_of_a_step(config, lambda *_: None) == []


def planted(kind: str) -> Callable[[TrainStep, Transformer], None]:
    """Return a change that makes a step wait once, in the given way."""

    def forward(module: nn.Module, _: object, output: object) -> None:
        assert isinstance(output, Losses)
        {
            "item": lambda: output.total.item(),
            "float": lambda: float(output.total.detach()),
            "if": lambda: bool(output.total > 0.0),
            "list": lambda: output.nll_BL.tolist(),
            "copy": lambda: output.nll_BL.cpu(),
            "mask": lambda: output.nll_BL[output.nll_BL > 0.0],
            "nonzero": lambda: output.nll_BL.nonzero(),
            "made": lambda: torch.tensor([1.0, 2.0]),
        }[kind]()

    def backward(gradient: torch.Tensor) -> None:
        gradient.norm().item()

    def change(_: TrainStep, model: Transformer) -> None:
        if kind == "backward":
            next(model.parameters()).register_hook(backward)
        else:
            model.register_forward_hook(forward)

    return change


@pytest.mark.parametrize(
    "kind", ["item", "float", "if", "list", "copy", "mask", "nonzero", "made", "backward"]
)
def test_a_planted_wait_is_found(tiny: Make, kind: str) -> None:
    config = tiny("data.packing=concatenated")
    assert len(reads_of_a_step(config, planted(kind))) >= 4, "one in each micro-batch"
