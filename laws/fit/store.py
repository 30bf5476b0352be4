"""File of a fit: everything for predictions, and all inputs of the fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.fit.engine import Fit

KIND = "allometry.fit"
VERSION = 1


@dataclass(frozen=True)
class StoredFit:
    """Content of a fit's file; ``extra``: data added by the writer."""

    fit: Fit
    bootstrap: Bootstrap | None
    extra: dict[str, Any]


def save_fit(
    path: Path, fit: Fit, bootstrap: Bootstrap | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a fit, its observations and its bootstrap as one JSON file.

    The file is replaced atomically: a reader sees the old or the new file. Raises UserError: the
    file cannot be written. For example, ``save_fit(Path("fit.json"), fit, bootstrap(fit))``.
    """
    data = {
        "kind": KIND,
        "version": VERSION,
        **fit.to_json(),
        "bootstrap": None if bootstrap is None else bootstrap.to_json(),
        "extra": dict(extra or {}),
    }
    text = json.dumps(data, allow_nan=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the fit: {error.strerror}") from error


def load_fit(path: Path) -> StoredFit:
    """Return the fit of ``save_fit``, with bit-identical predictions.

    Raises UserError: the file is missing, is not a fit, or has another version.
    """
    try:
        data = json_file.read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the fit: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); give a file that a fit was saved to"
        ) from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UserError(f"{path} holds no fit (kind {KIND!r}); give a file that a fit was saved to")
    if data.get("version") != VERSION:
        raise UserError(
            f"{path} is a fit of version {data.get('version')!r}, but only {VERSION} is "
            f"read; fit again"
        )
    try:
        fit = Fit.from_json(data)
        stored = data["bootstrap"]
        bootstrap = None if stored is None else Bootstrap.from_json(fit, stored)
        return StoredFit(fit, bootstrap, dict(data["extra"]))
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is a damaged fit ({type(error).__name__}: {error}); fit again"
        ) from error
