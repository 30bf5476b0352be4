"""Check the config differences between two launches of a run, or a run and its branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from allometry.configs.bad_steps import names_step
from allometry.configs.errors import UserError
from allometry.configs.lineage import Parent, covers
from allometry.configs.run import RunConfig
from allometry.optim.schedule import schedules_of
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.stages import StagePlace, place_at, place_of, places_of
from allometry.trainer.state.changed import (
    MIXTURE,
    SKIPS,
    Difference,
    check_named,
    check_names,
    check_possible,
    differences,
    is_possible,
)

# The trained parameters and their rates may change in mid-run; the change is an event.
OVERRIDES = "optimizer.overrides"
_LENGTHS = ("training.total_steps", "training.total_tokens")
CONTINUES = "may not change when a run continues; restore it or choose another run.folder"


def check_unchanged(
    old: RunConfig, new: RunConfig, step: int, sections: tuple[str, ...] | None = None
) -> None:
    """Raise UserError if a change affects the results of a run that has taken ``step`` steps.

    With ``sections`` only these sections or keys may not change. The mixture may change: samples
    already read stay the same, and each source continues at its next sample (``Reading.resumed``).
    ``optimizer.overrides`` (``changed_overrides``) and the choice of future steps without an update
    may change, too.
    """
    _check_skips(old, new, step, f"with which {old.run.folder} was started")
    for begun, change in _differences_of_stages(old, new, step):
        may = begun.goes_on and any(covers(name, change.key) for name in (*MIXTURE, OVERRIDES))
        may = may or any(covers(name, change.key) for name in SKIPS)
        if sections is not None:
            may = may or not any(covers(one, change.key) for one in sections)
        if not may:
            key, before, after = change
            at = begun.at
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


def check_branch(parent: RunConfig, branch: RunConfig, link: Parent) -> None:
    """Raise UserError if a branch does not continue its parent's first steps as declared.

    A branch may differ only in the keys of ``link.changes``. Unless these include ``schedule``, its
    first ``link.step`` steps must have the same fractions of the peak rate.

    Raises:
        UserError: names the key that differs, or the first step with another learning rate.
    """
    step, folder = link.step, link.folder
    _check_skips(parent, branch, step, f"of run.parent.folder={folder}")
    _check_streams(parent, branch, folder)
    check_names(link, _at(parent, step), _at(branch, step))
    for begun, change in _differences_of_stages(parent, branch, step):
        if not begun.goes_on and _is_of_branch(change):
            raise UserError(
                f"{begun.at}{change.key}={change.after!r} differs from {change.before!r} of "
                f"run.parent.folder={folder}, where that stage has ended; restore it or leave "
                "run.parent out"
            )
    changes = branch_changes(parent, branch, step)
    if place_at(places_of(branch), step).steps_before == step:  # a stage declares its own changes
        changes = tuple(change for change in changes if is_possible(change.key))
    check_possible(changes, f"of run.parent.folder={folder}", f"folder: {folder}, step: {step}")
    check_named(changes, link)
    if _check_length(branch, step) == step:
        raise UserError(
            f"run.parent.step={step} is the last of the branch's {step} steps, so that none is "
            "left to take; raise training.total_steps (or total_tokens) or branch earlier"
        )
    other = None
    if not link.may_change("schedule"):  # other optimizer changes are named explicitly
        alike = branch.model_copy(update={"optimizer": parent.optimizer})
        other = rates_part(parent, alike, step)
    if other is not None:
        begun, count = parent.run.schedule_from, "have the schedule count from the branch"
        raise UserError(
            f"{_why(parent, branch)} of run.parent.folder={folder} gave step {other} "
            f"another learning rate than this run would have had, so that it cannot branch after "
            f"step {step}; "
            + (f"branch before step {other}, " if other > 1 else "")
            + (f"go on with its schedule by run.parent.schedule_from={begun}, " if begun else "")
            + ("" if branch.stages else f"{count} by run.parent.changes=[schedule], ")
            + "or leave run.parent out"
        )


def branch_changes(
    parent: RunConfig, branch: RunConfig, step: int, *, rates: bool = False
) -> tuple[Difference, ...]:
    """Return the config differences of a branch from its parent at ``step``.

    With ``rates`` also the length, which with training stages is the total over all stages.
    """
    before, after = _before(parent, branch, step), _at(branch, step)
    found = [one for one in differences(before, after, rates=rates) if _is_of_branch(one)]
    if parent.stages or branch.stages:
        found = [one for one in found if one.key not in _LENGTHS]
        was, now = (places_of(run)[-1].last_step for run in (parent, branch))
        found += [Difference(_LENGTHS[0], was, now)] if rates and was != now else []
    return tuple(found)


def _check_skips(old: RunConfig, new: RunConfig, step: int, of: str) -> None:
    """Raise UserError if ``skip_steps`` changes for a step already taken or passed over."""
    was, now = old.training.skip_steps, new.training.skip_steps
    taken = range(1, step + 1) if was != now else ()
    other = next((one for one in taken if names_step(was, one) != names_step(now, one)), None)
    if other is not None:
        way = "is" if names_step(now, other) else "is not"
        raise UserError(
            f"training.skip_steps differs from that {of}: step {other} {way} among them now, and "
            f"{step} steps were taken; restore it, or go back to a checkpoint before that step "
            "with run.resume=step-N"
        )


def _check_streams(parent: RunConfig, branch: RunConfig, folder: str) -> None:
    """Raise UserError if the streams change in another way than from one stream to several."""
    was, now = parent.model.streams, branch.model.streams
    if was is not None and was != now:
        raise UserError(
            f"model.streams differs from that of run.parent.folder={folder}, which has "
            f"{was.count} streams: a branch can add streams to a run with one, but not change "
            "them; restore model.streams"
        )


def _is_of_branch(change: Difference) -> bool:
    return not covers("run", change.key) or change.key == "run.seed"


def changed_overrides(old: RunConfig, new: RunConfig, step: int) -> dict[str, int]:
    """Return the number of parameters that changed ``optimizer.overrides`` affect after ``step``.

    The counts are by change: frozen, trained again, and multiplied differently; empty if all are 0.
    """
    old, new = _before(old, new, step), _at(new, step)
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


def _at(run: RunConfig, step: int) -> RunConfig:
    """Return the config of a run after ``step`` steps, in the current training stage."""
    return place_at(places_of(run), step).config


def _before(old: RunConfig, new: RunConfig, step: int) -> RunConfig:
    """Return the config of ``old`` at ``step`` with which ``new`` is compared.

    If a stage ends at ``step`` but continues in ``new``, this is the ended stage, else the next.
    """
    goes_on = place_at(places_of(new), step).steps_before < step
    return place_of(old, step).config if goes_on else _at(old, step)


def rates_part(old: RunConfig, new: RunConfig, step: int) -> int | None:
    """Return the first of ``step`` steps at which two runs' rates differ; None if all are equal.

    Schedules are not sufficient: some parameterizations scale rates with the length of the run.
    """
    was, now = schedules_of(old), schedules_of(new)
    begun, other = was[0].first_step - 1, now[0].first_step - 1
    if min(step, begun) != min(step, other):  # one run does not describe its first steps
        return min(begun, other) + 1
    last = min(step, begun)
    for one, place in zip(places_of(old), places_of(new), strict=False):
        at, first = one.number - 1, one.steps_before + 1
        if first <= step and not _same_multipliers(old, new, at):
            return first
        last = min(step, one.last_step, place.last_step)
        done = max(first, was[at].first_step)
        while done <= last:
            if was[at].fraction(done) != now[at].fraction(done):
                return done
            done = min(was[at].flat_until(done), now[at].flat_until(done)) + 1
        if last == step or last < max(one.last_step, place.last_step):
            break
    return None if last == step else last + 1


class _Begun(NamedTuple):
    """A stage that had begun: as it was and as it is now; ``goes_on`` if it continues."""

    was: StagePlace
    now: StagePlace
    goes_on: bool

    @property
    def at(self) -> str:
        """Prefix of a key in messages: the stage, empty without stages."""
        return "" if self.now.name is None else f"stage {self.now.name}: "


def _stages_begun(old: RunConfig, new: RunConfig, step: int) -> Iterator[_Begun]:
    """Yield the stages that had begun by ``step``.

    Raises:
        UserError: such a stage was removed, or would have ended at another step.
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
        yield _Begun(one, other, other.name is None or other.last_step > step)


