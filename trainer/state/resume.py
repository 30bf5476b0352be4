"""Decide how a launch continues in its run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.sources import Sources
from allometry.optim.schedule import schedules_of
from allometry.parallel.agree import from_main_rank, on_all_ranks
from allometry.parallel.mesh import Mesh
from allometry.trainer.state import checkpoint
from allometry.trainer.state.branch import (
    Taken,
    copy_share,
    discard,
    stored_config,
    take,
)
from allometry.trainer.state.changed import Difference
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.identity import Identity, identity_for
from allometry.trainer.state.initial import Importer, check_converted, take_initial, unusable
from allometry.trainer.state.integrity import damage_of_contents
from allometry.trainer.state.local import LocalCopies
from allometry.trainer.state.local_choice import Offer, Offered, fetch, find
from allometry.trainer.state.reading import continued, weights_only, with_reading
from allometry.trainer.state.refused import check_not_refused
from allometry.trainer.state.rewinds import with_passed
from allometry.trainer.state.room import check_room
from allometry.trainer.state.same_files import check_read
from allometry.trainer.state.unchanged import branch_changes, changed_overrides, check_unchanged

T = TypeVar("T")
_SETTLED = ("model", "parameterization")


@dataclass(frozen=True)
class Start:
    """State from which a launch begins; ``checkpoint`` is None with random initial weights.

    ``branched``: the checkpoint was just taken over from ``run.parent``. ``changes``: config
    differences from here on; ``overrides``: number of parameters that changed overrides affect.
    ``next_stage``: the checkpoint was just saved, and the launch continues in the next training
    stage. ``identity``: of the run. ``new``: the folder is new. Before ``enter`` the checkpoint of
    another run has a temporary name, and no checkpoint is abandoned and no row dropped. ``offer``:
    the local copies, of which ``checkpoint`` is this rank's, while ``saved`` is the newest
    checkpoint of the folder; ``unused``: why other copies are not used.
    """

    checkpoint: Path | None
    facts: dict[str, Any] | None
    cleaned: list[str]
    abandoned: list[str]
    dropped_rows: int
    identity: Identity
    new: bool = False
    tokenizer: Path | None = None
    branched: bool = False
    changes: tuple[Difference, ...] = ()
    overrides: dict[str, int] = field(default_factory=dict)
    next_stage: bool = False
    offer: Offer | None = None
    saved: Path | None = None
    unused: tuple[str, ...] = ()

    @property
    def saved_step(self) -> int | None:
        """Step of the newest checkpoint of a trained state; None without one."""
        if self.offer is None:
            return self.step or None
        return None if self.saved is None else checkpoint.step_of(self.saved) or None

    @property
    def step(self) -> int:
        """Number of steps already taken."""
        return int(self.facts["step"]) if self.facts else 0

    @property
    def weights_only(self) -> bool:
        """True if the run begins with imported weights: see ``reading.weights_only``."""
        return weights_only(self.facts)


def start_events(config: RunConfig, start: Start) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events that record the beginning of a launch."""
    parent, facts = config.run.parent, start.facts or {}
    told = ("run", "source", "step", "hash")
    if start.weights_only:
        origin = {key: facts["origin"][key] for key in told if key in facts["origin"]}
        if "step" in origin:
            origin["at"] = origin.pop("step")
        keep = facts.get(
            "keep", ["weights", "optimizer"] if facts.get("optimizer") else ["weights"]
        )
        yield "initial", {**origin, "keep": keep, "stated": config.run.initial is not None}
    if start.checkpoint is None or (start.weights_only and config.run.initial is not None):
        yield "started", {"dropped_rows": start.dropped_rows}
    elif start.branched and parent is not None:
        yield "branched", {"parent": parent.folder}
    else:
        found = {"checkpoint": start.checkpoint.name, "dropped_rows": start.dropped_rows}
        if start.offer is not None:
            found |= {"local": True, "replicas_of": start.offer.from_others}
        yield "resumed", found
    if start.unused:
        yield "local_copies_unused", {"reasons": list(start.unused)}


@dataclass(frozen=True)
class _Choice:
    """Candidate state for a launch; of the checkpoint ``path`` only file sizes were checked.

    In a ``new`` folder the checkpoint is linked from another run, under a temporary name.
    """

    path: Path | None
    facts: dict[str, Any] | None
    new: bool = False
    copies: tuple[tuple[Path, Path], ...] = ()  # (source, target) of files that could not be linked
    changes: tuple[Difference, ...] = ()
    tokenizer: Path | None = None
    overrides: dict[str, int] = field(default_factory=dict)
    offer: Offer | None = None  # newer local copies, to which the facts belong

    @classmethod
    def of(cls, taken: Taken, facts: dict[str, Any], overrides: dict[str, int]) -> _Choice:
        return cls(
            *(taken.path, facts, True, taken.copies, taken.changes, taken.tokenizer, overrides)
        )


