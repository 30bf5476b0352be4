"""Strictness of the config loader: every error reports the file, the key and the fix."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import ConfigError, UserError
from allometry.configs.ladder import LadderConfig, load_ladder
from allometry.configs.loader import _form, _sections, dump, load, presets
from allometry.configs.run import RunConfig

PRESET = "preset:dense_25m"


def message(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_dump(name: str, tmp_path: Path) -> None:
    config = load(f"preset:{name}")
    assert load(write(tmp_path, dump(config))) == config


def test_yaml_1_2_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"base: {PRESET}\noptimizer: {{lr: 3e-4}}\ntraining: {{total_tokens: 1e9}}"
    )
    config = load(path)
    assert config.optimizer.lr == 3e-4
    assert config.training.total_tokens == 1_000_000_000


@pytest.mark.parametrize(
    "override", ["parallel.hdp=1e308", "model.num_layers=2147483648", "training.total_tokens=1e30"]
)
def test_numbers_beyond_sense_are_refused_shortly(override: str) -> None:
    """Refused before the plan, whose loops over so many layers would never end."""
    text = message(PRESET, override)
    assert override.partition("=")[0] in text
    assert len(text) < 300


def test_unknown_key_names_file_line_key_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, f"base: {PRESET}\nmodel:\n  num_layer: 3\n")
    text = message(path)
    assert f"{path}:3" in text
    assert "model.num_layer " in text
    assert "'num_layers'" in text


def test_key_of_another_section_is_pointed_to() -> None:
    assert "optimizer.lr" in message(PRESET, "lr=3")


def test_duplicate_key_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  width: 3\n  width: 4\n")
    text = message(path)
    assert f"{path}:3" in text
    assert "'width' stands twice" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=-1", "greater than 0"),
        ("schedule.kind=cosin", "'cosine'"),
        ("data.sources.0.weight=-1", "greater than or equal to 0"),
        ("data.sources.5.weight=1", "items 0 to 1"),
        ("model.num_heads=7", "must divide width=384"),
        ("training.total_steps=5", "set the other to null"),
        ("model.vocab_size=true", "whole number"),
        ("batch.sequences=1.5", "integer"),
        ("batch.sequences=30", "micro_batch_sequences=4 must divide"),
        ("run.folder.x=3", "no key 'x'"),
        ("run.resume=maybe", "run.resume='maybe'"),
        ("optimizer.lr=.nan", "finite"),
        ("optimizer.lr", "section.key=value"),
    ],
)
def test_bad_override_says_what_is_wrong(override: str, said: str) -> None:
    text = message(PRESET, override)
    assert said in text
    assert override.split("=")[0].split(".")[-1] in text


MSSP_KEYS = ("base_width", "regime", "base_experts", "base_experts_per_token", "base_expert_width")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "parameterization={kind: hyperp}",
            ": parameterization lacks base_width, base_layers; add them",
        ),
        (
            "parameterization={kind: mssp}",
            f": parameterization lacks {', '.join(MSSP_KEYS)}; add them",
        ),
        ("parameterization={kind: mup}", ": parameterization.base_width is missing; add it"),
        (
            "parameterization={kind: hyperp, embedding_std: 0}",
            ": parameterization.embedding_std=0 is not valid: "
            "input should be greater than 0 (2 more)",
        ),
    ],
)
def test_all_keys_that_a_section_lacks_are_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("preset:demo", [override])
    assert str(error.value) == f"override {override!r}{said}"


def test_an_empty_list_says_what_to_name() -> None:
    with pytest.raises(
        ConfigError, match=r"data.sources is empty: name at least one source; write it as"
    ):
        load("preset:demo", ["data.sources=[]"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.states.rounding=stochastic", "states.kind is missing; add one of fp32, fp8"),
        ("parallel.zero.optimizer_states.device=20GiB", 'device=0.5, or as .*device="20 GiB"'),
        ("parallel.zero.optimizer_states.nvme=''", "nvme is empty; give it a value or leave it"),
        ("precision.roles=[router]", r"write it as precision.roles=\[hidden, expert_up\]"),
    ],
)
def test_the_remedy_is_of_the_value_s_own_kind(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load("preset:demo", [override])


def test_keys_that_another_section_lacks_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"lacks base_width, base_layers; add them \(1 more\)$"):
        load("preset:demo", ["parameterization={kind: hyperp}", "optimizer={kind: muonh}"])


def test_override_changes_one_key() -> None:
    config = load(PRESET, ["optimizer.lr=1e-3", "--data.sources.1.weight=0.5"])
    assert config.optimizer.lr == 1e-3
    assert [s.weight for s in config.data.sources] == [0.8, 0.5]
    assert config.model == load(PRESET).model


def test_changing_the_kind_keeps_only_shared_keys() -> None:
    config = load(PRESET, ["schedule.kind=cosine"])
    assert config.schedule.kind == "cosine"
    assert config.schedule.warmup_steps == 200


DOCUMENTS = (
    "data.kind=documents",
    "data.max_document_tokens=4096",
    "batch.micro_batch_sequences=1",
)


def test_data_are_sequences_unless_their_kind_is_said(tmp_path: Path) -> None:
    data = load(PRESET).data
    assert isinstance(data, SequenceData)
    tree = YAML(typ="safe").load(presets()["dense_25m"])
    del tree["data"]["kind"]
    path = tmp_path / "run.yaml"
    YAML().dump(tree, path)
    assert load(path).data == data
    # Locations and similar keys are found as if ``kind`` were given.
    tree["data"]["sequence_lenght"] = tree["data"].pop("sequence_length")
    YAML().dump(tree, path)
    text = message(path)
    assert f"{path}:{path.read_text().split('sequence_lenght')[0].count(chr(10)) + 1}" in text
    assert "data.sequence_lenght is not a known key; did you mean 'sequence_length'?" in text


def test_whole_documents(tmp_path: Path) -> None:
    config = load(PRESET, DOCUMENTS)
    assert isinstance(config.data, DocumentData)
    assert config.data.max_document_tokens == 4096
    assert config.data.sources == load(PRESET).data.sources
    assert load(write(tmp_path, dump(config))) == config
    assert next(iter(config.data.model_dump())) == "kind"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.kind=document",), "data.kind=document is not known; use one of 'sequences', 'doc"),
        (("data.max_document_tokens=9",), "goes with data.kind=documents"),
        ((*DOCUMENTS, "data.packing=concatenated"), "goes with data.kind=sequences"),
        ((*DOCUMENTS, "data.max_document_tokens=0"), "greater than 0"),
        ((*DOCUMENTS, "data.sources=[]"), "data.sources=[]"),
        (("data.kind=documents",), "data.max_document_tokens is missing; add it"),
        (DOCUMENTS[:2], "set batch.micro_batch_sequences: 1"),
        ((*DOCUMENTS, "data.max_document_tokens=1e6"), "raise batch.sequences or lower data.max"),
        (
            (*DOCUMENTS, "batch.ramp={start_sequences: 4, increment_sequences: 4, over_tokens: 9}"),
            "batch.ramp.start_sequences=4 of data.sequence_length=512",
        ),
    ],
)
def test_documents_that_cannot_be_trained_on(overrides: tuple[str, ...], said: str) -> None:
    assert said in message(PRESET, *overrides)


def test_base_merges_sections_and_replaces_kinds(tmp_path: Path) -> None:
    write(tmp_path, f"base: {PRESET}\nmodel: {{width: 192}}\n", "below.yaml")
    path = write(tmp_path, "base: below.yaml\nschedule: {kind: linear, warmup_tokens: 1e6}\n")
    config = load(path)
    assert config.model.width == 192
    assert config.model.num_layers == 8
    assert config.schedule.kind == "linear"
    assert config.schedule.warmup_steps is None


def test_bases_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "circle" in message(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "nothing"), ("# a remark\n", "nothing"), ("- 1\n", "a list"), ("3\n", "a single value")],
)
def test_files_that_hold_no_sections(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    assert message(path) == f"{path}: expected 'section: ...' lines, found {said}"
    with pytest.raises(ConfigError, match=f"found {said}$"):
        load_ladder(path)


def test_missing_files_and_presets(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "no.yaml")
    assert "dense_25m" in message("preset:nothing")


def test_contradictions_between_sections() -> None:
    text = message(
        PRESET,
        "parameterization.kind=mup",
        "parameterization.base_width=64",
        "model.tied_embeddings=true",
    )
    assert "tied_embeddings" in text
    assert "mup" in text


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(PRESET).run.seed = 3  # type: ignore[misc]


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    from allometry.configs.loader import _sections

    found = {model}
    for field in model.model_fields.values():
        for inner in _sections(field.annotation):
            found |= sections(inner)
    return found


def test_every_field_is_described() -> None:
    bare = [
        f"{section.__name__}.{name}"
        for section in sections(RunConfig) - {RunConfig}
        for name, field in section.model_fields.items()
        if not field.description and name != "kind"
    ]
    assert not bare


def test_a_config_error_is_a_user_error() -> None:
    assert issubclass(ConfigError, UserError)
    assert issubclass(UserError, ValueError)


def test_a_kind_over_another_says_what_went_with_it(tmp_path: Path) -> None:
    """A file over its base loses all keys; an override loses those that the new kind lacks."""
    text = message(write(tmp_path, f"base: {PRESET}\nmodel: {{kind: moe, width: 64}}\n"))
    assert "model lacks vocab_size, num_layers, num_heads, experts; add them; " in text
    lost = "vocab_size, num_layers, num_heads, ffn_width"
    assert text.endswith(f"; model.kind=moe replaced another kind and its {lost}")
    text = message("preset:moe_demo", "model.kind=dense", "model.ffn_width=-1")
    assert "; model.kind=dense replaced another kind and its " in text
    assert "experts" in text.rpartition(" its ")[2]
    # An error in another section is reported without this one.
    assert "replaced" not in message(PRESET, "schedule.kind=cosine", "model.width=a")


def test_every_list_shows_its_form() -> None:
    """No list of a config is described in pydantic's words for tuples."""
    for root, whole in ((RunConfig, RUN_LISTS), (LadderConfig, LADDER_LISTS)):
        assert {".".join(path) for path in lists(root, ())} >= whole
        for path in lists(root, ()):
            assert re.match(rf"; write it as {'.'.join(path)}=\[[^]]", _form(path, root))


