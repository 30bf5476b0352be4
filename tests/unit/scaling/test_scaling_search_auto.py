"""``parallel: auto`` as a word or a section: resolved once, refused without a valid layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from allometry.configs.auto import FreeKey
from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load, yaml_text
from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.scaling.search.auto import settle
from allometry.scaling.search.space import FREE

H100 = "auto: {cluster: h100}"


def run(*keys: str, preset: str = "demo") -> RunConfig:
    return load(f"preset:{preset}", list(keys))


def test_a_word_is_a_section_and_survives_a_file(tmp_path: Path) -> None:
    config = run("parallel=auto")
    assert config.parallel.auto is not None
    assert config.parallel.auto.cluster == "this-machine"
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    assert load(file) == config
    assert get_args(FreeKey) == tuple(FREE)


def test_what_is_settled_has_a_layout_and_the_same_batch() -> None:
    config = run(f"parallel={{{H100}, timeout_s: 77}}", "batch.sequences=64")
    with pytest.raises(UserError, match="parallel=auto chooses a layout when a run begins"):
        Layout.of(config, 8)
    settled, facts = settle(config, 8, "cuda")
    assert facts is not None
    assert settled.parallel.auto is None
    assert settled.parallel.timeout_s == 77
    assert settled.batch.sequences == 64
    assert Layout.of(settled, 8).degrees.hdp == facts["hdp"]
    assert len(facts["others"]) <= 4
    assert all(one["seconds"] * 1.01 >= facts["predicted"]["seconds"] for one in facts["others"])
    assert RunConfig.model_validate(settled.model_dump(mode="json")) == settled
    assert settle(run(), 8, "cuda") == (run(), None)


def test_one_layout_serves_all_stages() -> None:
    """The longest stage is timed unchanged; the fullest stage must fit."""
    fuller = "stages.1.data.sequence_length=4096"
    config = run(f"parallel={{{H100}}}", fuller, preset="stages_demo")
    settled, facts = settle(config, 4, "cuda")
    assert facts is not None
    plans = RunPlan.of_stages(settled, 4)
    assert plans[1].memory.total > plans[0].memory.total
    assert [plan.layout for plan in plans] == [plans[0].layout] * 3
    assert facts["predicted"]["memory_bytes"] == max(plan.memory.total for plan in plans)
    assert plans[0].micro_batch_sequences == facts["chosen"]["micro_batch"]

    longest = ("stages.1.tokens=900_000", "stages.1.data.sequence_length=1024")
    settled, facts = settle(run(f"parallel={{{H100}}}", *longest, preset="stages_demo"), 1, "cuda")
    assert facts is not None
    stable, long, _ = RunPlan.of_stages(settled, 1)
    assert long.micro_batch_sequences == facts["chosen"]["micro_batch"] == 4, "as the stage says"
    assert facts["predicted"]["memory_bytes"] == max(stable.memory.total, long.memory.total)
    speed = facts["predicted"]["tokens_per_second"] * facts["predicted"]["seconds"]
    assert round(speed) == 8 * 1024, "tokens of its step"


def test_kept_keys_stay() -> None:
    keep = "{cluster: h100, keep: [parallel.tp, training.activation_checkpointing]}"
    config = run(f"parallel={{auto: {keep}, tp: 2}}", "training.activation_checkpointing=full")
    settled, _ = settle(config, 8, "cuda")
    assert settled.parallel.tp == 2
    assert settled.training.activation_checkpointing == "full"


def test_the_choice_of_a_launch_before_stays_while_the_question_does() -> None:
    config = run(f"parallel={{{H100}}}", "batch.sequences=64")
    _, facts = settle(config, 8, "cuda")
    assert facts is not None
    other = {**facts, "chosen": {**facts["chosen"], "micro_batch": 1, "checkpointing": "full"}}
    settled, kept = settle(config, 8, "cuda", other)
    assert kept is not None
    assert settled.training.activation_checkpointing == "full"
    assert kept["reason"] == "as the launch before chose it"
    _, again = settle(config, 4, "cuda", other)
    assert again is not None
    assert again["reason"].startswith("planned again, as 8 ranks before, 4 now")
    free = run(f"parallel={{{H100[:-1]}, reserve: 0.3}}}}", "batch.sequences=64")
    _, changed = settle(free, 8, "cuda", other)
    assert changed is not None
    assert changed["reason"].startswith("planned again, as parallel.auto changed")


def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path) -> None:
    plain: dict[str, Any] = load_hardware("h100").model_dump(mode="json")
    plain["gpu"]["memory_bytes"] = 1e6
    (tmp_path / "small.yaml").write_text(yaml_text(plain))
    small = run(f"parallel={{auto: {{cluster: {tmp_path / 'small.yaml'}}}}}")
    with pytest.raises(UserError, match=r"no layout of 2 ranks fits 0.0009 GB"):
        settle(small, 2, "cuda")
    with pytest.raises(UserError, match="7 ranks cannot share batches"):
        settle(run(f"parallel={{{H100}}}", "model.num_layers=6"), 7, "cuda")
    with pytest.raises(UserError, match="there is no hardware 'h101'"):
        settle(run("parallel={auto: {cluster: h101}}"), 2, "cuda")
    with pytest.raises(UserError, match="keep"):
        run("parallel={auto: {keep: [model.width]}}")
