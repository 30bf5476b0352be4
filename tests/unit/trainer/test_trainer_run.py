"""A run in one process: its record, its resumes, and its failures."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.scaling.count import flops_per_token
from allometry.trainer.state import checkpoint
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.integrity import damage
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=CPU, callbacks=[], **options)
    return Path(config.run.folder)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def test_record_of_a_run(tiny: Make) -> None:
    config = tiny("evaluation.every_steps=10")
    folder = run(config)
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(1, 21))
    last = found[-1]
    assert last["tokens"] == 20 * 8 * 32
    assert last["tokens/up"] + last["tokens/down"] == last["tokens"]
    assert last["tokens/up"] / last["tokens"] == pytest.approx(0.7, abs=0.01)
    described = json.loads((folder / "run.json").read_text())
    most = described["plan"]["flops_per_token"]["total"]  # of documents as long as a sequence
    least = flops_per_token(config.model, 1).total
    assert least < last["flops"] / last["tokens"] < most  # exact in test_trainer_flops.py
    assert last["s1"] == pytest.approx(sum(row["lr"] for row in found))
    assert [step["lr"] for step in found[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    for key in ("grad_norm", "tokens_per_s", "mfu", "peak_bytes", "time_s", "s2"):
        assert math.isfinite(last[key])
    assert last["loss"] < 0.8 * found[0]["loss"], "it learns to count"
    assert {"validation/up", "validation/down"} <= found[9].keys()
    assert {"validation/up", "validation/down"} <= last.keys()
    assert "validation/up" not in found[10]
    assert load(folder / "config.yaml") == config
    assert described["versions"]["torch"] == torch.__version__
    assert described["conventions"]["s2"]
    assert (folder / "latest").read_text().strip() == "step-20"


def test_source_losses_make_up_the_loss(tiny: Make) -> None:
    config = tiny("training.total_steps=3", "schedule.warmup_steps=0", "data.packing=concatenated")
    for row in rows(run(config)):
        shares = {name: row[f"loss/{name}"] for name in ("up", "down")}
        assert min(shares.values()) <= row["loss"] <= max(shares.values())


@pytest.mark.parametrize("extra", [[], ["model.dropout=0.2"], ["training.compute_dtype=bf16"]])
def test_two_resumes_are_bit_exact(tiny: Make, tmp_path: Path, extra: list[str]) -> None:
    straight = run(tiny(*extra, folder=tmp_path / "straight"))
    parts = tiny(*extra, folder=tmp_path / "parts")
    run(parts, stop_at_step=7)
    run(parts, stop_at_step=12)
    folder = run(parts)
    keys = ("loss", "grad_norm", "lr", "flops", "s1", "s2", "tokens/up", "loss/down")
    for one, other in zip(rows(straight), rows(folder), strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys], one["step"]
    resumed = [event["step"] for event in events(folder) if event["event"] == "resumed"]
    assert resumed == [7, 12]


def test_negative_control_another_seed_differs(tiny: Make, tmp_path: Path) -> None:
    one = run(tiny("training.total_steps=4", folder=tmp_path / "one"))
    two = run(tiny("training.total_steps=4", "run.seed=4", folder=tmp_path / "two"))
    assert losses(one) != losses(two)


def test_synchronous_saves_are_the_same_checkpoints(tiny: Make, tmp_path: Path) -> None:
    folders = [
        run(tiny(f"checkpoint.asynchronous={flag}", folder=tmp_path / flag))
        for flag in ("true", "false")
    ]
    kept = [[p.name for p in checkpoint.saved(RunFolder(f))] for f in folders]
    assert kept == [["step-15", "step-20"]] * 2
    assert all(
        damage(p, contents=True) is None for f in folders for p in checkpoint.saved(RunFolder(f))
    )


def test_keep_every(tiny: Make) -> None:
    folder = run(tiny("checkpoint.keep_last=1", "checkpoint.keep_every_steps=10"))
    assert [p.name for p in checkpoint.saved(RunFolder(folder))] == ["step-10", "step-20"]


def test_finished_run_run_again_does_nothing(tiny: Make) -> None:
    config = tiny()
    folder = run(config)
    before = rows(folder)
    run(config)
    assert rows(folder) == before
    assert [event["event"] for event in events(folder)][-2:] == ["already_finished", "finished"]


def test_damaged_checkpoint_is_refused_and_the_whole_one_offered(tiny: Make) -> None:
    config = tiny()
    folder = run(config, stop_at_step=12)
    shard = next((folder / "checkpoints" / "step-12").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"step-12 is damaged .*run\.resume=step-10"):
        run(config)
    shard.write_bytes(content[:-5])
    with pytest.raises(UserError, match="bytes instead of"):
        run(config)
    back = tiny("run.resume=step-10")
    assert [row["step"] for row in rows(run(back))] == list(range(1, 21))


def test_going_back_happens_once_and_sets_later_checkpoints_aside(tiny: Make) -> None:
    keep = "checkpoint.keep_last=9"
    folder = run(tiny(keep))
    back = tiny(keep, "run.resume=step-5")
    run(back, stop_at_step=8)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step-5", "step-8", *(f"abandoned-step-{n}" for n in (10, 15, 20))}
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))
    run(back, stop_at_step=12)  # the same command continues, and does not go back again
    assert [e["step"] for e in events(folder) if e["event"] == "resumed"] == [5, 8]
    (folder / "latest").unlink()
    run(back)
    assert [e["step"] for e in events(folder) if e["event"] == "resumed"] == [5, 8, 12]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(tiny: Make) -> None:
    config = tiny()
    folder = run(config, stop_at_step=12)
    before = rows(folder)
    shutil.rmtree(folder / "checkpoints" / "step-12")
    with pytest.raises(UserError, match=r"step-12 is damaged \(it is gone\).*run\.resume=step-10"):
        run(config)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="all of them are gone"):
        run(config)
    assert rows(folder) == before


def test_a_stop_that_is_past_is_refused(tiny: Make) -> None:
    config = tiny()
    run(config, stop_at_step=7)
    with pytest.raises(UserError, match=r"--stop-at-step=5 is past.*stands at step 7"):
        run(config, stop_at_step=5)


def test_half_written_checkpoint_is_removed_and_the_last_one_used(tiny: Make) -> None:
    config = tiny()
    folder = run(config, stop_at_step=12)
    half = folder / "checkpoints" / ".step-15.partial"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    run(config)
    assert not half.exists()
    kinds = [event["event"] for event in events(folder)]
    assert "removed_unfinished_checkpoint" in kinds
    assert [e["step"] for e in events(folder) if e["event"] == "resumed"] == [12]


def test_full_disk_while_saving_goes_on(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.ShardWriter

    class Full(real):  # type: ignore[misc, valid-type]
        def write_data(self, *args: Any, **kwargs: Any) -> Any:
            if "step-10" in str(self.path):
                raise OSError(28, "No space left on device")
            return super().write_data(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "ShardWriter", Full)
    folder = run(tiny("checkpoint.keep_last=9"))
    assert [p.name for p in checkpoint.saved(RunFolder(folder))] == ["step-5", "step-15", "step-20"]
    failed = [event for event in events(folder) if event["event"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == [10]
    assert "No space left" in failed[0]["reason"]
    assert len(rows(folder)) == 20


def test_not_finite_loss_stops_names_step_and_group_and_keeps_the_checkpoint(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allometry.trainer.step import TrainStep

    take = TrainStep.__call__

    def poisoned(self: TrainStep, step: int, batches: Any) -> Any:
        if step == 8:
            with torch.no_grad():
                self.parallel.parts[0].final_norm.weight[0] = math.nan
        return take(self, step, batches)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    config = tiny()
    with pytest.raises(UserError, match=r"step 8: the loss is nan.*vector.*step-5 is kept"):
        run(config)
    folder = Path(config.run.folder)
    assert (folder / "latest").read_text().strip() == "step-5"
    assert [row["step"] for row in rows(folder)] == list(range(1, 8))
    assert events(folder)[-1]["event"] == "not_finite"
    monkeypatch.undo()
    assert len(rows(run(config))) == 20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sources.0.train=nowhere/x", "nowhere/x"),
        ("data.tokenizer=nowhere.json", r"nowhere\.json"),
        ("model.vocab_size=32", "vocab"),
        ("parallel.hdp=2", r"parallel\.hdp=2"),
        ("run.resume=step-3", r"run\.resume=step-3"),
        ("schedule.warmup_steps=50", "warm-up of 50 steps"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tiny: Make, override: str, said: str) -> None:
    config = tiny(override)
    with pytest.raises(UserError, match=said) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.run.folder).exists()


def test_never_means_a_new_folder(tiny: Make) -> None:
    run(tiny("training.total_steps=1", "schedule.warmup_steps=0"))
    with pytest.raises(UserError, match=r"run\.resume=never"):
        run(tiny("training.total_steps=1", "schedule.warmup_steps=0", "run.resume=never"))


def test_changed_data_are_refused(tiny: Make, tmp_path: Path, tiny_store: Path) -> None:
    run(tiny(), stop_at_step=5)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_store, moved)
    same = tiny(f"data.sources.0.train={moved}/up.train")
    run(same, stop_at_step=6)
    from allometry.data.synthetic import write_store

    write_store(moved / "up.train", [np.arange(1, 30)] * 50)
    with pytest.raises(UserError, match="source 'up' are not the ones"):
        run(same)


def test_batch_ramp_is_followed(tiny: Make) -> None:
    ramp = "batch.ramp={start_sequences: 4, increment_sequences: 2, over_tokens: 1000}"
    found = rows(run(tiny(ramp, "batch.micro_batch_sequences=2")))
    steps = np.diff([0, *[row["tokens"] for row in found]]) // 32
    assert steps[0] == 4
    assert steps[-1] == 8
    assert set(steps) == {4, 6, 8}
