"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="a YAML file, or preset:NAME")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command whose further arguments override single keys of a config."""
