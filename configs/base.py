"""What every section of a run's description shares."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from allometry.configs.paths import expanded


class Section(BaseModel):
    """A frozen part of a run's description; a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def kind_unless_said(kind: str) -> BeforeValidator:
    """Return what lets a section without ``kind`` be of this one."""
    return BeforeValidator(lambda v: {"kind": kind, **v} if isinstance(v, dict) else v)


def _whole(value: Any) -> Any:
    """Let ``1e9`` (a float in YAML 1.2) stand where a whole number is meant."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number, not true or false")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("expected a whole number below 2^63")
    return value


Count = Annotated[int, BeforeValidator(_whole)]
"""A whole number of 64 bits that may be written ``1_000_000_000`` or ``1e9``."""

PathText = Annotated[str, AfterValidator(expanded)]
"""A path, kept as ``expanded`` gives it."""
