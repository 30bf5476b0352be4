"""The planner's cost model: exact for known formulas, and monotonic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig, load_hardware
from allometry.scaling.planner import operators
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.cost import COMMUNICATION, step_time
from allometry.scaling.planner.pipeline import bottleneck, bubble

DENSE = {
    **{"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336},
    **{"vocab": 128256, "sequence": 4096, "micro_batch": 1, "global_batch": 256},
    "hardware": "h100",
}
EXPERTS = DENSE | {"experts": 64, "top_k": 6, "expert_ffn": 1408, "ep": 8, "dp": 16}
LAYOUTS: tuple[dict[str, Any], ...] = (
    DENSE,
    DENSE | {"dp": 16, "zero": 1, "overlap": 0},
    DENSE | {"dp": 32, "zero": 3},
    DENSE | {"tp": 8, "dp": 4, "eager": 1},
    DENSE | {"tp": 16, "dp": 2},
    DENSE | {"pp": 4, "dp": 8, "zero": 0},
    DENSE | {"pp": 7, "even_stages": 1},
    DENSE | {"pp": 4, "chunks": 4, "schedule": "interleaved", "tp": 2},
    DENSE | {"cp": 8, "sequence": 131072, "global_batch": 8},
    DENSE | {"cp": 16, "sequence": 8192, "recompute": "full", "precision": "fp8"},
    DENSE | {"flash": 0, "recompute": "selective", "sequence_parallel": 0},
    EXPERTS,
    EXPERTS | {"ep": 16, "pp": 2, "schedule": "zb_h1", "shared_experts": 1, "dense_layers": 1},
)


def cases(*rows: dict[str, Any], hardware: HardwareConfig | None = None) -> Cases:
    return Cases.of(rows, {"h100": hardware or load_hardware("h100")})


def test_bubbles_of_equal_stages_are_the_formulas_exactly() -> None:
    f, b, w, p, v = 2.0, 3.0, 2.5, 8, 4
    names = ["1f1b", "interleaved", "zb_h1", "zb_h2"]
    found = bubble(names, p, v, f, b, w)
    assert found.tolist() == [7 * 7.5, 7 * 7.5 / 4, 7 * (f + b - w), 0.0]
    assert bubble("zb_h2", 8, 1, 4.0, 3.0, 2.5) == 7 * (4 + 3 - 5)
    assert bubble("zbv", 8, 2, 1.0, 1.0, 1.0) == 0
    assert (bubble(names, 1, v, f, b, w) == 0).all()


def test_a_step_of_1f1b_is_micro_batches_and_one_less_than_stages() -> None:
    # Equal stages: only the layers take significant time.
    plain = DENSE | {"vocab": 1, "pp": 4, "dp": 1, "even_stages": 1}
    found = step_time(cases(plain)).terms
    per_stage = sum(
        float(found[name][0])
        for name in ("matrix products", "attention", "element-wise", "waiting for the host")
    )
    assert found["bubble"][0] == pytest.approx(per_stage / 256 * 3, rel=1e-4)
    assert found["uneven stages"][0] == pytest.approx(0, abs=1e-3 * per_stage)


def test_the_slowest_stage_is_that_of_the_best_split() -> None:
    def slowest(layers: int, head: float, p: int, even: int = 0) -> float:
        one = (np.array([float(x)]) for x in (1, layers, head, p, even))
        return float(bottleneck(*one)[0])

    assert slowest(16, 4, 4) == 5  # 6 + 5 + 5 would be worse than 5, 5, 5, 1 and the head
    assert slowest(16, 4, 4, even=1) == 8
    assert slowest(16, 9, 8) == 9
    assert slowest(7, 0.5, 2) == 4
    assert slowest(16, 4, 1) == 20


def test_terms_add_up_and_a_gpu_alone_sends_nothing() -> None:
    found = step_time(cases(*LAYOUTS))
    for index in range(len(LAYOUTS)):
        terms = found.explain(index)
        assert sum(terms.values()) == pytest.approx(found.seconds[index], rel=1e-12)
        assert min(terms.values()) > -1e-9 * found.seconds[index], terms
    assert not set(found.explain(0)) & set(COMMUNICATION)
    assert "bubble" not in found.explain(0)
    kinds = {1: "data parallel", 3: "tensor parallel", 5: "between stages", 11: "expert parallel"}
    for index, term in kinds.items():
        assert term in found.explain(index), term
    assert "context parallel" in found.explain(9)


@pytest.mark.parametrize("factor", [1.05, 2.0, 20.0])
def test_better_hardware_is_never_slower(factor: float) -> None:
    plain = load_hardware("h100")
    gpu, inside, across = plain.gpu, plain.inside, plain.across

    def better(section: Any, key: str, by: float = factor) -> dict[str, Any]:
        return {key: getattr(section, key) * by}

    faster = {k: v * factor for k, v in gpu.peak_flops.items()}
    changed = {
        "inside": {"inside": inside.model_copy(update=better(inside, "bandwidth"))},
        "across": {"across": across.model_copy(update=better(across, "bandwidth"))},
        "latency": {"across": across.model_copy(update=better(across, "latency_s", 1 / factor))},
        "memory": {"gpu": gpu.model_copy(update=better(gpu, "memory_bandwidth"))},
        "products": {"gpu": gpu.model_copy(update={"peak_flops": faster})},
        "nics": {"nics_per_node": int(np.ceil(8 * factor))},
    }
    before = step_time(cases(*LAYOUTS)).seconds
    gained = np.zeros(len(LAYOUTS))
    for what, update in changed.items():
        after = step_time(cases(*LAYOUTS, hardware=plain.model_copy(update=update))).seconds
        assert (after <= before * (1 + 1e-12)).all(), what
        gained += before - after
    assert (gained > 0).all()


def test_more_work_is_never_faster() -> None:
    before = step_time(cases(*LAYOUTS)).seconds
    for key in ("layers", "vocab", "ffn", "global_batch"):
        more = step_time(cases(*(row | {key: row[key] * 2} for row in LAYOUTS))).seconds
        assert (more > before).all() or key == "ffn", key
        assert (more >= before).all(), key


def test_attention_gets_more_efficient_with_the_sequence() -> None:
    rows = [DENSE | {"sequence": s, "global_batch": 2**20 // s} for s in (1024, 4096, 16384)]
    seconds = step_time(cases(*rows)).terms["attention"]
    per_flop = seconds / np.array([1024, 4096, 16384])  # equal tokens, work is s per token
    assert (np.diff(per_flop) < 0).all()


def test_products_are_arithmetic_at_the_attainable_rate() -> None:
    # No row and no side too small: 6 FLOPs per parameter and token over the products' rate.
    ideal = replace(Constants(), rows_half=1e-9, width_half=1e-9, products=1.0)
    found = step_time(cases(DENSE), ideal).terms["matrix products"][0]
    parameters = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    card = load_hardware("h100").gpu
    rate = card.peak_flops["bf16"] * card.attainable["bf16"]
    assert found == pytest.approx(6 * parameters * 256 * 4096 / rate, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": None}, "width is missing; give it"),
        ({"tp": 0}, "tp=0 must be a number of at least 1"),
        ({"hardware": "b200"}, "hardware='b200' is not described; use one of h100"),
        ({"precision": "fp4"}, "precision='fp4' is not known on h100; use one of bf16, fp16"),
        ({"schedule": "gpipe2"}, "schedule='gpipe2' is not known"),
        ({"experts": 8}, "experts=8 need top_k and expert_ffn; give both"),
        ({"dp": float("nan")}, "dp=nan must be"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        cases(DENSE, DENSE | change)
    assert str(raised.value).startswith("configuration 1: ")


def test_a_configuration_costs_the_same_among_thousands() -> None:
    many = cases(*LAYOUTS).take(np.arange(4000) % len(LAYOUTS))
    seconds = step_time(many).seconds
    assert seconds.shape == (4000,)
    np.testing.assert_array_equal(seconds[: len(LAYOUTS)], step_time(cases(*LAYOUTS)).seconds)


def own(**changes: Any) -> HardwareConfig:
    tree = load_hardware("h100").model_dump()
    tree["gpu"] |= changes.pop("gpu", {})
    return HardwareConfig.model_validate(tree | changes)


def test_ranks_of_one_processor_compute_and_launch_in_turn() -> None:
    rows = (DENSE | {"pp": 1, "dp": 8, "zero": 1, "eager": 1, "overlap": 1},)
    beside, after = (
        step_time(cases(*rows, hardware=own(gpu={"asynchronous": way}))) for way in (True, False)
    )
    host = float(operators.launches(cases(*rows), Constants())[0])
    layers = rows[0]["layers"] * float(cases(*rows).micro_batches[0])
    assert after.terms["waiting for the host"][0] == pytest.approx(host * layers)
    assert beside.terms["waiting for the host"][0] < after.terms["waiting for the host"][0]
    # The processor that sends also computes: no overlap.
    assert after.terms["data parallel"][0] > beside.terms["data parallel"][0]


def test_what_ranks_leave_each_other_slows_what_they_share() -> None:
    crowds = [{"ranks": 8, "products": 0.5, "memory": 0.25}]
    rows = (DENSE | {"dp": 8},)
    alone, crowded = (
        step_time(cases(*rows, hardware=own(crowds=one))).terms for one in ([], crowds)
    )
    for name, factor in (("matrix products", 2), ("attention", 2), ("element-wise", 4)):
        assert crowded[name][0] == pytest.approx(factor * alone[name][0]), name


def test_constants_that_were_measured_take_the_place_of_defaults() -> None:
    found = Constants.of_hardware(own(constants={"passes_eager": 250.0}))
    assert found == replace(Constants(), passes_eager=250.0)
    with pytest.raises(UserError, match=r"constants\.pases_eager is no constant.*passes_eager"):
        Constants.of_hardware(own(constants={"pases_eager": 250.0}))
