"""Mixtures that change during a run, resumes and layouts: the exact samples that a run reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import BatchConfig, SequenceData
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.order import DocumentOrder
from allometry.data.store import TokenStore
from allometry.data.stream import Stream
from allometry.data.synthetic import write_store
from allometry.launch.runs.dry_run import planned as planned_run
from allometry.scaling.batch import BatchPlan
from allometry.trainer.feed import sequence_steps
from allometry.trainer.state import checkpoint
from allometry.trainer.train import train
from plain_mixture import plain_samples
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
NAMES = ("a", "b", "c")
LENGTH, WINDOWS, SEED = 4, 30, 11
BATCH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return sources whose tokens are their positions, so that a first token
    identifies a window."""
    made = tmp_path_factory.mktemp("stores")
    for number, name in enumerate(NAMES):
        first = 1 + number * WINDOWS * LENGTH
        tokens = np.arange(first, first + WINDOWS * LENGTH)
        write_store(made / name, np.split(tokens, np.arange(6, len(tokens), 6)))
    return made


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sources with weights, one of them possibly replayed at a changing ratio."""
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=3, max_size=3))
    weights[draw(st.integers(0, 1))] = 1.0  # at least one source
    data: dict[str, Any] = {"weights": dict(zip(NAMES, weights, strict=True)), "replay": None}
    if draw(st.booleans()):
        data["weights"] = {"a": 1.0, "b": 3.0, "c": 1.0}
        after = st.integers(1, 400)
        change = {"after_tokens": draw(after), "ratio": 0.9, "over_tokens": draw(after)}
        data["replay"] = {"ratio": draw(st.floats(0, 1)), "sources": ["c"], "changes": [change]}
    return data


def description(folder: Path, mixture: dict[str, Any]) -> SequenceData:
    sources = [
        {"name": name, "train": str(folder / name), "weight": weight}
        for name, weight in mixture["weights"].items()
    ]
    return SequenceData.model_validate(
        {"sequence_length": LENGTH, "sources": sources, "replay": mixture["replay"]}
    )


def consumed(stream: Stream, first: int, last: int, ranks: int, micro: int) -> Counter[int]:
    """Return the first tokens of the samples of all ranks' feeds in steps ``first`` to ``last``."""
    batch = BatchPlan(BatchConfig(sequences=BATCH, micro_batch_sequences=micro), LENGTH)
    plan = SimpleNamespace(
        batch=batch,
        micro_batch_sequences=micro,
        total_steps=last,
        micro_batches=lambda step: BATCH // (ranks * micro),
    )
    seen: Counter[int] = Counter()
    for rank in range(ranks):
        mesh = SimpleNamespace(hdp=SimpleNamespace(size=ranks, rank=rank), device=CPU)
        for step in sequence_steps(stream, plan, mesh, first - 1):  # type: ignore[arg-type]
            for given_batch in step.batches:
                seen.update(given_batch.tokens_BL[:, 0].tolist())
    return seen


def planned(folder: Path, followed: list[tuple[int, dict[str, float]]], total: int) -> Counter[int]:
    """Return the same from the definitions alone."""
    seen: Counter[int] = Counter()
    lines = {name: DocumentOrder(TokenStore(folder / name), name, SEED) for name in NAMES}
    for name, number in plain_samples(followed, NAMES, total):
        window = np.empty(1, np.int64)
        lines[name].read(lines[name].window(number, LENGTH) * LENGTH, window)
        seen[int(window[0])] += 1
    return seen


