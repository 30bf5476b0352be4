"""Any layout computes one process's gradients, for dense and MoE models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import tiny
from allometry.configs.execution import SCHEDULES
from allometry.configs.run import RunConfig
from allometry.parallel.mesh import open_mesh
from allometry.scaling.layout import ONE_STAGE_SCHEDULES
from allometry.studies.certificate import step as certificate
from allometry.studies.certificate.rank import TOLERANCE
from thinned import thinned

RunRanks = Callable[..., list[Any]]
CLIP = 0.05
COMMON = {
    "vocab_size": tiny.VOCAB,
    "width": 24,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 6,
    "qk_norm": True,
    "z_loss": 1e-3,
}
DENSE = {**COMMON, "kind": "dense", "ffn_width": 28}
MOE = {
    **COMMON,
    "kind": "moe",
    "first_dense_layers": 1,
    "ffn_width": 28,
    "experts": {
        "kind": "swiglu",
        "num_experts": 4,
        "experts_per_token": 2,
        "width": 12,
        "num_shared_experts": 1,
    },
    "router": {
        "gate": "sqrt",
        "z_loss": 1e-2,
        "balance": {"kind": "auxiliary", "coefficient": 0.1},
    },
}
LATENT = {
    **MOE,
    "first_dense_layers": 0,
    "ffn_width": None,
    "experts": MOE["experts"]
    | {"kind": "latent", "latent_width": 8, "num_shared_experts": 0, "norm": True},
    "router": {
        "gate": "sigmoid",
        "normalize": True,
        "scale": 1.5,
        "num_groups": 2,
        "groups_per_token": 1,
        "balance": {"kind": "bias", "centered": True},
    },
}


def run(
    model: dict[str, Any], dtype: str, checkpointing: str = "none", **parallel: Any
) -> RunConfig:
    pp = parallel.get("pp", 1)
    schedule = parallel.get("pipeline", {}).get("schedule", "1f1b")
    layers = 3 if pp == 1 else max(3, pp * (1 if schedule in ONE_STAGE_SCHEDULES else 2))
    return RunConfig.model_validate(
        {
            "run": {"folder": "none", "seed": tiny.SEED},
            "model": {**model, "num_layers": layers},
            "data": {
                "sequence_length": tiny.LENGTH,
                "sources": [{"name": name, "train": "none"} for name in ("even", "odd")],
            },
            "batch": {"sequences": 8, "micro_batch_sequences": 1},
            "training": {
                "total_steps": 3,
                "compute_dtype": dtype,
                "activation_checkpointing": checkpointing,
                "clip_grad_norm": CLIP,
            },
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "linear", "warmup_steps": 1},
            "parallel": {"timeout_s": 60, **parallel},
        }
    )


@lru_cache(maxsize=16)
def alone(model: str, layers: int, dtype: str, second: int) -> certificate.StepsResult:
    """(On each rank) steps of one process, compared with many layouts."""
    one = run(json.loads(model), dtype)
    sized = one.model.model_copy(update={"num_layers": layers})
    steps = [tiny.device_batches(count, seed) for seed, count in enumerate((8, second)) if count]
    return certificate.reference_steps(one.model_copy(update={"model": sized}), steps)


def errors(model: dict[str, Any], config: RunConfig) -> dict[str, tuple[str, float]]:
    """(On each rank) errors of this layout's steps against one process."""
    layers, dtype = config.model.num_layers, config.training.compute_dtype
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        # Number of sequences; in fp32 the state after an update is not compared (see TOLERANCE).
        second = max(4, 2 * mesh.pp.size * mesh.hdp.size) if dtype == "fp64" else 0
        wanted = alone(json.dumps(model), layers, dtype, second)
        assert wanted.grad_norm[0] > 2 * CLIP, "gradients are clipped"
        steps = [
            tiny.device_batches(count, seed)[mesh.hdp.rank :: mesh.hdp.size]
            for seed, count in enumerate((8, second))
            if count
        ]
        got = certificate.layout_steps(config, mesh, steps)
        assert all(bool((g != 0).any()) for g in got.gradients.values())
        assert got.parameters.keys() == got.gradients.keys()
        held = mesh.gather_objects({*got.gradients, *got.routers})
        assert set().union(*held) == {*wanted.gradients, *wanted.routers}
        return certificate.differences(got, wanted)


