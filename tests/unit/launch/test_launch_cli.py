"""The command line in separate processes: exit codes, one sentence per error."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.run import RunConfig
from allometry.launch import start
from allometry.launch.figures.drawing import check_format
from allometry.launch.runs.dry_run import planned
from shell import Shell

Make = Callable[..., RunConfig]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def allometry(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Return the single sentence of a refused command."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("allometry: ")
    return line


def test_help_answers_at_once() -> None:
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []  # CPU seconds, independent of other load
    for _ in range(5):
        begun = spent()
        done = allometry("--help")
        seconds.append(spent() - begun)
    assert done.returncode == 0
    for command in ("train", "prepare", "plot", "doctor"):
        assert command in done.stdout
    code = "import sys, allometry.launch.cli; print([m for m in HEAVY if m in sys.modules])"
    heavy = "HEAVY = ('torch', 'numpy', 'matplotlib', 'tokenizers', 'scipy', 'pyarrow'); "
    loaded = subprocess.run(
        [sys.executable, "-c", heavy + code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]", "what makes --help slow"
    assert min(seconds) < 0.5


def test_dry_run_says_what_will_happen_without_torch(tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(tiny()))
    code = (
        "import sys; from allometry.launch.cli import main\n"
        f"sys.argv = ['allometry', 'train', {str(path)!r}, '--dry-run']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "FLOPs per token", "tokens", "steps", "memory", "learning rate"):
        assert word in done.stdout
    assert not Path(tiny().run.folder).exists()


def test_dry_run_of_many_ranks_lists_what_they_hold_and_send(tiny: Make) -> None:
    config = tiny("parallel.tp=2", "parallel.zero.stage=2", "batch.sequences=512")
    text = planned(config, 64).text
    assert "pp=1, hdp=32, tp=2" in text
    assert "rank 0 (stage 0) calls in a step" in text
    assert text.count("parameters") == 2  # of the model; the memory is in bytes
    assert "; fits 80 GB: yes" in text
    large = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": 2**30})}
    )
    assert "fits 80 GB: no" in planned(large, 64).text
    assert "reduce-scatter" in text
    assert "32 ranks of hdp" in text


def test_dry_run_counts_what_is_read_and_finds_what_runs_dry(tiny: Make) -> None:
    report = planned(tiny("data.replay={ratio: 0.25, sources: [down]}"), 1)
    assert report.facts["data"]["sources"]["down"]["tokens"] == 20 * 8 * 32 / 4
    assert "down 1,280 tokens (0." in report.text
    with pytest.raises(UserError, match="'down' runs dry after"):
        planned(tiny("data.sources.1.max_epochs=0.1"), 1)
    with pytest.raises(UserError, match="no run is known"):
        planned(tiny("data.continue_sources=true"), 1)


def test_dry_run_as_json(tiny: Make) -> None:
    plan = json.loads(json.dumps(planned(tiny(), 2).facts))
    assert plan["total_steps"] == 20
    assert plan["layout"]["hdp"] == 2
    held = plan["ranks"][0]["bytes_held"]
    assert held["parameters"] == 4 * plan["parameters"]["total"]
    stated = plan["memory_bytes_per_rank"]
    for kind in ("parameters", "gradients", "optimizer_states"):
        assert stated[kind] == held[kind.replace("_", " ")]
    assert plan["learning_rate"][0]["lr"] == pytest.approx(1e-2 / 3)
    with pytest.raises(UserError, match=r"batch\.sequences=8"):
        planned(tiny(), 3)
    with pytest.raises(UserError, match=r"optimizer\.rank=1000 is above .*wq.weight, 32; choose"):
        planned(tiny("optimizer.kind=apollo", "optimizer.rank=1000"), 1)


def test_folder_of_a_figure_is_made_before_the_work(tmp_path: Path) -> None:
    check_format(tmp_path / "new/folder/loss.png")
    assert (tmp_path / "new/folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*loss\.png cannot be written: Not a dir"):
        check_format(tmp_path / "file/new/loss.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"a\.png cannot be written: it is a folder"):
        check_format(tmp_path / "a.png")


def test_errors_are_one_sentence_and_exit_code_2(tiny: Make, tmp_path: Path, shell: Shell) -> None:
    assert "does not exist" in sentence(allometry("train", tmp_path / "nothing.yaml"))
    path = tmp_path / "run.yaml"
    path.write_text(dump(tiny()) + "unknown: 1\n")
    assert "unknown" in shell.refusal("train", path)
    path.write_text(dump(tiny("data.sources.0.train=nowhere/x")))
    assert "nowhere/x" in sentence(allometry("train", path))
    assert "optimizer.lr" in shell.refusal("train", "preset:demo", "optimizer.lr=-1")
    assert "no config.yaml" in shell.refusal("plot", tmp_path)
    assert "preset:demo" in shell.refusal("train", "demo")
    assert "--dry-run" in shell.refusal("train", "preset:demo", "--json")
    assert "listed by --help" in shell.refusal("transfer", "preset:demo", "--over")
    tied = shell.refusal("train", "preset:demo", "model.tied_embeddings=true")
    assert tied.startswith("allometry: the configuration: model.tied_embeddings=true contradicts")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "empty" in shell.refusal("prepare", empty, "--out", tmp_path / "store")


def test_print_config_is_the_whole_configuration(tmp_path: Path) -> None:
    done = allometry("train", "preset:demo", "optimizer.lr=1e-3", "--print-config")
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    assert load(path) == load("preset:demo", ["optimizer.lr=1e-3"])


def test_a_run_from_text_to_picture(tmp_path: Path, tiny: Make, shell: Shell) -> None:
    words = [f"the number {n} follows the number {n - 1} in the line." for n in range(3000)]
    (tmp_path / "words.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(words[k : k + 7])}) + "\n" for k in range(2900))
    )
    store = tmp_path / "store"
    done = allometry(
        "prepare", f"up={tmp_path}/words.jsonl", "--out", store, "--vocab-size", "300", "--json"
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    config = tmp_path / "run.yaml"
    source = "{name: up, train: STORE/up.train, validation: STORE/up.validation}"
    described = tiny(
        f"data.sources=[{source.replace('STORE', str(store))}]",
        f"data.tokenizer={store}/tokenizer.json",
        f"model.vocab_size={manifest['tokenizer']['vocab_size']}",
    )
    config.write_text(dump(described))
    done = allometry("train", config, "record.display_every_steps=10")
    assert done.returncode == 0, done.stderr
    assert "step 10/20 | loss" in done.stdout
    picture = tmp_path / "loss.png"
    drawn = shell.json("plot", described.run.folder, "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    summary = drawn["runs"][0]
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["sources"][0]["validation_loss"] > 0


def test_doctor_names_everything_and_its_fix() -> None:
    done = allometry("doctor", "--json")
    assert done.returncode == 0, done.stderr
    by_name = {finding["name"]: finding for finding in json.loads(done.stdout)}
    names = {"torch", "CUDA", "NCCL", "NVML", "flash-attn", "NVIDIA apex", "deepspeed"}
    assert names | {"megatron-core", "CPU allocator"} <= by_name.keys()
    assert by_name["torch"]["status"] == "ok"
    assert all(f["fix"] for f in by_name.values() if f["status"] == "problem")


def test_doctor_knows_the_wrong_apex(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    code = "from allometry.launch.runs.doctor import _apex; print([f.status for f in _apex()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == "['problem']", done.stderr


_BATCHES_OF_UNLIKE_LENGTH = """
import random, torch
random.seed(0)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
kept, start = [], resident()
for _ in range(60):
    tokens, saved = random.randint(200, 2000), []
    for _ in range(12):
        saved += [torch.ones(tokens * 1024), torch.ones(tokens * 8)]
        kept.append(torch.ones(tokens * 7))
    kept = kept[-200:]
