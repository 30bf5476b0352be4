"""Every collective of a step by kind, axis, dtype and count; no reduction uses a 16-bit dtype.

Gradient reductions are fp32 at every ZeRO stage, with a single message for all gradients of
tp-replicated parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import tiny
from allometry.configs.run import RunConfig
from allometry.models import layers, parameters, products, router
from allometry.parallel import reduce, tensor, zero
from allometry.parallel.reduce import is_replicated_over_tp
from allometry.studies.rehearse import rehearse
from test_dist_layouts import DENSE, LATENT, MOE, run
from test_dist_tensor import config, mixture, pairs, prepare

RunRanks = Callable[..., list[Any]]
Calls = Counter[tuple[str, str, str]]
LAYERS, MICRO_BATCHES = 3, 4
BALANCE = {**MOE["router"]["balance"], "loads": "step_before"}
ONE_PASS = {**MOE, "router": {**MOE["router"], "balance": BALANCE}}
"""Without the pass that counts tokens per expert before the first forward with gradients."""


def activations(mixtures: int, dense: int = 0) -> Calls:
    """Return tensor parallelism's messages for micro-batches through ``mixtures`` MoE layers.

    ``dense``: branches of an MoE block, besides its routed experts, that process all tokens.
    """
    M = MICRO_BATCHES
    # Forward and backward of attention and feed-forward, of the embedding and of the head.
    seams = 2 * (2 * LAYERS + mixtures * dense) + 2
    return Counter(
        {
            ("all-gather", "tp", "bfloat16"): M * seams,
            ("reduce-scatter", "tp", "bfloat16"): M * seams,
            # For each token: its largest logit; its sum of exponentials and its target's logit.
            ("all-reduce", "tp", "float32"): M * 2,
            # Expert indices of each token, and gates, whose gradients are sent back.
            ("all-gather", "tp", "int64"): M * mixtures,
            ("all-gather", "tp", "float32"): M * mixtures,
            ("reduce-scatter", "tp", "float32"): M * mixtures,
        }
    )


def gradients(stage: int, routers: int) -> Calls:
    """Return ZeRO's messages on the hdp axis, which are the only gradient reductions over it."""
    if stage == 0:
        return Counter({("all-reduce", "hdp", "float32"): 1})
    # One unit per block, one for the other parameters; embedding and routers are in fp32.
    times = MICRO_BATCHES if stage == 3 else 1
    sums = MICRO_BATCHES if stage >= 2 else 1
    # Stage 3 gathers all units again for backward, except the rest and the last block; an embedding
    # look-up needs no table in backward.
    blocks = 2 * LAYERS - 1 if stage == 3 else LAYERS
    special = (2 * routers - (routers > 0) if stage == 3 else routers) + 1
    return Counter(
        {
            ("all-gather", "hdp", "bfloat16"): times * (blocks + 1),
            ("all-gather", "hdp", "float32"): times * special,
            ("reduce-scatter", "hdp", "float32"): sums * (LAYERS + 2 + routers),
        }
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("model", "mixtures", "beside"),
    [(DENSE, 0, 0), (ONE_PASS, 2, 1), (LATENT, 3, 0)],
    ids=["dense", "moe", "latent"],
)
def test_every_collective_of_a_step_in_bf16(
    model: dict[str, Any], mixtures: int, beside: int, stage: int
) -> None:
    (report,) = rehearse(run(model, "bf16", tp=2, zero={"stage": stage}), 4)
    assert report.micro_batches == MICRO_BATCHES
    called: Calls = Counter()
    for call, number in report.collectives:
        if call.bytes == 8:  # global gradient norm
            assert (call.kind, call.dtype) == ("all-reduce", "float64"), call
        else:
            called[call.kind, call.axis, call.dtype] += number
    once = Counter({("all-reduce", "tp", "float32"): 1})
    assert called == activations(mixtures, beside) + gradients(stage, mixtures) + once
    summed = [
        call for call, _ in report.collectives if call.axis == "tp" and call.kind == "all-reduce"
    ]
    assert max(call.bytes for call in summed) == 4 * replicated_numbers(model, stage)