def check(
    run_ranks: RunRanks, world_size: int, model: dict[str, Any], dtype: str, **settings: Any
) -> None:
    config = run(model, dtype, **settings)
    for rank, worst in enumerate(run_ranks(errors, world_size, model, config, timeout_s=120.0)):
        for kind, tolerance in TOLERANCE[dtype].items():
            assert worst[kind][1] <= tolerance, (rank, kind, worst)


MODELS = {"dense": DENSE, "moe": MOE, "latent": LATENT}

# fp32 runs the same code as fp64, which is exact: a few cases of each kind by default.
by_type = pytest.mark.parametrize("dtype", ["fp64", pytest.param("fp32", marks=pytest.mark.slow)])


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero": {"stage": stage, **more}}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "hdp2": (2, {}),
    "hdp4": (4, {}),
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "hdp2-tp2": (4, {"tp": 2}),
    "pp2-tp2": (4, {"pp": 2, "tp": 2}),
    "pp2-hdp2": (4, {"pp": 2}),
    "hdp2-zero1": (2, zero(1)),
    "hdp2-zero2": (2, zero(2)),
    "hdp2-zero3": (2, zero(3)),
    "hdp4-zero3-replicas2": (4, zero(3, replicas=2)),
    "hdp2-zero3-offload": (2, zero(3, offload="cpu")),
    "hdp2-tp2-zero2": (4, {"tp": 2, **zero(2)}),
    "pp2-hdp2-zero1": (4, {"pp": 2, **zero(1)}),
    "pp2-hdp2-zero3": (4, {"pp": 2, **zero(3)}),
    "hdp2-selective": (2, {"checkpointing": "selective"}),
    "tp2-full": (2, {"tp": 2, "checkpointing": "full"}),
    "pp2-full": (2, {"pp": 2, "checkpointing": "full"}),
    "pp2-hdp2-zero3-regather": (4, {"pp": 2, **zero(3, regather="micro_batch")}),
    "hdp2-zero3-step": (2, zero(3, regather="step")),
    "chunked-tp2-selective": (
        2,
        {"tp": 2, "tp_overlap": "chunked", "checkpointing": "selective"},
    ),
    "chunked-pp2-tp2-zbv": (
        4,
        {
            "pp": 2,
            "tp": 2,
            "tp_overlap": "chunked",
            "pipeline": {"schedule": "zbv_zero_bubble"},
        },
    ),
    "chunked-hdp2-tp2-zero3": (4, {"tp": 2, "tp_overlap": "chunked", **zero(3)}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "hdp4-ep2": (4, {"ep": 2}),
    "ep2-tp2": (4, {"ep": 2, "tp": 2}),
    "ep2-pp2": (4, {"ep": 2, "pp": 2}),
    "ep2-pp2-zbv": (4, {"ep": 2, "pp": 2, "pipeline": {"schedule": "zbv_zero_bubble"}}),
    "ep2-zero1": (2, {"ep": 2, **zero(1)}),
    "hdp4-ep2-zero2": (4, {"ep": 2, **zero(2)}),
    "hdp4-ep2-zero3": (4, {"ep": 2, **zero(3)}),
    "ep2-tp2-zero3": (4, {"ep": 2, "tp": 2, **zero(3)}),
    "ep2-selective": (2, {"ep": 2, "checkpointing": "selective"}),
    "ep2-zero1-selective": (2, {"ep": 2, "checkpointing": "selective", **zero(1)}),
    "ep2-pp2-zero3-selective": (
        4,
        {"ep": 2, "pp": 2, "checkpointing": "selective", **zero(3)},
    ),
    "hdp4-ep2-zero3-replicas2": (4, {"ep": 2, **zero(3, replicas=2)}),
    "ep2-full": (2, {"ep": 2, "checkpointing": "full"}),
    "ep2-tp2-selective": (4, {"ep": 2, "tp": 2, "checkpointing": "selective"}),
    "whole-tp2": (2, {"tp": 2, "expert_tp": 1}),
    "whole-tp2-selective": (2, {"tp": 2, "expert_tp": 1, "checkpointing": "selective"}),
    "whole-tp2-zero2": (4, {"tp": 2, "expert_tp": 1, **zero(2)}),
    "whole-tp2-pp2": (4, {"tp": 2, "expert_tp": 1, "pp": 2}),
    "whole-ep2-tp2": (4, {"ep": 2, "tp": 2, "expert_tp": 1}),
    "whole-ep2-tp2-zero3": (4, {"ep": 2, "tp": 2, "expert_tp": 1, **zero(3)}),
}


