"""Runs of a ladder, and steps shared between runs. Without torch."""

# N parameters, D tokens and C FLOPs of a run

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.ladder import (
    ConstantBatch,
    LadderConfig,
    LawBatch,
    LocalLaunch,
    NamedSchedule,
    PowerBatch,
    SbatchLaunch,
    Size,
)
from allometry.configs.loader import put, read, validate
from allometry.configs.run import RunConfig
from allometry.configs.source import Tree
from allometry.data.stream import missing_sources, open_stream
from allometry.laws.forms.base import Form
from allometry.laws.losses import LossChoice
from allometry.laws.registry import form_named
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.count import DocumentFlops, count_parameters, flops_per_token
from allometry.scaling.hyperlaws import LAWS, Target, suggest
from allometry.scaling.plan import RunPlan
from allometry.scaling.shapes import at_width
from allometry.studies.ladder.share import PlannedRun, branching_point, share
from allometry.trainer.state.changed import differences
from allometry.trainer.state.unchanged import rates_part


@dataclass(frozen=True)
class LadderPlan:
    """The rungs, each after the run from which it branches, the target, and notes."""

    ladder: LadderConfig
    rungs: tuple[PlannedRun, ...]
    target: PlannedRun | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Folder of the ladder."""
        return Path(self.ladder.folder)

    @property
    def launch(self) -> LocalLaunch | SbatchLaunch:
        """Launch section of the runs."""
        return self.ladder.launch

    @property
    def processes(self) -> int:
        """Ranks per run."""
        return self.launch.processes

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All runs, the target last."""
        return (*self.rungs, *([self.target] if self.target else []))


class _Cell(NamedTuple):
    """Attributes of a run."""

    size: Size
    horizon: _Horizon
    schedule: NamedSchedule | None
    seed: int
    is_target: bool = False


@dataclass(frozen=True)
class _Horizon:
    """Length of a run: one of three units, and its label."""

    label: str
    ratio: float | None = None
    tokens: int | None = None
    flops: float | None = None


def plan_ladder(ladder: LadderConfig, tree: Tree) -> LadderPlan:
    """Return the runs that the ladder describes.

    Runs that differ only in length are trained in the order of their lengths, each branching from
    the previous one where their learning rates diverge: for WSD at the start of the shorter run's
    decay, so that all these runs share one stable trunk. Raises UserError: a run's configuration is
    not valid, two runs have one name, or the target is a rung. For example,
    ``plan_ladder(*load_ladder("ladder.yaml")).rungs``.
    """
    form = form_named(ladder.law)
    if form.target.name != "loss" or any(one.name == "step" for one in form.inputs):
        raise UserError(
            f"law={ladder.law} does not predict the loss of finished runs; choose one that does, "
            "as chinchilla (allometry laws lists them)"
        )
    _check_fixed(ladder, form)
    maker = _Maker(ladder, tree)
    rungs: list[PlannedRun] = []
    notes: dict[str, None] = {}
    for cell in _cells(ladder):
        run = maker.make(cell)
        twin = next((other for other in rungs if _same(other, run)), None)
        if twin is not None:
            notes[f"{run.name} would be {twin.name} again and is left out"] = None
            continue
        if any(other.name == run.name for other in rungs):
            raise UserError(
                f"two runs of the ladder would be called {run.name}; give their sizes names, or "
                "horizons that differ in six digits"
            )
        rungs.append(run)
    for run in rungs:
        _check_loss(ladder.loss, run)
    target = _target(maker, ladder, rungs)
    shared, more = share([*rungs, *([target] if target else [])])
    return LadderPlan(
        ladder=ladder,
        rungs=tuple(run for run in shared if not run.is_target),
        target=next((run for run in shared if run.is_target), None),
        notes=(*maker.notes, *notes, *more),
    )


def _check_loss(loss: str, run: PlannedRun) -> None:
    """Raise UserError if the runs will not record this loss."""
    try:
        choice = LossChoice.parse(loss)
    except UserError as error:
        raise UserError(str(error).removeprefix("--")) from None
    names = [source.name for source in run.config.data.sources]
    if choice.source is not None and choice.source not in names:
        raise UserError(
            f"loss={loss}: the runs have no source {choice.source!r}, only {', '.join(names)}"
        )