def replicated_numbers(model: dict[str, Any], stage: int) -> int:
    """Count this rank's gradient elements of tp-replicated parameters, doubled from ZeRO 1 on."""
    whole = tiny.build(run(model, "bf16"))
    shapes = [
        parameter.shape
        for name, parameter in whole.named_parameters()
        if "norm" in name or "router" in name or "latent" in name
    ]
    return sum(shape.numel() // (1 if stage == 0 else 2) for shape in shapes)


@pytest.mark.parametrize(
    ("model", "world_size", "layout"),
    [
        (DENSE, 8, {"tp": 2, "pp": 2, "zero": {"stage": 1}}),
        (DENSE, 8, {"tp": 2, "pp": 2, "zero": {"stage": 3, "replicas": 2}}),
        (MOE, 8, {"tp": 2, "ep": 2, "zero": {"stage": 2, "replicas": 2}}),
        (MOE, 4, {"tp": 2, "ep": 2}),
    ],
)
def test_only_activations_and_parameters_travel_in_bf16(
    model: dict[str, Any], world_size: int, layout: dict[str, Any]
) -> None:
    allowed = {
        ("all-gather", "tp"),  # activations
        ("reduce-scatter", "tp"),
        ("all-to-all", "ep"),
        ("all-to-all", "tp"),  # rows received over ep
        ("send forward", "pp"),
        ("send backward", "pp"),
        ("all-gather", "shard"),  # parameters
        ("all-gather", "hdp"),
        ("all-gather", "expert_shard"),
    }
    for report in rehearse(run(model, "bf16", **layout), world_size):
        once = 0
        for call, number in report.collectives:
            if call.dtype == "bfloat16":
                assert (call.kind, call.axis) in allowed, call
            elif call.kind == "all-reduce" and call.axis == "tp" and call.dtype == "float32":
                once += number % 2  # the loss has two per micro-batch
        assert once == 1


@contextmanager
def summed_by_fsdp2() -> Iterator[None]:
    """Mark gradients as partial sums, which FSDP2 reduces one by one, in their dtype."""

    def marked(parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return parameter
        summands = [Partial() if p.is_replicate() else p for p in parameter.placements]
        return parameter.to_local(grad_placements=summands)

    with ExitStack() as stack:
        for module in (layers, parameters, products, router, tensor):
            stack.enter_context(mock.patch.object(module, "local_weight", marked))
        for module in (reduce, zero):
            stack.enter_context(mock.patch.object(module, "sum_over_tp"))
        yield


def summation_error(make: str, stage: int, by_fsdp2: bool) -> float:
    """Compare gradients of tp-replicated parameters with the fp64 sum over all ranks."""
    function = {"dense": config, "latent": latent}[make]
    with tiny.mesh(function(2, "bf16")) as mesh:
        batches = tiny.micro_batches(mesh.hdp.size)

        def backward(run: RunConfig, finish: bool) -> nn.Module:
            model, sync = tiny.distributed(run, mesh)
            prepare(model, batches)
            sync.micro_batch(last=True)
            loss = tiny.forward_loss(model, batches[mesh.hdp.rank])
            (loss / tiny.global_count(batches)).backward()
            if finish:
                sync.finish()
            return model

        exact: dict[str, Tensor] = {}
        for name, parameter in backward(function(2, "bf16"), finish=False).named_parameters():
            if is_replicated_over_tp(parameter):
                assert isinstance(parameter.grad, DTensor)
                exact[name] = parameter.grad.to_local().double()
                dist.all_reduce(exact[name])
        assert len(exact) > 5
        run = function(2, "bf16", stage=stage)
        if by_fsdp2:
            with summed_by_fsdp2():
                model = backward(run, finish=True)
        else:
            model = backward(run, finish=True)
        summed = {n: tiny.whole(p.grad) for n, p in model.named_parameters() if n in exact}
        return tiny.worst_error(summed, exact)


def latent(tp: int, dtype: str, **options: Any) -> RunConfig:
    return mixture(tp, dtype, latent=True, **options)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("make", ["dense", "latent"])
def test_bf16_summands_are_added_in_fp32(run_ranks: RunRanks, make: str, stage: int) -> None:
    assert max(run_ranks(summation_error, 4, make, stage, False)) < 1e-6
    if stage == 2:
        assert min(run_ranks(summation_error, 4, make, stage, True)) > 1e-3


class FullWidthCopies(TorchDispatchMode):
    """Count copies of the full activation [B, L, D] of all tokens."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.size, self.width, self.found = tokens * width, width, 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.cat.default, torch.ops.aten.clone.default):
            self.found += made.shape[-1:] == (self.width,) and made.numel() >= self.size
        return made


def copies(run: RunConfig) -> int:
    with tiny.mesh(run) as mesh:
        model, sync = tiny.distributed(run, mesh)
        batch = pairs(1)[0]
        sync.micro_batch(last=True)
        with FullWidthCopies(batch.tokens_BL.numel(), run.model.width) as counted:
            tiny.forward_loss(model, batch).backward()
        sync.finish()
        return counted.found


def test_only_the_head_copies_gathered_tokens_into_sequences(run_ranks: RunRanks) -> None:
    assert run_ranks(copies, 2, config(2, "fp32", activation_checkpointing="none")) == [2, 2]
