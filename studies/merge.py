"""Merge of the last checkpoints of a run, which approximates a decay of the learning rate.

WSM (arXiv 2507.17634): at a constant learning rate, checkpoint j is the first checkpoint plus the
updates of the intervals up to j, so a weighted sum of checkpoints weighs the updates like a decay.
"""

# N checkpoints, k = N - 1 intervals between them, M logical matrices of a parameter

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.model import ModelConfig
from allometry.configs.run import RunConfig
from allometry.data.run_tokenizer import tokenizer_of_run
from allometry.interop.huggingface.config import differences
from allometry.interop.huggingface.convert import new_folder
from allometry.interop.huggingface.weights import MODEL, CheckpointWeights, write_tensors
from allometry.optim.schedule import schedules_of
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.stages import place_of
from allometry.trainer.state.checkpoint import read_facts, saved, step_of
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.identity import Identity, problem_of
from allometry.trainer.state.initial import initial_facts
from allometry.trainer.state.integrity import COMPLETE, seal

_PRIMITIVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: x - x**2 / 2,
    "cosine": lambda x: x / 2 + math.sin(math.pi * x) / (2 * math.pi),
    "sqrt": lambda x: x - 2 / 3 * x**1.5,
}
"""Integrals of the decays 1 - x, (1 + cos(pi x)) / 2 and 1 - sqrt(x) from 0 to x."""
DECAYS = (*_PRIMITIVES, "mean")
_OF_THE_LAST = ".router.load"
"""Tensors copied from the last checkpoint: router loads of one step, which cannot be averaged."""

_NOTHING = "--last={} merges nothing; give 2 checkpoints or more"


def coefficients(steps: Sequence[int], decay: str) -> list[float]:
    """Return the coefficient c_j of each checkpoint; the merge is the sum of c_j theta_j.

    ``steps``: steps of the checkpoints, ascending. c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k,
    which sum to 1. The weight w_i of the update in interval i is the mean of the decay over the
    interval, where the decay falls from 1 at the first checkpoint to 0 at the last (arXiv
    2507.17634, with steps instead of equal intervals). ``mean``: 1/N each. For example,
    ``coefficients([0, 1, 2], "linear")`` is [0.25, 0.5, 0.25].
    """
    assert len(steps) > 1, steps
    if decay == "mean":
        return [1.0 / len(steps)] * len(steps)
    integral, first, length = _PRIMITIVES[decay], steps[0], steps[-1] - steps[0]
    bounds = itertools.pairwise((step - first) / length for step in steps)
    weights = [(integral(stop) - integral(start)) / (stop - start) for start, stop in bounds]
    return [before - after for before, after in itertools.pairwise((1.0, *weights, 0.0))]


