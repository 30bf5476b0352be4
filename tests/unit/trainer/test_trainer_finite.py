"""No checkpoint of non-finite parameters is written, and none is resumed from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer import save
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.step import StepOutcome, TrainStep
from allometry.trainer.train import train

Make = Callable[..., RunConfig]
EVERY_3 = ("checkpoint={every_steps: 3, keep_last: 1}", "training.total_steps=12")


@contextmanager
def update_of_step_6_breaks() -> Iterator[None]:
    """The update leaves a NaN in a parameter, which its loss and gradients do not show."""
    take = TrainStep.__call__

    def broken(self: TrainStep, step: int, batches: Sequence[DeviceBatch]) -> StepOutcome:
        outcome = take(self, step, batches)
        if step == 6:
            with torch.no_grad():
                *_, (_, last) = self.parallel.named_parameters()
                last.view(-1)[0] = torch.nan
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", broken)
        yield


def names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.run.folder) / "checkpoints").glob("step-*"))


def test_what_an_update_broke_is_not_saved(tiny: Make, tmp_path: Path) -> None:
    config = tiny(*EVERY_3, folder=tmp_path / "run")
    refusal = pytest.raises(UserError, match=r"step 6: its update left model\.\S+ not finite")
    with update_of_step_6_breaks(), refusal as said:
        train(config, callbacks=[])
    assert "step-3 is kept" in str(said.value)
    assert names(config) == ["step-3"]
    train(config, callbacks=[])  # without the fault
    assert names(config) == ["step-12"]


def test_a_checkpoint_that_is_not_finite_is_named(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*EVERY_3, folder=tmp_path / "run")
    with monkeypatch.context() as patch, update_of_step_6_breaks():
        patch.setattr(save, "not_finite", lambda *_: None)
        train(config, callbacks=[], stop_at_step=6)
    with pytest.raises(UserError, match=r"step-6: model\.\S+ is not finite"):
        train(config, callbacks=[])
