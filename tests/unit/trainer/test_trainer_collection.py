"""Python's garbage collector is paused within steps, runs between them, and is restored."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from typing_extensions import override

from allometry.configs.run import RunConfig
from allometry.trainer.collection import GarbageCollection
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.train import train
from small_experts import experts_model

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.enable()
    yield
    gc.enable()
    gc.unfreeze()
    if frozen:
        gc.freeze()


class Watch(Callback):
    """Record whether the collector could run in each step; optionally raise a fault."""

    def __init__(self, fault_at: int | None = None) -> None:
        self.enabled: dict[int, bool] = {}
        self.fault_at = fault_at

    @override
    def before_step(self, step: int) -> None:
        self.enabled[step] = gc.isenabled()
        if step == self.fault_at:
            raise RuntimeError("planted")


def test_steps_are_not_interrupted(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    collect = gc.collect
    monkeypatch.setattr(GarbageCollection, "EVERY", 5)

    def noted(*generation: int) -> int:
        collected.append(len(watch.enabled))
        return collect(*generation)

    monkeypatch.setattr(gc, "collect", noted)
    watch = Watch()
    train(tiny("training.total_steps=12"), device=CPU, callbacks=[watch])
    assert [step for step, enabled in watch.enabled.items() if enabled] == [1, 2, 3]
    assert set(collected) >= {3, 5, 10}
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_that_fails_gives_the_collector_back(tiny: Make) -> None:
    with pytest.raises(RuntimeError, match="planted"):
        train(tiny(), device=CPU, callbacks=[Watch(fault_at=7)])
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_is_off_stays_off(tiny: Make) -> None:
    gc.disable()
    train(tiny("training.total_steps=6"), device=CPU, callbacks=[])
    assert not gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_a_process_has_frozen_stays_frozen(tiny: Make) -> None:
    gc.collect()
    gc.freeze()
    frozen = gc.get_freeze_count()
    train(tiny("training.total_steps=6"), device=CPU, callbacks=[])
    assert gc.isenabled()
    assert 0.9 * frozen < gc.get_freeze_count() <= frozen


def test_a_resumed_launch_counts_its_own_first_steps(tiny: Make) -> None:
    config = tiny("training.total_steps=12")
    train(config, device=CPU, callbacks=[], stop_at_step=6)
    watch = Watch()
    train(config, device=CPU, callbacks=[watch])
    assert [step for step, enabled in watch.enabled.items() if enabled] == [7, 8, 9]


def tensors_in_cycles(config: RunConfig, *, planted: bool = False) -> list[int]:
    """Return the number of tensors per step that only the collector could free."""
    found: list[int] = []

    class Cycles(Callback):
        @override
        def after_step(self, step: int) -> None:
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
            cycle: list[Any] = [torch.ones(1)]
            if planted:
                cycle.append(cycle)

        @override
        def before_step(self, step: int) -> None:
            gc.collect()
            found.append(sum(isinstance(x, torch.Tensor) for x in gc.garbage))
            gc.garbage.clear()

    try:
        train(config, device=CPU, callbacks=[Cycles()])
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    return found[3:]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        (f"model={json.dumps(experts_model())}", "optimizer.kind=muonh"),
        ("data.kind=documents", "data.max_document_tokens=56"),
        ("training.activation_checkpointing=full", "parallel.zero.stage=2"),
    ],
    ids=["sequences", "experts", "documents", "zero2"],
)
def test_a_step_leaves_no_tensor_in_a_cycle(tiny: Make, settings: tuple[str, ...]) -> None:
    """Otherwise memory would grow until the next collection."""
    config = tiny(*settings, "training.total_steps=8", "batch.micro_batch_sequences=1")
    assert tensors_in_cycles(config) == [0] * 5


def test_a_tensor_in_a_cycle_is_found(tiny: Make) -> None:
    assert min(tensors_in_cycles(tiny("training.total_steps=8"), planted=True)) >= 1
