"""The ``run`` section: the folder of a run, and the run that it continues."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from allometry.configs.base import Count, PathText, Section


def covers(name: str, key: str) -> bool:
    """Return True if a dotted key is ``name`` or belongs to the section of that name."""
    return key == name or key.startswith(f"{name}.")


class Parent(Section):
    """The run from which a new run branches, with its states and its records."""

    folder: PathText = Field(
        min_length=1, description="run.folder of the parent, which may still be training"
    )
    step: Count = Field(
        gt=0,
        description="step of the parent's checkpoint at which the branch begins; see "
        "``checkpoint.keep_steps``",
    )
    changes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="keys or sections in which the branch differs from its parent, such as data or "
        "optimizer.lr; with schedule, the branch's schedule counts from ``step``",
    )
    schedule_from: Count = Field(
        0,
        ge=0,
        description="step from which the parent's own schedule counts, if that is not 0; not "
        "allowed with schedule in ``changes``",
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
        """Return True if ``changes`` contains this key or a section to which it belongs."""
        return any(covers(name, key) for name in self.changes)


def _step_or_latest(value: Any) -> Any:
    if isinstance(value, str) and value != "latest":
        raise ValueError("expected the step of a checkpoint, or latest")
    return value


Kept = Literal["weights", "optimizer", "data"]


class Initial(Section):
    """The checkpoint of another run, or the Hugging Face model, from which a new run starts."""

    folder: PathText | None = Field(
        None, min_length=1, description="run.folder of the other run; null: given by ``hf``"
    )
    hf: PathText | None = Field(
        None, min_length=1, description="folder of a Hugging Face model, instead of ``folder``"
    )
    step: Annotated[
        Annotated[Count, Field(ge=0)] | Literal["latest"], BeforeValidator(_step_or_latest)
    ] = Field("latest", description="step of the other run's checkpoint, or the latest one")
    keep: tuple[Kept, ...] = Field(
        ("weights",),
        min_length=1,
        description="state to take over: weights; optimizer, the optimizer states; data, the "
        "position in each source. All other state is initialized",
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
    """Folder, seed and origin of the run."""

    folder: PathText = Field(
        min_length=1, description="folder of the run, for its checkpoints and records"
    )
    seed: Count = Field(
        0, ge=0, description="seed of parameter initialization, data order and dropout"
    )
    resume: str = Field(
        "auto",
        pattern=r"^(auto|never|step-[0-9]+)$",
        description="auto: continue from the latest checkpoint in the folder, or start a new run; "
        "never: the folder must be new; step-N: return to that checkpoint and continue from there",
    )
    parent: Parent | None = Field(
        None,
        description="branch from another run, with its records and its position in the data; null: "
        "no branch",
    )
    initial: Initial | None = Field(
        None,
        description="start a new run at step 1 with the weights of another run; null: random "
        "initialization, unless parent is set",
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
        """Step after which ``schedule`` counts its steps; 0 except for branches."""
        if self.parent is None:
            return 0
        named = self.parent.may_change("schedule")
        return self.parent.step if named else self.parent.schedule_from

    @property
    def branched_at(self) -> int:
        """Number of steps that a branch takes over from its parent; 0 for other runs."""
        return 0 if self.parent is None else self.parent.step
