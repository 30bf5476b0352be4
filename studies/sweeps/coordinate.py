"""Coordinate check: the change of activations in a few steps must not depend on the size."""

# B sequences, L tokens, G batches; h_t a block's output after t steps

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.shapes import Axis, resize
from allometry.studies.sweeps.probe import LOGITS, STREAM, Probe, Sequences
from allometry.studies.sweeps.workers import Workers


@dataclass(frozen=True, slots=True)
class Movement:
    """rms(h_t - h_0) of one run: "blocks.0" ..., "stream" (the last block's) and "logits".

    ``losses``: in nats per token, before each step and after the last.
    """

    size: int
    seed: int
    rms: dict[str, float]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of the slopes of blocks (and their stream) and of the logits, both inclusive."""

    blocks: tuple[float, float]
    logits: tuple[float, float]

    @classmethod
    def within(cls, blocks: float, logits: float) -> Bounds:
        """Return symmetric bounds."""
        return cls((-blocks, blocks), (-logits, logits))


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateCheck:
    """Coordinate check of a model at several sizes (arXiv 2203.03466, appendix D.1).

    ``tokens_GBL``: G batches [B, L+1]; seed s trains and is measured on batch s mod G, in each of
    ``steps`` steps at the constant learning rate of ``optimizer``, in fp32. Zeros in the head and
    in the queries (``zero_head``, ``zero_queries``) remove the part of the initial function that
    legitimately shrinks as 1/√width, so that a few steps show the asymptotic slope; matrices on a
    sphere cannot be zero and keep their values.
    """

    model: ModelConfig
    parameterization: ParameterizationConfig
    optimizer: OptimizerConfig
    tokens_GBL: Sequences
    steps: int = 5
    zero_head: bool = True
    zero_queries: bool = True

    def movement(self, size: int, seed: int, axis: Axis = Axis.WIDTH) -> Movement:
        """Train one model and return the changes of its block outputs and logits."""
        assert axis != Axis.HORIZON, "a few steps have no horizon"
        zero = ("head",) * self.zero_head + ("queries",) * self.zero_queries
        model = resize(self.model, axis, size)
        probe = Probe(model, self.parameterization, self.optimizer, seed, zero=zero)
        batch_BL = self.tokens_GBL[seed % len(self.tokens_GBL)]
        start = probe.activations(batch_BL)
        losses = [probe.step(batch_BL) for _ in range(self.steps)]
        losses.append(probe.loss(batch_BL))
        end = probe.activations(batch_BL)
        rms = {name: float((end[name] - start[name]).square().mean().sqrt()) for name in start}
        rms[STREAM] = rms[f"blocks.{model.num_layers - 1}"]
        return Movement(size=size, seed=seed, rms=rms, losses=tuple(losses))

    def run(
        self,
        sizes: Iterable[int],
        seeds: Iterable[int],
        axis: Axis = Axis.WIDTH,
        processes: int = 1,
    ) -> list[Movement]:
        """Return the movement at each size with each seed, for any number of processes.

        Raises UserError: the model does not exist at a size. For example,
        ``slopes(check.run([64, 128, 256], range(3)))["logits"]``.
        """
        seeds = tuple(seeds)
        tasks = [(size, seed) for size in sizes for seed in seeds]
        for size in sorted({size for size, _ in tasks}):
            resize(self.model, axis, size)
        with Workers(min(processes, len(tasks))) as workers:
            return workers.run(partial(_movement, self, axis), tasks)


def _movement(check: CoordinateCheck, axis: Axis, task: tuple[int, int]) -> Movement:
    return check.movement(*task, axis)


def slopes(movements: Iterable[Movement]) -> dict[str, float]:
    """Return the exponent of size in each movement: d log2(rms) / d log2(size), all seeds.

    Only for blocks that exist at every size; NaN if a movement is not finite.
    """
    movements = list(movements)
    sizes = np.log2([movement.size for movement in movements])
    assert len(set(sizes)) > 1, "a slope needs at least two sizes"
    names = [n for n in movements[0].rms if all(n in movement.rms for movement in movements)]
    slope_of = {}
    for name in names:
        rms = np.array([movement.rms[name] for movement in movements])
        usable = bool(np.isfinite(rms).all() and (rms > 0).all())
        slope_of[name] = float(np.polyfit(sizes, np.log2(rms), 1)[0]) if usable else float("nan")
    return slope_of


def failures(measured: Mapping[str, float], bounds: Bounds, axis: Axis = Axis.WIDTH) -> list[str]:
    """Return a sentence for each slope outside its bounds; [] if the check is passed.

    Over depth the stream is checked instead of blocks: the n-th blocks of 4 and of 32 are not at
    the same relative depth.
    """
    outside = []
    for name, slope in measured.items():
        if name != LOGITS and (name == STREAM) != (axis == Axis.DEPTH):
            continue
        low, high = bounds.logits if name == LOGITS else bounds.blocks
        if not low <= slope <= high:
            outside.append(
                f"{name} moves as {axis}^{slope:+.2f}, outside {low:+.2g} to {high:+.2g}"
            )
    return outside


def default_bounds(kind: str, axis: Axis) -> Bounds:
    """Return the bounds for a parameterization of this kind.

    Bounds of muP over widths; wider for spheres, whose head cannot start at zero. Over depth wider
    again, because models of a few layers have not reached the limit of many, and for HyperP towards
    negative slopes, like its angle per step. docs/transfer.md has the measurements.
    """
    if axis == Axis.DEPTH:
        towards = (-0.5, 0.1)
        return Bounds(towards, towards) if kind == "hyperp" else Bounds.within(0.25, 0.25)
    return Bounds.within(0.2, 0.3) if kind == "hyperp" else Bounds.within(0.1, 0.2)


def means(movements: Sequence[Movement]) -> dict[int, dict[str, float]]:
    """Return the root mean square over seeds of each movement, by size."""
    by_size: dict[int, dict[str, float]] = {}
    for size in sorted({movement.size for movement in movements}):
        here = [movement.rms for movement in movements if movement.size == size]
        by_size[size] = {
            name: float(np.sqrt(np.mean([rms[name] ** 2 for rms in here]))) for name in here[0]
        }
    return by_size