@by_type
@pytest.mark.parametrize(
    ("model", "layout"),
    thinned(
        {
            ("dense", "tp4"),
            ("dense", "hdp2-tp2-zero2"),
            ("dense", "hdp4-zero3-replicas2"),
            ("dense", "hdp2-zero3-offload"),
            ("dense", "pp2-hdp2-zero3"),
            ("dense", "tp2-full"),
            ("moe", "hdp2-tp2"),
            ("moe", "hdp2-zero3"),
            ("moe", "pp2-tp2"),
            ("moe", "pp2-hdp2-zero1"),
            ("moe", "hdp2-selective"),
            ("dense", "pp2-hdp2-zero3-regather"),
            ("moe", "chunked-tp2-selective"),
            ("dense", "chunked-pp2-tp2-zbv"),
            ("dense", "chunked-hdp2-tp2-zero3"),
        },
        ("dense", "moe"),
        tuple(LAYOUTS),
    ),
)
def test_gradients_do_not_depend_on_the_layout(
    run_ranks: RunRanks, layout: str, model: str, dtype: str
) -> None:
    world_size, settings = LAYOUTS[layout]
    check(run_ranks, world_size, MODELS[model], dtype, **settings)


@by_type
@pytest.mark.parametrize(
    ("model", "layout"),
    thinned(
        {
            ("moe", "ep4"),
            ("moe", "ep2-tp2-zero3"),
            ("moe", "ep2-pp2-zbv"),
            ("moe", "hdp4-ep2-zero3-replicas2"),
            ("moe", "ep2-full"),
            ("latent", "ep2-tp2"),
            ("latent", "ep2-pp2-zero3-selective"),
            ("latent", "hdp4-ep2-zero2"),
            ("latent", "ep2-zero1"),
            ("moe", "whole-tp2"),
            ("moe", "whole-ep2-tp2-zero3"),
            ("latent", "whole-ep2-tp2"),
            ("latent", "whole-tp2-pp2"),
        },
        ("moe", "latent"),
        tuple(EXPERT_LAYOUTS),
    ),
)
def test_gradients_do_not_depend_on_where_experts_are(
    run_ranks: RunRanks, layout: str, model: str, dtype: str
) -> None:
    world_size, settings = EXPERT_LAYOUTS[layout]
    check(run_ranks, world_size, MODELS[model], dtype, **settings)


@pytest.mark.parametrize("layout", ["hdp2-zero3", "tp2", "pp2-hdp2", "ep2", "hdp4-ep2-zero2"])
def test_gradients_in_fp32(run_ranks: RunRanks, layout: str) -> None:
    world_size, settings = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    check(run_ranks, world_size, MOE, "fp32", **settings)


def gradients_of(*configs: RunConfig) -> list[dict[str, torch.Tensor]]:
    gradients = []
    for config in configs:
        with open_mesh(config.parallel, torch.device("cpu")) as mesh:
            mine = tiny.device_batches(8)[mesh.hdp.rank :: mesh.hdp.size]
            gradients.append(certificate.layout_steps(config, mesh, [mine]).gradients)
    return gradients


