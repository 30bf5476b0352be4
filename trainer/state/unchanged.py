"""What may differ between two launches of one run, or between a run and its branch."""

from __future__ import annotations

from allometry.configs.errors import UserError
from allometry.configs.lineage import Parent, covers
from allometry.configs.run import RunConfig
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.state.changed import (
    MIXTURE,
    Difference,
    check_named,
    check_names,
    check_possible,
    differences,
)

# Which parameters are trained, and how fast, may change where a run goes on, which is an event.
OVERRIDES = "optimizer.overrides"
CONTINUES = "may not change when a run continues; restore it or choose another run.folder"


def check_unchanged(
    old: RunConfig, new: RunConfig, step: int, sections: tuple[str, ...] | None = None
) -> None:
    """Refuse a change to what a run computes, naming the key; ``step`` steps have been taken.

    With ``sections`` only these, or single keys, may not change. The mixture may: samples already
    read stay what they were, and each source goes on at its next one (``Reading.resumed``). So may
    ``optimizer.overrides`` (``changed_overrides``).
    """
    for key, before, after in differences(old, new):
        settled = not any(covers(name, key) for name in (*MIXTURE, OVERRIDES))
        if sections is not None:
            settled = any(covers(one, key) for one in sections) and not covers(OVERRIDES, key)
        if settled:
            raise UserError(
                f"{key}={after!r} differs from {before!r}, with which {old.run.folder} was "
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


def check_branch(parent: RunConfig, branch: RunConfig, link: Parent) -> None:
    """Refuse a branch that would not go on from its parent's first steps, or not as it says.

    It differs in what ``link.changes`` names alone. Without ``schedule`` among these it would have
    taken the first ``link.step`` steps at the same fractions of the peak rate.

    Raises:
        UserError: names the key that differs, or the first step with another learning rate.
    """
    step, folder = link.step, link.folder
    check_names(link, parent, branch)
    changes = branch_changes(parent, branch)
    check_possible(changes, f"of run.parent.folder={folder}", f"folder: {folder}, step: {step}")
    check_named(changes, link)
    if _check_length(branch, step) == step:
        raise UserError(
            f"run.parent.step={step} is the last of the branch's {step} steps, so that none is "
            "left to take; raise training.total_steps (or total_tokens) or branch earlier"
        )
    other = None
    if not link.may_change("schedule"):  # what else the optimizer has is named
        alike = branch.model_copy(update={"optimizer": parent.optimizer})
        other = rates_part(parent, alike, step)
    if other is not None:
        begun = parent.run.schedule_from
        raise UserError(
            f"{_why(parent, branch)} of run.parent.folder={folder} gave step {other} "
            f"another learning rate than this run would have had, so that it cannot branch after "
            f"step {step}; "
            + (f"branch before step {other}, " if other > 1 else "")
            + (f"go on with its schedule by run.parent.schedule_from={begun}, " if begun else "")
            + "have the schedule count from the branch by run.parent.changes=[schedule], or leave "
            "run.parent out"
        )


def branch_changes(
    parent: RunConfig, branch: RunConfig, *, rates: bool = False
) -> tuple[Difference, ...]:
    """Return what a branch has otherwise than its parent, but for where it branches."""
    different = differences(parent, branch, rates=rates)
    return tuple(one for one in different if not covers("run", one.key) or one.key == "run.seed")


def changed_overrides(old: RunConfig, new: RunConfig) -> dict[str, int]:
    """How many parameters other ``optimizer.overrides`` freeze, train again and multiply otherwise;
    empty where none is.
    """
    rules = [Parameterization.of_run(_with_overrides(new, one)) for one in (old, new)]
    found = {"frozen": 0, "trained": 0, "multiplied": 0}
    for spec in inventory(new.model):
        before, after = (each.resolve(spec) for each in rules)
        if before.frozen != after.frozen:
            found["frozen" if after.frozen else "trained"] += 1
        elif not after.frozen:
            changed = (before.lr, before.weight_decay) != (after.lr, after.weight_decay)
            found["multiplied"] += changed
    return found if any(found.values()) else {}


def rates_part(old: RunConfig, new: RunConfig, step: int) -> int | None:
    """The first of ``step`` steps whose learning rates differ between two runs; None if none does.

    Not the schedule alone: some parameterizations scale rates with the length of the run.
    """
    if step and _multipliers(old) != _multipliers(new):
        return 1
    plan = BatchPlan(old.batch, old.data.sequence_length)
    was, now = resolve_schedule(old, plan), resolve_schedule(new, plan)
    begun, other = was.begin_step, now.begin_step
    if min(step, begun) != min(step, other):  # one of them does not say how its first steps were
        return min(begun, other) + 1
    shared = min(step, was.total_steps, now.total_steps)
    different = (s for s in range(begun + 1, shared + 1) if was.fraction(s) != now.fraction(s))
    return next(different, None if shared == step else shared + 1)


def _check_length(config: RunConfig, step: int) -> int:
    """The length of a run that has taken ``step`` steps, which may not be less."""
    plan = BatchPlan(config.batch, config.data.sequence_length)
    total = resolve_schedule(config, plan).total_steps
    if total < step:
        raise UserError(
            f"training asks for {total} steps in all, but the run has already taken {step}; raise "
            "training.total_steps (or total_tokens)"
        )
    return total


def _multipliers(config: RunConfig) -> list[tuple[float, float, float, float]]:
    """What multiplies rate, decay, epsilon and 1 - beta2 of each parameter, overrides aside."""
    rules = Parameterization.of_run(_with_overrides(config, None))
    resolved = [rules.resolve(spec) for spec in inventory(config.model)]
    return [(one.lr, one.weight_decay, one.eps, one.forgetting) for one in resolved]


def _with_overrides(config: RunConfig, of: RunConfig | None) -> RunConfig:
    """``config`` with the overrides of another run, or without any."""
    overrides = () if of is None else of.optimizer.overrides
    optimizer = config.optimizer.model_copy(update={"overrides": overrides})
    return config.model_copy(update={"optimizer": optimizer})


def _why(old: RunConfig, new: RunConfig) -> str:
    """The keys by which the rates of two runs differ."""
    if _multipliers(old) != _multipliers(new):
        return (
            f"parameterization.kind={new.parameterization.kind} scales learning rates with the "
            "length of the run: training.total_steps or total_tokens"
        )
    return "schedule or training.total_steps/total_tokens"
