"""Stability monitors: measurements that show problems before the loss does.

At the configured steps a sample of the step's batch runs through the model once more before the
step, without gradients and with observation hooks (``models/observe.py``); gradients and updates
are measured after the step. Monitors do not change a bit of training. All sums are over all ranks,
so that values do not depend on the layout; they are read with the step's own numbers.
"""

# N layers, R roles

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from allometry.configs.execution import MonitorConfig
from allometry.models.observe import FP8_ROLES, MAXIMA, OUTPUT, ROUNDING, SUMS, Observer
from allometry.optim.deepspeed import DeepSpeedOptimizer
from allometry.optim.exchange import ShardedMatrixOps
from allometry.optim.matrix_ops import squared_norms_of_parts
from allometry.optim.shards import Placements
from allometry.optim.tiered import gradient_of, rounded_values_of, values_of
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import AxisName, Mesh
from allometry.scaling.batch import BatchPlan
from allometry.scaling.roles import Role
from allometry.scaling.update_rules import UPDATE_RULES
from allometry.trainer.evaluate import evaluating
from allometry.trainer.record.alarms import Alarms, find
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.sample import Sample
from allometry.trainer.record.spectrum import TopSingularValues
from allometry.trainer.record.timing import to_host
from allometry.trainer.record.writer import Row

SAMPLED_ROWS = 256
"""Rows of a parameter whose updates are measured; copies of all rows would need too much memory."""

_ROLES = tuple(role.value for role in Role)
_AXES: tuple[AxisName, ...] = ("hdp", "tp", "pp")
_STEP_SUMS = ("squares", "magnitudes", "elements", "update", "before", "sampled")


@dataclass
class _Seen:
    """Observations of a step, in host memory."""

    sums: Tensor  # [N, len(SUMS)]
    maxima: Tensor  # [N, len(MAXIMA)]
    output: Tensor  # [len(OUTPUT)]
    roles: Tensor  # [R, len(_STEP_SUMS)]
    rounding: Tensor  # [len(FP8_ROLES), len(ROUNDING)]
    peaks: Tensor  # [R, 2]: largest epsilon, largest | ‖W‖/R − 1 |; −1 if undefined
    singular: dict[str, float] = field(default_factory=dict)