def _cells(ladder: LadderConfig) -> Iterator[_Cell]:
    schedules: tuple[NamedSchedule | None, ...] = ladder.schedules or (None,)
    for size in ladder.rungs:
        horizons = [_Horizon(f"x{ratio:g}", ratio=ratio) for ratio in ladder.tokens_per_parameter]
        horizons += [_Horizon(f"d{_round(tokens)}", tokens=tokens) for tokens in ladder.tokens]
        if ladder.isoflop and size.label in (ladder.isoflop.sizes or [size.label]):
            for c in ladder.isoflop.flops:
                horizons.append(_Horizon(f"c{c:g}".replace("+", ""), flops=c))
        for schedule in schedules:
            for seed in ladder.seeds:
                for horizon in horizons:
                    yield _Cell(size, horizon, schedule, seed)


def _target(maker: _Maker, ladder: LadderConfig, rungs: list[PlannedRun]) -> PlannedRun | None:
    wanted = ladder.target
    if wanted is None:
        return None
    if wanted.tokens is not None:
        horizon = _Horizon(f"d{_round(wanted.tokens)}", tokens=wanted.tokens)
    else:
        assert wanted.tokens_per_parameter is not None
        ratio = wanted.tokens_per_parameter
        horizon = _Horizon(f"x{ratio:g}", ratio=ratio)
    first = ladder.schedules[0] if ladder.schedules else None
    named = next((one for one in ladder.schedules if one.name == wanted.schedule), first)
    seed = ladder.seeds[0] if wanted.seed is None else wanted.seed
    target = maker.make(_Cell(wanted.size, horizon, named, seed, is_target=True))
    same = next((run for run in rungs if _same(run, target)), None)
    if same is not None:
        raise UserError(
            f"the target is {same.name}, a rung of the ladder, so that nothing would be predicted; "
            "choose another target.size, length or seed"
        )
    return target


class _Maker:
    """Factory of run configurations from the base configuration."""

    def __init__(self, ladder: LadderConfig, tree: Tree) -> None:
        self._ladder, self._tree = ladder, tree
        self._squares: dict[str, float | None] = {}  # by the description of the data
        self.notes: dict[str, None] = {}
        self._base = read(ladder.base)
        if self._base.data.get("stages"):
            raise ConfigError(
                f"{self._base.where(('stages',))}: base={ladder.base} has stages, and a ladder "
                "gives its runs their lengths; leave stages out"
            )
        for key, value in ladder.set.items():
            put(self._base, key, value, tree.where(("set", key)))

    def make(self, cell: _Cell) -> PlannedRun:
        """Return one run, without shared steps."""
        schedule = cell.schedule.name if cell.schedule else ""
        parts = [cell.size.label, cell.horizon.label, schedule, f"s{cell.seed}"]
        name = "-".join(["target"] * cell.is_target + [part for part in parts if part])
        try:
            return self._make(name, *cell)
        except ConfigError:
            raise  # the message names file and line
        except UserError as error:
            raise UserError(f"run {name} of the ladder: {error}") from None

    def _make(
        self,
        name: str,
        size: Size,
        horizon: _Horizon,
        schedule: NamedSchedule | None,
        seed: int,
        is_target: bool,
    ) -> PlannedRun:
        tree = copy.deepcopy(self._base)
        place = self._place(size, is_target)
        put(tree, "run.folder", str(Path(self._ladder.folder) / "runs" / name), place)
        put(tree, "run.seed", seed, place)
        # Placeholder until the model is known.
        put(tree, "training.total_tokens", horizon.tokens or 1, place)
        put(tree, "training.total_steps", None, place)
        if schedule is not None:
            put(tree, "schedule", schedule.schedule.model_dump(mode="json"), place)
        if size.width is not None:
            model = at_width(validate(tree).model, size.width)
            put(tree, "model", model.model_dump(mode="json"), place)
        for key, value in size.set.items():
            put(tree, key, value, place)
        config = validate(tree)
        if config.run.initial is not None:
            raise UserError(
                f"{place}: run.initial of base={self._ladder.base} begins a run with another one's "
                "weights, and the runs of a ladder begin from nothing; leave it out"
            )
        tokens = self._tokens(config, horizon)
        put(tree, "training.total_tokens", tokens, place)
        put(tree, "batch.sequences", self._sequences(config, tokens), place)
        config = validate(tree)
        plan = RunPlan.of(config, self._ladder.launch.processes)  # raises for bad layouts
        resolve_schedule(config, plan.batch)  # raises if the schedule is invalid
        if kept := branching_point(config, plan.total_steps):
            put(tree, "checkpoint.keep_steps", [*config.checkpoint.keep_steps, kept], place)
            config = validate(tree)
        return PlannedRun(
            name=name,
            is_target=is_target,
            size=size.label,
            schedule=schedule.name if schedule else config.schedule.kind,
            config=config,
            steps=plan.total_steps,
            tokens=plan.total_tokens,
            parameters=count(config, self._ladder.count),
            flops=round(plan.total_tokens * self._flops_per_token(config)),
        )

    def _place(self, size: Size, is_target: bool) -> str:
        if is_target:
            return self._tree.where(("target", "size"))
        labels = [one.label for one in self._ladder.rungs]
        key = "sizes" if self._ladder.sizes else "widths"
        return self._tree.where((key, labels.index(size.label)))

    def _tokens(self, config: RunConfig, horizon: _Horizon) -> int:
        if horizon.tokens is not None:
            return horizon.tokens
        if horizon.ratio is not None:
            return max(1, round(horizon.ratio * count(config, self._ladder.count)))
        assert horizon.flops is not None
        return max(1, round(horizon.flops / self._flops_per_token(config)))

    def _flops_per_token(self, config: RunConfig) -> float:
        """Return the model FLOPs per token as the run will record them, averaged over an epoch.

        Without the token files it is the upper bound for windows of one document each, with a note
        if lengths depend on it.
        """
        key = config.data.model_dump_json()
        if key not in self._squares:
            missing = missing_sources(config.data)
            stream = None if missing else open_stream(config.data, config.run.seed)
            self._squares[key] = stream and stream.squared_lengths_per_token()
            if missing and self._ladder.isoflop:
                self.notes[
                    f"isoflop.flops are those of windows that are one document each, as the tokens "
                    f"of {', '.join(missing)} are not on this machine; runs grow where "
                    "documents are shorter"
                ] = None
        squares = self._squares[key]
        if squares is None:
            return flops_per_token(config.model, config.data.sequence_length).total
        return DocumentFlops.of(config.model).expected(squares)

    def _sequences(self, config: RunConfig, tokens: int) -> int:
        """Return the batch of a run of ``tokens``, a multiple of its ranks' micro-batches."""
        rule, base = self._ladder.batch, config.batch.sequences
        match rule:
            case ConstantBatch():
                return base
            case PowerBatch():
                wanted = float(base * (tokens / rule.base_tokens) ** rule.exponent)
            case LawBatch():
                wanted = _law_batch(rule, config, tokens) / config.data.sequence_length
        parallel = config.parallel
        ranks = self._ladder.launch.processes // (parallel.tp * parallel.pp)
        ranks = ranks if parallel.hdp == "auto" else parallel.hdp
        unit = config.batch.micro_batch_sequences * max(1, ranks)
        return unit * max(1, round(wanted / unit))


