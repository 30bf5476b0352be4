"""Plan of a run, and of each rank if there are several: ``allometry train --dry-run``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from allometry.configs.auto import THIS_MACHINE
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import Stream, missing_sources
from allometry.launch.command import Report
from allometry.launch.start import has_gpu
from allometry.launch.text import size, table
from allometry.optim.schedule import Schedule, schedules_of
from allometry.scaling.advice import DEVICE_BYTES, advice
from allometry.scaling.count import DocumentFlops
from allometry.scaling.layout import SPLIT_BACKWARD
from allometry.scaling.moment import PARAMETERS, STATES
from allometry.scaling.plan import RunPlan, memory_of
from allometry.scaling.search.auto import settle
from allometry.scaling.stages import places_of
from allometry.trainer.repetition import (
    HEAD,
    check_epochs,
    facts_of,
    repetition_advice,
    repetitions,
    row_of,
)
from allometry.trainer.sources import open_sources
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.stages import stage_facts
from allometry.trainer.synthetic import synthetic_advice


def planned(config: RunConfig, world_size: int) -> Report:
    """Return the plan on ``world_size`` ranks. Raises UserError: there is no valid plan.

    For example, ``planned(load("run.yaml"), world_size=8)``.
    """
    auto = config.parallel.auto
    here = auto is not None and auto.cluster == THIS_MACHINE and not has_gpu()
    config, choice = settle(config, world_size, "cpu" if here else "cuda")
    plans, places = RunPlan.of_stages(config, world_size), places_of(config)
    data = data_here(config, plans[-1])
    found = []
    for place, plan, schedule in zip(places, plans, schedules_of(config), strict=True):
        one = place.config
        rates = learning_rates(one, plan, schedule)
        facts = {**plan.describe(), "learning_rate": rates, "data": data}
        facts["advice"] = advice(one, plan)
        facts["layout_choice"] = choice
        if world_size > 1:
            from allometry.studies.rehearse import rehearse  # imports torch

            facts["ranks"] = [rank.describe() for rank in rehearse(one, world_size)]
        found.append((facts, _text(one, plan, facts)))
    if config.stages is None:
        return Report(*found[0])
    stages = [stage_facts(config, place) for place in places]
    text = "\n".join(
        f"stage {said['name']}, steps {said['first_step']:,} to {said['last_step']:,}: "
        f"{said['said']}\n{each}"
        for said, (_, each) in zip(stages, found, strict=True)
    )
    plain = [{**said, "plan": facts} for said, (facts, _) in zip(stages, found, strict=True)]
    shared = {"data": data, "layout_choice": choice}
    return Report({**plans[-1].describe(), **shared, "stages": plain}, text)


def data_here(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """Return the tokens, epochs and FLOPs of the run by source, if its files are on this machine.

    Raises UserError: files are here but do not fit: damaged, another tokenizer, or token ids beyond
    the vocabulary.
    """
    if missing := missing_sources(config.data):
        return {"checked": False, "missing": missing}
    stream = open_sources(config)
    run, begun = config.run, RunFolder(config.run.folder).config.exists()
    if begun or run.parent or run.initial or config.data.continue_sources:
        from allometry.trainer.state.reading import continued, standing  # imports torch

        stream = continued(stream, standing(config))
    position = plan.batch.sequences_before(plan.total_steps + 1)
    stream.check_run(position)
    found = repetitions(stream, position, plan.parameters.non_embedding)
    check_epochs(config, found)
    accounts = stream.accounts(position)
    read = {name: account.tokens for name, account in accounts.items()}
    return {
        "checked": True,
        "epochs": {name: account.epochs for name, account in accounts.items()},
        "sources": {name: asdict(account) for name, account in accounts.items()},
        "repetition": facts_of(found),
        "kinds": stream.by_kind(read),
        "advice": {
            **dict(repetition_advice(config, found)),
            **dict(synthetic_advice(config, read)),
        },
        "select": {name: one.describe() for name, one in stream.selections.items()},
        "total_flops": round(expected_flops(config, stream)),
    }


def expected_flops(config: RunConfig, stream: Stream | DocumentStream) -> float:
    """Return the FLOPs of the run for the lengths of its documents, summed over its stages."""
    flops = 0.0
    for place in places_of(config):
        staged = stream.in_stage(place.number - 1)
        first, last = (
            place.batch.sequences_before(step + 1) for step in (place.steps_before, place.last_step)
        )
        squares = staged.squared_lengths_per_token(first, last)
        tokens = staged.tokens(last) - staged.tokens(first)
        flops += tokens * DocumentFlops.of(config.model).expected(squares)
    return flops


def learning_rates(config: RunConfig, plan: RunPlan, schedule: Schedule) -> list[dict[str, Any]]:
    """Return the learning rate at the corners of its schedule and at shares of the steps."""
    first, steps = schedule.first_step, schedule.total_steps - plan.steps_before
    corners = {first, plan.warmup_steps, schedule.decay_start, *schedule.ends}
    corners |= {plan.steps_before + round(steps * share) for share in (0.25, 0.5, 0.75, 0.9)}
    corners = {max(first, step) for step in corners}
    peak, tokens = config.optimizer.lr, plan.batch.tokens_after
    return [
        {"step": step, "tokens": tokens(step), "lr": peak * schedule.fraction(step)}
        for step in sorted({max(first, corner) for corner in corners})
    ]


def _text(config: RunConfig, plan: RunPlan, facts: dict[str, Any]) -> str:
    counts, flops, memory = plan.parameters, plan.flops_per_token, plan.memory
    roles = ", ".join(f"{role} {number:,}" for role, number in counts.by_role.items() if number)
    lines = [
        f"parameters        {counts.total:,} ({counts.non_embedding:,} without embeddings)",
        f"  by role         {roles}",
        *_overrides(facts["overrides"]),
        f"FLOPs per token   {flops.total:.4g} (forward {flops.forward:.4g}, backward "
        f"{flops.backward:.4g}; attention is {flops.attention / flops.total:.1%})",
        f"  of              {plan.flops_assumption}",
        f"tokens            {plan.total_tokens:,} ({plan.total_tokens / counts.total:.1f} per "
        f"parameter), {plan.total_flops:.4g} FLOPs in all",
        f"steps             {plan.total_steps - plan.steps_before:,} of {config.batch.sequences} x "
        f"{config.data.sequence_length} tokens ({_share(config, plan)})",
        f"memory per rank   {size(memory.total)} at the peak of the fullest ({memory.peak.name}); "
        f"fits {DEVICE_GB} GB: {'yes' if memory.total <= DEVICE_GB * 10**9 else 'no'}",
        *(
            f"  {name:<24}{size(number):>10}"
            f"{'' if name in (PARAMETERS, STATES) else '  (estimate)'}"
            for name, number in memory.peak.kinds.items()
        ),
        *_chosen(facts["layout_choice"]),
        *_gathered(config, plan),
        *_offloaded(plan),
        *(f"advice            {text}" for text in facts["advice"].values()),
        *_ranks(facts),
        *_data(facts["data"]),
        "learning rate",
        *(
            f"  step {corner['step']:>10,}  {corner['tokens']:>18,} tokens  {corner['lr']:.4g}"
            for corner in facts["learning_rate"]
        ),
    ]
    return "\n".join(lines)


def _overrides(entries: list[dict[str, Any]]) -> Iterator[str]:
    for number, entry in enumerate(entries):
        gets = ", ".join(
            f"{name} {entry[name]}" if name != "freeze" else "frozen" if entry[name] else "trained"
            for name in ("freeze", "lr_multiplier", "weight_decay_multiplier")
            if name in entry
        )
        yield (
            f"  overrides.{number:<6}{entry['parameters']:,} parameters of {entry['numbers']:,} "
            f"numbers: {gets}"
        )


def _chosen(choice: dict[str, Any] | None) -> list[str]:
    """Return lines on the layout that ``parallel: auto`` has chosen."""
    if choice is None:
        return []
    keys = ", ".join(f"{key}={value}" for key, value in choice["chosen"].items())
    predicted = choice["predicted"]
    return [
        f"layout            parallel=auto chose hdp={choice['hdp']}, {keys}",
        f"  because         {choice['reason']}; predicted {predicted['seconds']:.4g} s a step "
        f"({predicted['low']:.3g} to {predicted['high']:.3g})",
    ]


def _share(config: RunConfig, plan: RunPlan) -> str:
    number = plan.micro_batches(plan.total_steps)
    if config.data.kind == "documents":
        return (
            f"whole documents, planned step by step: at least {number} micro-batches of up to "
            f"{plan.micro_batch_tokens} tokens on each of {plan.hdp} hdp ranks"
        )
    return (
        f"{number} micro-batches of {plan.micro_batch_sequences} on each of {plan.world_size} ranks"
    )


SHOWN = 8
DEVICE_GB = DEVICE_BYTES // 10**9


def _gathered(config: RunConfig, plan: RunPlan) -> list[str]:
    """Return a line on the memory of parameters that stay gathered for a pipeline's step.

    The line names the setting that frees them after each micro-batch.
    """
    zero, pp = config.parallel.zero, plan.layout.pp
    if zero.stage < 3 or pp == 1 or zero.frees(pp) or plan.layout.schedule in SPLIT_BACKWARD:
        return []
    freed = zero.model_copy(update={"regather": "micro_batch"})
    parallel = config.parallel.model_copy(update={"zero": freed})
    other = memory_of(config.model_copy(update={"parallel": parallel}), plan.layout, plan.batch)
    spared = plan.memory.compute_copies - other.compute_copies
    return [
        f"  parameters are gathered once a step and kept; parallel.zero.regather: micro_batch "
        f"would spare {size(spared)} and gather them in each micro-batch"
    ]


def _offloaded(plan: RunPlan) -> list[str]:
    """Return a line on host memory of offloaded activations, and on the time of their copies."""
    traffic = plan.activation_traffic
    if traffic is None:
        return []
    copy_ms, forward_ms = 1e3 * traffic.copy_s, 1e3 * traffic.forward_s
    return [
        f"  activations of {traffic.layers} layers wait in {size(traffic.host_bytes)} of pinned "
        f"memory on the host of each rank; a layer's copy takes {copy_ms:.1f} ms, its forward "
        f"{forward_ms:.1f} ms (estimates)"
    ]


def _ranks(facts: dict[str, Any]) -> list[str]:
    """Return the collectives of a step on one rank of each pipeline rank, largest first."""
    if "ranks" not in facts:
        return []
    layout = facts["layout"]
    axes = ", ".join(f"{name}={layout[name]}" for name in ("pp", "hdp", "tp", "ep", "replicas"))
    if "stages" in layout:
        layers = ", ".join(str(stop - start) for start, stop in layout["stages"])
        axes += f"; schedule {layout['schedule']}, layers of the stages {layers}"
    lines = [f"layout            {axes}"]
    for rank in facts["ranks"]:
        stages = ", ".join(map(str, rank["stages"]))
        lines += [f"rank {rank['rank']} (stage {stages}) calls in a step"]
        calls = rank["collectives"]
        lines += [
            f"  {call['per_step']:>6,} x {call['kind']:<15} of {size(call['bytes']):>10} over "
            f"{call['ranks']} ranks of {call['axis']}"
            for call in calls[:SHOWN]
        ]
        if len(calls) > SHOWN:
            rest = sum(call["per_step"] * call["bytes"] for call in calls[SHOWN:])
            number = sum(call["per_step"] for call in calls[SHOWN:])
            lines.append(f"  {number:>6,} smaller ones, {size(rest)} together (--json lists them)")
    return lines


def _data(data: dict[str, Any]) -> list[str]:
    if not data["checked"]:
        return [f"data              not checked: no files here for {', '.join(data['missing'])}"]
    return [
        "data              "
        + ", ".join(
            f"{name} {account['tokens']:,} tokens ({account['epochs']:.3g} epochs)"
            for name, account in data["sources"].items()
        )
        + f"; {data['total_flops']:.4g} FLOPs with documents as long as here",
        *(
            f"  select          {name}: {one['kept_tokens']:,} of {one['tokens']:,} tokens, the "
            f"{one['side']} by {one['scorer']}"
            for name, one in data["select"].items()
        ),
        *_kinds(data["kinds"]),
        *_repetition(data),
        *(f"advice            {text}" for text in data["advice"].values()),
    ]


def _kinds(kinds: dict[str, int]) -> list[str]:
    """Return a line of shares of kinds of text, if not all text is natural."""
    if not kinds:
        return []
    total = max(1, sum(kinds.values()))
    return ["  kinds           " + ", ".join(f"{k} {n / total:.1%}" for k, n in kinds.items())]


def _repetition(data: dict[str, Any]) -> list[str]:
    """Return lines on the value of repeated tokens, if any source is repeated."""
    rows = data["repetition"]
    if not any(one["epochs"] > 1.0 for one in rows.values()):
        return []
    shown = table([HEAD, *(row_of(name, one) for name, one in rows.items())], right=range(1, 6))
    return [
        "repetition        (arXiv 2305.16264: of a new token, R_D = 15.39 epochs; nats by its C4)",
        *(f"  {line}" for line in shown.splitlines()),
    ]
