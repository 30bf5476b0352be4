"""Source weights by bilevel optimization: ScaleBiO (arXiv 2406.19976).

The weights lambda minimize the loss L1 of a target after training on the weighted sources:
min_lambda L1(w*(lambda)), w*(lambda) = argmin_w L2(lambda, w), with L2 = sum_i p_i l_i(w),
p = softmax(lambda) and l_i the mean loss of source i. The penalty method replaces this by
min_{lambda, w} max_u L1(w) + alpha (L2(lambda, w) - L2(lambda, u)), which needs first derivatives
alone: two models w and u are trained on the same batches, and the derivative by lambda
is alpha p_i (d_i - sum_k p_k d_k), d_i = l_i(w) - l_i(u), from losses that both have computed.
"""

# S sources

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from allometry.configs.data import DocumentData, SequenceData, Source
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE
from allometry.data.stream import Stream
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.optim.build import build_optimizer, set_lr
from allometry.optim.clip import clip_by_global_norm
from allometry.optim.schedule import Schedule, resolve_schedule
from allometry.scaling.batch import BatchPlan, total_steps
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.feed import DeviceBatch

Floats = NDArray[np.float64]
T = TypeVar("T", contravariant=True)
WARMUP, WEIGHT_DECAY = 0.03, 5e-4
"""Fraction of the steps in which the rate of lambda rises, and its weight decay, as published."""


class Player(Protocol, Generic[T]):
    """One of the two models, w or u."""

    def step(self, batch: T, weights: Sequence[float], fraction: float) -> Floats:
        """Take one optimizer step on the weighted sum of losses.

        Returns the losses before the step: the S sources, then the target. A loss with weight 0
        may be NaN.
        """


class SourceWeights:
    """The weights lambda, with AdamW.

    ``rate`` is the peak learning rate; it rises over the first 3 % of ``steps`` and falls to 0 as
    a cosine.
    """

    def __init__(self, count: int, rate: float, steps: int) -> None:
        self._lambda_S = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        self._optimizer = torch.optim.AdamW([self._lambda_S], lr=rate, weight_decay=WEIGHT_DECAY)
        self._rate, self._steps = rate, steps

    @property
    def shares(self) -> Floats:
        """p = softmax(lambda) (S)."""
        shares_S: Floats = self._lambda_S.detach().softmax(0).numpy()
        return shares_S

    def step(self, step: int, gaps_S: Floats, alpha: float) -> None:
        """Take step ``step`` (from 1), with the gaps d_i = l_i(w) - l_i(u)."""
        warmup = max(1.0, WARMUP * self._steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / self._steps))
        self._optimizer.param_groups[0]["lr"] = self._rate * min(1.0, step / warmup) * cosine
        shares_S = self.shares
        gradient_S = alpha * shares_S * (gaps_S - shares_S @ gaps_S)
        self._lambda_S.grad = torch.from_numpy(gradient_S)
        self._optimizer.step()


@dataclass(frozen=True)
class BilevelStep:
    """Shares before the step (S), and losses of w and u before it (S, and the target of w).

    The rate of the weights is near 0 at the last step, whose shares are the result.
    """

    shares: Floats
    losses: Floats
    inner: Floats
    target: float


def bilevel(
    outer: Player[T],
    inner: Player[T],
    weights: SourceWeights,
    alpha: float,
    batches: Sequence[T] | Iterator[T],
    schedule: Schedule | None = None,
) -> Iterator[BilevelStep]:
    """Yield the steps of ``outer`` (w), ``inner`` (u) and the weights, one for each batch.

    ``schedule``: the rate of both models as a fraction of the peak; None: constant.
    """
    for step, batch in enumerate(batches, start=1):
        fraction = 1.0 if schedule is None else schedule.fraction(step)
        shares_S = weights.shares
        scaled = [alpha * share for share in shares_S.tolist()]
        of_inner = inner.step(batch, [*scaled, 0.0], fraction)
        of_outer = outer.step(batch, [*scaled, 1.0], fraction)
        losses_S, inner_S = of_outer[:-1], of_inner[:-1]
        weights.step(step, losses_S - inner_S, alpha)
        yield BilevelStep(shares_S, losses_S, inner_S, float(of_outer[-1]))


