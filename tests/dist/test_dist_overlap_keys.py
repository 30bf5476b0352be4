"""Keys for overlap, unsharded experts and gathered parameters: invalid values give one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from allometry.configs.errors import UserError
from allometry.configs.execution import Zero
from allometry.parallel.apply import parallelize
from allometry.parallel.simulate import simulated_rank
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import build_part
from test_dist_layouts import DENSE, MOE, run


def refused(model: dict[str, Any], world_size: int, compiled: bool = False, **parallel: Any) -> str:
    config = run(model, "fp32", **parallel)
    training = config.training.model_copy(update={"compile": compiled})
    with pytest.raises(UserError) as error:
        Layout.of(config.model_copy(update={"training": training}), world_size)
    return str(error.value)


def test_whole_experts_need_enough_of_them() -> None:
    assert "parallel.ep=4 x parallel.tp=2 (parallel.expert_tp=1)=8 must divide" in refused(
        MOE, 8, ep=4, tp=2, expert_tp=1
    )
    assert "needs experts" in refused(DENSE, 2, tp=2, expert_tp=1)
    # Widths that tp does not divide are accepted then.
    odd = MOE | {"experts": MOE["experts"] | {"width": 11}}
    assert "model.experts.width" in refused(odd, 2, tp=2)
    assert Layout.of(run(odd, "fp32", tp=2, expert_tp=1), 2).degrees.expert_ranks == 2


def test_overlap_goes_with_compiled_blocks_or_without() -> None:
    assert "needs training.compile: true" in refused(DENSE, 2, tp=2, tp_overlap="symmetric")
    assert "needs training.compile: false" in refused(
        DENSE, 2, compiled=True, tp=2, tp_overlap="chunked"
    )


def test_symmetric_memory_needs_cuda() -> None:
    config = run(DENSE, "fp32", tp=2, tp_overlap="symmetric")
    training = config.training.model_copy(update={"compile": True})
    config = config.model_copy(update={"training": training})
    plan = RunPlan.of(config, 2)
    with (
        simulated_rank(config.parallel, 0, 2) as mesh,
        pytest.raises(UserError, match="needs CUDA with symmetric memory"),
    ):
        parallelize(lambda part: build_part(config, plan, part), config, plan.layout, mesh)
    assert torch.distributed.is_initialized() is False


def test_gathering_again_needs_shards_and_whole_backwards() -> None:
    with pytest.raises(ValidationError, match="regather=micro_batch needs parameters"):
        Zero(stage=2, regather="micro_batch")
    split = {"schedule": "zbv_zero_bubble"}
    zero = {"stage": 3, "regather": "micro_batch"}
    assert "needs a stage's parameters throughout" in refused(
        DENSE, 2, pp=2, pipeline=split, zero=zero
    )
    frees = [Zero(stage=3).frees(pp) for pp in (1, 2)]
    assert frees == [True, False]
    assert Zero(stage=3, regather="micro_batch").frees(2)
    assert not Zero(stage=3, regather="step").frees(1)