def worst(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(error for _, error in certificate.relative_errors(got, wanted))


def low_precision_error(settings: dict[str, Any]) -> float:
    """(On each rank) bf16 gradients of this layout against an unsharded model."""
    plain, sharded = gradients_of(run(MOE, "bf16"), run(MOE, "bf16", **settings))
    return worst(sharded, plain)


@pytest.mark.parametrize(
    "settings",
    [
        zero(1),
        zero(3),
        {"checkpointing": "selective", **zero(1)},
        {"checkpointing": "selective", **zero(3)},
        {"checkpointing": "full", **zero(2)},
    ],
)
def test_routers_and_experts_in_bf16_when_sharded(
    run_ranks: RunRanks, settings: dict[str, Any]
) -> None:
    # A micro-batch's gradients are rounded to bf16, whose unit is 2**-8, before they are summed.
    assert max(run_ranks(low_precision_error, 2, settings)) < 2**-7


def compiled_errors() -> tuple[float, float]:
    """(On each rank) errors of compiled bf16 gradients against fp32, unsharded and sharded."""
    # Compiled code rounds differently, which would change routing: use all experts per token.
    model = MOE | {"experts": MOE["experts"] | {"experts_per_token": 4}}
    whole, sharded = run(model, "bf16"), run(model, "bf16", **zero(1))
    training = whole.training.model_copy(update={"compile": True})
    compiled = [c.model_copy(update={"training": training}) for c in (whole, sharded)]
    exact, *others = gradients_of(run(model, "fp32"), *compiled)
    return worst(others[0], exact), worst(others[1], exact)


def compiled_exchange_error(settings: dict[str, Any]) -> float:
    """(On each rank) error of compiled fp32 gradients against eager ones, in one layout."""
    eager = run(MOE, "fp32", **settings)
    training = eager.training.model_copy(update={"compile": True})
    exact, compiled = gradients_of(eager, eager.model_copy(update={"training": training}))
    return worst(compiled, exact)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"ep": 2}, {"tp": 2, "expert_tp": 1}], ids=["ep2", "whole"])
def test_compiled_blocks_with_an_exchange(run_ranks: RunRanks, settings: dict[str, Any]) -> None:
    assert max(run_ranks(compiled_exchange_error, 2, settings)) < 1e-5


@pytest.mark.slow
def test_compiled_experts_in_bf16_when_sharded(run_ranks: RunRanks) -> None:
    for whole, sharded in run_ranks(compiled_errors, 2, timeout_s=240.0):
        assert 0.0 < sharded < 1.5 * whole


@by_type
@pytest.mark.parametrize(
    ("model", "pp", "schedule"),
    thinned(
        {
            ("dense", 2, "1f1b"),
            ("dense", 2, "looped_bfs"),
            ("dense", 4, "interleaved_1f1b"),
            ("dense", 4, "dualpipe_v"),
            ("moe", 2, "gpipe"),
            ("moe", 2, "interleaved_zero_bubble"),
            ("moe", 4, "zbv_zero_bubble"),
        },
        ("dense", "moe"),
        (2, 4),
        tuple(SCHEDULES),
    ),
)
def test_gradients_do_not_depend_on_the_pipeline(
    run_ranks: RunRanks, schedule: str, pp: int, model: str, dtype: str
) -> None:
    check(run_ranks, pp, MODELS[model], dtype, pp=pp, pipeline={"schedule": schedule})


@by_type
@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_three_axes_at_once(run_ranks: RunRanks, model: dict[str, Any], dtype: str) -> None:
    check(run_ranks, 8, model, dtype, pp=2, tp=2)


def initial_values(config: RunConfig) -> dict[str, torch.Tensor]:
    """(On each rank) full values of the parameters that this rank stores in part."""
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        made = certificate.make_parallel(config, mesh)
        return {name: tiny.whole(p.detach()).clone() for name, p in made.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"pp": 2}),
        (4, {"ep": 2, "tp": 2}),
        (4, {"pp": 2, "ep": 2, **zero(1)}),
        (4, {"ep": 2, "tp": 2, **zero(3)}),
    ],
)
def test_every_layout_starts_with_the_same_bits(
    run_ranks: RunRanks, world_size: int, settings: dict[str, Any]
) -> None:
    (alone,) = run_ranks(initial_values, 1, run(LATENT, "fp32"))
    held: set[str] = set()
    for values in run_ranks(initial_values, world_size, run(LATENT, "fp32", **settings)):
        assert all(torch.equal(value, alone[name]) for name, value in values.items())
        held |= values.keys()
    assert held == alone.keys()