Parts = Sequence[Sequence[DeviceBatch]]
"""Micro-batches of each source, then those of the target."""


class ModelPlayer:
    """A run's model with its optimizer, unsharded on one device."""

    def __init__(self, config: RunConfig, seed: int, device: torch.device, clip_by: float) -> None:
        """``clip_by`` multiplies the bound of the gradient norm, as the loss is scaled by alpha."""
        rules = Parameterization.of_run(config)
        self._model = build_model(config.model, rules, config.training.compute_dtype)
        initialize(self._model, rules, seed)
        self._model.to(device).train()
        self._optimizer = build_optimizer(
            self._model.named_parameters(),
            parameter_specs(self._model),
            rules,
            config.optimizer,
            seed=seed,
        )
        clip = config.training.clip_grad_norm
        self._clip = None if clip is None else clip * clip_by

    def step(self, batch: Parts, weights: Sequence[float], fraction: float) -> Floats:
        """See ``Player``. Each loss is normalized by its own number of targets in the batch."""
        self._optimizer.zero_grad(set_to_none=True)
        losses = np.full(len(batch), np.nan)
        for index, (part, weight) in enumerate(zip(batch, weights, strict=True)):
            if weight == 0.0:
                continue
            targets = max(1, sum(int((one.targets_BL != IGNORE).sum()) for one in part))
            nll = torch.zeros((), dtype=torch.float64, device=part[0].tokens_BL.device)
            for one in part:
                found = self._model(one.tokens_BL, one.targets_BL, one.documents)
                (found.total * (weight / targets)).backward()
                nll += found.nll_BL.double().sum()
            losses[index] = float(nll) / targets
        if self._clip is not None:
            clip_by_global_norm(self._model.parameters(), self._clip)
        set_lr(self._optimizer, fraction)
        self._optimizer.step()
        return losses


@dataclass(frozen=True)
class Slot:
    """Samples of one source in each batch.

    A step reads ``rows`` sequences, and a target that is also weighted reads the same number
    after these.
    """

    name: str
    stream: Stream
    rows: int
    weighted: bool
    target: bool

    @property
    def reads(self) -> int:
        """Number of sequences in a step."""
        return self.rows * (int(self.weighted) + int(self.target))


