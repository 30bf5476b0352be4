"""The ``stages`` section: parts of a run, each with changes to the run's sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from allometry.configs.base import Count, Section
from allometry.configs.optimization import ScheduleConfig
from allometry.configs.source import KeyPath, Tree

MAY_CHANGE: Mapping[str, tuple[str, ...]] = {
    "data": ("sequence_length", "packing", "max_document_tokens", "replay"),
    "batch": ("sequences", "micro_batch_sequences", "ramp"),
    "model": ("rope_theta", "rope_scaling", "dropout", "z_loss"),
    "optimizer": (
        *("lr", "adamw_lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "nesterov"),
        *("adjust", "scale", "refresh_steps", "norm_growth", "states", "overrides"),
    ),
    "training": (
        *("clip_grad_norm", "compute_dtype", "activation_checkpointing", "activation_offload"),
        *("compile", "cuda_graphs"),
    ),
    "precision": (
        *("saved_activations", "linears", "gradients", "roles", "gather", "compute_layers"),
    ),
    "parallel": ("context",),
}
"""Keys that a stage may change, by section; ``schedule`` is replaced completely."""

Changes = dict[str, Any]
Kept = Literal["weights", "optimizer", "data"]


class NotInStages(ValueError):
    """A stage contains a key that no stage may have, at ``path`` within the stage."""

    def __init__(self, said: str, *path: str) -> None:
        super().__init__(said)
        self.path = path


class InStage(ValueError):
    """Stage ``number`` makes the run invalid; ``error`` is that of the resulting run."""

    def __init__(self, number: int, name: str, error: ValidationError | NotInStages) -> None:
        said = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        super().__init__(f"stages.{number} ({name}): {said}")
        self.number, self.name, self.error = number, name, error


class Stage(Section):
    """A part of the run with its own length and changes to the run's sections.

    A stage starts with the weights, the optimizer states and the position in the data at the end of
    the previous stage; its schedule counts from its first step.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the stage in the run's records",
    )
    steps: Count | None = Field(
        None, gt=0, description="length of the stage in steps; null: given by tokens"
    )
    tokens: Count | None = Field(
        None,
        gt=0,
        description="length of the stage in tokens, rounded up to complete steps; null: given by "
        "steps",
    )
    mixture: dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        None,
        description="weights of data.sources in this stage, 0 for sources without an entry; null: "
        "the weights in data.sources",
    )
    schedule: ScheduleConfig | None = Field(
        None,
        description="schedule of the stage; null: the run's schedule, from its beginning. A "
        "warm-up starts at the last rate of the previous stage",
    )
    keep: tuple[Kept, ...] = Field(
        ("weights", "optimizer", "data"),
        description="state to keep from the previous stage; without optimizer, the optimizer "
        "states are initialized",
    )
    data: Changes = Field({}, description="changes to data: sequence_length, replay, ...")
    batch: Changes = Field({}, description="changes to batch")
    model: Changes = Field({}, description="changes to model: rope_theta, rope_scaling, ...")
    optimizer: Changes = Field({}, description="changes to optimizer: lr, overrides, ...")
    training: Changes = Field({}, description="changes to training, except its length")
    precision: Changes = Field({}, description="changes to precision")
    parallel: Changes = Field({}, description="changes to parallel.context")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                sections = ", ".join(MAY_CHANGE)
                raise ValueError(
                    f"a stage has no key {key!r}; it has name, steps or tokens, mixture, schedule "
                    f"and keep, and may change keys of {sections}"
                )
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"stage {self.name}: give exactly one of steps and tokens")
        lost = [what for what in ("weights", "data") if what not in self.keep]
        if lost:
            raise ValueError(
                f"stage {self.name}: keep={list(self.keep)} lets go of {lost[0]}, with which a "
                "stage always goes on; only optimizer may be left out, and a new run begins anew"
            )
        return self

    def over(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's plain configuration with the changes of this stage.

        Raises:
            NotInStages: the stage changes a key that no stage may change, or names an unknown
                source.
        """
        changes: dict[str, Any] = {}
        for section, allowed in MAY_CHANGE.items():
            wanted: Changes = getattr(self, section)
            for key, value in wanted.items():
                if key not in allowed and run[section].get(key) != value:
                    raise NotInStages(
                        f"a stage may not change {section}.{key}; of {section} it may change "
                        f"{', '.join(allowed)}",
                        *(section, key),
                    )
            changes[section] = wanted
        made = Tree(dict(run)).overlay(Tree(changes)).data
        if self.schedule is not None:
            made["schedule"] = self.schedule.model_dump(mode="json")
        made["training"] |= {"total_steps": self.steps, "total_tokens": self.tokens}
        made["data"] |= {"sources": self._sources(run["data"]["sources"])}
        return made | {"stages": None}

    def _sources(self, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.mixture is None:
            return sources
        names = [source["name"] for source in sources]
        unknown = [name for name in self.mixture if name not in names]
        if unknown:
            raise NotInStages(
                f"mixture names {unknown[0]!r}, which is none of data.sources "
                f"({', '.join(names)}); add it there",
                *("mixture", unknown[0]),
            )
        return [one | {"weight": self.mixture.get(one["name"], 0.0)} for one in sources]

    def places(self, tree: Tree, number: int) -> Tree:
        """Return the tree of ``over``, with the places at which the stage's keys were written."""
        made = Tree(self.over(tree.data), dict(tree.origin))
        start: KeyPath = ("stages", number)
        for section in (*MAY_CHANGE, "schedule"):
            for key in getattr(self, section) if section in MAY_CHANGE else ():
                made.origin[(section, key)] = tree.where((*start, section, key))
            if section in self.model_fields_set:
                made.origin[(section,)] = tree.where((*start, section))
        for path, place in tree.origin.items():
            if path[:2] == start and len(path) > 3:
                made.origin[path[2:]] = place
        if self.mixture is not None:
            made.origin[("data",)] = tree.where((*start, "mixture"))
        return made
