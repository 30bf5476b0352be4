"""Runs in stages: bits of a single run, resumes at any step, rates, samples and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.convert import export_hf
from allometry.launch.figures.branches import stages_begin
from allometry.launch.runs.dry_run import planned
from allometry.laws.runs import read_run
from allometry.trainer.state import checkpoint
from allometry.trainer.state.status import status_of
from allometry.trainer.train import train
from run_folders import events, rows
from shell import Shell

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
TIMES = {"time_s", "tokens_per_s", "mfu", "peak_bytes", "stage"}
STAGED = ("training.total_steps=null", "schedule={kind: constant}", "evaluation.every_steps=4")
LONG = {"data": {"sequence_length": 64}, "batch": {"sequences": 4, "micro_batch_sequences": 1}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stages(*given: dict[str, Any]) -> str:
    named = [{"name": f"s{number}"} | one for number, one in enumerate(given)]
    return f"stages={json.dumps(named)}"


def run(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=CPU, callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(folder / "checkpoints" / f"step-{step}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


THREE = stages(
    {"steps": 6},
    {"steps": 5, **LONG, "mixture": {"up": 1, "down": 1}, "model": {"rope_theta": 5e4}},
    {"steps": 5, "optimizer": {"lr": 3e-3}, "schedule": {"kind": "linear", "warmup_steps": 2}},
)


def test_stages_of_the_same_settings_are_one_run(tiny: Make, tmp_path: Path) -> None:
    """Bitwise equal, checkpoint and record, except for the stage's number."""
    plain = run(tiny("schedule={kind: constant}", "training.total_steps=12", folder=tmp_path / "p"))
    two = run(tiny(STAGED[0], STAGED[1], stages({"steps": 5}, {"steps": 7}), folder=tmp_path / "t"))
    without = [{k: v for k, v in row.items() if "/" not in k} for row in numbers(two)]
    assert without == [{k: v for k, v in row.items() if "/" not in k} for row in numbers(plain)]
    assert same(saved(two, 12), saved(plain, 12))
    assert [row["stage"] for row in rows(two)] == [1] * 5 + [2] * 7
    assert "stage" not in rows(plain)[0]