@dataclass(frozen=True)
class Plan:
    """Plan of a bilevel study: slots, steps, and the device of the models."""

    config: RunConfig
    slots: tuple[Slot, ...]
    steps: int
    schedule: Schedule
    device: torch.device

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the weighted sources."""
        return tuple(slot.name for slot in self.slots if slot.weighted)

    def ledger(self) -> dict[str, int]:
        """Return the tokens that each source gives in all steps."""
        return {
            slot.name: slot.stream.ledger(slot.reads * self.steps)[slot.name] for slot in self.slots
        }

    def epochs(self) -> dict[str, float]:
        """Return the epochs over each source in all steps."""
        return {
            slot.name: slot.stream.epochs(slot.reads * self.steps)[slot.name] for slot in self.slots
        }

    def batches(self) -> Iterator[Parts]:
        """Yield the micro-batches of each step: of the weighted sources, then of the target.

        Sample j of a source is the sample j of a run that reads this source alone.
        """
        for step in range(self.steps):
            parts: list[list[DeviceBatch]] = []
            target: list[DeviceBatch] = []
            for slot in self.slots:
                at = step * slot.reads
                if slot.weighted:
                    parts.append(self._read(slot, at))
                    at += slot.rows
                if slot.target:
                    target = self._read(slot, at)
            yield [*parts, target]

    def _read(self, slot: Slot, position: int) -> list[DeviceBatch]:
        size = self.config.batch.micro_batch_sequences
        return [
            DeviceBatch.of(
                slot.stream.batch(position + at, min(size, slot.rows - at)), self.device, position
            )
            for at in range(0, slot.rows, size)
        ]


def plan_bilevel(config: RunConfig, target: str, seed: int, device: torch.device) -> Plan:
    """Return the plan of a study of the weights of a run's sources.

    All sources with a weight above 0 take part, with equal numbers of sequences in each batch;
    their weights in ``config`` are not used. The target is a source; with weight 0 it is only the
    target. Documents are packed into sequences as with ``data.kind: sequences``.

    Raises:
        UserError: the target is no source, one source alone is weighted, the batch is smaller than
            the number of sources, or the model is a mixture of experts.
    """
    if config.model.kind != "dense":
        raise UserError(
            f"model.kind={config.model.kind} has losses of its routers, which are not of one "
            "source; learn the weights with model.kind=dense"
        )
    data = config.data
    names = [source.name for source in data.sources]
    if target not in names:
        raise UserError(f"--target={target} is none of data.sources; name {' or '.join(names)}")
    wanted = [source for source in data.sources if source.weight > 0.0 or source.name == target]
    weighted = [source.name for source in wanted if source.weight > 0.0]
    if len(weighted) < 2:
        raise UserError(
            f"data.sources: {weighted[0]} alone has a weight above 0, so there is nothing to "
            "learn; give a second source a weight"
        )
    rows = config.batch.sequences // (len(weighted) + 1)
    if not rows:
        raise UserError(
            f"batch.sequences={config.batch.sequences} gives no sequence to each of "
            f"{len(weighted)} sources and the target; raise it to {len(weighted) + 1} or more"
        )
    slots = [
        Slot(
            source.name,
            Stream(_alone(data, source), seed),
            rows,
            weighted=source.weight > 0.0,
            target=source.name == target,
        )
        for source in wanted
    ]
    batch = BatchPlan(config.batch.model_copy(update={"ramp": None}), data.sequence_length)
    steps = total_steps(config.training, batch)
    return Plan(config, tuple(slots), steps, resolve_schedule(config, batch), device)


def _alone(data: SequenceData | DocumentData, source: Source) -> SequenceData:
    return SequenceData(
        sequence_length=data.sequence_length,
        packing=data.packing if data.kind == "sequences" else "per_document",
        tokenizer=data.tokenizer,
        sources=(source.model_copy(update={"weight": 1.0, "validation": None, "parent": None}),),
    )


def learn(plan: Plan, alpha: float, rate: float, seed: int) -> Iterator[BilevelStep]:
    """Yield the steps of one study; both models begin with the same initial values.

    For example, ``*_, last = learn(plan, alpha=10.0, rate=1e-2, seed=0)``.
    """
    torch.manual_seed(seed)  # for dropout
    outer, inner = (ModelPlayer(plan.config, seed, plan.device, alpha) for _ in range(2))
    weights = SourceWeights(len(plan.sources), rate, plan.steps)
    yield from bilevel(outer, inner, weights, alpha, plan.batches(), plan.schedule)


def capped(shares_S: Floats, most_S: Floats) -> Floats:
    """Return shares that are at most ``most_S``; the rest goes to the others in proportion.

    For example, shares (.8, .1, .1) with at most (.5, 1, 1) become (.5, .25, .25).

    Raises:
        UserError: the bounds sum to less than 1.
    """
    if most_S.sum() < 1.0:
        raise UserError(
            f"the sources have tokens for {most_S.sum():.3g} of the run within --max-epochs; raise "
            "it, lower --tokens or add data"
        )
    full = np.zeros(len(shares_S), np.bool_)
    made_S = shares_S.astype(np.float64)
    while (made_S > most_S + 1e-12).any():
        full |= made_S > most_S
        others = np.where(full, 0.0, shares_S)
        if not others.sum():
            others = np.where(full, 0.0, 1.0)
        made_S = np.where(full, most_S, others / others.sum() * (1.0 - most_S[full].sum()))
    return made_S
