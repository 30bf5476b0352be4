"""Compare one step of a pipeline with one process, on the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import tiny
from allometry.configs.run import RunConfig
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh


def config(
    pp: int,
    schedule: str,
    dtype: str = "fp64",
    *,
    layers: int = 8,
    tied: bool = False,
    zero: int = 0,
    tp: int = 1,
    offload: str = "none",
    split: Any = "flops",
    **training: Any,
) -> RunConfig:
    """Return the tiny model with more layers, on a pipeline."""
    run = tiny.config(zero, dtype, tied)
    given = run.model_dump()
    given["model"]["num_layers"] = layers
    given["batch"]["sequences"] = 16 * 4
    if tp > 1:
        given["model"] |= {"num_heads": 2 * tp, "num_kv_heads": tp}
    given["parallel"]["zero"]["offload"] = offload
    given["parallel"] |= {"pp": pp, "tp": tp, "pipeline": {"schedule": schedule, "split": split}}
    given["training"] |= training
    return RunConfig.model_validate(given)


def step(
    made: Parallel, run: RunConfig, mesh: Mesh, count: int, seed: int = 0
) -> tuple[dict[str, Tensor], dict[int, Tensor], list[int]]:
    """Return gradients and losses of this rank for ``count`` micro-batches on each hdp rank."""
    batches = tiny.micro_batches(count * mesh.hdp.size, seed=seed)
    scale = torch.tensor(1.0 / tiny.global_count(batches), dtype=torch.float64)
    losses: dict[int, Tensor] = {}
    begun: list[int] = []
    mine = batches[mesh.hdp.rank :: mesh.hdp.size]
    made.execution.train(mine, scale, losses.__setitem__, begun.append)
    found = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), found.keys()
    return {name: tiny.whole(gradient) for name, gradient in found.items()}, losses, begun


def check(made: Parallel, run: RunConfig, mesh: Mesh, count: int, seed: int = 0) -> dict[str, Any]:
    """Compare one step with one process: worst error of this rank's gradients and losses."""
    found, losses, begun = step(made, run, mesh, count, seed)
    assert begun == list(range(count)), begun
    batches = tiny.micro_batches(count * mesh.hdp.size, seed=seed)
    alone = tiny.initialized(run, mesh.device)
    tiny.backward_alone(alone, batches)
    expected = tiny.gradients(alone)
    nll_error = 0.0
    with torch.no_grad():
        for index, nll_BL in losses.items():
            batch = batches[mesh.hdp.rank :: mesh.hdp.size][index]
            exact_BL = alone(batch.tokens_BL, batch.targets_BL, batch.documents).nll_BL
            difference = float((nll_BL - exact_BL).abs().max())
            nll_error = max(nll_error, difference if difference == difference else float("inf"))
    return {
        "names": sorted(found),
        "error": tiny.worst_error(found, {name: expected[name] for name in found}),
        "losses": sorted(losses),
        "nll_error": nll_error,
        "all": sorted(expected),
    }


def errors(run: RunConfig, count: int) -> dict[str, Any]:
    with tiny.mesh(run) as mesh:
        return check(tiny.parallel(run, mesh), run, mesh, count) | {"pp": mesh.pp.rank}


def assert_equal_to_one_process(
    results: list[Mapping[str, Any]], last: int, count: int, tolerance: float
) -> None:
    """Assert that each parameter is on some rank and right; only the last stage has losses."""
    assert max(found["error"] for found in results) < tolerance
    assert max(found["nll_error"] for found in results) < 20 * tolerance
    assert sorted({n for found in results for n in found["names"]}) == results[0]["all"]
    for found in results:
        assert found["losses"] == (list(range(count)) if found["pp"] == last else [])
