"""The ``parallel.auto`` and ``record.prediction`` sections: layout search, predicted steps."""

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
"""Keys that the layout search may choose."""


class AutoLayout(Section):
    """Choose the fastest layout that fits in memory, with the search of ``allometry plan``."""

    cluster: PathText = Field(
        THIS_MACHINE,
        min_length=1,
        description="hardware for which the planner estimates time and memory: a shipped "
        "description such as h100, a YAML file, or this-machine, which allometry doctor --measure "
        "writes",
    )
    reserve: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        0.1,
        description="fraction of the device memory that the chosen layout leaves free; raise it if "
        "a chosen layout runs out of memory",
    )
    keep: tuple[FreeKey, ...] = Field(
        (),
        description="layout keys that keep their configured values; the search chooses all other "
        "layout keys",
    )


class PredictionConfig(Section):
    """Compare predicted with measured step times: ``step_prediction`` events in events.jsonl."""

    cluster: PathText | None = Field(
        None,
        min_length=1,
        description="hardware of the prediction: a shipped description such as h100, a YAML file, "
        "or this-machine; null: parallel.auto.cluster, and no prediction without parallel.auto",
    )
    every_steps: Count = Field(100, gt=0, description="steps between step_prediction events")
