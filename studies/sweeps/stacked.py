"""Trials of a sweep with one shape, trained as one model with a leading run axis."""

# R runs, B sequences, L tokens in a sequence, P sequences of a pool

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.models.build import ComputeDtype, parameter_specs
from allometry.models.init import initialize
from allometry.models.stacked import StackedModel
from allometry.optim.build import set_lr
from allometry.optim.groups import parameter_groups
from allometry.optim.stacked import check_stacked, clip_runs, stacked_optimizer
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import RunScale
from allometry.studies.sweeps.probe import Sequences, counts_first, probe_model

LOOK = 16
"""Steps between checks for remaining runs; a check waits for the device."""


def check_stackable(model: ModelConfig, optimizer: OptimizerConfig) -> None:
    """Raise UserError for runs that cannot be stacked."""
    check_stacked(optimizer)
    if model.multi_token is not None:
        raise UserError(
            f"model.multi_token.depth={model.num_depths} weighs tokens by a step's targets, which "
            "stacked runs do not count; use --engine processes, or leave model.multi_token out"
        )
    if model.dropout:
        raise UserError(
            f"model.dropout={model.dropout:g} draws numbers run by run, which stacked runs cannot; "
            "use --engine processes, or model.dropout: 0"
        )


class StackedProbe:
    """R runs of one shape in one model, as ``Probe`` for one run.

    Run r has the rate of ``optimizers[r]``, which are otherwise equal, and the initial values of
    ``seeds[r]``. Each run computes the same as alone, up to rounding. A run whose loss is not
    finite has diverged: ``alive_R`` becomes False, and its parameters do not change any more. No
    method waits for the device, except the checks of ``train``. Raises UserError: see
    ``check_stackable``.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameterization: ParameterizationConfig,
        optimizers: Sequence[OptimizerConfig],
        seeds: Sequence[int],
        *,
        scale: RunScale | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: ComputeDtype = "fp32",
    ) -> None:
        assert len(optimizers) == len(seeds) > 0
        check_stackable(model, optimizers[0])
        device = torch.device(device)
        rules = [Parameterization(parameterization, model, each, scale) for each in optimizers]
        template = probe_model(model, rules[0], compute_dtype)
        self.model = StackedModel(template, len(seeds), device)
        for seed in dict.fromkeys(seeds):
            initialize(template, rules[0], seed)
            for run in (run for run, of_run in enumerate(seeds) if of_run == seed):
                self.model.fill(run, template)
        specs = parameter_specs(template)
        groups = [
            parameter_groups(template.named_parameters(), specs, *each)
            for each in zip(rules, optimizers, strict=True)
        ]
        self.optimizer = stacked_optimizer(self.model.parameters, groups)
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._counts_first = counts_first(model)
        self.alive_R = torch.ones(len(seeds), dtype=torch.bool, device=device)

    def step(
        self, sequences_RBL: Tensor, *, fraction: float = 1.0, clip: float | None = None
    ) -> Tensor:
        """Take a step of each run that has not diverged, at this fraction of its peak rate.

        ``sequences_RBL``: token ids [R, B, L+1] on the device. Returns the losses [R] before the
        step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.model.model.train()
        inputs_RBL, targets_RBL = sequences_RBL[..., :-1], sequences_RBL[..., 1:]
        self.model.begin_step(targets_RBL[0].numel())
        if self._counts_first:
            self.model.set_loads(self.model.visits(inputs_RBL))
        losses, visits = self.model.losses(inputs_RBL, targets_RBL)
        losses_R = losses.total / targets_RBL[0].numel()
        losses_R.sum().backward()
        self.alive_R = self.alive_R & losses_R.detach().isfinite()
        clip_runs([p.grad for p in self._trained], clip, self.alive_R)
        set_lr(self.optimizer, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].where(self.alive_R, 0.0)
        self.optimizer.step()
        self.model.end_step(visits)
        return losses_R.detach()

    def train(
        self,
        pool_PL: Sequences,
        places_RN: NDArray[np.int64],
        fractions: Sequence[float],
        clip: float | None,
    ) -> None:
        """Take a step at each of these fractions of the peak rates, unless all runs have diverged.

        ``places_RN``: indices of each run's sequences in the pool, in order, with equal numbers for
        all steps.
        """
        device = self.alive_R.device
        pool, places = torch.from_numpy(pool_PL).to(device), torch.from_numpy(places_RN).to(device)
        of_steps = places.chunk(len(fractions), dim=1)
        for step, (places_RB, fraction) in enumerate(zip(of_steps, fractions, strict=True)):
            if step % LOOK == 0 and not self.alive_R.any():
                return
            self.step(pool[places_RB], fraction=fraction, clip=clip)

    def final_losses(self, held_out_HL: Sequences, at_once: int) -> list[float]:
        """Return each run's loss on the same sequences, infinite if the run diverged."""
        losses_R = self.losses(torch.from_numpy(held_out_HL).to(self.alive_R.device), at_once)
        good_R = self.alive_R & losses_R.isfinite()
        return losses_R.where(good_R, math.inf).tolist()

    @torch.no_grad()
    def losses(self, sequences_PL: Tensor, at_once: int) -> Tensor:
        """Return each run's loss on the same sequences, nats per token, fp64 [R], without a step.

        ``at_once``: sequences per forward pass.
        """
        self.model.model.eval()
        sums_R = torch.zeros(self.model.runs, dtype=torch.float64, device=self.alive_R.device)
        for some_BL in sequences_PL.split(at_once):
            some_RBL = some_BL.expand(self.model.runs, -1, -1)
            nll_RBL = self.model.losses(some_RBL[..., :-1], some_RBL[..., 1:])[0].nll_BL
            sums_R += nll_RBL.double().sum((1, 2))
        return sums_R / (sequences_PL.shape[0] * (sequences_PL.shape[1] - 1))
