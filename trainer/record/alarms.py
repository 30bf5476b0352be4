"""Alarms of the monitors, reported once for each contiguous stretch of alarming steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST_GRADIENT_OVER_EPS = 10.0
"""Gradient RMS over epsilon below which epsilon dampens Adam's updates (arXiv 2309.14322, 3.4)."""

MASSIVE, MASSIVE_OVER_MEAN = 100.0, 1000.0
"""Magnitude of massive activations: above 100 and 1000 times the median (arXiv 2402.17762).

The mean magnitude is used in place of the median, because means can be reduced over ranks.
"""

LARGEST_ATTENTION_LOGIT = 1e4
"""Logit above which runs diverged (arXiv 2309.14322, section 3.1)."""

LARGEST_SPHERE_DRIFT = 1e-3
"""Limit of ‖W‖/R − 1 if the update rule keeps a matrix on its sphere; only rounding changes it."""

Findings = Mapping[str, Mapping[str, Any]]
"""Details of the alarms at a step, by kind."""


class Alarms:
    """Stores the kinds that were alarming at the last check; a launch begins with none."""

    def __init__(self) -> None:
        self._standing: frozenset[str] = frozenset()

    def new(self, findings: Findings) -> dict[str, Mapping[str, Any]]:
        """Return the findings whose kind was not alarming at the previous check."""
        fresh = {kind: each for kind, each in findings.items() if kind not in self._standing}
        self._standing = frozenset(findings)
        return fresh


def find(row: Mapping[str, float | int], eps: Mapping[str, float], mean: float) -> Findings:
    """Return the alarms in a row of monitors.

    ``eps``: the largest epsilon of each role that has one; ``mean``: the mean magnitude of the
    layer with the largest activation.
    """
    alarming: dict[str, dict[str, Any]] = {}

    def of(prefix: str) -> dict[str, float]:
        whole = f"monitors/{prefix}/"
        return {k.removeprefix(whole): v for k, v in row.items() if k.startswith(whole)}

    # A gradient of exactly zero is excluded: behind zero-initialized heads it is expected.
    small = {
        role: rms
        for role, rms in of("grad_rms").items()
        if role in eps and 0.0 < rms < LEAST_GRADIENT_OVER_EPS * eps[role]
    }
    if small:
        alarming["gradient_near_eps"] = {"grad_rms": small, "eps": {r: eps[r] for r in small}}
    largest = row.get("monitors/activation_max", 0.0)
    if largest > MASSIVE and largest > MASSIVE_OVER_MEAN * mean:
        layer = row["monitors/activation_max_layer"]
        alarming["massive_activation"] = {"value": largest, "layer": layer, "mean": mean}
    logit = row.get("monitors/attention_logit_max", 0.0)
    if logit > LARGEST_ATTENTION_LOGIT:
        layer = next(n for n, value in of("attention_logit_max").items() if value == logit)
        alarming["attention_logit"] = {"value": logit, "layer": int(layer)}
    off = {r: v for r, v in of("sphere_drift").items() if abs(v) > LARGEST_SPHERE_DRIFT}
    lost = {role: share for role, share in of("fp8_saturated_percent").items() if share > 0.0}
    if lost:
        alarming["fp8_saturated"] = {"percent": lost}
    if off:
        alarming["off_sphere"] = {"drift": off}
    return alarming
