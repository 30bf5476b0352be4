"""Renamed keys: accepted with one warning until a version, afterwards one sentence."""

import warnings
from pathlib import Path

import pytest

from allometry.configs import renamed
from allometry.configs.errors import ConfigError, RenamedKeyWarning
from allometry.configs.ladder import LadderConfig, load_ladder
from allometry.configs.loader import _models_at, dump, load, presets
from allometry.configs.machine import HardwareConfig
from allometry.configs.renamed import RENAMED, Renamed, new_names
from allometry.configs.run import RunConfig
from allometry.configs.tree import TreeConfig
from allometry.configs.version import VERSION, release
from allometry.launch.cli import main
from allometry.laws.runs import _read_yaml
from allometry.trainer.state.branch import stored_config
from allometry.trainer.state.folder import RunFolder

DEMO = "preset:demo"
ROOTS = {"run": RunConfig, "ladder": LadderConfig, "tree": TreeConfig, "hardware": HardwareConfig}
TABLE = (
    Renamed("schedule.warm", "schedule.warmup_steps", "0.1.0", "9.0.0"),
    Renamed("data.sources.*.share", "data.sources.*.weight", "0.1.0", "9.0.0"),
    Renamed("learning.rate", "optimizer.lr", "0.1.0", "9.0.0"),
    Renamed("optimizer.gone", "optimizer.eps", "0.0.1", VERSION),
    Renamed("rungs", "widths", "0.1.0", "9.0.0", of="ladder"),
)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "RENAMED", TABLE)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_rows_of_the_table_name_keys_that_exist_and_keys_that_do_not() -> None:
    for row in RENAMED:
        assert release(row.since) < release(row.until)
        for name, exists in ((row.old, False), (row.new, True)):
            path = tuple(part for part in name.split(".") if part != "*")
            sections = _models_at(ROOTS[row.of], path[:-1])
            assert any(path[-1] in one.model_fields for one in sections) == exists, name


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("schedule.warm=7", "schedule.warmup_steps=7"),
        ("schedule={kind: cosine, warm: 7}", "schedule={kind: cosine, warmup_steps: 7}"),
        ("data.sources.1.share=0.125", "data.sources.1.weight=0.125"),
        ("learning.rate=2e-3", "optimizer.lr=2e-3"),
        ("learning={rate: 2e-3}", "optimizer.lr=2e-3"),
    ],
)
def test_an_override_by_the_old_name_sets_the_new_key(override: str, new: str) -> None:
    with pytest.warns(RenamedKeyWarning, match="is an error from version 9.0.0 on; write") as found:
        config = load(DEMO, [override])
    assert len(found) == 1
    assert f"override {override!r}: " in str(found[0].message)
    assert config == load(DEMO, [new])
    assert load(DEMO) != config
    assert new.partition("=")[0].split(".")[-1] + ":" in dump(config)


def test_a_file_over_a_preset_gives_its_line_and_is_recorded_by_the_new_name(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, f"base: {DEMO}\nschedule:\n  warm: 7\n")
    with pytest.warns(RenamedKeyWarning, match=rf"{path}:3: schedule.warm was renamed in version"):
        config = load(path)
    assert config.schedule.warmup_steps == 7
    assert "warm: 7" not in dump(config)


def test_an_error_in_the_value_is_at_the_place_of_the_old_name(tmp_path: Path) -> None:
    path = written(tmp_path, f"base: {DEMO}\nschedule:\n  warm: many\n")
    with (
        pytest.warns(RenamedKeyWarning),
        pytest.raises(ConfigError, match=rf"{path}:3: schedule.warmup_steps='many'"),
    ):
        load(path)


def test_both_names_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"base: {DEMO}\nschedule:\n  warm: 7\n  warmup_steps: 8\n")
    with (
        pytest.warns(RenamedKeyWarning),
        pytest.raises(ConfigError, match=r"given as well; remove schedule\.warm$"),
    ):
        load(path)


def test_a_removed_name_is_one_sentence_with_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "optimizer.gone was renamed in version 0.0.1; write optimizer.eps"
    path = written(tmp_path, f"base: {DEMO}\noptimizer: {{gone: 1e-8}}\n")
    with pytest.raises(ConfigError, match=rf"{path}:2: {said}"):
        load(path)
    with pytest.raises(SystemExit) as end:
        main(["train", DEMO, "optimizer.gone=1", "--print-config"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"allometry: override 'optimizer.gone=1': {said}\n"


def test_stages_and_the_changes_of_a_branch_use_the_same_table() -> None:
    stages = "stages=[{name: all, steps: 9, %s: {%s: 3}}]"
    with pytest.warns(RenamedKeyWarning, match=r"stages\.0\.learning\.rate"):
        config = load(DEMO, ["training.total_steps=null", stages % ("learning", "rate")])
    assert config.stages is not None
    assert config.stages[0].optimizer == {"lr": 3}
    parent = "run.parent={folder: other, step: 4, changes: [learning.rate]}"
    with pytest.warns(RenamedKeyWarning, match=r"learning\.rate"):
        branch = load(DEMO, [parent])
    assert branch.run.parent is not None
    assert branch.run.parent.changes == ("optimizer.lr",)


def test_a_ladder_has_keys_of_its_own(tmp_path: Path) -> None:
    text = f"kind: ladder\nbase: {DEMO}\nfolder: out\nrungs: [32, 64]\ntokens: [1e5]\n"
    with pytest.warns(RenamedKeyWarning, match=r":4: rungs was renamed"):
        ladder, tree = load_ladder(written(tmp_path, text))
    assert ladder.widths == (32, 64)
    assert tree.where(("widths",)).endswith(":4")


def test_files_that_a_run_wrote_are_read_for_good_and_without_a_warning(tmp_path: Path) -> None:
    """The run of an old version continues, and its record is read by laws and reports."""
    now = dump(load(DEMO))
    assert "  eps: " in now
    old = now.replace("  eps: ", "  gone: ").replace("  warmup_steps: ", "  warm: ")
    path = written(tmp_path, old, "config.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored_config(RunFolder(str(tmp_path))) == load(DEMO)
        assert "eps" in _read_yaml(path)["optimizer"]
    with pytest.warns(RenamedKeyWarning), pytest.raises(ConfigError):  # as a user's own file
        load(path)


def test_kernels_in_the_record_of_an_old_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "RENAMED", RENAMED)
    was = {"norm": {"name": "torch"}, "quantise": {"name": "triton"}}
    assert new_names(was, "kernels")["quantize"] == {"name": "triton"}
    assert new_names(was, "kernels")["norm"] == {"name": "torch"}


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_the_command_line_prints_one_warning_per_key_on_the_main_rank(
    rank: str,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RANK", rank)
    path = written(tmp_path, f"base: {DEMO}\nschedule: {{warm: 7}}\n")
    with pytest.raises(SystemExit) as end:
        main(["train", str(path), "schedule.warm=8", "--print-config"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert "warmup_steps: 8" in out
    assert len(err.splitlines()) == lines
    assert all(line.startswith("allometry: warning: ") for line in err.splitlines())


def test_presets_have_the_present_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "RENAMED", RENAMED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RenamedKeyWarning)
        assert all(load(f"preset:{name}") for name in presets())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"allometry {VERSION}\n"
