"""Validate ``trainer.json`` of a checkpoint before use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from allometry.trainer.state.integrity import step_named

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True)


class _Change(_Facts):
    position: Count
    shares: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]]
    passed: Count = 0


class _Read(_Facts):
    tokens: Count
    samples: Count = 0


class _Reading(_Facts):
    mixture: Annotated[list[_Change], Field(min_length=1)]
    starts: dict[str, Count]
    ledger: dict[str, _Read]


class _Checkpoint(_Facts):
    step: Count
    data: dict[str, str] = {}
    ledger_tokens: dict[str, Count] = {}
    reading: _Reading | None = None
    held_out_before: dict[str, Number] = {}


class _Accepted(_Facts):
    loss: list[Number]
    grad_norm: list[Number]

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.loss) != len(self.grad_norm):
            raise ValueError("loss and grad_norm are not of the same steps")
        return self


class _Trained(_Checkpoint):
    position_sequences: Count
    flops: Number
    areas: dict[str, Number]
    skipped: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,18}$")],
        Literal["not_finite", "spike", "skip_steps"],
    ] = {}
    accepted: _Accepted | None = None


def check_facts(facts: dict[str, Any], path: Path) -> None:
    """Check the facts of the checkpoint in ``path``.

    Raises:
        ValueError: a value is missing, has a wrong type, or belongs to another step than ``path``.
    """
    try:
        (_Checkpoint if facts.get("weights_only") is True else _Trained).model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}") from None
    named = step_named(path)
    if named is not None and named != facts["step"]:
        raise ValueError(f"it is of step {facts['step']}, and the folder has another name")