@dataclass(frozen=True)
class Window:
    """Checkpoints of a run, oldest first, and the run's configuration in their stage."""

    folder: RunFolder
    config: RunConfig
    paths: tuple[Path, ...]

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints."""
        return [step_of(path) for path in self.paths]

    def last(self, number: int) -> Window:
        """Return the window of the last ``number`` of these checkpoints."""
        return replace(self, paths=self.paths[-number:])

    def rates(self) -> tuple[float, float]:
        """Return the smallest and largest learning rate of the window, as fractions of the peak."""
        run = load(self.folder.config, recorded=True)
        place = place_of(run, self.steps[-1])
        schedule = schedules_of(run)[place.number - 1]
        first = max(self.steps[0] + 1, schedule.first_step)
        rates = [schedule.fraction(step) for step in range(first, self.steps[-1] + 1)]
        return min(rates), max(rates)

    def notes(self) -> list[str]:
        """Return notes for the user about a merge of this window."""
        low, high = self.rates()
        if math.isclose(low, high, rel_tol=1e-9):
            return []
        return [
            f"the learning rate is between {low:.3g} and {high:.3g} of its peak from step "
            f"{self.steps[0] + 1} to {self.steps[-1]}: the merge adds to that change"
        ]


def open_window(run: str | Path, last: int, step: int | None = None) -> Window:
    """Return the ``last`` checkpoints of a run, up to ``step`` (None: up to the newest).

    For example, ``open_window("runs/mine", 5).steps`` are the steps of the last five checkpoints.

    Raises:
        UserError: there are fewer checkpoints, one of them is damaged (by the sizes of its files),
            or their stages have different models.
    """
    if last < 1:
        raise UserError(_NOTHING.format(last))
    folder = RunFolder(run)
    if not folder.config.exists():
        raise UserError(f"{folder.path} has no {folder.config.name}; name the folder of a run")
    there = saved(folder)
    if step is not None and folder.checkpoints / f"step-{step}" not in there:
        names = ", ".join(path.name for path in there) or "none"
        raise UserError(f"--step={step}: {folder.path} has no such checkpoint; it has {names}")
    usable = [path for path in there if step is None or step_of(path) <= step]
    paths = tuple(usable[-last:])
    if len(paths) < last:
        names = ", ".join(path.name for path in paths) or "none"
        raise UserError(
            f"--last={last}: {folder.path} has {len(paths)} checkpoints to merge ({names}); ask "
            "for fewer, or let a run keep more: checkpoint.keep_last, checkpoint.keep_steps"
        )
    for path in paths:
        problem = problem_of(folder, path)
        if problem is not None:
            raise UserError(
                f"checkpoint {path} is damaged ({problem}); merge checkpoints before it with "
                "--step, or fewer after it with --last"
            )
    run_config = load(folder.config, recorded=True)
    places = [place_of(run_config, step_of(path)) for path in paths]
    _check_one_model(paths, [place.config for place in places])
    return Window(folder, places[-1].config, paths)


def _check_one_model(paths: Sequence[Path], configs: Sequence[RunConfig]) -> None:
    for path, config in zip(paths, configs, strict=True):
        for key, now, then in differences(configs[-1].model, config.model):
            raise UserError(
                f"{path.name} and {paths[-1].name} are of stages with different models "
                f"(model.{key}={then!r} and {now!r}); merge fewer checkpoints with --last, those "
                "of one stage"
            )


class Merge:
    """Merged tensors of a window, read one at a time: parameters, and buffers of routers.

    Sums are in fp64, and at most one tensor of each checkpoint is in memory, for any layout of the
    checkpoints. Each tensor is checked against its checksum on reading.

    Raises:
        UserError: a checkpoint lacks a parameter of the model or has it in another shape; on
            reading: a tensor has changed since it was written.
    """

    def __init__(self, window: Window, decay: str) -> None:
        if decay not in DECAYS:
            raise UserError(f"--decay={decay} is not known; use {', '.join(DECAYS)}")
        if len(window.paths) < 2:
            raise UserError(_NOTHING.format(len(window.paths)))
        self.window, self.decay = window, decay
        self.coefficients = coefficients(window.steps, decay)
        self._weights = [CheckpointWeights(path) for path in window.paths]
        self.types = self._weights[-1].types()
        self.shapes = self._weights[-1].shapes
        rules = Parameterization.of_run(window.config)
        specs = inventory(window.config.model)
        self.spheres = {spec.name for spec in specs if rules.resolve(spec).sphere}
        self._check(window.config.model)

    def _check(self, model: ModelConfig) -> None:
        wanted = {spec.name: spec.shape for spec in inventory(model)}
        wanted |= {name: shape for name, shape in self.shapes.items() if name not in wanted}
        for weights in self._weights:
            for name, shape in wanted.items():
                if weights.shapes.get(name) != shape:
                    raise UserError(
                        f"checkpoint {weights.path} has {name} as {weights.shapes.get(name)}, and "
                        f"the run's model as {shape}; merge checkpoints of one model"
                    )

    def read(self, name: str) -> Tensor:
        """Return one merged tensor, unsharded and on the CPU, in its stored dtype."""
        last = self._weights[-1].read(name)
        if name.endswith(_OF_THE_LAST):
            return last
        total = self.coefficients[-1] * last.double()
        for weights, coefficient in zip(self._weights[:-1], self.coefficients, strict=False):
            total.add_(weights.read(name), alpha=coefficient)
        if name in self.spheres:
            total *= _norms(last) / _norms(total).clamp(min=torch.finfo(torch.float64).tiny)
        return total.to(last.dtype)


def _norms(values: Tensor) -> Tensor:
    """Return the Frobenius norm of each logical matrix in fp64: [1, 1], experts [M, 1, 1]."""
    return values.double().flatten(-2).norm(dim=-1)[..., None, None]


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge.

    ``rescaled``: number of parameters whose matrices keep the norms of the last checkpoint.
    """

    source: str
    target: str
    decay: str
    steps: list[int]
    coefficients: list[float]
    tensors: int
    rescaled: int
    notes: list[str]


def merge_run(
    run: str | Path, out: str | Path, last: int, decay: str = "linear", step: int | None = None
) -> MergeReport:
    """Write a run folder ``out`` whose step 0 has the merged weights, without optimizer state.

    The folder is like one from ``allometry convert``: it can be evaluated, exported, trained, and
    used as ``run.initial.folder``. ``decay``: one of ``DECAYS``. A failed merge leaves no files.
    For example, ``merge_run("runs/mine", "runs/merged", last=5)``.

    Raises:
        UserError: see ``open_window`` and ``Merge``; ``out`` exists.
    """
    window = open_window(run, last, step)
    merge = Merge(window, decay)
    with new_folder(out) as (final, partial):
        made = RunFolder(partial)
        path = made.checkpoints / "step-0"
        path.mkdir(parents=True)
        state = {
            MODEL + name: torch.empty(shape, dtype=merge.types[name], device="meta")
            for name, shape in merge.shapes.items()
        }
        files = write_tensors(path, state, lambda name: merge.read(name.removeprefix(MODEL)))
        facts = initial_facts(window.config, ("weights",), _origin(merge))
        seal(path, 0, files, facts, run=Identity.new().run)
        tokenizer_of_run(window.folder.path, window.config.data).keep(partial)
        anew = {"folder": str(out), "resume": "auto", "parent": None, "initial": None}
        config = window.config
        config = config.model_copy(update={"run": config.run.model_copy(update=anew)})
        write_atomically(made.config, dump(config))
        write_atomically(made.latest, path.name + "\n")
        return MergeReport(
            source=str(window.folder.path),
            target=str(final),
            decay=decay,
            steps=window.steps,
            coefficients=merge.coefficients,
            tensors=len(merge.shapes),
            rescaled=len(merge.spheres),
            notes=window.notes(),
        )


def _origin(merge: Merge) -> dict[str, Any]:
    """Return the origin of the merged weights for the checkpoint's facts (JSON)."""
    window = merge.window
    last = window.paths[-1]
    facts = read_facts(last)
    return {
        "source": str(window.folder.path.resolve()),
        "run": window.config.run.folder,
        "step": step_of(last),
        "hash": hashlib.sha256((last / COMPLETE).read_bytes()).hexdigest()[:16],
        "seed": window.config.run.seed,
        **{key: facts[key] for key in ("tokens", "data", "reading", "origin") if key in facts},
        **window.folder.origin(),
        "merged": {
            "decay": merge.decay,
            "steps": window.steps,
            "coefficients": merge.coefficients,
        },
    }