LAUNCHES = st.lists(
    st.tuples(
        mixtures(),
        st.integers(1, 5),  # steps before it ends
        st.integers(0, 4),  # of which some came after its last checkpoint, and are lost
        st.sampled_from([(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (12, 1)]),
        st.booleans(),  # whether the file was edited before it
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40)
@given(LAUNCHES)
def test_what_a_run_consumes_is_what_was_declared(folder: Path, launches: list[Any]) -> None:
    """Under edits, kills, resumes and changes of world size, sample by sample."""
    seen: Counter[int] = Counter()
    followed: list[tuple[int, dict[str, float]]] = []
    mixture, state, done = launches[0][0], None, 0
    for wanted, steps, lost, (ranks, micro), edited in launches:
        mixture = wanted if edited else mixture
        stream = Stream(description(folder, mixture), SEED)
        fresh = [(c.position, dict(c.shares)) for c in stream.mixture.changes]
        position = done * BATCH
        # By hand: the mixture in force up to here, then the file's own.
        begun = [shares for at, shares in fresh if at <= position][-1]
        followed = [c for c in followed if c[0] < position]
        followed += [(position, begun)] if not followed or followed[-1][1] != begun else []
        followed += [c for c in fresh if c[0] > position]
        if state is not None:
            stream = stream.resumed(json.loads(json.dumps(state)), position)
        kept = max(0, steps - lost)
        consumed_here = consumed(stream, done + 1, done + steps, ranks, micro)
        assert consumed_here.total() == steps * BATCH
        if kept:
            seen += consumed(stream, done + 1, done + kept, ranks, micro)
            done += kept
            state = stream.state(done * BATCH)
        elif state is None:
            state = stream.state(0)
    total = done * BATCH
    assert seen == planned(folder, followed, total)
    # No window repeats before its source is exhausted, and the ledger counts the epochs.
    for number, name in enumerate(NAMES):
        mine = [n for token, n in seen.items() if (token - 1) // (WINDOWS * LENGTH) == number]
        read = sum(mine)
        assert state is not None
        account = state["ledger"][name] if done else {"samples": 0, "epochs": 0, "tokens": 0}
        assert account["samples"] == read
        assert account["tokens"] == read * LENGTH
        assert account["epochs"] == read / WINDOWS


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=CPU, callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


def replay(ratio: float, *changes: dict[str, float]) -> str:
    return f"data.replay={json.dumps({'ratio': ratio, 'sources': ['down'], 'changes': changes})}"


FEW = ("training.total_steps=8", "checkpoint.every_steps=2", "evaluation.every_steps=2")


@pytest.mark.usefixtures("one_thread")
def test_an_edited_file_is_the_mixture_that_was_declared(tiny: Make, tmp_path: Path) -> None:
    """Bitwise equal: an edit at a step, and the change declared there from the start."""
    change = {"after_tokens": 4 * 8 * 32, "ratio": 0.9}
    whole = run(tiny(*FEW, replay(0.25, change), folder=tmp_path / "whole"))
    edited = tmp_path / "edited"
    run(tiny(*FEW, replay(0.25), folder=edited), stop=4)
    foreseen = planned_run(tiny(*FEW, replay(0.9), folder=edited), 1).facts["data"]["sources"]
    run(tiny(*FEW, replay(0.9), "batch.micro_batch_sequences=8", folder=edited), stop=6)
    run(tiny(*FEW, replay(0.9), folder=edited))
    keys = ("tokens/down", "unique_tokens/up", "epochs/down")
    for one, other in zip(rows(whole), rows(edited), strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)  # other micro-batches
    assert rows(whole)[3]["loss"] == rows(edited)[3]["loss"]
    (said,) = [event for event in events(edited) if event["event"] == "mixture_changed"]
    assert (said["step"], said["position"]) == (4, 32)
    assert said["before"] == pytest.approx({"up": 0.75, "down": 0.25})
    assert said["after"] == pytest.approx({"up": 0.1, "down": 0.9})
    assert said["tokens"] == {"up": 24 * 32, "down": 8 * 32}
    facts = checkpoint.read_facts(edited / "checkpoints" / "step-8")
    assert facts["reading"]["ledger"]["down"]["tokens"] == rows(edited)[-1]["tokens/down"]
    for name, account in foreseen.items():  # the dry run reads the folder's ledger
        assert account == facts["reading"]["ledger"][name]
    assert rows(edited)[-1]["tokens/down"] == pytest.approx((8 + 32 * 0.9) * 32, abs=32)
    described = json.loads((edited / "run.json").read_text())["data"]
    assert [change["position"] for change in described["mixture"]] == [0, 32]


@pytest.mark.usefixtures("one_thread")
def test_forgetting_is_the_loss_against_the_start(tiny: Make) -> None:
    config = tiny(*FEW, replay(0.0))
    folder = run(config, stop=4)
    run(config)
    (before,) = [event for event in events(folder) if event["event"] == "held_out_before"]
    assert before["step"] == 0
    assert before["losses"]["down"] == pytest.approx(np.log(64), abs=0.5)
    found = [row for row in rows(folder) if "forgetting/down" in row]
    assert [row["step"] for row in found] == [2, 4, 6, 8]
    for row in found:
        assert row["forgetting/down"] == row["validation/down"] - before["losses"]["down"]
        assert "forgetting/up" not in row
        assert row["tokens/down"] == 0
        assert "loss/down" not in row
    # The measured losses belong to the weights before the first step.
    assert rows(folder)[0]["loss"] == pytest.approx(before["losses"]["up"], abs=0.2)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sources.0.max_epochs=0.1"], "data source 'up' runs dry after"),
        (["data.sources.0.weight=0.5"], "sum to 0.8 and not to 1"),
        (["data.continue_sources=true"], "no run is known"),
        ([replay(0.2, {"after_tokens": 6000, "ratio": 0.5})], "after_tokens=6000 is past the end"),
        ([replay(0.2, {"after_tokens": 60, "ratio": 1.5})], "ratio=1.5 is not valid"),
        ([replay(-0.2)], "ratio=-0.2"),
    ],
)
def test_bad_mixtures_are_one_sentence_and_leave_nothing(
    tiny: Make, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(tiny(*overrides))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_thread")
def test_an_edit_that_runs_dry_leaves_the_run_as_it_was(tiny: Make) -> None:
    folder = run(tiny(*FEW), stop=4)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="'up' runs dry after 1"):
        run(tiny(*FEW, "data.sources.0.max_epochs=0.1", "data.sources.0.weight=7"))
    after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {p: b for p, b in after.items() if p.name != "run.lock"} == {
        p: b for p, b in before.items() if p.name != "run.lock"
    }
    run(tiny(*FEW))
    assert rows(folder)[-1]["step"] == 8
