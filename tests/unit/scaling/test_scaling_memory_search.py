"""Shortcuts of the memory estimate never skip the peak."""

from __future__ import annotations

import itertools

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.scaling.batch import BatchPlan
from allometry.scaling.blocks import RankBlocks
from allometry.scaling.layout import Layout
from allometry.scaling.plan import memory_of

WAYS = [
    f"training.activation_checkpointing={how} training.activation_offload={away}".split()
    for how, away in itertools.product(("none", "full"), (0, 0.5))
]
LAYOUTS = (
    "parallel.zero.stage=0",
    "parallel.zero.stage=1",
    "parallel.zero.stage=3 precision.compute_layers=[7]",
    "parallel.pp=2 parallel.zero.stage=3 parallel.zero.regather=micro_batch",
    "parallel.pp=4 parallel.pipeline.split=[1,5,5,1]",
    "parallel.pp=2 parallel.pipeline.schedule=zbv_zero_bubble training.compile=false",
)
MODELS = {
    "dense_1b": ("model.num_layers=12",),
    "moe_1b_a200m": ("model.first_dense_layers=3", "model.ffn_width=9000", "model.num_layers=12"),
}


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_looking_at_some_blocks_and_ranks_finds_the_fullest(
    preset: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8 = ["precision.linears=fp8_tensorwise"] if "compute_layers" in layout else []
    for way in WAYS:
        keys = [*MODELS[preset], *way, *layout.split(), *fp8]
        config = load(f"preset:{preset}", [*keys, "batch.ramp=null", "batch.sequences=64"])
        try:
            plan = Layout.of(config, 8)
        except UserError:  # offload in stages of two layers
            assert config.training.activation_offload > 0
            assert "split" in layout or "zbv" in layout
            continue
        batch = BatchPlan(config.batch, config.data.sequence_length)
        found = memory_of(config, plan, batch)
        with monkeypatch.context() as patched:
            patched.setattr(RankBlocks, "telling", frozenset(range(config.model.num_layers)))
            every = [memory_of(config, plan, batch, pp_rank=rank) for rank in range(plan.pp)]
        fullest = max(every, key=lambda estimate: estimate.total)
        assert found.describe() == fullest.describe()
        assert len(found.moments) <= len(fullest.moments)