print(resident() - start)
"""


def test_jemalloc_uses_what_it_keeps() -> None:
    library = start.find_library("jemalloc")
    if library is None:
        pytest.skip("jemalloc is not installed")
    ours = start.choose("jemalloc", {}).environment

    def growth_mib(environment: dict[str, str]) -> float:
        done = subprocess.run(
            [sys.executable, "-c", _BATCHES_OF_UNLIKE_LENGTH],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | environment,
        )
        return float(done.stdout)

    tight = ours["MALLOC_CONF"].replace("active_fit:20", "active_fit:1")
    assert growth_mib(ours) < 400  # one batch is at most 100 MiB
    assert growth_mib(ours | {"MALLOC_CONF": tight}) > 1000  # negative control


def test_allocator_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "has_gpu", lambda: False)
    monkeypatch.setattr(start, "find_library", lambda kind: None)
    assert start.choose("auto", {}).name == "glibc-tuned"
    assert start.choose("auto", {"LD_PRELOAD": "mine.so"}).environment == {}
    with pytest.raises(UserError, match="--allocator=jemalloc"):
        start.choose("jemalloc", {})
    with pytest.raises(UserError, match="--allocator=best"):
        start.choose("best", {})
    monkeypatch.setattr(start, "find_library", lambda kind: f"/lib/{kind}.so")
    assert start.choose("auto", {}).environment["LD_PRELOAD"] == "/lib/jemalloc.so"
    monkeypatch.setattr(start, "has_gpu", lambda: True)
    assert start.choose("auto", {}) == start.Allocator("system", {})


def test_segments_of_gpu_memory_grow_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert start.settle_cuda_allocator(gpu=False) is None
    assert not any(name in os.environ for name in names)
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:64")
            assert start.settle_cuda_allocator(gpu=True) == "max_split_size_mb:64"
            assert sum(name in os.environ for name in names) == 1
    monkeypatch.setenv(names[0], "")  # so that it is restored afterwards
    del os.environ[names[0]]
    assert start.settle_cuda_allocator(gpu=True) == "expandable_segments:True"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
