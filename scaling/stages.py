"""Positions of a run's stages: their steps and sequences."""

# Steps are counted from 1 over the complete run.

from __future__ import annotations

from dataclasses import dataclass

from allometry.configs.run import RunConfig
from allometry.scaling.batch import BatchPlan, total_steps


@dataclass(frozen=True)
class StagePlace:
    """A stage of a run: the config in effect, and its position among the stages.

    ``number`` counts from 1; a run without stages has one, whose ``name`` is None. ``local`` is the
    stage's batch plan counted from its own first step, ``batch`` the run's batch plan up to the end
    of the stage.
    """

    number: int
    name: str | None
    config: RunConfig
    steps_before: int
    steps: int
    local: BatchPlan
    batch: BatchPlan
    states_anew: bool = False  # optimizer states are reset at its start

    @property
    def last_step(self) -> int:
        """Last step of the stage."""
        return self.steps_before + self.steps

    @property
    def first_sequence(self) -> int:
        """Number of sequences in all earlier stages."""
        return self.batch.sequences_before(self.steps_before + 1)

    @property
    def asked_tokens(self) -> int:
        """Configured length in tokens, which complete steps may exceed."""
        return self.config.training.total_tokens or self.local.tokens_after(self.steps)


def places_of(config: RunConfig) -> tuple[StagePlace, ...]:
    """Return the stages of a run, in order; a run without stages has one."""
    places: list[StagePlace] = []
    for stage, one in zip(config.stages or (None,), config.of_stages(), strict=True):
        local = BatchPlan(one.batch, one.data.sequence_length)
        before = places[-1] if places else None
        done = before.last_step if before else 0
        batch = local if before is None else local.after(before.batch, done)
        steps = total_steps(one.training, local)
        name, anew = (stage.name, "optimizer" not in stage.keep) if stage else (None, False)
        places.append(StagePlace(len(places) + 1, name, one, done, steps, local, batch, anew))
    return tuple(places)


def place_of(config: RunConfig, step: int) -> StagePlace:
    """Return the stage that trained the last step before a checkpoint at ``step``."""
    return place_at(places_of(config), max(step - 1, 0))


def place_at(places: tuple[StagePlace, ...], steps_taken: int) -> StagePlace:
    """Return the stage of the step after ``steps_taken``; the last one at the run's end."""
    return next((one for one in places if steps_taken < one.last_step), places[-1])