def begin(
    folder: RunFolder,
    config: RunConfig,
    stream: Sources,
    mesh: Mesh,
    stop_at_step: int | None = None,
    check: Callable[[Sources], None] = lambda stream: None,
    importer: Importer | None = None,
    local: LocalCopies | None = None,
) -> Start:
    """Claim the folder and choose the state to continue from; every rank calls this.

    The caller calls ``enter`` after loading the checkpoint. ``check`` receives the data as the run
    would continue with them (``continued``) and may raise UserError; ``importer`` reads the model
    of ``run.initial.hf``.

    The main rank chooses a checkpoint by file sizes, and all ranks check their shares of its
    contents. A complete set of ``local`` copies is preferred if it is newer.

    Raises UserError on all ranks: the folder is in use, or not new as required; its checkpoint (or
    its parent's) is damaged or missing; ``stop_at_step`` has passed; or the config changes a key
    that may not change. The files of the run are unchanged then.
    """
    try:
        offered = Offered(None, ())
        if local is not None:
            offered = find(local, folder, _total_steps(config), config.record.every_steps)
        offer = offered.offer
        choice = from_main_rank(
            mesh,
            lambda: written(
                folder,
                lambda: _choose(folder, config, stream, stop_at_step, check, importer, offer),
            ),
            "choosing a checkpoint",
        )
        if choice.copies:
            on_all_ranks(
                mesh,
                lambda: written(
                    folder, lambda: copy_share(choice.copies, mesh.rank, mesh.world_size)
                ),
                "copying the parent's checkpoint",
            )
        problem = own = None
        if local is not None and choice.offer is not None:
            own = fetch(local, choice.offer)
        elif choice.path is not None:
            problem = damage_of_contents(choice.path, mesh)
        start = from_main_rank(
            mesh,
            lambda: written(folder, lambda: _start(folder, config, choice, problem)),
            "checking the run's folder",
        )
        unused = offer.unused if own is not None and offer is not None else offered.unused
        return replace(start, checkpoint=own or start.checkpoint, unused=unused)
    except BaseException:
        folder.withdraw()
        raise


def written(folder: RunFolder, work: Callable[[], T]) -> T:
    """Run ``work``, which writes into the folder; turn an OSError into a UserError."""
    try:
        return work()
    except OSError as error:
        raise checkpoint.unwritable(folder, error) from None


def next_stage(folder: RunFolder, before: Start, step: int, mesh: Mesh) -> Start:
    """Return the start of the training stage after ``step``, from the checkpoint just saved."""
    path = folder.checkpoints / f"step-{step}"
    facts = from_main_rank(mesh, lambda: checkpoint.read_facts(path), "reading a checkpoint")
    return Start(path, facts, [], [], 0, before.identity, next_stage=True)


def _choose(
    folder: RunFolder,
    config: RunConfig,
    stream: Sources,
    stop_at_step: int | None,
    check: Callable[[Sources], None],
    importer: Importer | None,
    offer: Offer | None,
) -> _Choice:
    """Claim the folder and choose the state to begin from, without reading shards."""

    def accept(facts: dict[str, Any], before: RunConfig) -> None:
        check_read(config, facts, stream.fingerprints())
        check(continued(stream, with_reading(facts, before)))

    parent, resume = config.run.parent, config.run.resume
    if folder.is_new():
        check_not_refused(folder)
        folder.check_config_is_there(parent.step if parent else 0)
    folder.claim()
    if folder.is_new():
        if resume not in ("auto", "never"):
            raise UserError(
                f"run.resume={resume}: {folder.path} holds no run to go back to; use "
                "run.resume=auto"
            )
        return _choose_new(folder, config, stream, stop_at_step, accept, check, importer)
    if resume == "never":
        raise UserError(
            f"run.folder={folder.path} already holds a run and run.resume=never; choose another "
            "folder or use run.resume=auto"
        )
    old = stored_config(folder)
    # A rewind by run.resume is done once: the same command then continues from there.
    back = resume != old.run.resume and resume != "auto"
    path = checkpoint.choose(folder, resume if back else "auto")
    if back or (offer and path and checkpoint.step_of(path) >= offer.step):
        offer = None
    if path is None and offer is None:
        _check_stop(folder, 0, stop_at_step)
        check(continued(stream, None))
        return _Choice(None, None)
    facts = offer.facts if offer else with_passed(folder, checkpoint.read_facts(path))
    _check_stop(folder, facts["step"], stop_at_step)
    if not facts.get("weights_only"):
        check_unchanged(old, config, facts["step"])
        accept(facts, old)
        return replace(_going_on(folder, old, config, path, facts), offer=offer)
    # Imported weights are not yet trained: only the keys that describe them may not change.
    settled = (*_SETTLED, "optimizer.kind") if facts.get("optimizer") else _SETTLED
    if old.run.initial is not None:
        settled = (*settled, "run.initial")
    elif config.run.initial is not None:
        check_converted(folder, config.run.initial, facts)
    check_unchanged(old, config, facts["step"], settled)
    accept(facts, old)
    return _Choice(path, facts)


