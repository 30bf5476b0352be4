"""Tokens that a run in stages reads, under edits, kills, resumes and other world sizes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import BatchConfig, SequenceData
from allometry.data.changes import DataStage
from allometry.data.order import DocumentOrder
from allometry.data.store import TokenStore
from allometry.data.stream import Stream
from allometry.data.synthetic import write_store
from allometry.scaling.batch import BatchPlan
from allometry.trainer.feed import sequence_steps
from plain_lines import plain_windows
from plain_mixture import plain_samples

CPU = torch.device("cpu")
NAMES = ("a", "b")
TOKENS, SEED = 150, 11

Plan = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return sources in which every token is unique."""
    made = tmp_path_factory.mktemp("stores")
    for number, name in enumerate(NAMES):
        tokens = np.arange(1 + number * TOKENS, 1 + (number + 1) * TOKENS)
        write_store(made / name, np.split(tokens, np.arange(7, TOKENS, 7)))
    return made


STAGE = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 4),
        "batch": st.sampled_from([4, 8]),
        "length": st.sampled_from([3, 4, 8, 13]),
        "weights": st.sampled_from([(1.0, 0.0), (1.0, 1.0), (3.0, 1.0), (0.0, 1.0)]),
    }
)
LAUNCHES = st.lists(
    st.tuples(
        st.integers(1, 5),  # steps before it ends
        st.integers(0, 3),  # of which some came after its last checkpoint, and are lost
        st.sampled_from([(1, 4), (1, 1), (2, 2), (4, 1), (2, 1)]),
        st.none() | st.tuples(STAGE, st.lists(STAGE, max_size=2)),  # an edit of the file before it
    ),
    min_size=1,
    max_size=5,
)


def opened(folder: Path, plan: Plan) -> tuple[Stream, list[BatchPlan]]:
    stages: list[DataStage] = []
    batches: list[BatchPlan] = []
    done = position = 0
    for stage in plan:
        sources = [
            {"name": name, "train": str(folder / name), "weight": weight}
            for name, weight in zip(NAMES, stage["weights"], strict=True)
        ]
        data = SequenceData.model_validate({"sequence_length": stage["length"], "sources": sources})
        size = BatchConfig(sequences=stage["batch"], micro_batch_sequences=1)
        own = BatchPlan(size, stage["length"])
        batches.append(own.after(batches[-1], done) if batches else own)
        samples = stage["steps"] * stage["batch"]
        stages.append(DataStage(data, position, samples, str(len(stages))))
        done, position = done + stage["steps"], position + samples
    return Stream(stages[0].data, SEED, stages), batches


def consumed(
    stream: Stream, batches: list[BatchPlan], plan: Plan, first: int, last: int, layout: Any
) -> Counter[int]:
    """Return the tokens of all ranks' feeds in steps ``first`` to ``last``, stage by stage."""
    ranks, micro = layout
    seen: Counter[int] = Counter()
    begun = 0
    for number, (stage, batch) in enumerate(zip(plan, batches, strict=True)):
        end = begun + stage["steps"]
        start, stop = max(first, begun + 1), min(last, end)
        for rank in range(ranks if start <= stop else 0):
            mesh = SimpleNamespace(hdp=SimpleNamespace(size=ranks, rank=rank), device=CPU)
            made = SimpleNamespace(
                batch=batch,
                micro_batch_sequences=micro,
                total_steps=stop,
                micro_batches=lambda step, size=stage["batch"]: size // (ranks * micro),
            )
            staged = stream.in_stage(number)
            for step in sequence_steps(staged, made, mesh, start - 1):  # type: ignore[arg-type]
                for given_batch in step.batches:
                    seen.update(given_batch.tokens_BL.reshape(-1).tolist())
        begun = end
    return seen


def declared(folder: Path, taken: list[tuple[dict[str, Any], int]]) -> Counter[int]:
    """Return the same from the definitions; ``taken``: stages and the steps taken in them."""
    changes, position = [], 0
    for stage, steps in taken:
        total = sum(stage["weights"])
        shares = dict(zip(NAMES, (w / total for w in stage["weights"]), strict=True))
        if not changes or changes[-1][1:] != (shares, stage["length"]):
            changes.append((position, shares, stage["length"]))
        position += steps * stage["batch"]
    samples = plain_samples([change[:2] for change in changes], NAMES, position)
    seen: Counter[int] = Counter()
    for name in NAMES:
        order = DocumentOrder(TokenStore(folder / name), name, SEED)
        parts: list[tuple[int, int]] = []
        ends = [*(at for at, _, _ in changes[1:]), position]
        for (begin, _, length), end in zip(changes, ends, strict=True):
            count = sum(source == name for source, _ in samples[begin:end])
            if parts and parts[-1][1] == length:
                parts[-1] = (parts[-1][0] + count, length)
            elif count:
                parts.append((count, length))
        for places in plain_windows(f"{SEED}:{name}", TOKENS, parts, epochs=40):
            for place in places:
                token = np.empty(1, np.int64)
                order.read(place, token)
                seen[int(token[0])] += 1
    return seen


@settings(max_examples=20)
@given(st.lists(STAGE, min_size=1, max_size=4), LAUNCHES)
def test_what_a_run_in_stages_consumes_is_what_was_declared(
    folder: Path, plan: Plan, launches: list[Any]
) -> None:
    """Token by token; an edit keeps the past, and its stage's length and batch."""
    seen: Counter[int] = Counter()
    taken: list[tuple[dict[str, Any], int]] = []
    state, done = None, 0
    for steps, lost, layout, edit in launches:
        ends = np.cumsum([stage["steps"] for stage in plan]).tolist()
        if edit is not None and done < ends[-1]:
            now = next(k for k, end in enumerate(ends) if done < end)
            here = done - (ends[now] - plan[now]["steps"])
            kept = {key: plan[now][key] for key in ("batch", "length")} if here else {}
            current = edit[0] | kept | {"steps": here + edit[0]["steps"]}
            plan = [*plan[:now], current, *edit[1]]
            ends = np.cumsum([stage["steps"] for stage in plan]).tolist()
        stop = min(done + steps, ends[-1])
        safe = max(done, stop - lost)
        stream, batches = opened(folder, plan)
        if state is not None:
            position = batches[-1].sequences_before(done + 1)
            stream = stream.resumed(json.loads(json.dumps(state)), position)
        consumed(stream, batches, plan, done + 1, stop, layout)
        seen += consumed(stream, batches, plan, done + 1, safe, layout)
        for step in range(done + 1, safe + 1):
            taken.append((plan[next(k for k, end in enumerate(ends) if step <= end)], 1))
        done = safe
        state = stream.state(batches[-1].sequences_before(done + 1))
        for name, account in state["ledger"].items():
            first = 1 + NAMES.index(name) * TOKENS
            mine = [n for token, n in seen.items() if first <= token < first + TOKENS]
            assert account["tokens"] == sum(mine)
            assert account["unique_tokens"] == len(mine)
            assert account["epochs"] == sum(mine) / TOKENS
    assert seen == (declared(folder, taken) if taken else Counter())
