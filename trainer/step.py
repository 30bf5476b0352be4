"""Take one optimizer step: forward and backward of all micro-batches, reduction, update."""

# B sequences of a micro-batch, L tokens in a sequence, S sources

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from allometry.data.batch import IGNORE
from allometry.optim.build import groups_not_finite, take_step
from allometry.optim.schedule import Schedule
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.trainer.bad_steps import Judge
from allometry.trainer.balance import Balancer
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.record.bits import checksum, combined
from allometry.trainer.record.timing import to_host


@dataclass(frozen=True)
class StepOutcome:
    """Measurements of a step, still on the device so that the host does not wait for them.

    ``sums_2S`` contains the sum of losses and the number of target tokens of each source, over all
    ranks. ``grad_norm`` is the global norm before clipping; ``lr`` the learning rate at the base
    dimensions; ``routing`` the routers' statistics (``Balancer.observed`` summed over all ranks),
    None without experts. ``tokens`` and ``squared_lengths`` are the tokens of the global batch and
    the sum of its squared document lengths (integers, exact in float64). ``verdict`` is the result
    of a ``Judge``, None without one. ``ahead``: sum of losses and targets of each depth of
    multi-token prediction, [depths, 2], None without.
    """

    step: int
    lr: float
    sums_2S: Tensor
    grad_norm: Tensor
    routing: Tensor | None
    tokens: Tensor
    squared_lengths: Tensor
    verdict: Tensor | None = None
    ahead: Tensor | None = None

    @property
    def losses_ahead(self) -> dict[str, float]:
        """Mean loss of each depth of multi-token prediction that has targets, by its number."""
        sums = [] if self.ahead is None else self.ahead.tolist()
        return {str(k): total / count for k, (total, count) in enumerate(sums, 1) if count}

    def to_host(self) -> StepOutcome:
        """Copy the outcome to host memory; on a GPU complete once the work queued now has run."""
        tensors = {
            field.name: to_host(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def source_sums(nll_BL: Tensor, targets_BL: Tensor, sources: Tensor, count: int) -> Tensor:
    """Return loss sums and target counts by source, [2, S] in float64.

    ``sources`` is [B] or [B, L].
    """
    sums = torch.stack([nll_BL.double(), (targets_BL != IGNORE).double()])
    sums = sums.sum(2) if sources.dim() == 1 else sums.flatten(1)
    # A matrix product, because index_add uses atomics on a GPU and is not deterministic.
    numbers_S = torch.arange(count, device=sums.device)
    return sums @ (sources.flatten()[:, None] == numbers_S).double()


def seed_dropout(seed: int, batch: DeviceBatch) -> None:
    """Seed the generators of a forward pass from the seed and the position of its samples alone."""
    place = f"{batch.position}|{batch.first}" if batch.first else str(batch.position)
    digest = hashlib.sha256(f"dropout|{seed}|{place}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class TrainStep:
    """Takes optimizer steps; all dependencies are passed to the constructor."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        mesh: Mesh,
        *,
        peak_lr: float,
        sources: int,
        clip_grad_norm: float | None,
        dropout_seed: int | None,
        balancer: Balancer | None = None,
        judge: Judge | None = None,
        depths: int = 0,
    ) -> None:
        self.parallel = parallel
        self._balancer, self._judge = balancer, judge
        self._optimizer = optimizer
        self._schedule = schedule
        self._mesh = mesh
        self._peak_lr = peak_lr
        self._sources = sources
        self._clip = clip_grad_norm
        self._dropout_seed = dropout_seed
        self._depths = depths

    def __call__(self, step: int, batches: Sequence[DeviceBatch]) -> StepOutcome:
        """Take the step; ``batches`` are this rank's micro-batches.

        The loss is the sum over target tokens divided by their number in the global batch, so
        gradients do not depend on the distribution of tokens over ranks and micro-batches.
        """
        self._optimizer.zero_grad(set_to_none=True)
        sums_2S = torch.zeros(2, self._sources, dtype=torch.float64, device=self._mesh.device)

        def observe(index: int, nll_BL: Tensor) -> None:
            batch = batches[index]
            nonlocal sums_2S
            sums_2S += source_sums(nll_BL, batch.targets_BL, batch.sources, self._sources)

        def seed(index: int) -> None:
            assert self._dropout_seed is not None
            seed_dropout(self._dropout_seed, batches[index])

        before = None if self._dropout_seed is None else seed
        execution = self.parallel.execution
        targets, tokens, squared_lengths = self._begin(
            batches, lambda: execution.count_visits(batches, before)
        )
        # The clamp gives zero gradients, not a division by zero, for a batch without targets.
        scale = 1.0 / targets.clamp(min=1.0)
        execution.train(batches, scale, observe, before)
        sums_2S *= self._mesh.tp.rank == 0  # all tensor-parallel ranks have the same losses
        routing = None if self._balancer is None else self._balancer.observed()
        ahead = self._ahead()
        along = [tensor for tensor in (sums_2S, routing, ahead) if tensor is not None]
        fraction = self._schedule.fraction(step)
        verdict = bad = None

        def is_bad(norm: Tensor) -> Tensor:
            nonlocal verdict, bad
            assert self._judge is not None
            losses, counts = sums_2S.sum(1)
            verdict = self._judge(losses / counts.clamp(min=1.0), norm.to(sums_2S.device))
            bad = verdict[0]
            return bad

        judged = None if self._judge is None else is_bad
        norm = take_step(self._optimizer, fraction, self._clip, self._mesh, along, judged)
        if self._balancer is not None and routing is not None:
            self._balancer.end_step(routing, bad)
        return StepOutcome(
            step=step,
            lr=self._peak_lr * fraction,
            sums_2S=sums_2S,
            grad_norm=norm,
            routing=routing,
            tokens=tokens,
            squared_lengths=squared_lengths,
            verdict=verdict,
            ahead=ahead,
        )

    def _ahead(self) -> Tensor | None:
        """Take the sums of losses and the targets of each depth on this rank, [depths, 2]."""
        if not self._depths:
            return None
        sums = torch.zeros(self._depths, 2, dtype=torch.float64, device=self._mesh.device)
        for part in self.parallel.parts.values():
            if part.mtp is not None:
                sums += part.mtp.take()
        return sums * (self._mesh.tp.rank == 0)

    def pass_over(self, step: int) -> StepOutcome:
        """Return the outcome of a skipped step, without computing or changing anything."""
        zero = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        return StepOutcome(
            step=step,
            lr=0.0,
            sums_2S=zero.expand(2, self._sources),
            grad_norm=zero,
            routing=None,
            tokens=zero,
            squared_lengths=zero,
        )

    def compute(self, batches: Sequence[DeviceBatch]) -> Tensor:
        """Compute the gradients of a step before clipping, without an update.

        Returns the checksum of this rank's losses (0-dim int64). Router statistics are summed and
        discarded; the routers' buffers are left as after the beginning of a step.
        """
        self._optimizer.zero_grad(set_to_none=True)
        execution, losses = self.parallel.execution, [checksum(torch.zeros(0))]

        def seed(index: int) -> None:
            assert self._dropout_seed is not None
            seed_dropout(self._dropout_seed, batches[index])

        def observe(index: int, nll_BL: Tensor) -> None:
            losses.append(checksum(nll_BL))

        before = None if self._dropout_seed is None else seed
        targets, _, _ = self._begin(batches, lambda: execution.count_visits(batches, before))
        execution.train(batches, 1.0 / targets.clamp(min=1.0), observe, before)
        if self._balancer is not None:
            self._balancer.observed()
        self._ahead()
        return combined(losses, self._mesh.device)

    def groups_not_finite(self) -> list[str]:
        """Return the parameter groups with non-finite gradients or values on this rank, by name."""
        return groups_not_finite(self._optimizer)

    def _begin(
        self, batches: Sequence[DeviceBatch], count_visits: Callable[[], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Begin the routers' step; return targets, tokens and squared lengths of the global batch.

        All three are 0-dim float64 tensors. All counts that ranks need before the first backward
        pass are reduced in one message.
        """
        counts = torch.zeros(3 + self._depths, dtype=torch.float64, device=self._mesh.device)
        for batch in batches:
            counts[0] += (batch.targets_BL != IGNORE).sum()
            counts[1] += batch.num_tokens
            if self._depths:
                counts[3:] += batch.targets_ahead(self._depths)
        counts[2] = sum(batch.squared_lengths for batch in batches)
        visits = None if self._balancer is None else self._balancer.count_visits(count_visits)
        # All ranks of a pipeline and of a tensor-parallel group have the same micro-batches.
        if visits is None:
            self._mesh.all_reduce_sum(counts, "hdp")
        else:
            counts *= self._mesh.tp.rank == self._mesh.pp.rank == 0
            self._mesh.sum_together([counts, visits])
        targets, tokens, squared_lengths = counts[:3]
        for part in self.parallel.parts.values():
            if part.mtp is not None:
                part.mtp.set_targets(torch.cat([counts[:1], counts[3:]]))
        if self._balancer is not None:
            self._balancer.begin_step(tokens, visits)
        return targets, tokens, squared_lengths
