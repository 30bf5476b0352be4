"""General and domain loss of continual pretraining by the domain's share, from D-CPT fits."""

# B samples, n rows, S shares

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.engine import Fit, FitOptions, fit
from allometry.laws.forms.repetition import DataConstrained, effective
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

Array = NDArray[np.float64]

LOSSES = ("general", "domain")
ALPHA, BETA = 0.34, 0.28
"""Exponents of N and D if the runs have too few sizes or horizons: Hoffmann et al., 2203.15556."""
FEWEST_SHARES = 3
GRID = 1001
"""Number of shares at which the frontier is searched."""
STARTS = 32


@dataclass(frozen=True)
class Held:
    """Held-out rows of ``what`` ("r=0.5", "N=1e6"), predicted by fits to the other rows.

    ``errors``: relative errors [n] of each loss, of the rows that the law can describe
    (``described``); ``ends``: the errors at the longest horizon of each N and r.
    """

    what: str
    errors: Mapping[str, Array]
    ends: Mapping[str, Array]


@dataclass(frozen=True)
class DCpt:
    """Both fits of the D-CPT law (2406.01375) to one set of rows, with bootstraps of one seed.

    The bootstraps draw the same groups, so samples of equal index are of the same runs. ``fixed``:
    exponents that the rows do not determine.
    """

    rows: Observations
    fits: Mapping[str, Fit]
    fixed: Mapping[str, float]
    samples: Mapping[str, Bootstrap] = field(default_factory=dict)

    def r_squared(self, which: str) -> float:
        """Return the share of the measured loss's variance that the fit explains."""
        rows = self.fits[which].observations
        left = np.square(self.fits[which].predict(rows) - rows["loss"]).sum()
        return float(1.0 - left / np.square(rows["loss"] - rows["loss"].mean()).sum())

    def at(self, shares_S: Array, size: float, tokens: float) -> Frontier:
        """Return both losses at these shares of the domain."""
        full_S = np.ones(len(shares_S))
        rows = Observations.of({"N": size * full_S, "D": tokens * full_S, "r": shares_S})
        predicted, low, high, drawn = {}, {}, {}, {}
        for which in LOSSES:
            inputs = _inputs(rows, which)
            predicted[which] = self.fits[which].predict(inputs)
            if self.samples:
                one = self.samples[which]
                low[which], high[which] = one.predict_interval(inputs)
                drawn[which] = one.predictions(inputs)
        return Frontier(shares_S, predicted, low, high, drawn)

    @property
    def alpha(self) -> float:
        """Exponent of N of the general loss."""
        return self.fits["general"].values["alpha"]

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest share of the domain in the rows."""
        return float(self.rows["r"].min()), float(self.rows["r"].max())


@dataclass(frozen=True)
class Frontier:
    """Losses [S] of ``general`` and ``domain`` by the domain's share, intervals, samples [B, S]."""

    shares_S: Array
    losses: Mapping[str, Array]
    low: Mapping[str, Array]
    high: Mapping[str, Array]
    drawn: Mapping[str, Array]

    def best(self, bound: float, *, largest: bool = False) -> int:
        """Return the index of the least domain loss with a general loss of at most ``bound``.

        ``largest``: instead, the index of the largest share up to which every share satisfies the
        bound: the critical ratio (2407.17467). Raises UserError: no share satisfies the bound.
        """
        pick = _largest if largest else _least
        place = pick(self.losses["general"], self.losses["domain"], bound)
        if place is None:
            least = int(np.argmin(self.losses["general"]))
            raise UserError(
                f"no share that was run keeps the general loss at {bound:.4f}: the least predicted "
                f"is {self.losses['general'][least]:.4f}, with a domain share of "
                f"{self.shares_S[least]:g}; allow more (--rise), train on fewer tokens or add runs "
                "of more replay"
            )
        return place

    def best_interval(
        self, bound: float, level: float = 0.95, *, largest: bool = False
    ) -> tuple[float, float] | None:
        """Return the interval of the best share over samples, None without samples.

        A sample without a share within the bound counts as the share of its least general loss.
        """
        if not self.drawn:
            return None
        found, pick = [], _largest if largest else _least
        for general_S, domain_S in zip(self.drawn["general"], self.drawn["domain"], strict=False):
            place = pick(general_S, domain_S, bound)
            found.append(self.shares_S[int(np.argmin(general_S)) if place is None else place])
        low, high = np.quantile(found, (0.5 - level / 2, 0.5 + level / 2))
        return float(low), float(high)


def _least(general_S: Array, domain_S: Array, bound: float) -> int | None:
    within = np.where(general_S <= bound, domain_S, np.inf)
    place = int(np.argmin(within))
    return place if np.isfinite(within[place]) else None


def _largest(general_S: Array, _: Array, bound: float) -> int | None:
    over_S = ~(general_S <= bound)
    place = int(np.argmax(over_S)) if over_S.any() else len(over_S)
    return place - 1 if place else None


