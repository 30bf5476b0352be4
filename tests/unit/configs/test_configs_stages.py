"""Stages of a config: the resulting run, and one sentence per error."""

from __future__ import annotations

from pathlib import Path

import pytest

from allometry.configs.errors import ConfigError
from allometry.configs.loader import _models_at, dump, load
from allometry.configs.run import RunConfig
from allometry.configs.stages import MAY_CHANGE

STAGED = "training.total_steps=null"
WITH = (
    "stages=[{name: stable, steps: 10}, {name: long, tokens: 4e4, data: {sequence_length: 512}, "
    "batch: {sequences: 8}, model: {rope_theta: 5e4}, mixture: {python-code: 1}, "
    "schedule: {kind: linear}, optimizer: {lr: 1e-3}}]"
)


def test_each_stage_is_an_ordinary_run(tmp_path: Path) -> None:
    config = load("preset:demo", [STAGED, WITH])
    path = tmp_path / "again.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    stable, long = config.of_stages()
    by_hand = load("preset:demo", ["training.total_steps=10"])
    assert stable == by_hand
    overrides = ["training.total_steps=null", "training.total_tokens=40000"]
    overrides += ["data.sequence_length=512", "batch.sequences=8", "model.rope_theta=5e4"]
    overrides += ["data.sources.0.weight=1", "data.sources.1.weight=0"]
    overrides += ["schedule={kind: linear}", "optimizer.lr=1e-3"]
    assert long == load("preset:demo", overrides)
    assert by_hand.of_stages() == (by_hand,)


def test_what_a_stage_may_change_is_there_to_be_changed() -> None:
    """``optimizer.overrides`` contains the settings of single parameters."""
    for section, keys in MAY_CHANGE.items():
        models = _models_at(RunConfig, (section,))
        known = {key for model in models for key in model.model_fields}
        assert set(keys) - known <= {"overrides"}, section
        assert not {"kind", "width", "num_layers", "total_steps", "sources"} & set(keys)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[]", "stages is empty: name at least one stage"),
        ("[{name: a}]", "stage a: give exactly one of steps and tokens"),
        ("[{name: a, steps: 3, tokens: 4}]", "stage a: give exactly one of steps and tokens"),
        ("[{name: a, steps: 0}]", r"stages.0.steps=0 is not valid: input should be greater than 0"),
        ("[{name: a, tokens: 1.5}]", r"stages.0.tokens=1.5"),
        ("[{name: a, stpes: 3}]", "a stage has no key 'stpes'; it has name, steps or tokens, mixt"),
        ("[{name: a, steps: 3, evaluation: {}}]", "no key 'evaluation'.* may change keys of data"),
        (
            "[{name: a, steps: 3, model: {width: 3}}]",
            "stage a: a stage may not change model.width; of model it may change rope_theta",
        ),
        ("[{name: a, steps: 3, optimizer: {kind: lion}}]", "may not change optimizer.kind"),
        ("[{name: a, steps: 3, training: {total_steps: 3}}]", "not change training.total_steps"),
        ("[{name: a, steps: 3, data: {sources: []}}]", "may not change data.sources"),
        (
            "[{name: a, steps: 3, mixture: {foo: 3}}]",
            r"mixture names 'foo', which is none of data.sources \(python-code, python-prose\)",
        ),
        ("[{name: a, steps: 3, mixture: {python-code: 0}}]", "stage a: data: every source has wei"),
        ("[{name: a, steps: 3, mixture: {python-code: -1}}]", "greater than or equal to 0"),
        ("[{name: a, steps: 3}, {name: a, steps: 4}]", "a is the name of two stages"),
        ("[{name: a, steps: 3, schedule: {kind: cosin}}]", "schedule.kind=cosin is not known"),
        ("[{name: a, steps: 3, batch: {sequences: 7}}]", "stage a: batch: micro_batch_sequences"),
        ("[{name: a, steps: 3, data: {sequence_length: -1}}]", "stage a: data.sequence_length=-1"),
        ("[{name: a, steps: 3, optimizer: {momentum: 0.9}}]", "optimizer.momentum goes with optim"),
        ("[{name: a, steps: 3, keep: [weights]}]", "lets go of data"),
        ("{a: 3}", "should be a list"),
        ("[3]", "must be a section"),
    ],
)
def test_a_mistake_is_one_sentence(stages: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load("preset:demo", [STAGED, f"stages={stages}"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("override 'stages=", "the configuration: stages: a is"))


def test_the_length_stands_in_one_place() -> None:
    with pytest.raises(ConfigError, match="total_steps=160, but stages give the length of the run"):
        load("preset:demo", [WITH])
    with pytest.raises(ConfigError, match="give exactly one of total_tokens and total_steps"):
        load("preset:demo", [STAGED])


def test_a_mistake_is_found_in_the_line_of_its_stage(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["base: preset:demo", "training: {total_steps: null}", "stages:", "  - name: a"]
    lines += ["    steps: 5", "  - name: b", "    steps: 6", "    data:"]
    path.write_text("\n".join([*lines, "      sequence_length: -1", ""]))
    with pytest.raises(ConfigError, match=f"{path}:9: stage b: data.sequence_length=-1"):
        load(path)
    path.write_text("\n".join([*lines[:-1], "    model: {width: 3}", ""]))
    with pytest.raises(ConfigError, match=f"{path}:8: stage b: a stage may not change model.width"):
        load(path)
