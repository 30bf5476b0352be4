"""Choice of a run's loss, and its value at the end of the run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.observations import Column
from allometry.laws.runs import Run

SPELLINGS = "validation, train, validation/NAME or train/NAME"


@dataclass(frozen=True, slots=True)
class LossChoice:
    """Loss of a run: ``kind`` ``validation`` or ``train``, of one source or the mixture (None).

    ``last``: share of a run's steps over which the training loss is averaged.
    """

    kind: str
    source: str | None
    last: float

    @classmethod
    def parse(cls, text: str, last: float = 0.1) -> LossChoice:
        """Parse ``validation``, ``train``, ``validation/NAME`` or ``train/NAME``.

        Raises UserError: any other text, or ``last`` is not a share of the run.
        """
        kind, slash, source = text.partition("/")
        if kind not in ("validation", "train") or (slash and not source):
            raise UserError(f"--loss={text} is no loss of a run; use {SPELLINGS}")
        if not 0.0 < last <= 1.0:
            raise UserError(f"--last={last} is not a share of a run; use more than 0 and at most 1")
        return cls(kind, source or None, last)

    def describe(self, run: Run) -> str:
        """Return a description of the loss, for ``Observations.conventions``."""
        over = f"mean over the last {self.last:.0%} of the steps, nats per token"
        if self.kind == "train":
            return f"training loss of {self.source or 'the mixture'}, {over}"
        if self.source is not None:
            return f"held-out loss of {self.source} at the last step, nats per token"
        weights = validation_weights(run)
        names = ", ".join(f"{weight:.4g} {name}" for name, weight in weights.items())
        return f"held-out loss at the last step, nats per token, weighted by shares: {names}"


def shares(run: Run) -> dict[str, float]:
    """Return each source's share of the run's first mixture."""
    sources = run.record["data"]["sources"]
    return {name: float(source["share"]) for name, source in sources.items()}


def validation_weights(run: Run) -> dict[str, float]:
    """Return the shares of the sources with training and held-out tokens, scaled to sum to one."""
    held_out = {
        n: share for n, share in shares(run).items() if share and f"validation/{n}" in run.metrics
    }
    total = sum(held_out.values())
    return {name: share / total for name, share in held_out.items()}


def final_loss(run: Run, choice: LossChoice) -> float:
    """Return a finished run's loss in nats per token. Raises UserError: missing or not positive."""
    steps, losses = loss_curve(run, choice)
    there = steps == steps[-1]
    if choice.kind == "train":
        there = steps > steps[-1] * (1.0 - choice.last)
    elif steps[-1] != run.metrics["step"][-1]:
        raise UserError(
            f"{run.folder} has no held-out loss at its last step, "
            f"{run.metrics['step'][-1]:.0f}; choose --loss train"
        )
    check_losses(run, choice, steps[there], losses[there])
    return float(losses[there].mean())


def check_losses(run: Run, choice: LossChoice, steps: Column, losses: Column) -> None:
    """Check that losses are positive numbers, because laws compare their logs or shares.

    Raises UserError: a loss is zero, negative or not finite; the message has file, step and value.
    """
    bad = ~np.isfinite(losses) | (losses <= 0.0)
    if bad.any():
        row = int(np.argmax(bad))
        kind = "training" if choice.kind == "train" else "held-out"
        raise UserError(
            f"{run.folder}/metrics.jsonl, step {steps[row]:.0f}: the {kind} loss of "
            f"{choice.source or 'the mixture'} is {losses[row]:g}, and laws take positive numbers; "
            "mend or remove that row, or leave the run out"
        )


def loss_curve(run: Run, choice: LossChoice) -> tuple[Column, Column]:
    """Return the recorded steps that have this loss, and their losses.

    Every row except those of skipped steps has the training loss of the mixture: NaN is a loss
    there, for ``check_losses``. Raises UserError: no row has this loss.
    """
    metrics, kind = run.metrics, "loss" if choice.kind == "train" else "validation"
    key = kind if choice.source is None else f"{kind}/{choice.source}"
    values = metrics.get(key)
    if key == "validation":
        key = "validation/"
        weights = validation_weights(run)
        parts = [weight * metrics[f"validation/{name}"] for name, weight in weights.items()]
        values = np.sum(parts, axis=0) if parts else None
    there = np.zeros(0, bool) if values is None else ~np.isnan(values)
    if values is None or not there.any():
        names = [name for name in metrics if name.startswith(("validation/", "loss/"))]
        raise UserError(
            f"{run.folder} has no row with {key} in metrics.jsonl, only "
            f"{', '.join(names) or 'no losses of sources'}; choose another --loss ({SPELLINGS})"
        )
    if choice.kind == "train" and choice.source is None:
        there = metrics.get("skipped", np.zeros(len(there))) != 1.0
    return metrics["step"][there], values[there]
