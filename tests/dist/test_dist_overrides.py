"""Frozen parameters and multiplied rates in parallel layouts equal one process.

The one process differentiates all parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import tiny
from allometry.configs.run import RunConfig
from allometry.parallel.mesh import open_mesh
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.studies.certificate import step as certificate
from allometry.studies.certificate.rank import TOLERANCE
from test_dist_layouts import DENSE, LATENT, MOE, run

RunRanks = Callable[..., list[Any]]

EMBEDDING = {"roles": "input", "freeze": True}
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "embedding": [EMBEDDING],
    "first layers": [EMBEDDING, {"layers": "0-1", "freeze": True}],
    "all but the embedding": [{"freeze": True}, {"roles": "input", "freeze": False}],
    "parts": [
        {"names": ["*.wk.weight", "*.gate.weight"], "freeze": True},
        {"names": "*.wq.weight", "lr_multiplier": 0.25, "weight_decay_multiplier": 2.0},
    ],
    "parts of experts": [{"names": ["*.experts.gate", "*.wv.weight"], "freeze": True}],
    "last": [{"names": ["final_norm.weight", "head.weight", "*.down.weight"], "freeze": True}],
    "routers": [{"names": ["*router.weight", "*.experts.*"], "freeze": True}],
}
MODELS = {"dense": DENSE, "tied": {**DENSE, "tied_embeddings": True}, "moe": MOE, "latent": LATENT}


def overridden(model: str, which: str, **settings: Any) -> RunConfig:
    config = run(MODELS[model], "fp64", **settings)
    optimizer = config.optimizer.model_dump() | {"overrides": ENTRIES[which]}
    return RunConfig.model_validate(config.model_dump(mode="json") | {"optimizer": optimizer})


@lru_cache(maxsize=8)
def alone(text: str, second: int) -> certificate.StepsResult:
    """(On each rank) steps of one process."""
    tree = RunConfig.model_validate_json(text).model_dump(mode="json")
    config = RunConfig.model_validate(tree | {"parallel": {"timeout_s": 60}})
    steps = [tiny.device_batches(count, seed) for seed, count in enumerate((8, second))]
    return certificate.reference_steps(config, steps)


def errors(
    text: str, twin: str | None = None
) -> tuple[dict[str, tuple[str, float]], list[str], list[str]]:
    """(On each rank) errors of two steps against one process; changed and unchanged names."""
    config = RunConfig.model_validate_json(text)
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        second = max(4, 2 * mesh.pp.size * mesh.hdp.size)
        wanted = alone(twin or text, second)
        steps = [
            tiny.device_batches(count, seed)[mesh.hdp.rank :: mesh.hdp.size]
            for seed, count in enumerate((8, second))
        ]
        first = certificate.make_parallel(config, mesh)
        before = {name: tiny.whole(p.detach()).clone() for name, p in first.named_parameters()}
        got = certificate.layout_steps(config, mesh, steps)
        same = [n for n, p in got.parameters.items() if torch.equal(p, before[n])]
        held = mesh.gather_objects(set(got.gradients))
        assert set().union(*held) == set(wanted.gradients)
        return certificate.differences(got, wanted), sorted(got.gradients), sorted(same)


def check(run_ranks: RunRanks, world_size: int, config: RunConfig) -> None:
    found: dict[str, bool] = {}  # True if the parameter has kept its bits
    for rank, (worst, gradients, same) in enumerate(
        run_ranks(errors, world_size, config.model_dump_json(), timeout_s=120.0)
    ):
        for kind, tolerance in TOLERANCE["fp64"].items():
            assert worst[kind][1] <= tolerance, (rank, kind, worst)
        found |= dict.fromkeys(gradients, False) | dict.fromkeys(same, True)
        assert not set(gradients) & set(same), "what is trained moves, and nothing else has one"
    rules = Parameterization.of_run(config)
    wanted = {spec.name: rules.resolve(spec).frozen for spec in inventory(config.model)}
    assert found == wanted
    assert True in wanted.values()


def layout(ranks: int, schedule: str = "1f1b", stage: int = 0, **more: Any) -> Any:
    return ranks, {"pipeline": {"schedule": schedule}, "zero": {"stage": stage}, **more}


CASES: dict[str, tuple[str, str, tuple[int, dict[str, Any]]]] = {
    "tp2": ("dense", "parts", layout(2, tp=2)),
    "tp2 chunked": ("dense", "last", layout(2, tp=2, tp_overlap="chunked")),
    "tp2 tied": ("tied", "embedding", layout(2, tp=2)),
    "pp2, a frozen stage": ("dense", "first layers", layout(2, pp=2)),
    "pp2 zbv": ("dense", "parts", layout(2, "zbv_zero_bubble", pp=2)),
    "pp2 tied": ("tied", "embedding", layout(4, stage=1, pp=2)),
    "zbv, a frozen stage": ("dense", "first layers", layout(4, "zbv_zero_bubble", 1, pp=2)),
    "ep2": ("moe", "routers", layout(2, ep=2)),
    "ep2 zero1": ("latent", "parts of experts", layout(2, stage=1, ep=2)),
    "hdp2": ("dense", "all but the embedding", layout(2)),
    "hdp2 zero1": ("moe", "parts of experts", layout(2, stage=1)),
    "hdp2 zero3": ("dense", "first layers", layout(2, stage=3)),
}
SLOW: dict[str, tuple[str, str, tuple[int, dict[str, Any]]]] = {
    f"{model}, {which}, {name}": (model, which, how)
    for name, how in {
        "tp2": layout(2, tp=2),
        "pp2": layout(2, pp=2),
        "pp2 izb": layout(2, "interleaved_zero_bubble", pp=2),
        "pp2 hdp2 zero3": layout(4, stage=3, pp=2),
        "hdp2 zero2": layout(2, stage=2),
        "hdp2 zero3 selective": layout(2, stage=3, checkpointing="selective"),
        "ep2 full": layout(2, ep=2, checkpointing="full"),
    }.items()
    for model, which in (
        ("dense", "last"),
        ("tied", "first layers"),
        ("moe", "routers"),
        ("moe", "first layers"),
        ("latent", "parts of experts"),
    )
    if "ep" not in how[1] or model in ("moe", "latent")
}


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_layouts_train_what_is_not_frozen_as_one_process_does(
    run_ranks: RunRanks, case: str
) -> None:
    model, which, (world_size, settings) = (CASES | SLOW)[case]
    check(run_ranks, world_size, overridden(model, which, **settings))


def test_negative_control_another_multiplier(run_ranks: RunRanks) -> None:
    config = overridden("dense", "parts")
    (entry, other) = config.optimizer.overrides
    changed = (entry, other.model_copy(update={"lr_multiplier": 0.5}))
    optimizer = config.optimizer.model_copy(update={"overrides": changed})
    for made in run_ranks(against, 2, config.model_dump_json(), optimizer.model_dump_json()):
        assert made > 1e-4


def against(text: str, optimizer: str) -> float:
    """(On each rank) error of parameters against one process with another optimizer section."""
    tree = RunConfig.model_validate_json(text).model_dump(mode="json")
    other = RunConfig.model_validate(tree | {"optimizer": json.loads(optimizer)})
    worst, _, _ = errors(text, other.model_dump_json())
    return worst["parameters"][1]