class Monitors(Callback):
    """Measures at the configured steps; runs on every rank."""

    def __init__(
        self,
        config: MonitorConfig,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        sample: Sample,
        batch_plan: BatchPlan,
        mesh: Mesh,
        report: Reporter,
        *,
        num_layers: int,
        clip_grad_norm: float | None,
    ) -> None:
        self._config, self._mesh, self._parallel, self._report = config, mesh, parallel, report
        self._sample, self._batch_plan = sample, batch_plan
        self._num_layers, self._clip = num_layers, clip_grad_norm
        watches = not isinstance(optimizer, DeepSpeedOptimizer)
        self._changes = Changes(optimizer, mesh) if watches else NoChanges(mesh)
        self._optimizer = optimizer
        self._spectrum: TopSingularValues | None = None
        self._observed: Observer | None = None
        self._seen: dict[int, _Seen] = {}
        self._alarms = Alarms()
        self._steps = self._clipped = 0

    def _due(self, step: int) -> bool:
        every = self._config.every_steps
        return every is not None and step % every == 0

    @override
    def before_step(self, step: int) -> None:
        if self._due(step):
            self._observed = self._probe(step)
            self._changes.remember()

    @override
    def after_step(self, step: int) -> None:
        if self._due(step) and self._observed is not None:
            observed, self._observed = self._observed, None
            roles, peaks = self._changes.measure()
            for axis in _AXES:
                for sums in (observed.sums, observed.output, observed.rounding):
                    self._mesh.all_reduce_sum(sums, axis)
                _all_reduce_max(observed.maxima, self._mesh, axis)
            self._mesh.all_reduce_sum(roles, "pp")
            _all_reduce_max(peaks, self._mesh, "pp")
            of_model = observed.sums, observed.maxima, observed.output
            seen = (*of_model, roles, observed.rounding, peaks)
            self._seen[step] = _Seen(*map(to_host, seen))
        every = self._config.singular_values_every_steps
        if every is not None and step % every == 0:
            singular = self._singular_values()
            self._seen.setdefault(step, _Seen(*[torch.empty(0)] * 6)).singular = singular

    @override
    def additions(self, finished: FinishedStep) -> Row:
        """Add the observations, and report their alarms.

        ``clip_rate`` covers the steps since the last row of monitors in this launch.
        """
        self._steps += 1
        self._clipped += self._clip is not None and finished.grad_norm > self._clip
        seen = self._seen.pop(finished.step, None)
        if seen is None:
            return {}
        row: Row = {f"monitors/singular/{k}": v for k, v in seen.singular.items()}
        if not seen.sums.numel():
            return row
        row["monitors/clip_rate"] = self._clipped / self._steps
        self._steps = self._clipped = 0
        mean = _model_rows(row, seen)
        eps = _role_rows(row, seen)
        _rounding_rows(row, seen)
        for kind, details in self._alarms.new(find(row, eps, mean)).items():
            self._report("alarm", step=finished.step, alarm=kind, **details)
        return row

    def _probe(self, step: int) -> Observer:
        mesh, parts = self._mesh, list(self._parallel.parts.values())
        observer = Observer(
            self._num_layers,
            mesh.device,
            own=lambda x_BL: x_BL.tensor_split(mesh.tp.size, dim=1)[mesh.tp.rank],
            copies=mesh.tp.size,
        )
        plan = self._batch_plan
        batches = self._sample(plan.sequences_before(step), plan.sequences(step))
        with evaluating(parts), observer.watching(parts):
            self._parallel.execution.evaluate(batches, lambda index, nll_BL: None)
        return observer

    def _singular_values(self) -> dict[str, float]:
        if isinstance(self._changes, NoChanges):
            return {}
        if self._spectrum is None:
            named = [(n, p) for n, p in self._parallel.named_parameters() if p.dim() > 1]
            rounded = partial(rounded_values_of, self._optimizer)
            self._spectrum = TopSingularValues(named, self._mesh, rounded)
        values = self._spectrum()
        largest = torch.stack([value.max() for value in values.values()]).tolist() if values else []
        mine = dict(zip(values, largest, strict=True))
        if self._mesh.pp.size == 1:
            return mine
        return {k: v for stage in self._mesh.gather_objects(mine) for k, v in stage.items()}


