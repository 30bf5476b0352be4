"""Changes allowed between launches of one run, and refusals by key."""

from collections.abc import Callable

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer.state.unchanged import check_unchanged

Make = Callable[..., RunConfig]


@pytest.mark.parametrize(
    "change",
    [
        "model.width=64",
        "optimizer.lr=0.5",
        "optimizer.weight_decay=0.0",
        "run.seed=4",
        "batch.sequences=16",
        "data.sequence_length=16",
        "data.continue_sources=true",
        "data.packing=concatenated",
        "training.compute_dtype=bf16",
        "training.clip_grad_norm=null",
        "parameterization.embedding_std=0.5",
    ],
)
def test_what_may_not_change_is_named(tiny: Make, change: str) -> None:
    with pytest.raises(UserError, match="may not change") as caught:
        check_unchanged(tiny(), tiny(change), step=5)
    assert change.split("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "run.folder=elsewhere",
        "parallel.timeout_s=5",
        "parallel.zero.stage=3",
        "batch.micro_batch_sequences=4",
        "checkpoint.every_steps=7",
        "record.tensorboard=true",
        "evaluation.every_steps=3",
        "data.sources.0.train=moved/up.train",
        "data.sources.1.weight=0.5",
        "data.sources.1.max_epochs=2",
        "data.replay={ratio: 0.5, sources: [down]}",
        "training.compile=true",
    ],
)
def test_what_may_change_may(tiny: Make, change: str) -> None:
    check_unchanged(tiny(), tiny(change), step=5)


def test_schedule_may_change_where_no_step_was_taken(tiny: Make) -> None:
    longer = tiny("training.total_steps=40")
    check_unchanged(tiny(), longer, step=14)  # still stable: WSD decays over the last 6 of 20
    with pytest.raises(UserError, match="step 15, already taken"):
        check_unchanged(tiny(), longer, step=15)
    with pytest.raises(UserError, match="already taken"):
        check_unchanged(tiny(), tiny("schedule.warmup_steps=2"), step=14)
    with pytest.raises(UserError, match="asks for 20 steps in all"):
        check_unchanged(longer, tiny(), step=25)
