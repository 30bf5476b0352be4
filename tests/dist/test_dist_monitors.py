"""Monitors on several ranks give one process's values and do not change training bitwise."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import rows
from test_dist_runs import launch

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
LOOK = (
    "training.total_steps=2",
    "schedule.warmup_steps=0",
    "schedule.decay_fraction=0.5",
    "record.monitors.every_steps=1",
    "record.monitors.sequences=3",
    "record.monitors.singular_values_every_steps=2",
)
MOE = (
    "model={kind: moe, vocab_size: 64, width: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
    "first_dense_layers: 1, ffn_width: 64, "
    "experts: {kind: swiglu, num_experts: 4, experts_per_token: 2, width: 16}}",
)
SPHERES = (*MOE, "optimizer={kind: muonh, lr: 0.02}")
FP8 = ("precision.saved_activations=fp8",)
# The same number of sequences on each rank, because expert rows do not mark padding.
FP8_ROWS = (
    "precision={saved_activations: fp8, linears: fp8_rowwise}",
    "record.monitors.sequences=4",
)
DOCUMENTS = (
    "data.kind=documents",
    "data.max_document_tokens=60",
    "batch.micro_batch_sequences=1",
    "parallel.context.min_chunk_tokens=2",
    "parallel.context.capacity_tokens=64",
)


def monitored(config: RunConfig) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if k.startswith("monitors/")}
        for row in rows(Path(config.run.folder))
    ]


def differences(found: dict[str, float], wanted: dict[str, float], tolerance: float) -> list[str]:
    assert found.keys() == wanted.keys()
    # A mean of logits of both signs is near zero: compare it with 1, the size of the logits.
    return [
        f"{name}: {found[name]} is not {wanted[name]}"
        for name in wanted
        if not math.isclose(found[name], wanted[name], rel_tol=tolerance, abs_tol=tolerance / 100)
    ]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "layout", "ranks"),
    [
        ((), ("parallel.zero.stage=0",), 2),
        slow((), ("parallel.zero.stage=3",), 4),
        ((), ("parallel.tp=2",), 2),
        ((), ("parallel.pp=2", "batch.micro_batch_sequences=1"), 2),
        slow((), ("parallel.tp=2", "parallel.zero.stage=2"), 4),
        (MOE, ("parallel.ep=2", "parallel.zero.stage=1"), 2),
        slow(MOE, ("parallel.tp=2",), 2),
        (SPHERES, ("parallel.zero.stage=3",), 2),
        slow((), ("parallel.zero={stage: 2, offload: cpu}",), 2),
        slow((), ("parallel.zero={stage: 1, replicas: 2}",), 2),
        slow(DOCUMENTS, ("parallel.pp=2", "parallel.zero.stage=1"), 4),
        (DOCUMENTS, ("parallel.zero.stage=3",), 2),
        (FP8, ("parallel.tp=2",), 2),
        ((*MOE, *FP8_ROWS), ("parallel.ep=2",), 2),
    ],
)
def test_values_do_not_depend_on_the_layout(
    tiny: Make,
    run_ranks: Ranks,
    tmp_path: Path,
    kind: tuple[str, ...],
    layout: tuple[str, ...],
    ranks: int,
) -> None:
    alone = tiny(*LOOK, *kind, folder=tmp_path / "alone")
    run_ranks(launch, 1, alone)
    spread = tiny(*LOOK, *kind, *layout, folder=tmp_path / "spread")
    run_ranks(launch, ranks, spread)
    wanted, found = monitored(alone), monitored(spread)
    assert len(wanted[0]) > 30
    assert any(key.startswith("monitors/singular/") for key in wanted[1])
    assert ("monitors/sphere_drift/hidden" in wanted[0]) == (kind == SPHERES)
    assert ("monitors/fp8_error/hidden" in wanted[0]) == ("fp8" in " ".join(kind))
    # Singular values are from the second step: their vectors, and Adam with gradients near zero,
    # amplify rounding.
    assert not differences(found[0], wanted[0], 1e-4)
    assert not differences(found[1], wanted[1], 1e-2)
    assert differences(found[1], found[1] | wanted[0], 1e-2), "the comparison can fail"


def test_other_tokens_are_noticed(tiny: Make, run_ranks: Ranks, tmp_path: Path) -> None:
    three = tiny(*LOOK, folder=tmp_path / "three")
    four = tiny(*LOOK, "record.monitors.sequences=4", folder=tmp_path / "four")
    run_ranks(launch, 1, three)
    run_ranks(launch, 1, four)
    assert differences(monitored(four)[0], monitored(three)[0], 1e-4)


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (("parallel.zero.stage=0",), 2),
        slow(("parallel.zero.stage=1",), 2),
        (("parallel.zero.stage=3", "training.compute_dtype=bf16"), 2),
        slow(("parallel.tp=2",), 2),
        (("parallel.pp=2", "batch.micro_batch_sequences=1", "model.tied_embeddings=true"), 2),
        ((*MOE, "parallel.ep=2", "parallel.zero.stage=2", "training.compute_dtype=bf16"), 2),
    ],
)
def test_training_is_the_same_to_the_bit(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, layout: tuple[str, ...], ranks: int
) -> None:
    common = ("training.total_steps=5", "checkpoint.every_steps=null", *layout)
    every = "record.monitors={every_steps: 1, singular_values_every_steps: 2}"
    never = "record.monitors={every_steps: null, singular_values_every_steps: null}"
    found = []
    for name, monitors in (("with", every), ("without", never)):
        config = tiny(*common, monitors, folder=tmp_path / name)
        run_ranks(launch, ranks, config)
        found.append(rows(Path(config.run.folder)))
    for one, other in zip(*found, strict=True):
        assert [one[key] for key in ("loss", "grad_norm")] == [
            other[key] for key in ("loss", "grad_norm")
        ]
    assert "monitors/grad_rms/hidden" in found[0][0]
    assert not any(key.startswith("monitors/") for row in found[1] for key in row)
