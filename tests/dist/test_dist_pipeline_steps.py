"""Pipelines over several steps, in bf16, with checkpointing and compilation; measured costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

import pipelined
import tiny
from allometry.configs.run import RunConfig
from allometry.models.init import initialize
from allometry.models.products import stacks
from allometry.models.transformer import Part, Transformer
from allometry.parallel.apply import materialize
from allometry.parallel.measure import measure_costs
from allometry.parallel.stage import Stage
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization

RunRanks = Callable[..., list[Any]]


def train(run: RunConfig, counts: tuple[int, ...]) -> dict[str, float]:
    """Take AdamW steps with varying numbers of micro-batches, and evaluate
    before and after each."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        alone = tiny.initialized(run, mesh.device)
        trained = dict(made.named_parameters())
        optimizers = [
            torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
            for parameters in (trained.values(), alone.parameters())
        ]
        worst = {"gradient": 0.0, "evaluation": 0.0, "evaluated": 0.0}
        for number, count in enumerate((0, *counts)):
            if count:
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                gradients, _, _ = pipelined.step(made, run, mesh, count, seed=number)
                tiny.backward_alone(alone, tiny.micro_batches(count * mesh.hdp.size, seed=number))
                expected = {n: g for n, g in tiny.gradients(alone).items() if n in gradients}
                worst["gradient"] = max(worst["gradient"], tiny.worst_error(gradients, expected))
                for optimizer in optimizers:
                    optimizer.step()
            # More and fewer micro-batches than stages.
            for held_out in (1, 5):
                batches = tiny.micro_batches(held_out, seed=99 + held_out)
                losses: dict[int, Tensor] = {}
                made.execution.evaluate(batches, losses.__setitem__)
                worst["evaluated"] += len(losses)
                with torch.no_grad():
                    for index, nll_BL in losses.items():
                        batch = batches[index]
                        exact = alone(batch.tokens_BL, batch.targets_BL, batch.documents)
                        error = float((nll_BL - exact.nll_BL).abs().max())
                        worst["evaluation"] = max(worst["evaluation"], error)
            for name, parameter in made.named_parameters():
                assert isinstance(parameter, DTensor) == (run.parallel.zero.stage > 0), name
                assert parameter is trained[name], name
        values = {name: tiny.whole(parameter.detach()) for name, parameter in trained.items()}
        moved = tiny.values(alone)
        worst["parameters"] = tiny.worst_error(values, {name: moved[name] for name in values})
        return worst


@pytest.mark.parametrize(
    ("schedule", "zero", "ranks"),
    [
        ("1f1b", 0, 2),
        ("interleaved_1f1b", 0, 2),
        ("zbv_zero_bubble", 0, 2),
        ("1f1b", 3, 4),
        ("interleaved_zero_bubble", 1, 4),
        ("zbv_zero_bubble", 3, 4),
    ],
)
def test_training_with_changing_batches_and_evaluation(
    run_ranks: RunRanks, schedule: str, zero: int, ranks: int
) -> None:
    run = pipelined.config(2, schedule, layers=4, tied=True, zero=zero)
    counts = (4, 2, 4)
    results = run_ranks(train, ranks, run, counts)
    for of_rank in results:
        assert of_rank["gradient"] < 1e-10
        assert of_rank["evaluation"] < 1e-10
        assert of_rank["parameters"] < 1e-10
    lines = ranks // 2
    assert sum(of_rank["evaluated"] for of_rank in results) == lines * 6 * (len(counts) + 1)


