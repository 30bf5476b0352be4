"""Each rule about inadvisable combinations: cases with advice and without."""

from __future__ import annotations

from pathlib import Path

import pytest

import allometry.configs
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.scaling.advice import RULES, advice
from allometry.scaling.plan import RunPlan

SEVEN, MOE = "dense_7b", "moe_1b_a200m"
FULL = "training.activation_checkpointing=full"
LONG = ("parallel.zero.stage=3", "data.sequence_length=262144", "batch.ramp=null")


def preset_config(name: str, *changes: str) -> RunConfig:
    return load(str(Path(allometry.configs.__file__).parent / "presets" / f"{name}.yaml"), changes)


def said(preset: str, world_size: int, *changes: str, node_ranks: int = 8) -> dict[str, str]:
    config = preset_config(preset, *changes)
    return advice(config, RunPlan.of(config, world_size), node_ranks)


SPEAKS: dict[str, tuple[str, int, list[str], str]] = {
    "does_not_fit": (SEVEN, 8, ["parallel.zero.stage=0", FULL], "parallel.zero.stage="),
    "stage_higher_than_needed": (SEVEN, 32, ["parallel.zero.stage=3", FULL], "stage 1"),
    "regathers_in_a_pipeline": (
        SEVEN,
        64,
        ["parallel.pp=4", "parallel.zero.regather=micro_batch", FULL],
        "step does so once",
    ),
    "recomputes_though_memory_is_ample": ("dense_25m", 8, [FULL], "computes every forward twice"),
    "offloads_though_memory_is_ample": (
        "dense_25m",
        8,
        ["parallel.zero.stage=1", "parallel.zero.offload=cpu"],
        "none needs",
    ),
    "activations_leave_though_memory_is_ample": (
        "dense_25m",
        8,
        ["training.activation_offload=0.5"],
        "training.activation_offload=0.5 moves",
    ),
    "copies_of_activations_do_not_hide": (
        SEVEN,
        32,
        ["training.activation_offload=1.0"],
        "training.activation_checkpointing=full sends 34 MB, which hides",
    ),
    "tp_across_nodes": (SEVEN, 64, ["parallel.tp=4"], "use parallel.tp="),
    "pipeline_mostly_waits": (
        SEVEN,
        256,
        ["parallel.pp=8", "batch.micro_batch_sequences=4", "batch.ramp=null"],
        "leave ranks idle for 47%",
    ),
    "experts_cut_too_thin": (MOE, 8, ["parallel.tp=2"], "parallel.expert_tp: 1"),
}


def test_every_rule_is_here() -> None:
    assert set(SPEAKS) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("rule", SPEAKS)
def test_a_rule_speaks(rule: str) -> None:
    preset, world_size, changes, words = SPEAKS[rule]
    node_ranks = 6 if rule == "tp_across_nodes" else 8
    found = said(preset, world_size, *changes, node_ranks=node_ranks)
    assert words in found[rule]


SILENT: dict[str, tuple[str, int, list[str]]] = {
    "does_not_fit": (SEVEN, 64, ["parallel.zero.stage=3", FULL]),
    "stage_higher_than_needed": (SEVEN, 32, ["parallel.zero.stage=1", FULL]),
    "regathers_in_a_pipeline": (SEVEN, 64, ["parallel.pp=4", FULL]),
    "recomputes_though_memory_is_ample": ("dense_25m", 8, []),
    "offloads_though_memory_is_ample": ("dense_25m", 8, ["parallel.zero.stage=1"]),
    "activations_leave_though_memory_is_ample": (
        SEVEN,
        32,
        [*LONG, FULL, "training.activation_offload=1.0"],
    ),
    "copies_of_activations_do_not_hide": (SEVEN, 32, [FULL, "training.activation_offload=1.0"]),
    "tp_across_nodes": (SEVEN, 64, ["parallel.tp=4"]),
    "pipeline_mostly_waits": (SEVEN, 64, ["parallel.pp=4"]),
    "experts_cut_too_thin": (MOE, 8, ["parallel.tp=2", "parallel.expert_tp=1"]),
}


@pytest.mark.parametrize("rule", SILENT)
def test_a_rule_is_silent(rule: str) -> None:
    preset, world_size, changes = SILENT[rule]
    assert rule not in said(preset, world_size, *changes)


def test_what_is_proposed_is_what_is_planned() -> None:
    text = said(SEVEN, 32, "parallel.zero.stage=3", FULL)["stage_higher_than_needed"]
    lower = preset_config(SEVEN, "parallel.zero.stage=1", FULL)
    assert f"{RunPlan.of(lower, 32).memory.total / 1e9:.1f} GB" in text


def test_what_no_checkpointing_makes_fit_may_with_offload() -> None:
    text = said(SEVEN, 32, *LONG, FULL)["does_not_fit"]
    assert "training.activation_checkpointing=full with training.activation_offload=1.0" in text
    offloaded = preset_config(SEVEN, *LONG, FULL, "training.activation_offload=1.0")
    assert f"needs {RunPlan.of(offloaded, 32).memory.total / 1e9:.1f} GB" in text


def test_a_copy_hides_behind_the_attention_of_long_sequences() -> None:
    """FLOPs grow with the square of the tokens, offloaded bytes linearly."""
    rule, share = "copies_of_activations_do_not_hide", "training.activation_offload=1.0"
    assert "longer sequences" not in said(SEVEN, 32, share)[rule]
    assert rule not in said(SEVEN, 32, *LONG, share, "data.sequence_length=524288")
    slow = "parallel.context.costs.host_bandwidth_gb_per_s=1"
    assert "longer sequences hide more" in said(SEVEN, 32, share, FULL, slow)[rule]
