"""What may differ between two launches of one run, or between a run and its branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.optim.schedule import schedules_of
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.stages import StagePlace, places_of

# What changes how a run is carried out and recorded but not what it computes. The length of the run
# and its schedule may change as long as the steps already taken used the same learning rates.
FREE = (
    "run.folder",
    "run.resume",
    "parallel",
    "evaluation",
    "checkpoint",
    "record",
    "batch.micro_batch_sequences",
    "training.compile",
    "training.cuda_graphs",
    "training.activation_checkpointing",
    "training.activation_offload",
    "training.deterministic",
    "kernels",
    "data.tokenizer",
    "training.total_steps",
    "training.total_tokens",
    "schedule",
)
# The paths of a source's files may change too: their contents are compared by fingerprint.
_PATHS = ("train", "validation")
# What of a source says how much of it is read, which may change where a run goes on.
_MIXTURE = ("weight", "max_epochs")
# How states are kept may change where a run branches: they are converted, which is an event.
BRANCH_FREE = ("run.parent", "optimizer.states.")
CONTINUES = "may not change when a run continues; restore it or choose another run.folder"
BRANCHES = "may not differ in a run that branches from it; restore it or leave run.parent out"


def check_unchanged(
    old: RunConfig, new: RunConfig, step: int, sections: tuple[str, ...] | None = None
) -> None:
    """Refuse a change to what a run computes, naming the key; ``step`` steps have been taken.

    With ``sections`` only these, or single keys, may not change. The mixture may: samples already
    read stay what they were, and each source goes on at its next one (``Reading.resumed``).
    """
    for at, key, before, after in _differences_of_stages(old, new, step):
        if sections is None or f"{key}.".startswith(tuple(f"{one}." for one in sections)):
            raise UserError(
                f"{at}{key}={after!r} differs from {before!r}, with which {old.run.folder} was "
                f"started, and {CONTINUES}"
            )
    _check_length(new, step)
    taken = rates_part(old, new, step)
    if taken is not None:
        raise UserError(
            f"{_why(old, new)} changed so that step {taken}, already taken, would have had another "
            "learning rate; restore it, or go back to a checkpoint before that step with "
            "run.resume=step-N"
        )


def check_branch(parent: RunConfig, branch: RunConfig, step: int) -> None:
    """Refuse a branch that would not have taken its parent's first ``step`` steps alike.

    Raises:
        UserError: names the key that differs, or the first step with another learning rate.
    """
    for at, key, before, after in _differences_of_stages(parent, branch, step):
        if not key.startswith(BRANCH_FREE):
            raise UserError(
                f"{at}{key}={after!r} differs from {before!r} of run.parent.folder="
                f"{parent.run.folder}, and {BRANCHES}"
            )
    if _check_length(branch, step) == step:
        raise UserError(
            f"run.parent.step={step} is the last of the branch's {step} steps, so that none is "
            "left to take; raise training.total_steps (or total_tokens) or branch earlier"
        )
    other = rates_part(parent, branch, step)
    if other is not None:
        raise UserError(
            f"{_why(parent, branch)} of run.parent.folder={parent.run.folder} gave step {other} "
            f"another learning rate than this run would have had, so that it cannot branch after "
            f"step {step}; "
            + (f"branch before step {other} or " if other > 1 else "")
            + "leave run.parent out"
        )


def differences(old: RunConfig, new: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """What two runs compute differently, as (key, old, new), their schedules and lengths aside."""
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        # Dropout draws its masks by micro-batch.
        masks = key == "batch.micro_batch_sequences" and new.model.dropout > 0
        if before.get(key) != after.get(key) and (masks or not _is_free(key)):
            yield key, before.get(key), after.get(key)


def rates_part(old: RunConfig, new: RunConfig, step: int) -> int | None:
    """The first of ``step`` steps whose learning rates differ between two runs; None if none does.

    Not the schedule alone: some parameterizations scale rates with the length of the run.
    """
    was, now, last = schedules_of(old), schedules_of(new), 0
    for one, other in zip(places_of(old), places_of(new), strict=False):
        at, first = one.number - 1, one.steps_before + 1
        last = min(step, one.last_step, other.last_step)
        if first <= step and _multipliers(old, at) != _multipliers(new, at):
            return first
        for done in range(first, last + 1):
            if was[at].fraction(done) != now[at].fraction(done):
                return done
        if last == step or last < max(one.last_step, other.last_step):
            break
    return None if last == step else last + 1


def _stages_begun(
    old: RunConfig, new: RunConfig, step: int
) -> Iterator[tuple[StagePlace, StagePlace]]:
    """The stages that had begun by ``step``, as they were and as they are now.

    Raises:
        UserError: a stage that had begun is no more, or would have ended at another step.
    """
    was, now = places_of(old), places_of(new)
    for one in was:
        if one.steps_before >= step and one.number > 1:
            return
        other = now[one.number - 1] if one.number <= len(now) else None
        staged = one.name is not None or (other is not None and other.name is not None)
        if staged and (other is None or min(other.last_step, step) != min(one.last_step, step)):
            name = "the run, which had no stages" if one.name is None else f"stage {one.name}"
            wanted = "is gone" if other is None else f"would have ended at {other.last_step}"
            raise UserError(
                f"stages: of the {step} steps taken, those from {one.steps_before + 1} to "
                f"{min(one.last_step, step)} were taken in {name}, which now {wanted}; only what "
                f"lies after step {step} may change: restore the rest or choose another run.folder"
            )
        assert other is not None
        yield one, other


def _differences_of_stages(
    old: RunConfig, new: RunConfig, step: int
) -> Iterator[tuple[str, str, Any, Any]]:
    """``differences`` of the stages begun, after the stage; of the last one but its mixture."""
    for one, other in _stages_begun(old, new, step):
        now = other.config
        if other.name is None or other.last_step > step:
            now = _with_mixture_of(one.config, now)
        for key, before, after in differences(one.config, now):
            yield "" if other.name is None else f"stage {other.name}: ", key, before, after


def _check_length(config: RunConfig, step: int) -> int:
    """The length of a run that has taken ``step`` steps, which may not be less."""
    total = schedules_of(config)[-1].total_steps
    if total < step:
        raise UserError(
            f"training asks for {total} steps in all, but the run has already taken {step}; raise "
            "training.total_steps (or total_tokens), or add to its stages"
        )
    return total


def _multipliers(config: RunConfig, stage: int = 0) -> list[tuple[float, float, float, float]]:
    """What multiplies rate, decay, epsilon and 1 - beta2 of each parameter in a stage."""
    rules = Parameterization.of_run(config, stage)
    resolved = [rules.resolve(spec) for spec in inventory(config.model)]
    return [(one.lr, one.weight_decay, one.eps, one.forgetting) for one in resolved]


def _why(old: RunConfig, new: RunConfig) -> str:
    """The keys by which the rates of two runs differ."""
    if _multipliers(old) != _multipliers(new):
        return (
            f"parameterization.kind={new.parameterization.kind} scales learning rates with the "
            "length of the run: training.total_steps or total_tokens"
        )
    return "schedule or training.total_steps/total_tokens"


def _is_free(key: str) -> bool:
    parts = key.split(".")
    if parts[:2] == ["data", "sources"] and parts[-1] in _PATHS:
        return True
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _with_mixture_of(old: RunConfig, new: RunConfig) -> RunConfig:
    """``new`` with the sources of ``old``, as far as it has them, in its order and shares."""
    there = {source.name: source for source in new.data.sources}
    sources = [
        there.get(source.name, source).model_copy(
            update={key: getattr(source, key) for key in _MIXTURE}
        )
        for source in old.data.sources
    ]
    update = {"sources": tuple(sources), "replay": old.data.replay}
    return new.model_copy(update={"data": new.data.model_copy(update=update)})


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """A nested description as {dotted key: value}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= leaves(inner, f"{path}.{key}" if path else str(key))
    return found
