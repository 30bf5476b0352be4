"""Preparation in tasks that is killed, on Ray, and with stages that drop documents."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.data.encode import train_tokenizer
from allometry.data.manifest import Manifest
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.data.tasks.executors import Engine
from allometry.data.tasks.plan import Folder
from allometry.data.tasks.run import prepare_in_tasks
from gates import LIMIT_S
from task_stores import differences, needs_datatrove

pytestmark = [pytest.mark.slow, needs_datatrove]
LOCAL = Engine("local", tasks=2, workers=1)
WORDS = ["".join(random.Random(k).choices("abcdefghijklmnop", k=6)) for k in range(500)]


def sentence(rng: random.Random, length: int = 60) -> list[str]:
    return rng.choices(WORDS, k=length)


def write_lines(path: Path, texts: list[list[str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps({"text": " ".join(text)}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def of_one_process(request: PrepareRequest, out: Path) -> Path:
    prepare(replace(request, out=str(out), processes=1), quiet=True)
    return out


@pytest.fixture
def request_(tmp_path: Path) -> PrepareRequest:
    """Return a request over two files, the second one large."""
    rng = random.Random(0)
    write_lines(tmp_path / "in/0.jsonl", [sentence(rng) for _ in range(50)])
    write_lines(tmp_path / "in/1.jsonl", [sentence(rng) for _ in range(8000)])
    tokenizer = str(tmp_path / "tokenizer.json")
    train_tokenizer([" ".join(WORDS)], 300).save(tokenizer)
    return PrepareRequest((f"web={tmp_path}/in",), str(tmp_path / "out"), tokenizer=tokenizer)


@pytest.mark.timeout(4 * LIMIT_S)
def test_a_killed_command_goes_on_when_it_is_repeated(
    request_: PrepareRequest, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "out")
    words = [sys.executable, "-m", "allometry.launch.cli", "prepare", *request_.inputs]
    words += ["--out", request_.out, "--tokenizer", str(request_.tokenizer)]
    words += ["--engine", "datatrove:local"]
    words += ["--tasks", "2", "--workers", "1", "--json"]
    with subprocess.Popen(words, start_new_session=True) as command:
        until = time.monotonic() + LIMIT_S
        while not list(folder.work.glob("attempts/00001-*/web.train.bin")):
            assert time.monotonic() < until
            assert command.poll() is None
            time.sleep(0.01)
        os.killpg(command.pid, signal.SIGKILL)
    assert folder.record(0).is_file()
    assert not folder.record(1).is_file()
    shard = Path(f"{folder.shard('web.train', 0)}.bin")
    first = shard.stat().st_mtime_ns
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert shard.stat().st_mtime_ns == first
    assert json.loads(done.stdout)["sources"]["web"]["splits"]["train"]["documents"] > 7000
    assert differences(folder.out, of_one_process(request_, tmp_path / "one")) == []


@pytest.mark.timeout(4 * LIMIT_S)
def test_ray_gives_the_store_of_one_process(request_: PrepareRequest, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    engine = replace(LOCAL, kind="ray")
    try:
        first = tmp_path / "in/1.jsonl"
        before = first.read_bytes()
        first.write_bytes(before + b'{"text": 3}\n')
        bad = replace(request_, out=str(tmp_path / "bad"))
        with pytest.raises(UserError, match=r"1\.jsonl, line 8001"):
            prepare_in_tasks(bad, engine, quiet=True)
        assert [Folder(tmp_path / "bad").record(task).is_file() for task in (0, 1)] == [True, False]
        first.write_bytes(before)
        prepare_in_tasks(request_, engine, quiet=True)
    finally:
        ray.shutdown()
    assert differences(tmp_path / "out", of_one_process(request_, tmp_path / "one")) == []


def texts_of(folder: Path) -> set[str]:
    """Return the documents of both splits, decoded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = set()
    for split in ("train", "validation"):
        store = TokenStore(folder / f"web.{split}")
        found |= {tokenizer.decode(store.read(d)[:-1].tolist()) for d in range(store.num_documents)}
    return found


def test_near_duplicates_and_benchmark_text_are_dropped(tmp_path: Path) -> None:
    """60 documents, 10 equal ones, 10 with one word changed, and 3 with a benchmark's question."""
    pytest.importorskip("spacy", reason="spacy is not installed: pip install 'allometry[curate]'")
    rng = random.Random(1)
    originals = [sentence(rng, 100) for _ in range(60)]
    changed = [[*text[:40], "changed", *text[41:]] for text in originals[10:20]]
    question = sentence(rng, 15)
    leaked = [[*sentence(rng, 30), *question, *sentence(rng, 30)] for _ in range(3)]
    texts = [*originals, *originals[:10], *changed, *leaked]
    rng.shuffle(texts)
    for part in range(3):
        write_lines(tmp_path / f"in/{part}.jsonl", texts[part::3])
    write_lines(tmp_path / "benchmark.jsonl", [question, ["too", "short"]])
    request = PrepareRequest((f"web={tmp_path}/in",), "", vocab_size=300, validation_fraction=0.2)

    def made(tasks: int) -> Manifest:
        engine = replace(
            LOCAL,
            tasks=tasks,
            deduplicate=True,
            decontaminate=(str(tmp_path / "benchmark.jsonl"),),
        )
        out = str(tmp_path / f"out{tasks}")
        found = prepare_in_tasks(replace(request, out=out), engine, quiet=True)
        assert isinstance(found, Manifest)
        return found

    two, three = made(2), made(3)
    web = two.sources["web"]
    assert web.skipped == {
        "near duplicate of another document": 20,
        "has 12 words of a benchmark in a row": 3,
    }
    assert sum(split.documents for split in web.splits.values()) == 60
    kept, unchanged = texts_of(tmp_path / "out2"), {" ".join(text) for text in originals}
    assert len(kept & unchanged) >= 50
    assert kept <= {" ".join(text) for text in texts} - {" ".join(text) for text in leaked}
    assert texts_of(tmp_path / "out3") == kept  # whichever tasks there are
    assert three.sources["web"].skipped == web.skipped
    # Negative control: without the stages all documents are there.
    plain = of_one_process(request, tmp_path / "one")
    assert len(texts_of(plain)) == 73
    assert {"spacy", "datatrove"} <= two.versions.keys()