def kept_of_the_head(run: RunConfig, counts: tuple[int, ...], summed: bool) -> list[int]:
    """Count tensors of the head weight's size that a step saves for backward, by micro-batches."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        for part in made.parts.values():
            if part.head is not None and not summed:
                part.head.gradient_sum = None
        kept: list[int] = []
        for count in counts:
            kept.append(0)

            def pack(tensor: Tensor) -> Tensor:
                kept[-1] += tensor.shape == (run.model.vocab_size, run.model.width)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                pipelined.step(made, run, mesh, count)
        return kept


@pytest.mark.parametrize("schedule", ["gpipe", "looped_bfs"])
def test_the_heads_gradient_is_there_once_whatever_the_micro_batches(
    run_ranks: RunRanks, schedule: str
) -> None:
    run = pipelined.config(2, schedule, layers=4)
    assert run_ranks(kept_of_the_head, 2, run, (4, 8), True)[1] == [0, 0]
    assert run_ranks(kept_of_the_head, 2, run, (4, 8), False)[1] == [4, 8], "negative control"


CAST_ONCE = "allometry.parallel.execution.cast_once"


def cast_weights(run: RunConfig, counts: tuple[int, ...], once: bool) -> list[int]:
    """Count copies of block matrices that a step saves for backward, by micro-batches."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        held = (p for name, p in made.named_parameters() if ".ffn." in name)
        shapes = {(p.to_local() if isinstance(p, DTensor) else p).shape for p in held}
        shapes |= {torch.Size((2 * rows, columns)) for rows, columns in shapes}  # gate and up
        shapes |= {shape[::-1] for shape in shapes}  # a product saves the transposed matrix
        kept: list[int] = []
        for stacked in (s for part in made.parts.values() for s in stacks(part)):
            stacked.plain = not once
        for count in counts:
            storages: dict[int, Tensor] = {}

            def pack(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
                if tensor.shape in shapes and tensor.dtype == torch.bfloat16:
                    storages[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with (
                nullcontext() if once else mock.patch(CAST_ONCE, return_value=nullcontext()),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                made.execution.train(tiny.micro_batches(count), torch.tensor(1.0), lambda *_: None)
            kept.append(len(storages))
        return kept


@pytest.mark.parametrize("tp", [1, 2])
def test_micro_batches_in_flight_share_the_cast_weights(run_ranks: RunRanks, tp: int) -> None:
    run = pipelined.config(2, "gpipe", "bf16", layers=4, tp=tp)
    matrices = 2 * 2  # gate with up, and down, of the feed-forwards of two blocks
    for kept in run_ranks(cast_weights, 2 * tp, run, (2, 4), True):
        assert kept == [matrices, matrices]
    for kept in run_ranks(cast_weights, 2 * tp, run, (2, 4), False):
        assert kept == [2 * matrices, 4 * matrices], "negative control"


def bf16_error(run: RunConfig, count: int, repair: bool) -> dict[str, float]:
    """Compare bf16 gradients with one process in bf16; ``repair`` False: torch's accumulation."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        kept = Stage.backward_weight_one_chunk
        if not repair:
            Stage.backward_weight_one_chunk = PipelineStage.backward_weight_one_chunk
        try:
            gradients, _, _ = pipelined.step(made, run, mesh, count)
        finally:
            Stage.backward_weight_one_chunk = kept
        batches = tiny.micro_batches(count * mesh.hdp.size)
        same, exact = (tiny.initialized(config_like(run, d), mesh.device) for d in ("bf16", "fp64"))
        for alone in (same, exact):
            tiny.backward_alone(alone, batches)
        low, high = tiny.gradients(same), tiny.gradients(exact)
        return {
            "to one process": tiny.worst_error(gradients, {name: low[name] for name in gradients}),
            "to exact": tiny.worst_error(gradients, {name: high[name] for name in gradients}),
            "of one process": tiny.worst_error(
                {name: low[name] for name in gradients}, {name: high[name] for name in gradients}
            ),
        }


def config_like(run: RunConfig, dtype: str) -> RunConfig:
    return run.model_copy(
        update={"training": run.training.model_copy(update={"compute_dtype": dtype})}
    )


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_bf16(run_ranks: RunRanks, schedule: str, zero: int) -> None:
    run = pipelined.config(2, schedule, "bf16", layers=4, zero=zero)
    for of_rank in run_ranks(bf16_error, 4 if zero else 2, run, 8, True):
        assert of_rank["to one process"] < (1e-6 if zero == 0 else 2**-8)
        assert of_rank["to exact"] < 1.1 * of_rank["of one process"]


def test_gradients_of_weights_do_not_add_up_in_bf16(run_ranks: RunRanks) -> None:
    """On ranks without the head: one process accumulates the head's gradient differently."""
    run = pipelined.config(2, "zbv_zero_bubble", "bf16", layers=4, zero=1)
    assert min(f["to one process"] for f in run_ranks(bf16_error, 4, run, 8, True)) < 1e-6
    assert min(f["to one process"] for f in run_ranks(bf16_error, 4, run, 8, False)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "schedule"), [("selective", "1f1b"), ("full", "1f1b"), ("full", "zbv_zero_bubble")]
)
def test_with_activation_checkpointing(run_ranks: RunRanks, kind: str, schedule: str) -> None:
    run = pipelined.config(2, schedule, layers=4, zero=3, activation_checkpointing=kind)
    results = run_ranks(pipelined.errors, 4, run, 4)
    pipelined.assert_equal_to_one_process(
        results, 0 if schedule == "zbv_zero_bubble" else 1, 4, 1e-10
    )


def test_compiled_blocks(run_ranks: RunRanks) -> None:
    run = pipelined.config(2, "1f1b", "fp32", layers=2, compile=True)
    results = run_ranks(pipelined.errors, 2, run, 4, timeout_s=240.0)
    pipelined.assert_equal_to_one_process(results, 1, 4, 1e-5)


def held_buffers(run: RunConfig, count: int) -> int:
    """Return the largest number of pending input tensors at any forward of two steps."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        execution: Any = made.execution
        most = 0

        def look(_: int) -> None:
            nonlocal most
            infos = [
                info
                for prepared in execution._prepared.values()
                for stage in prepared.stages
                for held in (stage.args_recv_info, stage.grad_recv_info)
                for received in held.values()
                for info in received
            ]
            if mesh.pp.rank == 1:
                most = max(most, sum(info.buffer is not None for info in infos))

        batches = tiny.micro_batches(count)
        for _ in range(2):
            made.execution.train(batches, torch.tensor(1.0), lambda *_: None, look)
        return most


def test_received_tensors_are_held_while_they_are_needed(run_ranks: RunRanks) -> None:
    assert run_ranks(held_buffers, 2, pipelined.config(2, "1f1b", layers=2), 8) == [0, 1]


def test_measured_costs() -> None:
    """Expensive layers are measured as such, and equal layers are measured once."""
    run = pipelined.config(2, "1f1b", "fp32", layers=4)
    built = []

    def build(part: Part) -> Transformer:
        built.append(part)
        module = tiny.build(run, part)
        materialize(module, torch.device("cpu"))
        initialize(module, Parameterization(run.parameterization, run.model), tiny.SEED)
        if part.layers:
            whole = module.blocks["0"].forward

            def slow(*args: Any) -> Any:
                time.sleep(0.3)
                return whole(*args)

            module.blocks["0"].forward = slow
        return module

    costs = measure_costs(build, run, torch.device("cpu"))
    assert len(costs) == 6
    assert len(built) == 3
    assert costs[1] == costs[2] == costs[3] == costs[4] > 0.3
    assert 0 < costs[0] < 0.3
    assert 0 < costs[5] < 0.3
    assert Layout.of(run, 2, costs=costs).stages == (range(2), range(2, 4))
