"""Large products of cases: a few of each kind run by default, all of them as slow tests."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from itertools import product
from typing import Any

import pytest


def thinned(quick: Collection[Hashable], *choices: Sequence[Hashable]) -> list[Any]:
    """Return every combination of the choices as a parameter set; those not in ``quick`` are slow.

    A combination of several choices is a tuple; of a single choice, the choice itself.
    """
    all_of = [case if len(choices) > 1 else case[0] for case in product(*choices)]
    unknown = set(quick) - set(all_of)
    assert quick, "none of the cases would run"
    assert not unknown, f"not among the cases: {unknown}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id="-".join(map(str, case)) if isinstance(case, tuple) else str(case),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in all_of
    ]