RUN_LISTS = {
    "data.sources",
    "checkpoint.keep_steps",
    "parallel.pipeline.split",
    "schedule.decay_ends_steps",
    "schedule.decay_ends_tokens",
}
LADDER_LISTS = {
    *("widths", "sizes", "tokens", "tokens_per_parameter", "seeds", "schedules"),
    *("isoflop.flops", "isoflop.sizes", "launch.options"),
}


def lists(root: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the paths of lists in a config, outside items of lists."""
    for key, field in root.model_fields.items():
        if "tuple[" in str(field.annotation):
            yield (*path, key)
            continue
        for section in _sections(field.annotation):
            yield from lists(section, (*path, key))


def test_a_mapping_shows_its_form(tmp_path: Path) -> None:
    for key, form in (("fix", "fix={name: 0.5}"), ("set", "set={name: 1}")):
        path = tmp_path / "ladder.yaml"
        path.write_text(f"kind: ladder\nbase: x.yaml\nfolder: x\n{key}: E=0\n")
        with pytest.raises(ConfigError) as caught:
            load_ladder(path)
        assert f"; write it as {form}" in str(caught.value)


def test_a_list_shows_the_form_of_its_items() -> None:
    for change, form in (
        ("checkpoint.keep_steps=5", "checkpoint.keep_steps=[1, 2]"),
        ("checkpoint.keep_steps=[a]", "checkpoint.keep_steps=[1, 2]"),
        ("data.sources=store/x", "data.sources=[{name: ..., train: ...}, ...]"),
        ("data.sources=[a]", "data.sources=[{name: ..., train: ...}, ...]"),
        ("parallel.pipeline.split=[a]", "parallel.pipeline.split=[1, 2]"),
    ):
        text = message(PRESET, change)
        assert f"; write it as {form}" in text
        assert "tuple" not in text
    assert "write it" not in message(PRESET, "data.sources.0.nme=3")
