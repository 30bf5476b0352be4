"""Yield the events that a launch reports before its first step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import Stream
from allometry.optim.build import Elsewhere
from allometry.parallel.mesh import Mesh
from allometry.scaling.advice import NODE_RANKS, advice
from allometry.scaling.plan import RunPlan
from allometry.trainer.repetition import facts_of, last_sample, repetition_advice, repetitions
from allometry.trainer.state.changed import change_events
from allometry.trainer.state.reading import data_events, read_again
from allometry.trainer.state.resume import Start, start_events
from allometry.trainer.state.stages import stage_facts
from allometry.trainer.synthetic import synthetic_advice


def said_at_start(
    config: RunConfig,
    whole: RunConfig,
    plan: RunPlan,
    start: Start,
    stream: Stream | DocumentStream,
    mesh: Mesh,
    optimizer: torch.optim.Optimizer,
    kernel_changes: Sequence[Mapping[str, Any]],
    converted: Mapping[str, int],
    layout_choice: Mapping[str, Any] | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events (kind, facts) of a launch, or of a training stage that begins within one.

    ``whole`` is the config of all training stages; ``config``, ``plan`` and ``stream`` are those of
    the current one. ``kernel_changes``: differences from the kernels of the last launch;
    ``converted``: number of converted optimizer states, by conversion; ``layout_choice``: the
    choice of ``parallel: auto``, None without it.
    """
    step = {"step": start.step}
    if layout_choice is not None:
        yield "layout_chosen", {**step, **layout_choice}
    if not start.next_stage:  # otherwise the launch has already reported its start
        if mesh.restart is not None:
            reason = mesh.restart.reason or "not known"
            yield "restarted", {**step, "count": mesh.restart.count, "reason": reason}
        for kind, facts in start_events(config, start):
            yield kind, {**step, **facts}
    if mesh.device.type == "cuda":  # the estimates are for a GPU
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        node_ranks = int(here) if here.isdecimal() else NODE_RANKS
        for rule, text in advice(config, plan, node_ranks).items():
            yield "advice", {"rule": rule, "text": text}
    if not start.next_stage:
        yield from _repeated(whole, plan, stream, step)
    if again := read_again(start.facts, stream):
        yield "same_documents", {"sources": again, "seed": config.run.seed}
    if isinstance(optimizer, Elsewhere):
        held = {f"{tier}_bytes": size for tier, size in optimizer.held_bytes().items()}
        place = optimizer.place()
        masters = {"parameters_bytes": optimizer.parameters_bytes}
        yield "optimizer_states", {**step, **held, **masters, **place}
        if "note" in place:
            yield "states_disk", dict(place)
    for kind, facts in (*data_events(start.facts, stream), *change_events(start.changes)):
        yield kind, {**step, **facts}
    if start.overrides:
        yield "overrides_changed", {**step, **start.overrides}
    if plan.stage is not None and start.step == plan.steps_before:
        yield "stage", {**step, **stage_facts(whole, plan.stage)}
    for change in kernel_changes:
        yield "kernels_changed", {**step, **change}
    for name, states in converted.items():
        yield "states_converted", {**step, "change": name, "states": states}


def _repeated(
    whole: RunConfig, plan: RunPlan, stream: Stream | DocumentStream, step: dict[str, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the repeated sources of the run, and advice about them."""
    found = repetitions(stream, last_sample(whole), plan.parameters.non_embedding)
    if any(one.epochs > 1.0 for one in found):
        said = ", ".join(
            f"{one.source} {one.epochs:.3g} epochs of {one.unique:,} tokens (a token is worth "
            f"{one.average:.2f} of a new one, the next one {one.last:.2f})"
            for one in found
        )
        yield "repetition", {**step, "sources": facts_of(found), "said": said}
    read = stream.ledger(last_sample(whole))
    for rule, text in (*repetition_advice(whole, found), *synthetic_advice(whole, read)):
        yield "advice", {"rule": rule, "text": text}