class Changes:
    """Measures gradients, updates and drift from spheres by role, as sums over ranks.

    Of updates, every n-th row of a tensor is measured, with n such that ``SAMPLED_ROWS`` rows
    remain (at least one of each expert): the choice depends on the tensor's shape alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        self._optimizer, self._mesh = optimizer, mesh
        self._whole = ShardedMatrixOps(mesh)
        self._placements = Placements(mesh)
        self._kept: list[Tensor] = []
        self._parameters = [p for _, p in self._members()]

    def _members(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the rows whose updates ``measure`` will compute."""
        self._kept = [self._rows(p).clone() for p in self._parameters]

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, Tensor]:
        """Return this stage's sums [R, len(_STEP_SUMS)] and ``_Seen.peaks``, by role."""
        parameters, kept = self._parameters, self._kept
        self._kept = []
        with_gradient, squares, magnitudes = self._of_gradients()
        now = [self._rows(p) for p in parameters]
        updates = [a.double() - b.double() for a, b in zip(now, kept, strict=True)]
        partials = [
            *squares,
            *magnitudes,
            *squared_norms_of_parts(updates),
            *squared_norms_of_parts(kept),
        ]
        values = iter(self._whole.sums([*with_gradient * 2, *parameters * 2], partials))
        roles = {p: _ROLES.index(group["role"]) for group, p in self._members()}
        device = self._mesh.device
        sums = torch.zeros(len(_ROLES), len(_STEP_SUMS), dtype=torch.float64, device=device)
        columns = {0: with_gradient, 1: with_gradient, 3: parameters, 4: parameters}
        for column, over in columns.items():
            for p in over:
                sums[roles[p], column] += next(values).sum().to(device)
        for p in with_gradient:
            sums[roles[p], 2] += p.numel()
        for p in parameters:
            sums[roles[p], 5] += self._sampled(p)
        return sums, self._peaks()

    def _of_gradients(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the parameters with a gradient, and Σg² and Σ|g| of this rank's parts."""
        parameters: list[Tensor] = []
        squares: list[Tensor] = []
        magnitudes: list[Tensor] = []
        for parameter in self._parameters:
            gradient = gradient_of(self._optimizer, parameter)  # one at a time, as it may be a copy
            if gradient is not None:
                parameters.append(parameter)
                squares += squared_norms_of_parts([gradient])
                magnitudes.append(_sums_of_magnitudes(gradient))
        return parameters, squares, magnitudes

    def _peaks(self) -> Tensor:
        peaks = torch.full((len(_ROLES), 2), -1.0, dtype=torch.float64, device=self._mesh.device)
        # ‖W‖ of the logical matrices [M] of parameters that are kept on spheres.
        on_spheres = [p for group, p in self._members() if group.get("sphere")]
        values = (values_of(self._optimizer, p) for p in on_spheres)  # one at a time
        partials = [squared_norms_of_parts([part])[0] for part in values]
        squares = self._whole.sums(on_spheres, partials)
        norms = {p: square.sqrt() for p, square in zip(on_spheres, squares, strict=True)}
        for group, parameter in self._members():
            role = peaks[_ROLES.index(group["role"])]
            if UPDATE_RULES[group["rule"]].second_moment:
                role[0].clamp_(min=float(group["eps"]))
            if parameter in norms:
                radius = self._optimizer.state[parameter]["radius"]  # see optim/sphere.py
                drift = (norms[parameter] / radius.to(norms[parameter]) - 1.0).abs().max()
                role[1].copy_(torch.maximum(role[1], drift.to(role.device)))
        return peaks

    def _rows(self, parameter: Tensor) -> Tensor:
        """Return this rank's part of the sampled rows."""
        part = values_of(self._optimizer, parameter)
        if part.dim() < 2:
            return part
        start = self._placements.of(parameter).boxes[self._mesh.stage.rank].rows[0]
        apart = _apart(parameter)
        return part[..., -start % apart :: apart, :]

    def _sampled(self, parameter: Tensor) -> int:
        """Return the number of sampled elements of the unsharded parameter."""
        if parameter.dim() < 2:
            return parameter.numel()
        rows = parameter.shape[-2]
        return parameter.numel() // rows * -(-rows // _apart(parameter))


class NoChanges:
    """Replaces ``Changes`` if an engine gives no access to gradients and parameters."""

    LIMITED: ClassVar = {
        "to": "activations and outputs",
        "absent": "grad_rms, grad_l1, param_rms, update_ratio, singular",
    }
    """Details of the event that reports the limitation."""

    def __init__(self, mesh: Mesh) -> None:
        self._device = mesh.device

    def remember(self) -> None:
        """Do nothing."""

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return the result of ``Changes`` for an empty set of parameters."""
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self._device}
        return torch.zeros(len(_ROLES), len(_STEP_SUMS), **kind), torch.full(
            (len(_ROLES), 2), -1.0, **kind
        )


def _sums_of_magnitudes(part: Tensor) -> Tensor:
    """Return Σ|x| over each logical matrix of this rank's part, [m], summed in fp64."""
    dims = (1, 2) if part.dim() == 3 else None
    return torch.linalg.vector_norm(part, 1, dim=dims, dtype=torch.float64).view(-1)


def _apart(parameter: Tensor) -> int:
    rows = parameter.shape[-2]
    experts = parameter.shape[0] if parameter.dim() == 3 else 1
    return max(1, min(rows, rows * experts // SAMPLED_ROWS))


def _all_reduce_max(tensor: Tensor, mesh: Mesh, axis: AxisName) -> None:
    ranks = mesh.axis(axis)
    if ranks.size > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=ranks.group)


def _model_rows(row: Row, seen: _Seen) -> float:
    """Add the model's observations; return the mean magnitude of the layer with activation_max."""
    values = torch.cat([seen.sums, seen.maxima], dim=1).tolist()
    layers = [dict(zip((*SUMS, *MAXIMA), each, strict=True)) for each in values]
    for layer, of in enumerate(layers):
        elements, queries, pairs = (max(of[k], 1.0) for k in ("elements", "queries", "pairs"))
        for branch in ("attention", "ffn"):
            rms = math.sqrt(of[f"{branch}_squares"] / elements)
            outliers = 100.0 * of[f"{branch}_outliers"] / elements
            row[f"monitors/branch_rms/{layer}/{branch}"] = rms
            row[f"monitors/outlier_percent/{layer}/{branch}"] = outliers
        row[f"monitors/attention_z/{layer}"] = of["squared_attention_log_z"] / queries
        row[f"monitors/attention_logit_mean/{layer}"] = of["attention_logits"] / pairs
        row[f"monitors/attention_logit_max/{layer}"] = of["attention_logit"]
        row[f"monitors/activation_max/{layer}"] = of["activation"]
    worst = max(range(len(layers)), key=lambda layer: layers[layer]["activation"])
    row["monitors/attention_logit_max"] = max(of["attention_logit"] for of in layers)
    row["monitors/activation_max"] = layers[worst]["activation"]
    row["monitors/activation_max_layer"] = worst
    output = dict(zip(OUTPUT, seen.output.tolist(), strict=True))
    for name in ("log_z", "squared_log_z"):
        row[f"monitors/output/{name}"] = output[name] / max(output["tokens"], 1.0)
    return float(layers[worst]["magnitudes"] / max(layers[worst]["elements"], 1.0))


def _rounding_rows(row: Row, seen: _Seen) -> None:
    """Add FP8 rounding statistics of the inputs of matrix products, by role of the weights."""
    for role, values in zip(FP8_ROLES, seen.rounding.tolist(), strict=True):
        of = dict(zip(ROUNDING, values, strict=True))
        if of["elements"]:
            row[f"monitors/fp8_error/{role}"] = math.sqrt(of["errors"] / max(of["squares"], 1e-300))
            row[f"monitors/fp8_underflow_percent/{role}"] = 100 * of["underflows"] / of["elements"]
            row[f"monitors/fp8_saturated_percent/{role}"] = 100 * of["saturated"] / of["elements"]


def _role_rows(row: Row, seen: _Seen) -> dict[str, float]:
    """Add the step's measurements by role; return the largest epsilon of each role."""
    eps: dict[str, float] = {}
    magnitudes = 0.0
    for role, values, (most, drift) in zip(
        _ROLES, seen.roles.tolist(), seen.peaks.tolist(), strict=True
    ):
        of = dict(zip(_STEP_SUMS, values, strict=True))
        magnitudes += of["magnitudes"]
        if of["elements"]:
            row[f"monitors/grad_rms/{role}"] = math.sqrt(of["squares"] / of["elements"])
        if of["sampled"]:
            row[f"monitors/param_rms/{role}"] = math.sqrt(of["before"] / of["sampled"])
            if of["before"]:
                row[f"monitors/update_ratio/{role}"] = math.sqrt(of["update"] / of["before"])
        if drift >= 0.0:
            row[f"monitors/sphere_drift/{role}"] = drift
        if most > 0.0:
            eps[role] = most
    if seen.roles[:, _STEP_SUMS.index("elements")].any():
        row["monitors/grad_l1"] = magnitudes
    return eps
