"""Variants compared by each part of ``benchmarks/transfer.py``."""

from __future__ import annotations

from allometry.scaling.shapes import Axis
from contenders.families import (
    ADAM,
    BASE,
    SPECTRAL,
    SPHERES,
    Asked,
    Reading,
    Variant,
    mixture,
    model,
    mssp,
    parameterization,
    spheres,
)

LOW, HIGH = (-7.0, -6.5, -6.0, -5.5, -5.0, -4.5), (-5.0, -4.5, -4.0, -3.5, -3.0, -2.5)
WIDTHS = (32, 64, 128, 256)
HELD, LOST = Asked(most=0.5), Asked(least=0.5)
"""A rule passes if the best rates drift by at most half an octave; a negative control must drift
more."""

STANDARD = parameterization(kind="sp", embedding_std=1.0)
MAXIMAL = parameterization(kind="mup", embedding_std=1.0, base_width=BASE)

RATES = (
    Variant("sp", STANDARD, ADAM, WIDTHS[:3], LOW, Asked(least=1.5)),
    Variant("mup", MAXIMAL, ADAM, WIDTHS, LOW, Asked(most=0.3)),
    Variant(
        "hyperp, head .02", spheres(head_std=0.02), SPHERES, WIDTHS[:3], HIGH, Asked(least=1.5)
    ),
    Variant(
        "hyperp, head .02, logits / m",
        spheres(head_std=0.02, output_multiplier="1/m"),
        SPHERES,
        WIDTHS[:3],
        HIGH,
    ),
    Variant("hyperp, base head", spheres(), SPHERES, WIDTHS, HIGH, Asked(most=0.9)),
    Variant(
        "hyperp, base head, logits / m",
        spheres(output_multiplier="1/m"),
        SPHERES,
        WIDTHS,
        HIGH,
        Asked(most=0.5),
    ),
    Variant(
        "hyperp, base head, logits / m, spectral",
        spheres(output_multiplier="1/m"),
        SPECTRAL,
        WIDTHS,
        HIGH,
        Asked(most=0.5),
    ),
)


def depth() -> tuple[Variant, ...]:
    """Return variants with 2 to 8 layers of width 64.

    HyperP without its √(L0/L), the negative control, reuses the same trials: the factor applies to
    every rate, so that omitting it (a base with the model's number of layers) only shifts rates.
    """
    width, layers = 64, (2, 4, 8)
    without = Reading("hyperp, no √(L0/L)", -0.5, Asked(least=0.5, exponent=-0.5))
    shared = {"embedding_std": 1.0, "base_width": width}
    complete = parameterization(kind="completep", base_layers=2, depth_alpha=1.0, **shared)
    half = parameterization(kind="completep", base_layers=2, depth_alpha=0.5, **shared)
    plain = parameterization(kind="mup", **shared)
    family = {"axis": Axis.DEPTH, "model": model(width, 2)}
    return (
        Variant(
            "hyperp", spheres(width), SPHERES, layers, HIGH, HELD, readings=(without,), **family
        ),
        Variant("completep", complete, ADAM, layers, LOW, HELD, **family),
        Variant("depth-mup", half, ADAM, layers, LOW, HELD, **family),
        Variant("mup", plain, ADAM, layers, LOW, **family),
    )


def horizon() -> tuple[Variant, ...]:
    """Return variants with 40 to 320 steps at width 64, without HyperP's T^-0.32.

    With the rule, the rates of the same trials shift by .32 octaves per doubling, because the
    factor applies to every rate.
    """
    width, steps = 64, (40, 80, 160, 320)
    ruled = Reading("hyperp, T^-0.32", 0.32, HELD)
    family = {"axis": Axis.HORIZON, "model": model(width, 2)}
    free = spheres(width, data_exponent=0.0)
    plain = parameterization(kind="mup", embedding_std=1.0, base_width=width)
    return (
        Variant(
            "hyperp, no rule",
            free,
            SPHERES,
            steps,
            HIGH,
            Asked(exponent=-0.32),
            readings=(ruled,),
            **family,
        ),
        Variant("mup", plain, ADAM, steps, LOW, **family),
    )


def experts() -> tuple[Variant, ...]:
    """Return mixtures with increasing numbers of experts, by rule.

    HyperP: 1 to 32 experts of constant width, top-1 (width 64, expert width 64, constant tokens and
    work per token; one expert is the dense model), compared with ``sp`` and AdamW. MSSP regime I:
    width x 4, number (4) and top-k (1) constant. II: 4 to 32 experts of width 32, with width and
    top-k in proportion. III: the same with experts half as wide as the model. ``sp`` on each of
    these families is the negative control.
    """
    more, numbers = mixture(64, 1, 1, 64, "sqrt"), (1, 2, 8, 32)
    first = mixture(BASE, 4, 1, 64, "sigmoid")
    second = mixture(BASE, 4, 1, 32, "sigmoid")
    third = mixture(BASE, 4, 1, 16, "sigmoid")
    regimes = (
        ("I", first, Axis.WIDTH, WIDTHS[:3]),
        ("II", second, Axis.REGIME_II, (4, 8, 16, 32)),
        ("III", third, Axis.REGIME_III, (4, 8, 16, 32)),
    )
    found = [
        Variant(
            f"hyperp, 1 visit{name}",
            spheres(64),
            kind,
            numbers,
            HIGH,
            HELD,
            axis=Axis.EXPERTS,
            model=more,
        )
        for name, kind in (("", SPHERES), (", spectral", SPECTRAL))
    ]
    found += [
        Variant("sp, 1 visit", STANDARD, ADAM, numbers, LOW, axis=Axis.EXPERTS, model=more),
    ]
    for regime, base, axis, sizes in regimes:
        ruled = mssp(regime, base)
        family = {"axis": axis, "model": base}
        found.append(Variant(f"mssp {regime}", ruled, ADAM, sizes, LOW, HELD, **family))
        found.append(
            Variant(f"sp, grown as {regime}", STANDARD, ADAM, sizes[:3], LOW, LOST, **family)
        )
    return tuple(found)


SEEDS = {"coordinates": 4, "rates": 4, "depth": 4, "horizon": 4, "experts": 3}
PARTS = {"rates": RATES, "depth": depth(), "horizon": horizon(), "experts": experts()}