@pytest.mark.slow
def test_stages_are_the_schedule_that_was_continued_by_hand(tiny: Make, tmp_path: Path) -> None:
    """``schedule.kind: continued`` gives the same in one run: a warm-up from the last rate."""
    before = {"kind": "wsd", "warmup_steps": 2, "decay_fraction": 0.5, "final_fraction": 0.1}
    after = {"kind": "cosine", "warmup_steps": 3}
    schedule = {"kind": "continued", "before": before, "before_steps": 7, "after": after}
    by_hand = tiny(
        f"schedule={json.dumps(schedule)}", "training.total_steps=14", folder=tmp_path / "hand"
    )
    staged = tiny(
        STAGED[0],
        stages({"steps": 7, "schedule": before}, {"steps": 7, "schedule": after}),
        folder=tmp_path / "staged",
    )
    hand, made = run(by_hand), run(staged)
    assert [row["lr"] for row in rows(hand)] == [row["lr"] for row in rows(made)]
    assert [row["loss"] for row in rows(hand)] == [row["loss"] for row in rows(made)]
    assert same(saved(hand, 14), saved(made, 14))


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(made: dict[str, Path], tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of ``THREE`` in one launch, made once."""
    if not made:
        folder = tmp_path_factory.mktemp("whole") / "run"
        made["whole"] = run(tiny(*STAGED, THREE, "checkpoint.keep_steps=[11]", folder=folder))
    return made["whole"]


def kill(folder: Path, last: int) -> None:
    """Leave a run in the state after a kill: steps and rows after the checkpoint ``last``."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > last:
            shutil.rmtree(path)
    (folder / "latest").write_text(f"step-{last}\n")


def test_resumes_before_at_and_after_boundaries_are_exact(
    tiny: Make, tmp_path: Path, whole: Path
) -> None:
    """Stopped in a stage and at boundaries; killed after each, resumed from its checkpoint."""
    cut = tmp_path / "cut"
    for stop, back in ((5, 5), (6, 6), (8, 6), (11, 11), (13, 11)):
        run(tiny(*STAGED, THREE, folder=cut), stop=stop)
        assert rows(cut)[-1]["step"] == stop
        kill(cut, back)
    run(tiny(*STAGED, THREE, folder=cut))
    assert numbers(cut) == numbers(whole)
    assert same(saved(cut, 16), saved(whole, 16))


def test_what_a_boundary_says(whole: Path) -> None:
    folder = whole
    said = [event for event in events(folder) if event["event"] == "stage"]
    assert [(one["name"], one["step"], one["last_step"]) for one in said] == [
        ("s0", 0, 6),
        ("s1", 6, 11),
        ("s2", 11, 16),
    ]
    assert said[1]["tokens_before"] == 6 * 256
    assert said[1]["changes"]["data.sequence_length"] == [32, 64]
    assert said[1]["changes"]["model.rope_theta"] == [1e4, 5e4]
    assert said[2]["changes"]["optimizer.lr"] == [1e-2, 3e-3]
    kinds = [event["event"] for event in events(folder)]
    assert kinds.count("finished") == kinds.count("started") == 1
    assert "mixture_changed" not in kinds
    last = rows(folder)[-1]
    assert last["tokens"] == last["tokens/up"] + last["tokens/down"] == 16 * 256
    record = json.loads((folder / "run.json").read_text())
    assert record["plan"]["total_steps"] == 16
    assert record["plan"]["total_tokens"] == 16 * 256
    assert [launch["first_step"] for launch in record["launches"]] == [1, 7, 12]
    validated = [row["step"] for row in rows(folder) if "validation/up" in row]
    assert validated == [4, 6, 8, 11, 12, 16]


def test_a_stage_may_begin_with_new_states(tiny: Make) -> None:
    second = {"steps": 2, "keep": ["weights", "data"]}
    folder = run(tiny(STAGED[0], STAGED[1], stages({"steps": 3}, second)))
    steps = {k: v for k, v in saved(folder, 5).items() if k.endswith(".step")}
    assert steps
    assert all(float(value) == 2 for value in steps.values())
    moved = saved(folder, 3)["model.head.weight"]
    assert not torch.equal(moved, saved(folder, 5)["model.head.weight"])
    # A resume within the stage keeps them.
    again = run(tiny(STAGED[0], STAGED[1], stages({"steps": 3}, second | {"steps": 4})))
    assert all(float(v) == 4 for k, v in saved(again, 7).items() if k.endswith(".step"))


@pytest.mark.slow
def test_whole_documents_of_another_length(tiny: Make, tmp_path: Path) -> None:
    """Longer pieces in a second stage: the ledger adds up, and a resume is exact."""
    documents = "data={kind: documents, sequence_length: 64, max_document_tokens: 20}"
    sources = tiny().data.model_dump(mode="json")["sources"]
    given = (
        STAGED[0],
        STAGED[1],
        f"{documents[:-1]}, sources: {json.dumps(sources)}}}",
        "batch={sequences: 4, micro_batch_sequences: 1}",
        "parallel.context.capacity_tokens=64",
        stages({"steps": 3}, {"steps": 3, "data": {"max_document_tokens": 60}}),
    )
    one = run(tiny(*given, folder=tmp_path / "one"))
    run(tiny(*given, folder=tmp_path / "two"), stop=4)
    two = run(tiny(*given, folder=tmp_path / "two"))
    assert numbers(one) == numbers(two)
    last = rows(one)[-1]
    assert last["tokens"] == last["tokens/up"] + last["tokens/down"]
    assert last["unique_tokens/up"] == last["tokens/up"]


EDITS = [
    ({"steps": 4}, {"steps": 4}, "would have ended at 4"),
    ({"steps": 9}, {"steps": 4}, "would have ended at 9"),
    ({"steps": 6, "mixture": {"up": 1}}, {"steps": 4}, "stage s0: data.sources.down.weight=0.0"),
    ({"steps": 6, "data": {"sequence_length": 16}}, {"steps": 4}, "stage s0: data.sequence_length"),
    ({"steps": 6}, {"steps": 4, "optimizer": {"lr": 1.0}}, "stage s1: optimizer.lr=1.0"),
    ({"steps": 6}, {"steps": 4, "schedule": {"kind": "linear"}}, "step 7, already taken"),
]


def test_only_what_lies_ahead_may_be_edited(tiny: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = (STAGED[0], STAGED[1])
    run(tiny(*short, stages({"steps": 6}, {"steps": 4})), stop=7)
    for first, second, said in EDITS:
        with pytest.raises(UserError, match=said) as caught:
            run(tiny(*short, stages(first, second)))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="taken in stage s1, which now is gone"):
        run(tiny(*short, stages({"steps": 6})))
    with pytest.raises(UserError, match="which now would have ended at 20"):
        run(tiny("schedule={kind: constant}"))
    # The current stage may change its length and mixture; stages may be added after it.
    second = {"steps": 3, "mixture": {"up": 1, "down": 3}}
    run(tiny(*short, stages({"steps": 6}, second, {"steps": 2, **LONG})))
    assert [row["stage"] for row in rows(folder)] == [1] * 6 + [2] * 3 + [3] * 2
    said = [event for event in events(folder) if event["event"] == "mixture_changed"]
    assert [one["step"] for one in said] == [7]


@pytest.mark.slow
def test_a_run_without_stages_gets_some(tiny: Make, tmp_path: Path) -> None:
    """Its only stage ends at the current step, as if it had been declared so."""
    folder = run(tiny("schedule={kind: constant}", folder=tmp_path / "a"), stop=6)
    three = tiny(*STAGED, THREE, folder=tmp_path / "a")
    run(three)
    facts = checkpoint.read_facts(folder / "checkpoints" / "step-16")
    assert facts["tokens"] == 16 * 256
    assert [row.get("stage") for row in rows(folder)] == [None] * 6 + [2] * 5 + [3] * 5


def test_the_plan_and_bad_stages(tiny: Make, whole: Path) -> None:
    report = planned(load(whole / "config.yaml"), 1)
    assert report.facts["total_steps"] == 16
    assert [stage["name"] for stage in report.facts["stages"]] == ["s0", "s1", "s2"]
    assert "stage s1" in report.text
    ledger = checkpoint.read_facts(whole / "checkpoints" / "step-16")["reading"]["ledger"]
    assert report.facts["data"]["sources"] == ledger
    changes = [{"after_tokens": 3000, "ratio": 0.5}]
    replay = {"ratio": 0.2, "sources": ["down"], "changes": changes}
    for bad, said in (
        ({"steps": 3, "schedule": {"kind": "linear", "warmup_steps": 4}}, "stage s1: its warm-up"),
        ({"steps": 3, "batch": {"sequences": 5, "micro_batch_sequences": 1}}, None),
        ({"steps": 3, "data": {"replay": replay}}, "past the end of stage s1"),
        ({"steps": 10**6, "tokens": None}, None),
    ):
        config = tiny(*STAGED, "data.sources.0.max_epochs=9", stages({"steps": 3}, bad))
        if said is not None:
            with pytest.raises(UserError, match=said):
                planned(config, 1)
            assert not Path(config.run.folder).exists()
    with pytest.raises(UserError, match="'up' runs dry after"):
        planned(config, 1)


def test_what_is_made_of_a_run_knows_its_stages(
    tiny: Make, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, theta, longest in ((11, 5e4, 64), (16, 1e4, 32)):
        out = tmp_path / f"hf-{step}"
        export_hf(whole, out, step=step)
        exported = json.loads((out / "config.json").read_text())
        assert exported["rope_theta"] == theta
        assert exported["max_position_embeddings"] == longest
    tokens, losses = stages_begin(read_run(whole), "tokens")
    assert tokens.tolist() == [7 * 256, 12 * 256]
    assert losses.tolist() == [rows(whole)[6]["loss"], rows(whole)[11]["loss"]]
    status = status_of(whole)
    assert (status.step, status.total_steps, status.state) == (16, 16, "ended")
    shell = Shell(capsys)
    config = whole / "config.yaml"
    assert "has stages, and this command looks at one" in shell.refusal("memory", config)
    shown = tmp_path / "stage.yaml"
    shown.write_text(shell("train", config, "--print-config", "--stage", "s1"))
    assert load(shown) == load(config).of_stages()[1]
    assert "s0, s1, s2" in shell.refusal("train", config, "--print-config", "--stage", "s3")
