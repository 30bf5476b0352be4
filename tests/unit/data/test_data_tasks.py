"""Preparation in tasks: the store of one process, whatever was interrupted."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.data.tasks.executors import Engine
from allometry.data.tasks.finish import finish
from allometry.data.tasks.plan import Folder, divide
from allometry.data.tasks.run import prepare_in_tasks
from allometry.data.writer import TokenWriter
from task_stores import differences, needs_datatrove

LOCAL = Engine("local", tasks=2, workers=1)
SPLITS = "train", "validation"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three JSON Lines files and a text file, with blank and null texts."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeé大 ", k=rng.randint(1, 6))) for _ in range(200)]
    (folder / "web").mkdir()
    for part in range(3):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(40)]
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts, " ", None]]
        (folder / f"web/{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "books").mkdir()
    for part in range(2):
        (folder / f"books/{part}.txt").write_text(f"Book {part}. " + " ".join(words))
    return folder


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareRequest:
    """Return the request of a store that one process has made."""
    request = PrepareRequest(
        (f"web={corpus}/web", f"books={corpus}/books"),
        str(tmp_path_factory.mktemp("one") / "out"),
        vocab_size=300,
        validation_fraction=0.2,
        processes=1,
    )
    prepare(request, quiet=True)
    return request


def in_tasks(one: PrepareRequest, out: Path, **changes: Any) -> PrepareRequest:
    return replace(one, out=str(out), processes=None, **changes)


@needs_datatrove
def test_an_interrupted_job_gives_the_store_of_one_process(
    one: PrepareRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, folder = in_tasks(one, tmp_path / "out"), Folder(tmp_path / "out")
    finished: list[str] = []
    finish_file = TokenWriter.finish

    def count(writer: TokenWriter) -> Any:
        finished.append(writer._bin.parent.name[:5])
        if interrupt and finished.count("00001") == 2:
            raise KeyboardInterrupt
        return finish_file(writer)

    monkeypatch.setattr(TokenWriter, "finish", count)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        prepare_in_tasks(request, LOCAL, quiet=True)
    assert folder.record(0).is_file()
    assert not folder.record(1).is_file()
    assert len(list((folder.work / "attempts").iterdir())) == 1  # half-written
    assert not (folder.out / "manifest.json").exists()
    with pytest.raises(UserError, match="tasks=2, not 3"):
        prepare_in_tasks(request, replace(LOCAL, tasks=3), quiet=True)
    with pytest.raises(UserError, match="separator=None, not x"):
        prepare_in_tasks(replace(request, separator="x"), LOCAL, quiet=True)
    with pytest.raises(UserError, match="unfinished preparation in tasks"):
        prepare(replace(request, processes=1), quiet=True)
    with pytest.raises(UserError, match=r"1 of 2 tasks .* first task 1; repeat"):
        finish(folder, None)  # type: ignore[arg-type]
    interrupt, before = False, len(finished)
    prepare_in_tasks(request, LOCAL, quiet=True)
    assert set(finished[before:]) == {"00001"}  # the complete task is not done again
    assert differences(folder.out, Path(one.out)) == []
    assert [path.name for path in folder.work.iterdir()] == ["log"]
    assert not list(folder.out.rglob("*.shards/*.idx"))
    for name in ("web", "books"):
        for split in SPLITS:
            if (Path(one.out) / f"{name}.{split}.bin").exists():
                ours = TokenStore(folder.out / f"{name}.{split}")
                assert ours.fingerprint == TokenStore(Path(one.out) / f"{name}.{split}").fingerprint
    # The same request again writes nothing, in tasks or by one process.
    before = len(finished)
    made = prepare_in_tasks(request, replace(LOCAL, tasks=None), quiet=True)
    assert made == prepare(replace(request, processes=1), quiet=True)
    assert len(finished) == before


@needs_datatrove
def test_another_order_of_files_is_another_store(
    one: PrepareRequest, corpus: Path, tmp_path: Path
) -> None:
    """Negative control: the comparison finds the same documents in another order."""
    (tmp_path / "web").mkdir()
    for part, other in enumerate((1, 0, 2)):
        (tmp_path / f"web/{part}.jsonl").write_bytes((corpus / f"web/{other}.jsonl").read_bytes())
    inputs = f"web={tmp_path}/web", one.inputs[1]
    prepare_in_tasks(in_tasks(one, tmp_path / "out", inputs=inputs), LOCAL, quiet=True)
    found = differences(tmp_path / "out", Path(one.out))
    assert {"tokens of web.train", "index of web.train", "request"} <= set(found)
    assert "tokenizer" not in found


@needs_datatrove
def test_what_a_task_finds_wrong_is_one_sentence(
    one: PrepareRequest, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for part in range(2):
        (tmp_path / f"in/{part}.jsonl").write_bytes((corpus / f"web/{part}.jsonl").read_bytes())
    bad = tmp_path / "in/1.jsonl"
    with bad.open("a") as file:
        file.write('{"txt": 1}\n{"text": 2}\n')
    tokenizer = f"{one.out}/tokenizer.json"
    request = replace(
        in_tasks(one, tmp_path / "out", inputs=(f"web={tmp_path}/in",)),
        tokenizer=tokenizer,
        vocab_size=None,
    )
    with pytest.raises(UserError, match=r"1\.jsonl, line 43 .*--on-bad-line skip"):
        prepare_in_tasks(request, LOCAL, quiet=True)
    assert "line 43" in Folder(tmp_path / "out").failure(1).read_text()
    skip = replace(request, on_bad_line="skip", out=str(tmp_path / "skip"))
    with pytest.raises(UserError, match="more than 1 bad lines"):
        prepare_in_tasks(replace(skip, max_bad_lines=1), LOCAL, quiet=True)
    bad.write_text(bad.read_text() + "\n")
    with pytest.raises(UserError, match=r"input .* has changed since the preparation"):
        prepare_in_tasks(skip, LOCAL, quiet=True)


@pytest.mark.parametrize(
    ("change", "engine", "says"),
    [
        ({"max_documents": 3}, {}, "max_documents=3 counts the documents of a source in order"),
        ({"processes": 2}, {}, "processes=2 is for preparation without --engine; give --workers"),
        ({}, {"tasks": 6}, "tasks=6 is more than the 5 input files"),
        ({"inputs": ("builtin:python-code",)}, {}, "is one piece that tasks cannot share"),
        ({}, {"tasks": 0}, "tasks=0 must be at least 1"),
        ({}, {"kind": "slurm"}, "Slurm needs a partition; add --sbatch partition=..."),
        ({}, {"sbatch": ("partition=x",)}, "--sbatch partition=x is of --engine datatrove:slurm"),
        ({}, {"kind": "slurm", "sbatch": ("x",)}, "--sbatch x must be KEY=VALUE"),
        ({}, {"kind": "dask"}, "engine=datatrove:dask must be one of local, slurm, ray"),
    ],
)
@needs_datatrove
def test_requests_that_tasks_cannot_do(
    one: PrepareRequest, tmp_path: Path, change: dict[str, Any], engine: dict[str, Any], says: str
) -> None:
    def ask() -> None:
        request = replace(in_tasks(one, tmp_path / "out"), **change)
        prepare_in_tasks(request, replace(LOCAL, **engine), quiet=True)

    with pytest.raises(UserError) as refused:
        ask()
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out/.tasks").exists()


@pytest.mark.parametrize(
    ("engine", "missing", "command"),
    [
        (LOCAL, "datatrove", "pip install 'allometry[prepare]'"),
        (replace(LOCAL, deduplicate=True), "spacy", "pip install 'allometry[curate]'"),
        (replace(LOCAL, kind="ray"), "ray", "pip install 'ray'"),
    ],
)
def test_a_missing_package_is_told_with_the_command(
    one: PrepareRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    missing: str,
    command: str,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UserError) as refused:
        prepare_in_tasks(in_tasks(one, tmp_path / "out"), engine, quiet=True)
    assert f"needs {missing}, which is not installed" in str(refused.value)
    assert command in str(refused.value)


def test_parts_are_contiguous_and_none_is_empty() -> None:
    rng = random.Random(1)
    for _ in range(300):
        sizes = [rng.choice((0, 1, 5, 100)) for _ in range(rng.randint(1, 12))]
        tasks = rng.randint(1, len(sizes))
        parts = divide(sizes, tasks)
        assert len(parts) == tasks
        assert [number for part in parts for number in part] == list(range(len(sizes)))
        assert all(parts)
    assert divide([1] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert divide([9, 1, 1, 1], 2) == [range(0, 1), range(1, 4)]
