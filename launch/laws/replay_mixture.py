"""Shares of more than two sources by exponential mixing laws, for ``allometry mix RUNS``."""

from __future__ import annotations

from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.laws.commands import MixReplay
from allometry.launch.laws.predict import LEVEL
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import FitOptions, fit, require_identified
from allometry.laws.mixing import mixture_intervals, optimal_mixture
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from allometry.laws.replay import ReplayRows

ALIKE = 1e-3
"""Relative difference of tokens below which runs have the same horizon."""
STARTS = 64


def of_sources(asked: MixReplay, read: ReplayRows) -> dict[str, Any] | None:
    """Return the best share of each source; None for fewer than three sources.

    Data mixing laws (2403.16952) are fitted to the final losses of the runs of the largest size and
    its longest horizon. The result is the smallest domain loss with a general loss at most ``rise``
    % above its start, and applies to this size and horizon only. ``why`` is the reason for a
    missing result.
    """
    sources, ends = read.sources, read.ends
    if len(sources) < 3 or ends is None:
        return None
    size = ends["N"].max()
    tokens = ends["D"][ends["N"] == size].max()
    rows = ends.take((ends["N"] == size) & (ends["D"] >= (1.0 - ALIKE) * tokens))
    limit = float(rows["start"].mean()) * (1.0 + asked.rise / 100.0)
    facts = {"at": {"N": float(size), "D": float(tokens)}, "runs": len(rows), "limit": limit}
    names = [f"r/{name}" for name in sources]
    form = form_named(f"mixing_exponential:{','.join(names)}")
    try:
        laws = {}
        for which in ("domain", "general"):
            columns = {**{name: rows[name] for name in names}, "loss": rows[which]}
            options = FitOptions(starts=STARTS, seed=asked.seed)
            laws[which] = fit(form, Observations.of(columns), options)
            require_identified(laws[which])
        search: dict[str, Any] = {
            "weights": {"domain": 1.0, "general": 0.0},
            "least": {name: float(rows[name].min()) for name in names},
            "most": {name: float(rows[name].max()) for name in names},
            "bounds": {"general": limit},
            "seed": asked.seed,
        }
        found = optimal_mixture(laws, names, **search)
        intervals = None
        if asked.bootstraps:
            drawn = {
                which: bootstrap(law, max(asked.bootstraps, 2), asked.seed)
                for which, law in laws.items()
            }
            intervals = mixture_intervals(drawn, names, level=LEVEL, **search)
    except UserError as error:
        return facts | {"why": str(error)}
    shares = {}
    for name, share in found.shares.items():
        low, high = (None, None) if intervals is None else intervals[name]
        shares[name.removeprefix("r/")] = {"share": share, "low": low, "high": high}
    return facts | {"shares": shares, "losses": found.losses}