def _check_fixed(ladder: LadderConfig, form: Form) -> None:
    """Raise UserError for fixed names that are not parameters, or for invalid values."""
    known = {one.name: one for one in form.parameters}
    for name, value in ladder.fix.items():
        if name not in known:
            raise UserError(
                f"fix.{name}: {form.name} has no such parameter; use one of {', '.join(known)}"
            )
        low, high = known[name].low, known[name].high
        if not low <= value <= high:
            raise UserError(
                f"fix.{name}={value:g} is outside of what {form.name} allows; choose a value from "
                f"{low:g} to {high:g}"
            )


def _law_batch(rule: LawBatch, config: RunConfig, tokens: int) -> float:
    law = next((law for law in LAWS if law.name == rule.law), None)
    if law is None:
        known = ", ".join(law.name for law in LAWS)
        raise UserError(f"batch.law={rule.law} is not known; use one of {known}")
    said = suggest(Target.of(config.model, tokens, config.data.sequence_length), [law])[0]
    if said.batch_tokens is None:
        why = said.refused or "it says nothing of the batch"
        raise UserError(f"batch.law={rule.law} gives no batch here: {why}; use another law")
    return said.batch_tokens


def count(config: RunConfig, convention: str) -> int:
    """Return N by one of the ladder's conventions, as in run.json."""
    counted = count_parameters(config.model)
    if convention == "with_head":
        return counted.non_embedding + config.model.vocab_size * config.model.width
    return int(getattr(counted, convention))


def _same(one: PlannedRun, other: PlannedRun) -> bool:
    """Return True if two runs compute the same."""
    return (
        one.steps == other.steps
        and next(iter(differences(one.config, other.config)), None) is None
        and rates_part(one.config, other.config, one.steps) is None
    )


def _round(number: int) -> str:
    """Return a whole number with a suffix if exact: 5000000 is 5M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number % size == 0:
            return f"{number // size}{unit}"
    return str(number)
