"""Base class and value types of all configuration sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from allometry.configs.paths import expanded


class Section(BaseModel):
    """Base class of configuration sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def kind_unless_said(kind: str) -> BeforeValidator:
    """Return a validator that sets ``kind`` in a section without that key."""
    return BeforeValidator(lambda v: {"kind": kind, **v} if isinstance(v, dict) else v)


def _whole(value: Any) -> Any:
    """Convert an integral float to an integer: ``1e9`` is a float in YAML 1.2."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number, not true or false")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("expected a whole number below 2^63")
    return value


Count = Annotated[int, BeforeValidator(_whole)]
"""64-bit integer that may be written as ``1_000_000_000`` or ``1e9``."""

PathText = Annotated[str, AfterValidator(expanded)]
"""Path after ``expanded`` has replaced ``~`` and environment variables."""
