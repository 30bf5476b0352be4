"""FP8 in any layout: the same numbers share a scale, so gradients equal one process's."""

# B sequences, L tokens in a sequence

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import tiny
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.parallel.mesh import open_mesh
from allometry.scaling.layout import Layout
from allometry.studies.certificate import step as certificate
from thinned import thinned

RunRanks = Callable[..., list[Any]]
DENSE = {
    "kind": "dense",
    "vocab_size": tiny.VOCAB,
    "width": 40,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_width": 64,
    "qk_norm": True,
}
MOE = {
    **DENSE,
    "kind": "moe",
    "first_dense_layers": 1,
    "experts": {
        "kind": "latent",
        "latent_width": 24,
        "num_experts": 4,
        "experts_per_token": 2,
        "width": 32,
        "num_shared_experts": 1,
    },
}
SAVED = {"saved_activations": "fp8"}
ROWS = {"saved_activations": "fp8", "linears": "fp8_rowwise"}


def run(
    model: dict[str, Any], precision: dict[str, Any], checkpointing: str = "none", **parallel: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": "none", "seed": tiny.SEED},
            "model": model,
            "data": {
                "sequence_length": tiny.LENGTH,
                "sources": [{"name": name, "train": "none"} for name in ("even", "odd")],
            },
            "batch": {"sequences": 8, "micro_batch_sequences": 1},
            "training": {
                "total_steps": 3,
                "compute_dtype": "fp64",
                "activation_checkpointing": checkpointing,
            },
            "precision": precision,
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": {"timeout_s": 60, **parallel},
        }
    )


@lru_cache(maxsize=8)
def alone(model: str, precision: str) -> certificate.StepsResult:
    """(On each rank) a step of one process."""
    one = run(json.loads(model), json.loads(precision))
    return certificate.reference_steps(one, [tiny.device_batches(8, 0)])


def errors(config: RunConfig) -> dict[str, float]:
    """(On each rank) errors of this layout's losses and gradients against one process."""
    model, precision = config.model.model_dump_json(), config.precision.model_dump_json()
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        batches = tiny.device_batches(8, 0)[mesh.hdp.rank :: mesh.hdp.size]
        got = certificate.layout_steps(config, mesh, [batches])
    worst = certificate.differences(got, alone(model, precision))
    exact = certificate.differences(got, alone(model, '{"saved_activations": "compute"}'))
    found = {kind: worst[kind][1] for kind in ("sums", "gradients")}
    return found | {"without": exact["gradients"][1]}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp=2": (2, {"tp": 2}),
    "tp=2, chunked": (2, {"tp": 2, "tp_overlap": "chunked"}),
    "hdp=2, zero 3": (2, {"hdp": 2, "zero": {"stage": 3}}),
    "pp=2": (2, {"pp": 2}),
    "zbv": (2, {"pp": 2, "pipeline": {"schedule": "zbv_zero_bubble"}}),
    "tp=2, hdp=2, zero 2": (4, {"tp": 2, "hdp": 2, "zero": {"stage": 2}}),
}
OF_EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep=2": (2, {"hdp": 2, "ep": 2}),
    "tp=2": (2, {"tp": 2}),
    "tp=2, whole experts": (2, {"tp": 2, "expert_tp": 1}),
    "ep=2, tp=2, zero 1": (4, {"hdp": 2, "ep": 2, "tp": 2, "zero": {"stage": 1}}),
}


def check(run_ranks: RunRanks, ranks: int, config: RunConfig) -> None:
    for worst in run_ranks(errors, ranks, config, timeout_s=120.0):
        assert worst["sums"] <= 1e-10, worst
        assert worst["gradients"] <= 1e-10, worst
        assert worst["without"] > 1e-4, "negative control: FP8 shows"


@pytest.mark.parametrize(
    "layout", thinned({"hdp=2, zero 3", "pp=2", "tp=2, hdp=2, zero 2"}, list(LAYOUTS))
)
def test_saved_activations(run_ranks: RunRanks, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    check(run_ranks, ranks, run(DENSE, SAVED, **parallel))


@pytest.mark.parametrize(
    "layout", thinned({"tp=2, whole experts", "ep=2, tp=2, zero 1"}, list(OF_EXPERTS))
)
def test_saved_activations_of_experts(run_ranks: RunRanks, layout: str) -> None:
    ranks, parallel = OF_EXPERTS[layout]
    check(run_ranks, ranks, run(MOE, SAVED, **parallel))


@pytest.mark.parametrize("kind", thinned({"full"}, ["selective", "full"]))
def test_with_checkpointing(run_ranks: RunRanks, kind: str) -> None:
    check(run_ranks, 2, run(DENSE, SAVED, kind, tp=2))


@pytest.mark.parametrize("layout", thinned({"hdp=2, zero 3"}, ["hdp=2, zero 3", "pp=2"]))
def test_products_with_a_scale_for_each_row(run_ranks: RunRanks, layout: str) -> None:
    """Without tp: on each tp rank, part of a row would have its own maximum."""
    ranks, parallel = LAYOUTS[layout]
    check(run_ranks, ranks, run(DENSE, ROWS, **parallel))


def test_products_of_experts_elsewhere(run_ranks: RunRanks) -> None:
    check(run_ranks, 2, run(MOE, ROWS, hdp=2, ep=2))


def test_a_layout_that_would_part_a_group_is_refused() -> None:
    model = DENSE | {"ffn_width": 72}
    Layout.of(run(model, SAVED), 1)
    Layout.of(run(model, {}, tp=2), 2)
    with pytest.raises(UserError, match=r"model\.ffn_width=72 over 2 ranks is no multiple of 16"):
        Layout.of(run(model, SAVED, tp=2), 2)
    with pytest.raises(UserError, match="fp8_blockwise scales 128 numbers together"):
        Layout.of(run(DENSE, {"linears": "fp8_blockwise"}, tp=2), 2)
    with pytest.raises(UserError, match=r"names layer 4, but model\.num_layers=4"):
        Layout.of(run(DENSE, {"linears": "fp8_rowwise", "compute_layers": [4]}), 1)
