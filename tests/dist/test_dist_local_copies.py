"""Local copies on two ranks: copies that a launch resumes from, and copies that it must not use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import events, rows
from test_dist_runs import launch
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "hdp2": (2, {}),
    "hdp2-zero3": (2, {"zero": {"stage": 3}}),
    "pp2": (2, {"pp": 2}),
    "tp2": (2, {"tp": 2}),
    "hdp2-tiers": (2, {"zero": {"stage": 2, "optimizer_states": {"device": 0.3}}}),
}


def crash(config: RunConfig, step: int) -> None:
    """(On each rank) a launch that fails before ``step`` after writing its files."""
    from allometry.trainer.loop import Loop
    from allometry.trainer.watch.watchdog import Watchdog

    take = Loop._take

    def failing(loop: Loop, number: int, given: Any) -> None:
        if number == step:
            raise ZeroDivisionError
        take(loop, number, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take", failing)
        patch.setattr(Watchdog, "_run", lambda watch: None)  # it ends ranks whose peers have ended
        with pytest.raises(ZeroDivisionError):
            launch(config)


def prepared(tiny: Make, folder: Path, layout: dict[str, Any], *more: str) -> RunConfig:
    local = {"folder": str(folder.parent / "nodes"), "every_steps": 4}
    (folder.parent / "nodes").mkdir(exist_ok=True)
    return tiny(
        f"parallel={json.dumps(layout)}", f"checkpoint.local={json.dumps(local)}",
        "training.total_steps=14", "checkpoint.asynchronous=false", *more, folder=folder,
    )  # fmt: skip


def kept(folder: Path) -> Path:
    """Return the folder of the only run that has copies."""
    (place,) = (folder.parent / "nodes").iterdir()
    return place


def resumed(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == "resumed"]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows(folder)]


@pytest.mark.parametrize("name", thinned({"hdp2-zero3"}, list(LAYOUTS)))
def test_a_run_goes_on_from_its_newest_copy(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, name: str
) -> None:
    count, layout = LAYOUTS[name]
    straight = tiny(
        f"parallel={json.dumps(layout)}", "training.total_steps=14", folder=tmp_path / "straight"
    )
    run_ranks(launch, count, straight)
    folder = tmp_path / "run"
    config = prepared(tiny, folder, layout)
    run_ranks(crash, count, config, 7)
    run_ranks(crash, count, config, 14)
    run_ranks(launch, count, config)
    assert [event["checkpoint"] for event in resumed(folder)] == ["step-5", "step-12"]
    assert [event.get("local") for event in resumed(folder)] == [None, True]
    assert resumed(folder)[1]["replicas_of"] == []
    assert losses(folder) == losses(tmp_path / "straight")
    assert not list((tmp_path / "nodes").iterdir())


def gone(place: Path) -> None:
    """Lose the node of rank 1."""
    shutil.rmtree(place / "rank-1")


def half(place: Path) -> None:
    """Truncate a shard by one byte."""
    shard = next((place / "rank-1/of-1/step-8").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


def flipped(place: Path) -> None:
    shard = next((place / "rank-1/of-1/step-8").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def unfinished(place: Path) -> None:
    (place / "rank-1/of-1/step-8/complete.json").unlink()


def renamed(place: Path) -> None:
    (place / "rank-1/of-1/step-8").rename(place / "rank-1/of-1/step-9")


@pytest.mark.parametrize("harm", thinned({gone}, [gone, half, flipped, unfinished, renamed]))
def test_the_neighbours_replica_serves(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    config = prepared(tiny, folder, {"zero": {"stage": 3}})
    run_ranks(crash, 2, config, 9)
    harm(kept(folder))
    run_ranks(launch, 2, config)
    (event,) = resumed(folder)
    assert (event["checkpoint"], event["local"], event["replicas_of"]) == ("step-8", True, [1])
    assert len(rows(folder)) == 14


def both(place: Path) -> None:
    for keeper in (0, 1):
        shard = next((place / f"rank-{keeper}/of-1/step-8").glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])


def mixed(place: Path) -> None:
    """Replace rank 1's copy and its replica by those of another launch."""
    for keeper in (0, 1):
        copy = place / f"rank-{keeper}/of-1/step-8"
        facts = json.loads((copy / "trainer.json").read_text())
        facts["copy"]["launch"] = "1.0/" + facts["copy"]["launch"].partition("/")[2]
        resealed(copy, facts)


def resealed(copy: Path, facts: dict[str, Any]) -> None:
    from allometry.trainer.state.integrity import seal

    listed = json.loads((copy / "complete.json").read_text())["files"]
    del listed["trainer.json"]
    seal(copy, 8, listed, facts)


def everyone(place: Path) -> None:
    shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [both, mixed, everyone])
def test_without_a_whole_set_the_checkpoint_serves(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    straight = tiny(
        "parallel.zero.stage=3", "training.total_steps=14", folder=tmp_path / "straight"
    )
    run_ranks(launch, 2, straight)
    folder = tmp_path / "run"
    config = prepared(tiny, folder, {"zero": {"stage": 3}})
    run_ranks(crash, 2, config, 9)
    harm(kept(folder))
    run_ranks(launch, 2, config)
    (event,) = resumed(folder)
    assert (event["checkpoint"], event.get("local")) == ("step-5", None)
    told = [e for e in events(folder) if e["event"] == "local_copies_unused"]
    assert bool(told) == (harm is not everyone)
    assert losses(folder) == losses(tmp_path / "straight")


@pytest.mark.slow
def test_copies_are_not_used_where_the_run_is_another(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    """Another layout, a requested step, missing rows, or a restarted run."""
    first = tmp_path / "run"
    config = prepared(tiny, first, {"zero": {"stage": 3}})
    run_ranks(crash, 2, config, 9)
    place = kept(first)
    saved = tmp_path / "saved"
    shutil.copytree(place, saved)

    def again(harm: Callable[[Path], object], *changes: str, ranks: int = 2) -> dict[str, Any]:
        """Return how another launch continues from the saved folders after ``harm``."""
        before = tmp_path / "before"
        shutil.copytree(first, before)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(saved, place)
        harm(first)
        stage = {} if ranks == 1 else {"zero": {"stage": 3}}
        run_ranks(launch, ranks, prepared(tiny, first, stage, *changes), 13)
        found = [e for e in events(first) if e["event"] in ("resumed", "started")][-1]
        shutil.rmtree(first)
        before.rename(first)
        return found

    def cut(folder: Path) -> None:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:6]))

    assert again(lambda folder: None)["local"]
    assert "local" not in again(lambda folder: None, ranks=1)
    assert "local" not in again(lambda folder: None, "run.resume=step-5")
    assert "local" not in again(cut)
    assert again(shutil.rmtree)["event"] == "started"
