"""The ``run`` section: where a run lives, and from which other run it goes on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from allometry.configs.base import Count, PathText, Section


def covers(name: str, key: str) -> bool:
    """Return whether a dotted key is ``name`` or lies in the section of that name."""
    return key == name or key.startswith(f"{name}.")


class Parent(Section):
    """The run that a new run branches from, with everything it has learnt and recorded."""

    folder: PathText = Field(
        min_length=1, description="the parent's run.folder; it may be training"
    )
    step: Count = Field(
        gt=0, description="its checkpoint to begin at; see ``checkpoint.keep_steps``"
    )
    changes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="keys or sections in which the branch differs from its parent: data, "
        "optimizer.lr; schedule: it counts from ``step``, as that of a run that begins there",
    )
    schedule_from: Count = Field(
        0,
        ge=0,
        description="where the parent's own schedule counts from a step of its own, that step; "
        "not with schedule in ``changes``",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        twice = sorted({name for name in self.changes if self.changes.count(name) > 1})
        if twice:
            raise ValueError(f"changes names {twice[0]!r} twice; name it once")
        if self.schedule_from and self.may_change("schedule"):
            raise ValueError(
                f"schedule_from={self.schedule_from} says where the parent's schedule counts from, "
                f"but with schedule in changes it counts from step={self.step}; leave one of them "
                "out"
            )
        if self.schedule_from > self.step:
            raise ValueError(
                f"schedule_from={self.schedule_from} is past step={self.step}, where the branch "
                "begins; give the step from which the parent's schedule counts, or name schedule "
                "in changes"
            )
        return self

    def may_change(self, key: str) -> bool:
        """Return whether ``changes`` names this key or a section that it lies in."""
        return any(covers(name, key) for name in self.changes)


def _step_or_latest(value: Any) -> Any:
    if isinstance(value, str) and value != "latest":
        raise ValueError("expected the step of a checkpoint, or latest")
    return value


Kept = Literal["weights", "optimizer", "data"]


class Initial(Section):
    """The checkpoint of another run, or the Hugging Face model, that a new run begins with."""

    folder: PathText | None = Field(None, min_length=1, description="the run.folder of that run")
    hf: PathText | None = Field(
        None, min_length=1, description="instead of ``folder``: the folder of a Hugging Face model"
    )
    step: Annotated[
        Annotated[Count, Field(ge=0)] | Literal["latest"], BeforeValidator(_step_or_latest)
    ] = Field("latest", description="its checkpoint to begin with, by its step, or the latest")
    keep: tuple[Kept, ...] = Field(
        ("weights",),
        min_length=1,
        description="what goes on: weights; optimizer, what it remembers of each; data, each "
        "source after what was read of it. The rest begins afresh",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.folder is None) == (self.hf is None):
            raise ValueError(
                "give exactly one of folder, a run of ours, and hf, a Hugging Face model"
            )
        if len(set(self.keep)) < len(self.keep):
            raise ValueError("keep names something twice; name each part once")
        if "weights" not in self.keep:
            raise ValueError(
                f"keep=[{', '.join(self.keep)}] has no weights, which the rest belongs to; add "
                "weights"
            )
        if self.hf is None:
            return self
        if self.keep != ("weights",):
            raise ValueError(
                f"keep=[{', '.join(self.keep)}] asks more of hf={self.hf} than a Hugging Face "
                "model has; set keep: [weights], or name the run itself in folder"
            )
        if self.step != "latest":
            raise ValueError(
                f"step={self.step} goes with folder: the model in hf={self.hf} has no steps; leave "
                "it out"
            )
        return self


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    folder: PathText = Field(min_length=1, description="the run's folder")
    seed: Count = Field(0, ge=0, description="seed of parameters, data order and dropout")
    resume: str = Field(
        "auto",
        pattern=r"^(auto|never|step-[0-9]+)$",
        description="auto: continue what the folder holds, or start; never: the folder must be "
        "new; step-N: go back to that checkpoint and continue from there",
    )
    parent: Parent | None = Field(
        None, description="branch from another run, with its record and its place in the data"
    )
    initial: Initial | None = Field(
        None, description="a new run that begins with the weights of another one, at step 1"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.parent is not None and self.initial is not None:
            raise ValueError(
                "parent (a branch, at its parent's step) and initial (a new run, at step 1) are "
                "two ways to begin; leave one of them out"
            )
        return self

    @property
    def schedule_from(self) -> int:
        """The step after which ``schedule`` counts its steps; 0 but for branches."""
        if self.parent is None:
            return 0
        named = self.parent.may_change("schedule")
        return self.parent.step if named else self.parent.schedule_from

    @property
    def branched_at(self) -> int:
        """The steps that a branch has from its parent; 0 of other runs."""
        return 0 if self.parent is None else self.parent.step