def _going_on(
    folder: RunFolder, old: RunConfig, config: RunConfig, path: Path | None, facts: dict[str, Any]
) -> _Choice:
    """Return the choice of a run's own checkpoint, with the config changes at its step."""
    step = facts["step"]
    _check_rows(folder, step)
    if _is_first(folder, config):
        old = _parent_of(config) or old
    changes = branch_changes(old, config, step, rates=True)
    overrides = changed_overrides(old, config, step)
    return _Choice(path, with_reading(facts, old), changes=changes, overrides=overrides)


def _choose_new(
    folder: RunFolder,
    config: RunConfig,
    stream: Sources,
    stop_at_step: int | None,
    accept: Callable[[dict[str, Any], RunConfig], None],
    check: Callable[[Sources], None],
    importer: Importer | None,
) -> _Choice:
    """Choose the state from which a new run begins, and link its files into the folder."""
    parent, initial = config.run.parent, config.run.initial
    if parent is not None:
        _check_stop(folder, parent.step, stop_at_step)
        source = RunFolder(parent.folder)
        taken = take(folder, config, parent, lambda facts: accept(facts, stored_config(source)))
        before = stored_config(source)
        facts = with_reading(taken.facts, before)
        return _Choice.of(taken, facts, changed_overrides(before, config, parent.step))
    if initial is not None:
        taken = take_initial(
            *(folder, config, initial, lambda facts: check(continued(stream, facts)), importer)
        )
        return _Choice.of(taken, taken.facts, {})
    check(continued(stream, None))
    return _Choice(None, None, new=True)


def _start(folder: RunFolder, config: RunConfig, choice: _Choice, problem: str | None) -> Start:
    """Return the start of the launch; ``problem`` describes damaged contents, None if undamaged."""
    path = choice.path
    step = int(choice.facts["step"]) if choice.facts else 0
    if path is not None and problem is not None:
        if choice.new:
            raise _discarded(config, choice, path, problem)
        raise checkpoint.damaged(folder, path, problem)
    cleaned = checkpoint.clean(folder, path)
    total = _total_steps(config)
    if step < total:
        check_room(folder.path, config, len(checkpoint.saved(folder)), step, total)
    branched = _is_first(folder, config)
    return Start(
        checkpoint=path,
        facts=choice.facts,
        cleaned=cleaned,
        abandoned=[],
        dropped_rows=0,
        identity=identity_for(folder, path, step, branched=branched),
        new=choice.new,
        tokenizer=choice.tokenizer,
        branched=branched,
        changes=choice.changes,
        overrides=choice.overrides,
        offer=choice.offer,
        saved=path,
    )


def _is_first(folder: RunFolder, config: RunConfig) -> bool:
    """Return True if no launch of a branch has yet written its record, even if one was killed."""
    return config.run.parent is not None and not folder.run.exists()


def _parent_of(config: RunConfig) -> RunConfig | None:
    assert config.run.parent is not None
    source = RunFolder(config.run.parent.folder)
    return None if source.is_new() else stored_config(source)


def _discarded(config: RunConfig, choice: _Choice, path: Path, problem: str) -> UserError:
    """Remove the linked files of another run's checkpoint; return the error about it."""
    if config.run.parent is not None:
        return discard(path, config.run.parent, problem)
    assert choice.facts is not None
    shutil.rmtree(path, ignore_errors=True)
    origin = choice.facts["origin"]
    return unusable(Path(origin["source"]) / "checkpoints" / f"step-{origin['step']}", problem)


def _check_rows(folder: RunFolder, step: int) -> None:
    if step and not folder.metrics.exists():
        raise UserError(
            f"{folder.metrics} is gone, which holds the rows up to step {step}; restore it, or "
            "make an empty file of that name to go on without them"
        )


def _total_steps(config: RunConfig) -> int:
    return schedules_of(config)[-1].total_steps


def _check_stop(folder: RunFolder, step: int, stop_at_step: int | None) -> None:
    if stop_at_step is not None and step >= stop_at_step:
        raise UserError(
            f"--stop-at-step={stop_at_step} is past: {folder.path} stands at step {step}; name a "
            "later step or leave it out"
        )
