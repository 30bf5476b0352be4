"""Sweeps of ``benchmarks/transfer.py --size real`` and of its small cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from allometry.configs.model import (
    AuxiliaryBalance,
    DenseModel,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
    RouterConfig,
    SwiGLUExperts,
)
from allometry.scaling.count import count_parameters
from allometry.scaling.shapes import Axis
from contenders.families import ADAM, SPECTRAL, SPHERES, parameterization

PARTS = ("width", "depth", "width-and-depth", "horizon", "batch", "experts", "mssp")
TOKENS_PER_PARAMETER = 20
SPREAD = 16
"""Divisor of the steps of a run at the base, because the batch grows by this factor."""


@dataclass(frozen=True)
class Cut:
    """Size of the study.

    Sizes of an axis begin with the base. A base run reads ``TOKENS_PER_PARAMETER`` tokens per
    active parameter, in at most ``most_steps`` steps if given. ``only``: rows of the cut; None:
    all.
    """

    name: str
    vocabulary: int
    length: int
    sequences: int
    widths: tuple[int, ...]
    layers: tuple[int, ...]
    together: tuple[int, ...]
    horizon_width: int
    growth: tuple[int, ...]
    experts: tuple[int, ...]
    several: tuple[int, ...]
    regimes: tuple[int, ...]
    head: int
    seeds: int
    held_out: int
    max_bytes: int | None = None
    most_steps: int | None = None
    only: tuple[str, ...] | None = None


REAL = Cut(
    name="real",
    vocabulary=512,
    length=128,
    sequences=8,
    widths=(64, 128, 256, 512),
    layers=(2, 4, 8, 16),
    together=(64, 128, 256, 512),
    horizon_width=24,
    growth=(1, 2, 4, 8, 16),
    experts=(1, 4, 16, 64),
    several=(4, 16, 64),
    regimes=(4, 8, 16, 32),
    head=16,
    seeds=3,
    held_out=256,
)
SMALL = Cut(
    name="small",
    vocabulary=512,
    length=32,
    sequences=4,
    widths=(16, 32),
    layers=(1, 2),
    together=(16, 32),
    horizon_width=16,
    growth=(1, 2),
    experts=(1, 4),
    several=(4, 8),
    regimes=(4, 8),
    head=8,
    seeds=3,
    held_out=32,
    max_bytes=1_000_000,
    most_steps=16,
    only=(
        *("width: sp", "width: mup", "depth: completep", "width-and-depth: mupp"),
        *("horizon: hyperp, base head", "batch: mupp", "experts, 1 visit: sp, mup, completep"),
        "mssp: II",
    ),
)
CUTS = {"real": REAL, "small": SMALL}


@dataclass(frozen=True)
class Entry:
    """Row of the study: a model family and parameterization, over the sizes of an axis.

    ``compared``: name of the row whose regret is the reference.
    """

    part: str
    who: str
    config: ParameterizationConfig
    kind: str
    axis: Axis
    sizes: tuple[int, ...]
    model: ModelConfig
    steps: int
    cut: Cut
    group: str | None = None
    compared: str | None = None

    @property
    def name(self) -> str:
        """Return the part and the name of the rules."""
        return f"{self.group or self.part}: {self.who}"

    @property
    def slug(self) -> str:
        """Return the name as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.name)

    @property
    def warmup_steps(self) -> int:
        """Return 2 % of the steps of the base."""
        return max(1, self.steps // 50)

    @property
    def log2_lrs(self) -> tuple[float, ...]:
        """Return the five initial rates of the base, at half octaves."""
        middle = -6.0 if self.kind == ADAM else -5.0
        return tuple(middle + n / 2 for n in range(-2, 3))


def entries(cut: Cut, parts: Iterable[str] | None = None) -> list[Entry]:
    """Return the rows of a cut; a row used as reference precedes the rows compared with it."""
    made = [*_dense(cut), *_runs(cut), *_experts(cut), *_mssp(cut)]
    chosen = set(parts or PARTS)
    return [
        entry
        for entry in made
        if entry.part in chosen and (cut.only is None or entry.name in cut.only)
    ]


def dense(cut: Cut, width: int, layers: int) -> DenseModel:
    """Return a dense model with the cut's head width, qk-norm and SwiGLU of 2.5 times the width."""
    return DenseModel(
        vocab_size=cut.vocabulary,
        width=width,
        num_layers=layers,
        num_heads=width // min(cut.head, width // 2),
        ffn_width=width * 5 // 2 // 8 * 8,
        qk_norm=True,
    )


def mixture(cut: Cut, width: int, number: int, visits: int, wide: int, gate: str) -> MoEModel:
    """Return a model of two MoE layers with an auxiliary balancing loss of coefficient .01."""
    return MoEModel(
        vocab_size=cut.vocabulary,
        width=width,
        num_layers=2,
        num_heads=width // min(cut.head, width // 2),
        qk_norm=True,
        experts=SwiGLUExperts(num_experts=number, experts_per_token=visits, width=wide),
        router=RouterConfig.model_validate(
            {"gate": gate, "balance": AuxiliaryBalance(coefficient=0.01)}
        ),
    )


def steps_of(cut: Cut, model: ModelConfig) -> int:
    """Return the number of steps of a base run."""
    tokens = TOKENS_PER_PARAMETER * count_parameters(model).active
    steps = -(-tokens // (cut.sequences * cut.length * SPREAD)) * SPREAD
    return min(steps, cut.most_steps or steps)


Rules = tuple[tuple[str, ParameterizationConfig, str], ...]
"""Tuples (name, parameterization, kind of optimizer)."""


def adam_rules(width: int, layers: int, batch: int) -> Rules:
    shared: dict[str, Any] = {"embedding_std": 1.0, "base_width": width}
    return (
        ("sp", parameterization(kind="sp", embedding_std=1.0), ADAM),
        ("mup", parameterization(kind="mup", **shared), ADAM),
        (
            "mupp",
            parameterization(kind="mupp", base_layers=layers, base_batch_tokens=batch, **shared),
            ADAM,
        ),
        ("completep", parameterization(kind="completep", base_layers=layers, **shared), ADAM),
    )


def sphere_rules(width: int, layers: int, batch: int, tokens: int) -> Rules:
    """Return HyperP as published (σ of the embedding 1e-4, of the head .02) and
    with the base head."""
    shared: dict[str, Any] = {
        "kind": "hyperp",
        "base_width": width,
        "base_layers": layers,
        "base_batch_tokens": batch,
        "base_tokens": tokens,
    }
    own = parameterization(embedding_std=0.5, output_multiplier="1/m", **shared)
    return (
        ("hyperp, published", parameterization(head_std=0.02, **shared), SPHERES),
        ("hyperp, base head", own, SPHERES),
        ("hyperp, spectral", own, SPECTRAL),
    )


def rules(cut: Cut, model: ModelConfig) -> Rules:
    """Return all rules with this model as their base."""
    batch = cut.sequences * cut.length
    tokens = batch * steps_of(cut, model)
    return (
        *adam_rules(model.width, model.num_layers, batch),
        *sphere_rules(model.width, model.num_layers, batch, tokens),
    )


def _family(
    cut: Cut,
    part: str,
    model: ModelConfig,
    axis: Axis,
    sizes: tuple[int, ...],
    alike: tuple[str, ...] = ("sp",),
    group: str | None = None,
) -> Iterator[Entry]:
    """Yield a row for each rule; rules in ``alike`` give the same runs and share one row."""
    first = ", ".join(alike)
    for who, config, kind in rules(cut, model):
        if who in alike[1:]:
            continue
        entry = Entry(
            part=part,
            who=first if who == "sp" else who,
            config=config,
            kind=kind,
            axis=axis,
            sizes=sizes,
            model=model,
            steps=steps_of(cut, model),
            cut=cut,
            group=group,
        )
        yield entry if who == "sp" else replace(entry, compared=f"{group or part}: {first}")


def _dense(cut: Cut) -> Iterator[Entry]:
    base = dense(cut, cut.widths[0], cut.layers[0])
    yield from _family(cut, "width", base, Axis.WIDTH, cut.widths)
    yield from _family(cut, "depth", base, Axis.DEPTH, cut.layers, ("sp", "mup"))
    yield from _family(cut, "width-and-depth", base, Axis.WIDTH_AND_DEPTH, cut.together)


def _runs(cut: Cut) -> Iterator[Entry]:
    """Yield rows at the base's width and depth, where sp, muP and CompleteP are equal."""
    alike = ("sp", "mup", "completep")
    short = dense(cut, cut.horizon_width, cut.layers[0])
    lengths = tuple(steps_of(cut, short) * factor for factor in cut.growth)
    yield from _family(cut, "horizon", short, Axis.HORIZON, lengths, alike)
    base = dense(cut, cut.widths[0], cut.layers[0])
    batches = tuple(cut.sequences * factor for factor in cut.growth)
    yield from _family(cut, "batch", base, Axis.BATCH, batches, alike)


def _experts(cut: Cut) -> Iterator[Entry]:
    """Yield rows with more experts of constant width and work per token: top-1 and top-4."""
    width, alike = cut.widths[0], ("sp", "mup", "completep")
    for visits, numbers in ((1, cut.experts), (4, cut.several)):
        wide = width * 5 // 2 // visits // 8 * 8 or 8
        base = mixture(cut, width, numbers[0], visits, wide, "sqrt")
        group = f"experts, {visits} visit{'s' if visits > 1 else ''}"
        yield from _family(cut, "experts", base, Axis.EXPERTS, numbers, alike, group)


def _mssp(cut: Cut) -> Iterator[Entry]:
    """Yield regime I over widths with 4 experts, II and III over experts; sp as control."""
    first, half = cut.widths[0], cut.widths[0] // 2
    families = (
        ("I", mixture(cut, first, 4, 1, first, "sigmoid"), Axis.WIDTH, cut.widths),
        ("II", mixture(cut, half, 4, 1, half, "sigmoid"), Axis.REGIME_II, cut.regimes),
        ("III", mixture(cut, half, 4, 1, half // 2, "sigmoid"), Axis.REGIME_III, cut.regimes),
    )
    for regime, base, axis, sizes in families:
        steps = steps_of(cut, base)
        shared: dict[str, Any] = {
            **{"part": "mssp", "kind": ADAM, "axis": axis, "sizes": sizes, "model": base},
            **{"steps": steps, "cut": cut},
        }
        plain = parameterization(kind="sp", embedding_std=1.0)
        grown = Entry(who=f"sp, grown as {regime}", config=plain, **shared)
        yield grown
        ruled = parameterization(
            kind="mssp",
            regime=regime,
            embedding_std=1.0,
            base_width=base.width,
            base_experts=base.experts.num_experts,
            base_experts_per_token=base.experts.experts_per_token,
            base_expert_width=base.experts.width,
        )
        yield Entry(who=regime, config=ruled, compared=grown.name, **shared)
