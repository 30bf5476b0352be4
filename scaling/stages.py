"""Where the stages of a run lie: their steps, and which sequences they take."""

# Steps are counted from 1 over the whole run.

from __future__ import annotations

from dataclasses import dataclass

from allometry.configs.run import RunConfig
from allometry.scaling.batch import BatchPlan, total_steps


@dataclass(frozen=True)
class StagePlace:
    """A stage of a run: the run as it is in the stage, and its place among the others.

    ``number`` counts from 1; ``name`` is None for a run without stages, which is one. ``local`` is
    the stage's batch counted from its own first step, ``batch`` that of the run up to its end.
    """

    number: int
    name: str | None
    config: RunConfig
    steps_before: int
    steps: int
    local: BatchPlan
    batch: BatchPlan
    states_anew: bool = False  # what the optimizer remembers does not go on

    @property
    def last_step(self) -> int:
        """The last step of the stage."""
        return self.steps_before + self.steps

    @property
    def first_sequence(self) -> int:
        """Sequences of all stages before it."""
        return self.batch.sequences_before(self.steps_before + 1)

    @property
    def asked_tokens(self) -> int:
        """Its length as asked for, which whole steps may exceed."""
        return self.config.training.total_tokens or self.local.tokens_after(self.steps)


def places_of(config: RunConfig) -> tuple[StagePlace, ...]:
    """Return the stages of a run, in order; one for a run without."""
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
    """Return the stage that a checkpoint at ``step`` was trained in last."""
    return place_at(places_of(config), max(step - 1, 0))


def place_at(places: tuple[StagePlace, ...], steps_taken: int) -> StagePlace:
    """Return the stage of the step after ``steps_taken``; the last one at the run's end."""
    return next((one for one in places if steps_taken < one.last_step), places[-1])