def fit_d_cpt(rows: Observations, *, bootstraps: int = 0, seed: int = 0) -> DCpt:
    """Fit the D-CPT law to the general and to the domain's loss of rows N, D, r, general, domain.

    With fewer than three sizes (or horizons) the exponent of N (D) is fixed at ``ALPHA``
    (``BETA``), and with one size the term in N is left out. Each loss is fitted to the rows that
    the law can describe (``described``). Raises UserError: there are fewer than three shares or too
    few rows.
    """
    shares = np.unique(rows["r"])
    if len(shares) < FEWEST_SHARES:
        raise UserError(
            f"the runs have domain shares {', '.join(f'{r:g}' for r in shares)} alone, and the "
            f"D-CPT law takes {FEWEST_SHARES} of them; add runs of other ratios"
        )
    sizes, horizons = len(np.unique(rows["N"])), len(np.unique(rows["D"]))
    fixed = {"A": 0.0} if sizes == 1 else {}
    fixed |= {"alpha": ALPHA} if sizes < 3 else {}
    fixed |= {"beta": BETA} if horizons < 3 else {}
    options = FitOptions(starts=STARTS, seed=seed, fixed=fixed)
    form = form_named("d_cpt")
    fits = {w: fit(form, _inputs(described(rows, w), w), options) for w in LOSSES}
    several = bootstraps and len(set(rows.groups)) > 1
    samples = {w: bootstrap(fits[w], max(bootstraps, 2), seed) for w in LOSSES} if several else {}
    return DCpt(rows, fits, fixed, samples)


def held_out(rows: Observations, seed: int = 0) -> tuple[list[Held], list[str]]:
    """Return predictions for each ratio and the largest size by fits without these rows, and notes.

    Each ratio between the smallest and the largest is held out at all sizes. The notes list ratios
    and sizes that cannot be held out.
    """
    shares, sizes = np.unique(rows["r"]), np.unique(rows["N"])
    folds = [(f"r={share:g}", rows["r"] == share) for share in shares[1:-1]]
    found, notes = [], []
    if len(sizes) > 2:
        folds.append((f"N={sizes[-1]:.4g}", rows["N"] == sizes[-1]))
    else:
        notes.append("no size is held out: that takes three, two to fit and one to predict")
    if len(shares) <= FEWEST_SHARES:
        folds = [one for one in folds if one[0].startswith("N")]
        notes.append("no ratio is held out: that takes four, three to fit and one to predict")
    for what, out_n in folds:
        try:
            without = fit_d_cpt(rows.take(~out_n), seed=seed)
        except UserError as error:
            notes.append(f"{what} is not held out: {error}")
            continue
        errors, ends = {}, {}
        for which, law in without.fits.items():
            there = described(rows.take(out_n), which)
            errors[which] = law.predict(_inputs(there, which)) / there[which] - 1.0
            ends[which] = errors[which][_last(there)]
        found.append(Held(what, errors, ends))
    return found, notes


def described(rows: Observations, which: str) -> Observations:
    """Return the rows whose loss ``which`` the law can describe.

    At a share of 0 of the measured corpus the law has no D, while the loss of a corpus that is no
    longer read rises with D: of these rows only those of the longest horizon of each size are kept.
    """
    share = _share(rows, which)
    kept_n = share > 0.0
    for size in np.unique(rows["N"]):
        alike_n = (rows["N"] == size) & ~(share > 0.0)
        if alike_n.any():
            kept_n |= alike_n & (rows["D"] == rows["D"][alike_n].max())
    return rows.take(kept_n)


def _last(rows: Observations) -> NDArray[np.bool_]:
    """Return a mask [n] of the rows with the longest horizon of their N and r."""
    last_n = np.zeros(len(rows), bool)
    for size, share in {*zip(rows["N"], rows["r"], strict=True)}:
        alike_n = (rows["N"] == size) & (rows["r"] == share)
        last_n |= alike_n & (rows["D"] == rows["D"][alike_n].max())
    return last_n


def _share(rows: Observations, which: str) -> Array:
    """Return the share [n] of the corpus whose loss is measured."""
    return rows["r"] if which == "domain" else 1.0 - rows["r"]


def _inputs(rows: Observations, which: str) -> Observations:
    """Return the rows with r as the share of the corpus whose loss is measured, and that loss."""
    columns = {"N": rows["N"], "D": rows["D"], "r": _share(rows, which)}
    if which in rows.columns:
        columns["loss"] = rows[which]
    return replace(rows, columns=columns, conventions={})


@dataclass(frozen=True)
class Repeated:
    """Value of a source that is read ``epochs`` times: ``worth`` in unique tokens (2305.16264).

    ``last``: value of a further token, relative to a unique token. ``half``: number of epochs after
    which ``last`` is below a half.
    """

    tokens: float
    unique: float
    epochs: float
    worth: float
    last: float
    half: float


def repeated(
    tokens: float, unique: float, half_life: float = DataConstrained.published["C4"]["R_D"]
) -> Repeated:
    """Return the value of ``tokens`` read of ``unique`` ones; ``half_life``: the law's R_D.

    The value of a further token is the slope of the law's D' by D, exp(-(epochs - 1)/R_D). For
    example, ``repeated(4e9, 1e9).worth`` is the value of four epochs of 1e9 tokens.
    """
    epochs = tokens / unique
    half = 1.0 + half_life * float(np.log(2.0))
    if epochs <= 1.0:
        return Repeated(tokens, unique, epochs, tokens, 1.0, half)
    worth = float(effective(unique, epochs - 1.0, half_life))
    return Repeated(tokens, unique, epochs, worth, float(np.exp(-(epochs - 1.0) / half_life)), half)
