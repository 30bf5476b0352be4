"""What the planner does for a run: choose its layout, and predict its steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from allometry.configs.base import Count, PathText, Section

THIS_MACHINE = "this-machine"
FreeKey = Literal[
    "parallel.tp",
    "parallel.pp",
    "parallel.ep",
    "parallel.zero.stage",
    "parallel.zero.regather",
    "parallel.pipeline.schedule",
    "parallel.pipeline.stages_per_rank",
    "training.activation_checkpointing",
    "batch.micro_batch_sequences",
]
"""Keys that a search for layouts chooses."""


class AutoLayout(Section):
    """What the layout is chosen by: the fastest that fits, as ``allometry plan`` finds it."""

    cluster: PathText = Field(
        THIS_MACHINE,
        min_length=1,
        description="kind of node: a name as h100, a YAML file of one, or this-machine, as "
        "allometry doctor --measure describes it",
    )
    reserve: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        0.1, description="share of a card's memory that is left free"
    )
    keep: tuple[FreeKey, ...] = Field(
        (), description="keys that stay as they are written; all others of a layout are chosen"
    )


class PredictionConfig(Section):
    """Predicted against measured steps: ``step_prediction`` in events.jsonl."""

    cluster: PathText | None = Field(
        None,
        min_length=1,
        description="kind of node: a name as h100, a YAML file of one, or this-machine; null: "
        "that of parallel.auto, and without it nothing is predicted",
    )
    every_steps: Count = Field(100, gt=0, description="steps between events")
