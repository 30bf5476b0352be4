"""Describe the training stages of a run, without importing torch."""

from __future__ import annotations

from typing import Any

from allometry.configs.run import RunConfig
from allometry.scaling.stages import StagePlace
from allometry.trainer.state.changed import leaves

NOT_CHANGES = ("training.total_steps", "training.total_tokens")
"""Keys that differ in every training stage."""


def stage_facts(config: RunConfig, place: StagePlace) -> dict[str, Any]:
    """Return the facts of the event at the beginning of a stage: its steps, tokens and changes."""
    before = config if place.number == 1 else config.of_stages()[place.number - 2]
    was, now = leaves(before.model_dump(mode="json")), leaves(place.config.model_dump(mode="json"))
    changes = {
        key: [was.get(key), now.get(key)]
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in NOT_CHANGES and not key.startswith("stages")
    }
    said = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
    tokens = place.local.tokens_after(place.steps)
    asked = place.asked_tokens
    rounded = "" if asked == tokens else f" ({asked:,} asked for, rounded up to whole steps)"
    return {
        "name": place.name,
        "number": place.number,
        "first_step": place.steps_before + 1,
        "last_step": place.last_step,
        "tokens_before": place.batch.tokens_after(place.steps_before),
        "tokens": tokens,
        "asked_tokens": asked,
        "changes": changes,
        "said": f"{tokens:,} tokens{rounded}; {said or 'nothing differs'}",
    }
