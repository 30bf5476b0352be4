"""Suggestions of published laws and measured transfer for a run: ``allometry suggest``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.studies import measured
from allometry.launch.studies.commands import Suggest as SuggestCommand
from allometry.launch.text import table
from allometry.scaling.batch import BatchPlan, total_steps
from allometry.scaling.count import count_parameters
from allometry.scaling.hyperlaws import Suggestion, Target, disagreements, suggest
from allometry.scaling.parameterizations.base import RunScale
from allometry.scaling.shapes import at_width, tuning_width

TOKENS_PER_PARAMETER = 20
COLUMNS = 100


@dataclass(frozen=True)
class Base:
    """Model to tune at: the same model at a smaller width, with tokens in proportion."""

    width: int
    parameters: int
    tokens: int


def suggested(asked: SuggestCommand) -> Report:
    """Return suggestions for this run, or for other numbers of parameters and tokens."""
    config = asked.load()
    for name in ("params", "tokens", "loss"):
        value = getattr(asked, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name}={value:g} is not finite; give a number, as 1e9")
    parameters, tokens = (None if n is None else round(n) for n in (asked.params, asked.tokens))
    length = config.data.sequence_length
    plan = BatchPlan(config.batch, length)
    planned = plan.tokens_after(total_steps(config.training, plan))
    target = Target.of(
        config.model, tokens or planned, length, parameters=parameters, loss=asked.loss
    )
    suggestions = suggest(target)
    apart = disagreements(suggestions)
    width = tuning_width(config.model)
    count = count_parameters(at_width(config.model, width)).active
    base = Base(width, count, TOKENS_PER_PARAMETER * count)
    scale = RunScale(plan.full_sequences * length, tokens or planned)
    facts = {
        "target": asdict(target),
        "sequence_length": length,
        "suggestions": [suggestion.describe() for suggestion in suggestions],
        "disagreements": apart,
        "base": asdict(base),
        "measured": measured.facts(config, scale),
    }
    active = f", {target.active:.3g} active" if target.kind == "moe" else ""
    head = (
        f"{target.kind} model, N = {target.parameters:.3g}{active} (without embedding and head), "
        f"{target.num_layers} layers; D = {target.tokens:.3g} tokens; C = {target.flops:.3g} FLOPs"
    )
    small = base.width == config.model.width
    lines = [
        *_wrapped(head),
        _table(suggestions, length),
        *(line for note in _notes(suggestions, apart) for line in _wrapped(note)),
        *_wrapped(_tune(base, small)),
        *(words for line in measured.lines(config, scale) for words in _wrapped_text(line)),
    ]
    return Report(facts, "\n".join(lines))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _wrapped_text(text: str) -> list[str]:
    """Return a table unchanged, or a sentence wrapped to COLUMNS."""
    return [text] if "\n" in text else _wrapped(text)


def _table(suggestions: Sequence[Suggestion], length: int) -> str:
    rows = [["law", "for", "peak lr", "batch, tokens", "sequences"]]
    for one in suggestions:
        if one.refused:
            continue
        batch, cells = one.batch_tokens, ["-", "-"]
        if batch is not None:
            cells = [f"{batch:,}", f"{max(1, round(batch / length)):,}"]
        lr = "-" if one.lr is None else f"{one.lr:.3g}"
        rows.append([one.law + ("*" if one.outside else ""), one.setting, lr, *cells])
    return table(rows)


def _notes(suggestions: Sequence[Suggestion], apart: list[str]) -> list[str]:
    lines = []
    for one in suggestions:
        said: list[Any] = [f"fitted on {one.fitted}", f"schedule: {one.schedule}"]
        if one.refused:
            said = [one.refused]
        said += [f"* outside: {words}" for words in one.outside]
        said += one.notes
        lines.append(f"{one.law} ({one.source}): {'; '.join(said)}")
    return [*lines, *(f"note: {words}" for words in apart)]


def _tune(base: Base, small: bool) -> str:
    if small:
        return (
            f"to tune small: model.width={base.width} ({base.parameters:,} parameters active) is "
            "small already, so tune the model itself; allometry transfer measures whether its rate "
            "holds at larger sizes"
        )
    return (
        f"to tune small: model.width={base.width} ({base.parameters:,} parameters active, "
        f"{base.tokens:,} tokens at {TOKENS_PER_PARAMETER} each), with a parameterization whose "
        f"base_width is {base.width}; allometry transfer measures whether its rate holds"
    )