def _differences_of_stages(
    old: RunConfig, new: RunConfig, step: int
) -> Iterator[tuple[_Begun, Difference]]:
    """Yield the differences of the stages begun that affect results."""
    for begun in _stages_begun(old, new, step):
        for change in differences(begun.was.config, begun.now.config):
            yield begun, change


def _check_length(config: RunConfig, step: int) -> int:
    """Return the length of a run, which must not be less than the ``step`` steps taken."""
    total = schedules_of(config)[-1].total_steps
    if total < step:
        raise UserError(
            f"training asks for {total} steps in all, but the run has already taken {step}; raise "
            "training.total_steps (or total_tokens), or add to its stages"
        )
    return total


def _same_multipliers(old: RunConfig, new: RunConfig, stage: int) -> bool:
    """Return True if all parameters that both runs have follow the same multipliers in a stage."""
    was, now = _multipliers(old, stage), _multipliers(new, stage)
    return all(was[name] == now[name] for name in was.keys() & now.keys())


def _multipliers(config: RunConfig, stage: int) -> dict[str, tuple[float, float, float, float]]:
    """Return the multipliers of rate, weight decay, epsilon and 1 - beta2 in a stage, by parameter.

    Overrides are ignored.
    """
    whole = Parameterization.of_run(config, stage)
    assert whole.optimizer is not None
    plain = whole.optimizer.model_copy(update={"overrides": ()})
    rules = Parameterization(whole.config, whole.model, plain, whole.scale)
    resolved = {spec.name: rules.resolve(spec) for spec in inventory(config.model)}
    return {
        name: (one.lr, one.weight_decay, one.eps, one.forgetting) for name, one in resolved.items()
    }


def _with_overrides(config: RunConfig, of: RunConfig) -> RunConfig:
    """Return ``config`` with the overrides of another run."""
    optimizer = config.optimizer.model_copy(update={"overrides": of.optimizer.overrides})
    return config.model_copy(update={"optimizer": optimizer})


def _why(old: RunConfig, new: RunConfig) -> str:
    """Return the keys that cause the difference in the rates of two runs."""
    if not _same_multipliers(old, new, 0):
        return (
            f"parameterization.kind={new.parameterization.kind} scales learning rates with the "
            "length of the run: training.total_steps or total_tokens"
        )
    if old.stages or new.stages:
        return "schedule, length or optimizer.lr of a stage (its warm-up begins at the last rate)"
    return "schedule or training.total_steps/total_tokens"
