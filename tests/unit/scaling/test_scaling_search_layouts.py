"""The search for layouts proposes layouts that the trainer accepts, and the best of them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.scaling.planner.cost import step_time
from allometry.scaling.search.case import Case
from allometry.scaling.search.proposal import proposals
from allometry.scaling.search.remedies import changed, near_counts, nearest, remedies
from allometry.scaling.search.search import Asked, Search
from allometry.scaling.search.sensitivity import sensitivity
from allometry.scaling.search.space import applied

H100 = load_hardware("h100")
ASKED = Asked(H100, "h100")
RAMP = "batch.ramp={start_sequences: 48, increment_sequences: 48, over_tokens: 1e9}"
RUNS = {
    "dense": ("dense_7b", ("model.num_layers=4",), 16),
    "ramp": ("dense_25m", (RAMP, "batch.sequences=480"), 12),
    "experts": ("moe_demo", ("batch.ramp=null",), 8),
    "documents": ("documents_demo", (), 4),
    "fp8": ("demo", ("precision.linears=fp8_rowwise", "training.compile=false"), 8),
    "offload": ("demo", ("parallel.zero.stage=1", "parallel.zero.optimizer_states={}"), 4),
}


def run(name: str) -> tuple[RunConfig, int]:
    preset, keys, gpus = RUNS[name]
    return load(f"preset:{preset}", list(keys)), gpus


@pytest.mark.parametrize("name", RUNS)
def test_what_is_proposed_is_a_run_that_trains(name: str) -> None:
    config, gpus = run(name)
    search = Search(config, gpus, ASKED)
    best = search.best(8)
    assert best
    for choice in best:
        placed = applied(config, choice, gpus)
        again = RunConfig.model_validate(placed.model_dump(mode="json"))
        assert again == placed, dump(placed)
        plan = RunPlan.of(again, gpus)
        assert plan.memory.total == search.memory(choice).total <= search.limit  # type: ignore[union-attr]
        assert plan.batch.full_sequences == config.batch.sequences


@pytest.mark.parametrize("name", RUNS)
def test_all_at_once_is_each_alone(name: str) -> None:
    config, gpus = run(name)
    search = Search(config, gpus, ASKED)
    choices = [c for c in search.space.choices() if search.memory(c) is not None][::23]
    together = search.cases(choices)
    for index, choice in enumerate(choices):
        placed = applied(config, choice, gpus)
        alone = Case.of(placed, H100, layout=Layout.of(placed, gpus), name="h100").cases(H100)
        for key, column in alone.n.items():
            assert together.n[key][index] == column[0], (key, choice)
        for key, column in alone.hw.items():
            assert together.hw[key][index] == column[0], (key, choice)
        for key in ("precision", "recompute", "schedule", "hardware"):
            assert getattr(together, key)[index] == getattr(alone, key)[0], (key, choice)


def test_the_first_is_the_fastest_of_all_that_fit() -> None:
    config, gpus = run("experts")
    tight = replace(ASKED, hardware=H100.model_copy(update={"gpu": _gpu(1e8)}))
    search = Search(config, gpus, tight)
    every = list(search.space.choices())
    fits = [c for c in every if (m := search.memory(c)) and m.total <= search.limit]
    assert 0 < len(fits) < sum(search.memory(c) is not None for c in every)
    seconds = step_time(search.cases(fits)).seconds
    [best] = search.best(1)
    assert step_time(search.cases([best])).seconds[0] == pytest.approx(seconds.min(), rel=1e-8)
    ordered = [s for _, s in search.ordered()]
    assert len(ordered) == len(fits)
    assert np.all(np.diff(np.log(ordered)) > -1e-8)


def _gpu(memory: float) -> object:
    return H100.gpu.model_copy(update={"memory_bytes": memory})


def test_memory_as_objective_puts_the_least_first() -> None:
    config, gpus = run("dense")
    search = Search(config, gpus, replace(ASKED, objective="memory"))
    [best] = search.best(1)
    assert search.memory(best).total == min(least for _, least in search.cores.values())  # type: ignore[union-attr]


def test_kept_keys_stay_and_unknown_ones_are_refused() -> None:
    config = load("preset:dense_7b", ["parallel.tp=4", "batch.ramp=null"])
    keep = ("parallel.tp", "parallel.zero.stage", "batch.micro_batch_sequences")
    for choice in Search(config, 64, replace(ASKED, keep=keep)).best(5):
        assert (choice.tp, choice.zero, choice.micro_batch) == (4, 3, 1)
    with pytest.raises(UserError, match=r"model.width cannot be kept"):
        Search(config, 64, replace(ASKED, keep=("model.width",)))


def test_a_card_without_the_precision_is_refused() -> None:
    config = load("preset:dense_7b", ["precision.linears=fp8_rowwise"])
    a100 = Asked(load_hardware("a100"), "a100")
    with pytest.raises(UserError, match=r"precision.linears=fp8_rowwise: the description of a100"):
        Search(config, 64, a100)
    with pytest.raises(UserError, match=r"training.compute_dtype=fp64"):
        Search(load("preset:dense_1b", ["training.compute_dtype=fp64"]), 8, a100)


def test_what_does_not_fit_says_what_would() -> None:
    big = ["model.width=8192", "model.num_layers=80", "model.num_heads=64", "batch.ramp=null"]
    config = load("preset:dense_7b", [*big, "model.ffn_width=28672"])
    search = Search(config, 8, ASKED)
    assert not search.fitting
    choice, least = nearest(search)
    assert least > search.limit
    assert search.memory(choice).total == least  # type: ignore[union-attr]
    found = list(remedies(search))
    assert found[0].gpus > 8
    for remedy in found:
        assert remedy.bytes <= search.limit
    assert any(
        "offload" in remedy.change or "optimizer_states" in remedy.change for remedy in found
    )
    offloaded = changed(config, {"parallel.zero.optimizer_states": {}})
    assert offloaded is not None
    assert offloaded.parallel.zero.optimizer_states is not None


def test_a_number_of_gpus_without_a_layout_names_near_ones() -> None:
    config = load("preset:dense_25m", ["batch.sequences=64"])
    search = Search(config, 88, ASKED)  # 11 divides no size, and exceeds the layers
    assert not search.cores
    near = near_counts(config, 88, ASKED)
    assert near == [80, 96]
    assert all(Search(config, gpus, ASKED).cores for gpus in near)


def test_an_assumption_that_turns_the_choice_is_named() -> None:
    config = load("preset:moe_mixtral_8x7b", ["batch.ramp=null", "model.num_layers=8"])
    search = Search(config, 64, ASKED)
    [best] = search.best(1)
    turns = list(sensitivity(search, best))
    assert len({turn.assumption for turn in turns}) == 13
    for turn in turns:
        if turn.best == best:
            assert turn.loses == pytest.approx(0, abs=1e-8)
    slow = H100.model_copy(update={"inside": H100.inside.model_copy(update={"bandwidth": 1e9})})
    choice, _ = next(search.ordered(slow))
    assert choice.tp == 1


def test_predictions_add_up() -> None:
    config, gpus = run("dense")
    search = Search(config, gpus, ASKED)
    for one in proposals(search, search.best(3), tokens=10**12, price=2.0):
        assert sum(one.terms.values()) == pytest.approx(one.seconds)
        assert one.low < one.seconds < one.high
        assert one.gpu_hours == pytest.approx(one.days * 24 * gpus)
        assert one.cost == pytest.approx(2 * one.gpu_hours)
        assert one.tokens >= 10**12
        speed = one.tokens / (one.days * 86400) / gpus
        assert speed == pytest.approx(one.tokens_per_second)
        assert 0.2 < one.mfu < 0.8
        [kind] = search.cases([one.choice]).kinds
        assert one.unseen == (kind not in ASKED.calibration.kinds)


@pytest.mark.parametrize(
    "preset", ["dense_7b", pytest.param("moe_mixtral_8x7b", marks=pytest.mark.slow)]
)
def test_thousands_of_gpus_take_seconds(preset: str) -> None:
    config = load(f"preset:{preset}", ["batch.ramp=null", "batch.sequences=4096"])
    begun = time.process_time()
    search = Search(config, 4096, ASKED)
    best = search.best(10)
    assert len(proposals(search, best)) == 10
    list(sensitivity(search, best[0]))
    assert time.process_time() - begun < 10  # measured: 1.4 s


def test_cuda_graphs_are_for_one_gpu() -> None:
    config = load("preset:dense_1b", ["training.cuda_graphs=true"])
    with pytest.raises(UserError, match="cuda_graphs"):
        Search(config, 8, ASKED)


def test_what_is_said_not_to_fit_does_not_fit_in_any_way() -> None:
    config, gpus = run("dense")
    search = Search(
        config, gpus, replace(ASKED, hardware=H100.model_copy(update={"gpu": _gpu(9e9)}))
    )
    refused = [core for core in search.space.cores() if core not in search.fitting]
    assert 0 < len(refused) < len(list(search.space.cores()))
    for core in refused:
        for choice in search.space.of_core(core):
            found = search.memory(choice)
            assert found is None or found.total > search.limit, choice
