"""Parameters gathered in FP8: bitwise equal products, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.models.gathered import Gathered
from allometry.parallel.gather_fp8 import Fp8Gather
from allometry.parallel.mesh import open_mesh
from allometry.scaling.layout import Layout
from allometry.studies.certificate import step as certificate
from allometry.studies.rehearse import rehearse
from test_dist_precision import DENSE, MOE, SAVED
from test_dist_precision import run as described

RunRanks = Callable[..., list[Any]]
TENSORWISE = {"linears": "fp8_tensorwise", "compute_layers": [1]}


def run(
    gather: str, dtype: str = "bf16", precision: dict[str, Any] | None = None, **more: Any
) -> RunConfig:
    chosen = {**TENSORWISE, **(precision or {}), "gather": gather}
    made = described(more.pop("model", DENSE), chosen, more.pop("checkpointing", "none"), **more)
    training = made.training.model_copy(update={"compute_dtype": dtype})
    return made.model_copy(update={"training": training})


def steps(config: RunConfig, seen: list[bool] | None = None) -> dict[str, Any]:
    """(On each rank) three steps in this layout: all computed values."""
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        batches = [
            tiny.device_batches(8, seed)[mesh.hdp.rank :: mesh.hdp.size] for seed in range(3)
        ]
        got = certificate.layout_steps(config, mesh, batches)
    row = {f"parameters of {name}": x for name, x in got.parameters.items()}
    row |= {f"gradients of {name}": x for name, x in got.gradients.items()}
    return row | {f"sums {i}": x for i, x in enumerate(got.sums)}


def different(settings: dict[str, Any], forgetful: bool = False) -> list[str]:
    """(On each rank) quantities that differ bitwise with FP8 gathers."""
    wanted = steps(run("compute", **settings))
    reads = 0

    def reading(weight: Gathered) -> torch.Tensor:
        raise AssertionError("a product decodes a weight that it should read in FP8")

    refresh = Fp8Gather.refresh

    def counted(self: Fp8Gather) -> None:
        nonlocal reads
        reads += self.stale
        if not (forgetful and self._scales is not None):
            refresh(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gathered, "decoded", reading)
        patch.setattr(Fp8Gather, "refresh", counted)
        got = steps(run("fp8", **settings))
    assert forgetful or reads == 3, "scales are found once a step"
    assert got.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(got[name], wanted[name])]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 1": (2, {"zero": {"stage": 1}}),
    "zero 3, saved, full": (
        2,
        {"zero": {"stage": 3}, "precision": SAVED, "checkpointing": "full"},
    ),
    "zero 2 in fp32": (2, {"zero": {"stage": 2}, "dtype": "fp32"}),
    "pp=2, zero 3": (4, {"pp": 2, "zero": {"stage": 3}}),
    "copies": (4, {"zero": {"stage": 3, "replicas": 2}}),
}


QUICK = ("zero 3, saved, full",)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in LAYOUTS],
)
def test_bits_are_those_of_whole_weights(run_ranks: RunRanks, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    assert run_ranks(different, ranks, settings) == [[]] * ranks


def test_scales_of_the_step_before_are_told_apart(run_ranks: RunRanks) -> None:
    found = run_ranks(different, 2, {"zero": {"stage": 1}}, True)
    assert all("sums 2" in names for names in found)


def compiled_error() -> float:
    """(On each rank) largest relative error of compiled blocks against eager blocks."""
    config, found = run("fp8", "fp32", zero={"stage": 3}), []
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        for compiled in (False, True):
            made = certificate.make_parallel(config, mesh)
            part = made.parts[0]
            for block in part.blocks.values() if compiled else ():
                block.compile(fullgraph=True, backend="aot_eager")
            tiny.backward_shared(part, made.sync, tiny.micro_batches(4), mesh)
            found.append(tiny.gradients(part))
    return tiny.worst_error(found[1], found[0])


def test_compiled_blocks_read_fp8(run_ranks: RunRanks) -> None:
    assert max(run_ranks(compiled_error, 2)) <= 1e-5


def gathered_bytes(gather: str, stage: int) -> int:
    """Return the bytes of blocks that a rank receives in the gathers of a step."""
    config = run(gather, hdp=4, zero={"stage": stage})
    (report,) = rehearse(config, 4)
    return sum(
        call.bytes * number
        for call, number in report.collectives
        if call.kind == "all-gather" and call.dtype != "float32"
    )


def test_a_byte_of_a_number_travels() -> None:
    model = certificate.build(run("compute"))
    numbers = {
        layer: sum(p.numel() for p in block.parameters() if p.dim() == 2)
        for layer, block in model.blocks.items()
    }
    saved = sum(n for layer, n in numbers.items() if layer != "1")  # layer 1 computes in bf16
    for stage, last in ((1, 0), (3, numbers["3"])):
        times = (
            1
            if stage == 1
            else 2 * rehearse(run("fp8", hdp=4, zero={"stage": 3}), 4)[0].micro_batches
        )
        less = gathered_bytes("compute", stage) - gathered_bytes("fp8", stage)
        assert less == times * saved - (times // 2) * last, (stage, less, times, saved)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"zero": {"stage": 0}}, r"parallel\.zero\.stage=0 gathers no parameters"),
        ({"hdp": 1, "tp": 2, "zero": {"stage": 1}}, r"parallel\.tp=2 leaves a rank parts"),
        ({"model": MOE, "zero": {"stage": 1}}, r"model\.kind=moe"),
        ({"zero": {"stage": 1, "offload": "cpu"}}, r"parallel\.zero\.offload=cpu"),
        (
            {"hdp": 3, "zero": {"stage": 1}},
            r"3 ranks do not share the 32 rows of blocks\.0\.attention\.wq\.weight evenly",
        ),
    ],
    ids=["zero 0", "tp", "experts", "offload", "uneven"],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], reason: str) -> None:
    config = run("fp8", **{"hdp": 2, **settings})
    with pytest.raises(UserError, match=rf"precision\.gather=fp8 cannot be: .*{reason}"):
        Layout.of(config, config.parallel.hdp * config.parallel.tp)
