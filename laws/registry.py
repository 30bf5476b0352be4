"""Registry of all laws by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from allometry.configs.errors import UserError
from allometry.laws import forms
from allometry.laws.forms.base import Form


@cache
def all_forms() -> dict[str, Form]:
    """Return every form of ``laws/forms`` by name; each file lists its forms in ``FORMS``."""
    by_name: dict[str, Form] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(forms.__path__)):
        if module == "base":
            continue
        for form in importlib.import_module(f"{forms.__name__}.{module}").FORMS:
            assert form.name not in by_name, form.name
            by_name[form.name] = form
    return by_name


def form_named(name: str) -> Form:
    """Return the form ``name``, or ``name:a,b,c`` over columns. Raises UserError: unknown name."""
    by_name = all_forms()
    base, colon, columns = name.partition(":")
    if base not in by_name:
        hint = f"use one of {', '.join(sorted(by_name))}"
        if near := difflib.get_close_matches(base, by_name, n=1):
            hint = f"did you mean {near[0]!r} (allometry laws lists all)?"
        raise UserError(f"no law is called {base!r}; {hint}")
    if not colon:
        return by_name[base]
    return by_name[base].for_columns([column.strip() for column in columns.split(",")])
