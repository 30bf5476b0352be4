"""Checkpoints in object stores: complete or absent, and a run that continues without them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer import upload
from allometry.trainer.state.remote import LISTED, Store, fetch
from allometry.trainer.train import train
from run_folders import events, rows
from thinned import thinned

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(upload, "RETRY_AFTER_S", (0.0,))
    yield
    fsspec.filesystem("memory").store.clear()


def run(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == kind]


@pytest.fixture(params=thinned({"memory://runs/a"}, ["memory://runs/a", "file://{}/store"]))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path)


def test_a_fetched_run_goes_on_to_the_bit(tiny: Make, tmp_path: Path, url: str) -> None:
    straight = run(tiny("checkpoint.every_steps=null", folder=tmp_path / "straight"))
    config = tiny(f"checkpoint.upload={{url: '{url}'}}", "checkpoint.every_steps=null")
    first = run(config, 8)
    assert [event["step"] for event in told(first, "uploaded")] == [8]
    shutil.rmtree(first)
    second = tmp_path / "second"
    assert fetch(Store.of(url, "URL"), second, None) == 8
    again = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(second)})})
    run(again)
    assert [row["loss"] for row in rows(second)] == [row["loss"] for row in rows(straight)]
    assert Store.of(url, "URL").steps() == [8, 20]
    with pytest.raises(UserError, match="is there already"):
        fetch(Store.of(url, "URL"), second, None)


def test_what_was_cut_short_counts_for_nothing(tiny: Make, tmp_path: Path, url: str) -> None:
    run(tiny(f"checkpoint.upload={{url: '{url}'}}", "checkpoint.every_steps=10"))
    store = Store.of(url, "URL")
    steps = store.steps()
    assert steps[-1] == 20
    store.fs.rm_file(store.at(20, LISTED))  # the last file of an upload
    assert 20 not in store.steps()
    with pytest.raises(UserError, match=r"no whole upload of step 20; it has"):
        fetch(store, tmp_path / "fetched", 20)
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize("harm", thinned({"changed"}, ["changed", "gone", "outside", "step"]))
def test_damaged_uploads_are_refused(tiny: Make, tmp_path: Path, harm: str) -> None:
    url = f"file://{tmp_path}/store"
    run(tiny(f"checkpoint.upload={{url: '{url}'}}", "checkpoint.every_steps=null"), 4)
    place = tmp_path / "store/step-4"
    listed = json.loads((place / LISTED).read_text())
    if harm == "changed":
        path = place / "record/metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    elif harm == "gone":
        (place / "trainer.json").unlink()
    elif harm == "outside":
        listed["files"]["../x"] = {"bytes": 0, "crc32": 0}
    else:
        listed["step"] = 5
    (place / LISTED).write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"step 4 of file://.* cannot be fetched"):
        fetch(Store.of(url, "URL"), tmp_path / "fetched", None)
    assert not (tmp_path / "fetched").exists()
    assert not list(tmp_path.glob(".fetched*"))


def test_a_store_that_takes_nothing_does_not_end_the_run(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[int] = []

    def refuse(self: Store, step: int, files: Any) -> None:
        puts.append(step)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Store, "put", refuse)
    folder = run(tiny("checkpoint.upload={url: 'memory://runs/a'}", "checkpoint.every_steps=null"))
    (failed,) = told(folder, "upload_failed")
    assert (failed["step"], failed["reason"]) == (20, "ConnectionError: no route to host")
    assert puts == [20, 20]
    assert len(rows(folder)) == 20
    assert not list(folder.glob("checkpoints/.upload*"))
    monkeypatch.undo()
    run(tiny("checkpoint.upload={url: 'memory://runs/a'}", "checkpoint.every_steps=null"))
    assert Store.of("memory://runs/a", "URL").steps() == [20]  # unfinished, found by a launch


def test_only_the_newest_stay(tiny: Make) -> None:
    config = tiny(
        "checkpoint.upload={url: 'memory://runs/a', keep_last: 1}",
        *("checkpoint.every_steps=null", "checkpoint.keep_steps=[4]"),
    )
    for stop in (4, 8, 12):
        run(config, stop)
    assert Store.of("memory://runs/a", "URL").steps() == [4, 12]


def test_a_place_that_fsspec_does_not_know_is_refused(tiny: Make) -> None:
    config = tiny("checkpoint.upload={url: 'nothing://x'}")
    with pytest.raises(UserError, match=r"checkpoint\.upload\.url=nothing://x cannot be used"):
        run(config)
    assert not Path(config.run.folder).exists()


def test_copies_need_to_know_when(tmp_path: Path, tiny: Make) -> None:
    with pytest.raises(UserError, match="says not when to copy"):
        tiny("checkpoint.local={folder: /dev/shm}")
