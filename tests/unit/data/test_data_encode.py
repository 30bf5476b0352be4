import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from allometry.configs.errors import UserError
from allometry.data.corpus import Document
from allometry.data.encode import TextSample, Workers, train_tokenizer
from allometry.data.progress import ProgressReport


def test_training_a_tokenizer_is_deterministic() -> None:
    rng = random.Random(3)
    texts = ["".join(rng.choices("abcdeé大  ", k=400)) for _ in range(50)]
    assert train_tokenizer(texts, 500).to_str() == train_tokenizer(texts, 500).to_str()


def test_sample_does_not_depend_on_the_order() -> None:
    rng = random.Random(1)
    documents = [
        Document.of(str(n), chr(97 + n % 26) * rng.randint(1, 30), str(n % 7)) for n in range(200)
    ]
    samples = []
    for _ in range(4):
        rng.shuffle(documents)
        sample = TextSample(500)
        for document in documents:
            sample.offer(document)
        samples.append(sample.texts())
    assert samples[0] == samples[1] == samples[2] == samples[3]
    assert 400 < sum(map(len, samples[0])) <= 500


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, time\n"
        "from allometry.data.encode import Workers\n"
        "def pid(_):\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as workers:\n"
        "        print(*set(workers.map(pid, iter(range(40)))), flush=True)\n"
        "        time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert children
    deadline = time.monotonic() + 120
    while any(map(psutil.pid_exists, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(
        psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE
        for child in children
    )


def _die(number: int) -> int:
    os._exit(3)


def test_a_process_that_dies_is_told() -> None:
    with Workers(2) as workers, pytest.raises(UserError, match=r"process died, .*processes=2"):
        list(workers.map(_die, iter(range(3))))


def test_progress_in_a_log_file_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allometry.data.progress._LINE_EVERY_S", 0.0)
    log = io.StringIO()
    with ProgressReport(log) as report:
        report.begin("encoding [web]", 2_000_000)
        report.advance(500_000)
        report.say("web: done")
    assert log.getvalue() == "encoding [web]: 0.5 of 2.0 MB (25 %)\nweb: done\n"
