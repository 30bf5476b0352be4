"""Counting live tensors: allocation, release, resizes, kinds; compared with the allocator."""

from __future__ import annotations

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.launch.studies.commands import Memory
from allometry.launch.studies.memory import counted
from allometry.studies.memory.allocator import AllocatorLog
from allometry.studies.memory.live import BACKWARD, LiveBytes, peak_of

SMALL = (
    "model.num_layers=2",
    "model.vocab_size=512",
    "data.sequence_length=64",
    "batch={sequences: 4, micro_batch_sequences: 2}",
)


def test_births_deaths_and_views() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        view = kept[10:]
        gone = torch.ones(500) + 1
        live.mark([kept], "kept")
        del gone
        last = torch.empty(250)
    changes = [event.bytes for event in live.events]
    assert sum(changes) == kept.nbytes + last.nbytes
    peak = peak_of(live, lambda stored: stored.kind or "other")
    # ones(500), which was released inside the sum, and the sum itself
    assert peak.bytes == 4000 + 2 * 2000
    assert peak.kinds == {"kept": 4000, "other": 4000}
    assert view.untyped_storage().nbytes() == kept.untyped_storage().nbytes()


def test_resized_storages_are_followed() -> None:
    with LiveBytes() as live:
        buffer = torch.empty(256, dtype=torch.uint8)
        buffer.untyped_storage().resize_(0)
        assert sum(event.bytes for event in live.events) == 0
        buffer.untyped_storage().resize_(512)
    assert sum(event.bytes for event in live.events) == 512
    assert live.stored[0].resized


def test_backward_is_known_as_such() -> None:
    with LiveBytes() as live:
        x = torch.ones(64, requires_grad=True)
        (x.exp() * 2).sum().backward()
    assert BACKWARD in {stored.born for stored in live.stored}


def test_tensors_are_what_the_allocator_gave_out() -> None:
    with AllocatorLog(torch.device("cpu")) as log, LiveBytes() as live:
        log.begin()
        x = torch.randn(256, 256, requires_grad=True)
        for _ in range(3):
            (x @ x).softmax(1).square().sum().backward()
        allocated = log.peak()
    tensors = peak_of(live, lambda stored: "all").bytes
    assert tensors == pytest.approx(allocated, rel=0.01)
    assert allocated > 4 * x.nbytes


def test_probe_prints_both_and_is_near(capfd: pytest.CaptureFixture[str]) -> None:
    report = counted(Memory(config="preset:demo", overrides=SMALL, probe=True))
    assert 0.9 < report.facts["ratio"] < 1.1
    assert report.facts["measured"]["allocated"] == pytest.approx(
        report.facts["measured"]["peak"]["bytes"], rel=0.02
    )
    for word in ("optimizer states", "saved: SwiGLU", "allocator", "peak: predicted at"):
        assert word in report.text


def test_prediction_is_that_of_the_dry_run() -> None:
    from allometry.launch.runs.dry_run import planned

    report = counted(Memory(config="preset:demo", overrides=SMALL, world_size=2))
    dry = planned(load("preset:demo", list(SMALL)), 2).facts["memory_bytes_per_rank"]
    assert {key: report.facts[key] for key in dry} == dry
    assert report.facts["total"] == max(report.facts["moments"].values())
    assert sum(dry["peak"].values()) == dry["total"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rank": 2, "world_size": 2}, "--rank=2 is not below --world-size=2"),
        ({"device": "tpu"}, "--device=tpu is not known; use cuda or cpu"),
    ],
)
def test_bad_requests(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        counted(Memory(config="preset:demo", overrides=SMALL, **asked))


def test_a_probe_that_would_not_fit_is_refused() -> None:
    large = ("model.width=12288", "model.num_layers=400", "model.ffn_width=49152")
    heads = ("model.num_heads=96", "model.num_kv_heads=96")
    with pytest.raises(UserError, match=r"two real steps, about .* scale the run down"):
        counted(Memory(config="preset:demo", overrides=(*large, *heads), probe=True))
