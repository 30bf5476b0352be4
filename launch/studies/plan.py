"""Layouts of a run that fit on a number of GPUs, and the best of them: ``allometry plan``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.configs.loader import PRESET, put, yaml_text
from allometry.configs.machine import HardwareConfig, load_hardware
from allometry.configs.run import RunConfig
from allometry.configs.source import Tree, parse_value
from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format
from allometry.launch.studies.commands import Plan
from allometry.launch.studies.plan_scale import scale_figure, scale_text
from allometry.launch.studies.plan_target import sizes, target_text
from allometry.launch.studies.plan_text import described, learnt_text
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.store import load_fit
from allometry.laws.predictions import Compared, calibrate_runs
from allometry.scaling.count import count_parameters
from allometry.scaling.planner.calibrate import Calibration
from allometry.scaling.planner.store import load as load_belief
from allometry.scaling.planner.store import published, save
from allometry.scaling.search.auto import without_auto
from allometry.scaling.search.curves import scale_curve
from allometry.scaling.search.proposal import Proposal, proposals
from allometry.scaling.search.remedies import Remedy, near_counts, nearest, remedies
from allometry.scaling.search.search import RESERVE, Asked, Objective, Search
from allometry.scaling.search.sensitivity import Turn, sensitivity

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Answer:
    """Result: ``best`` layouts first; if empty, ``remedies`` for the most GPUs with a layout."""

    searches: tuple[Search, ...]
    best: tuple[Proposal, ...]
    turns: tuple[Turn, ...]
    remedies: tuple[Remedy, ...]

    def describe(self) -> dict[str, Any]:
        """Return the result as JSON."""
        asked = self.searches[0].asked
        facts: dict[str, Any] = {
            "cluster": asked.name,
            "objective": asked.objective,
            "limit_bytes": round(self.searches[0].limit),
            "reserve": asked.reserve,
            "fits": {str(s.world_size): _fits(s) for s in self.searches},
            "layouts": [one.describe() for one in self.best],
            "sensitivity": [turn.describe(self.best[0].gpus) for turn in self.turns],
        }
        if not self.best:
            search = [search for search in self.searches if search.cores][-1]
            choice, least = nearest(search)
            layout = choice.describe(search.world_size)
            facts["nearest"] = {"layout": layout, "bytes": least}
            facts["remedies"] = [remedy.describe() for remedy in self.remedies]
        return facts


_PREDICTED = ": predicted "
"""Marker in the first line of a file written by ``--write``."""


def _fits(search: Search) -> dict[str, int]:
    return {"layouts": len(search.degrees), "fit": len(search.fitting_degrees)}


def planned(asked: Plan) -> Report:
    """Search layouts for each number of GPUs, and write the best layout if requested."""
    if (asked.fit is None) != (asked.loss is None):
        raise UserError("--fit and --loss belong together: a law, and the loss to reach by it")
    if asked.write is not None and (asked.scale or asked.fit is not None):
        raise UserError("--write keeps one run's layout; leave it out, or --scale and --fit")
    belief, learnt = _belief(asked, load_hardware(asked.cluster))
    if asked.scale:
        return _scaled(asked, belief)
    if asked.fit is not None and asked.loss is not None:
        return _reached(asked, belief, load_fit(asked.fit).fit, asked.loss)
    tree = _overrides(asked) if asked.write is not None else Tree({})
    config, tokens = without_auto(asked.load()), _tokens(asked.tokens)
    wanted = _asked(asked, belief)
    searches = [Search(config, gpus, wanted) for gpus in _counts(asked.gpus)]
    able = [search for search in searches if search.cores]
    if not able:
        raise UserError(_no_layout(config, searches[0], wanted))
    found = [one for s in able for one in proposals(s, s.best(asked.top), tokens, asked.price)]
    best = tuple(sorted(found, key=lambda one: _rank(one, wanted.objective))[: asked.top])
    turns: tuple[Turn, ...] = ()
    if best and wanted.objective != "memory":
        first = next(search for search in able if search.world_size == best[0].gpus)
        turns = tuple(sensitivity(first, best[0].choice))
    saved = () if best else tuple(remedies(able[-1]))
    facts = Answer(tuple(searches), best, turns, saved).describe()
    text = described(searches, best, turns, saved, asked.explain)
    if learnt:
        facts["learnt"] = [asdict(one) | {"folder": str(one.folder)} for one in learnt]
        text += "\n\n" + learnt_text(learnt)
    if best and asked.write is not None:
        _write(asked, best[0], tree)
        facts["written"] = str(asked.write)
        text += f"\n\nthe first layout is in {asked.write}: allometry train {asked.write}"
    return Report(facts, text, passed=bool(best))


def _scaled(asked: Plan, belief: Calibration | None) -> Report:
    """Return the best layouts from few to many GPUs, as a table and a figure."""
    check_format(asked.out)
    config, tokens, wanted = (
        without_auto(asked.load()),
        _tokens(asked.tokens),
        _asked(asked, belief),
    )
    at = _counts(asked.gpus)[0]
    strong, weak = (scale_curve(config, wanted, kind, at, tokens) for kind in ("strong", "weak"))
    points = [*strong, *weak]
    facts = {"cluster": asked.cluster, "weak_at": at, "points": [p.describe() for p in points]}
    text = scale_text(points)
    fits = any(point.best is not None for point in points)
    if fits:
        title = f"{human(count_parameters(config.model).total)} parameters on {asked.cluster}"
        scale_figure(points, title, asked.out)
        facts["figure"] = str(asked.out)
        text += f"\n\nfigure: {asked.out}"
    return Report(facts, text, passed=fits)


def _reached(asked: Plan, belief: Calibration | None, fit: Fit, loss: float) -> Report:
    """Return sizes, tokens and layouts that reach a loss by a law, the cheapest first."""
    config, wanted = without_auto(asked.load()), _asked(asked, belief)
    found, notes = sizes(config, fit, loss, wanted, _counts(asked.gpus), asked.price)
    facts = {"cluster": asked.cluster, "loss": loss, "law": fit.form.name, "notes": notes}
    facts["sizes"] = [one.describe() for one in found]
    return Report(facts, target_text(found, notes, loss, asked.top))


def _rank(one: Proposal, objective: Objective) -> float:
    values = {"time": one.days, "cost": one.gpu_hours, "memory": float(one.memory.total)}
    return values[objective]


def _belief(asked: Plan, hardware: HardwareConfig) -> tuple[Calibration | None, list[Compared]]:
    """Return the calibration of the cost model, and the runs that were used for it."""
    if not asked.calibrate:
        return (None if asked.constants is None else load_belief(asked.constants)), []
    found = calibrate_runs(asked.calibrate, published(hardware))
    if asked.constants is not None:
        try:
            save(found.belief, asked.constants)
        except OSError as error:
            raise UserError(
                f"--constants={asked.constants} cannot be written ({error.strerror}); name another"
            ) from None
    return found.belief, list(found.compared)


def _asked(asked: Plan, belief: Calibration | None) -> Asked:
    if asked.objective not in get_args(Objective):
        raise UserError(f"--objective={asked.objective} is not known; use time, cost or memory")
    hardware = load_hardware(asked.cluster)
    return Asked(
        hardware,
        asked.cluster,
        objective=asked.objective,  # type: ignore[arg-type]
        reserve=RESERVE if asked.reserve is None else asked.reserve,
        keep=asked.keep,
        device="cuda" if hardware.gpu.asynchronous else "cpu",
        belief=belief,
    )


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.replace("_", "").split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--gpus={text} is not a number of GPUs; use one as 1024, or 512,1024")
    return sorted(set(counts))


def _tokens(text: str | None) -> int | None:
    if text is None:
        return None
    factor = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise UserError(f"--tokens={text} is not a number of tokens; use one as 2T, 300B or 1e9")
    return round(number)


def _no_layout(config: RunConfig, search: Search, asked: Asked) -> str:
    gpus = search.world_size
    why = f"; {search.refusals[0]}" if search.refusals else ""
    near = near_counts(config, gpus, asked)
    use = f"use {' or '.join(map(str, near))} GPUs, or " if near else ""
    return (
        f"no layout of {gpus} GPUs shares batches of {config.batch.sequences} sequences of this "
        f"model{why}; {use}another batch.sequences"
    )


def _overrides(asked: Plan) -> Tree:
    """Return the overrides as a tree for ``_write``.

    Raises UserError: --write cannot write them.
    """
    out, tree = asked.write, Tree({})
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--write={out} cannot be written: {out.parent} is no folder; make it")
    if out is not None and out.exists() and not _is_plan(out, asked.config):
        raise UserError(
            f"--write={out} is a file that allometry plan did not write, or CONFIG itself; name "
            "another"
        )
    for text in asked.overrides:
        key, _, value = text.lstrip("-").partition("=")
        if any(part.isdigit() for part in key.split(".")):
            raise UserError(
                f"--write cannot keep override {text!r}, which changes one item of a list; put it "
                "into a file and plan that"
            )
        put(tree, key, parse_value(value, text), text)
    return tree


def _is_plan(out: Path, config: str) -> bool:
    """Return True if the file was written by ``--write`` and is not CONFIG itself."""
    try:
        first = out.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return False
    return (
        first.startswith("# ") and _PREDICTED in first and out.resolve() != Path(config).resolve()
    )


def _write(asked: Plan, best: Proposal, tree: Tree) -> None:
    """Write the run in this layout: CONFIG as its base, with the given overrides."""
    assert asked.write is not None
    out, base = asked.write, asked.config
    if not base.startswith(PRESET):
        base = os.path.relpath(Path(base).resolve(), out.parent.resolve())
    sections = best.choice.sections(best.gpus)
    sections["parallel"]["auto"] = None
    top = Tree(sections)
    keys = tree.overlay(top).data
    heading = (
        f"# {best.gpus} x {asked.cluster}{_PREDICTED}{best.seconds:.4g} s a step "
        f"({best.low:.4g} to {best.high:.4g}), {best.memory.total / 1e9:.1f} GB a GPU.\n"
    )
    try:
        out.write_text(heading + yaml_text({"base": base, **keys}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write={out} cannot be written: {error.strerror}") from None
