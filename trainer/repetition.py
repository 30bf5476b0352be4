"""Estimate the value of repeated data before the first step, and limit the number of epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.data.sources import Sources
from allometry.laws.forms.repetition import DataConstrained, effective
from allometry.laws.frontier import repeated
from allometry.scaling.stages import places_of

MOST_EPOCHS = 40
"""Epochs after which the next token is worth less than 8 % of a new token (arXiv 2305.16264)."""
SOME, MUCH = 4, 16
LAW = DataConstrained.published["C4"]
LEAST_PARAMETERS = 7e6
"""Size of the smallest models to which the law was fitted; smaller models get no cost."""


@dataclass(frozen=True)
class Repetition:
    """A source at the end of a run: ``tokens`` read, ``unique`` tokens, and ``epochs``.

    ``average`` is the mean value of a token of the source in this run, and ``last`` the value of
    the next token, relative to a new token (2305.16264, R_D = 15.39 epochs). ``cost`` is the
    increase of the loss in nats per token over reading only new tokens, by the law of C4; None for
    models below its range.
    """

    source: str
    tokens: int
    unique: int
    epochs: float
    average: float
    last: float
    cost: float | None


def worth(epochs: float) -> tuple[float, float]:
    """Return the mean value of a token after ``epochs`` epochs, and the value of the next token.

    For example, after 4 epochs a token was worth 0.931 on average, and the next is worth 0.823.
    """
    one = repeated(epochs, 1.0)
    return one.worth / epochs, one.last


def repetitions(stream: Sources, samples: int, parameters: int) -> list[Repetition]:
    """Return the repetition of each source read in the first ``samples`` samples of a run.

    ``parameters``: the model's parameters without embeddings.
    """
    accounts, begun = stream.accounts(samples), stream.epochs(0)
    total = sum(account.tokens for account in accounts.values())
    found = []
    for name, unique in stream.unique_tokens().items():
        account = accounts[name]
        if not account.tokens:
            continue
        gained = _unique_epochs(account.epochs) - _unique_epochs(begun[name])
        average = gained / (account.epochs - begun[name])
        cost = None
        if parameters >= LEAST_PARAMETERS:
            seen = total - account.tokens * (1.0 - average)
            cost = LAW["B"] * (seen ** -LAW["beta"] - total ** -LAW["beta"])
        last = worth(account.epochs)[1] if account.epochs > 0 else 1.0
        found.append(Repetition(name, account.tokens, unique, account.epochs, average, last, cost))
    return found


def _unique_epochs(epochs: float) -> float:
    """Return the number of epochs of new tokens equivalent to ``epochs`` epochs of one source."""
    return epochs if epochs <= 1.0 else float(effective(1.0, epochs - 1.0, LAW["R_D"]))


def last_sample(config: RunConfig) -> int:
    """Return the number of samples of a run, over all of its training stages."""
    last = places_of(config)[-1]
    return last.batch.sequences_before(last.last_step + 1)


def check_epochs(config: RunConfig, found: Sequence[Repetition]) -> None:
    """Refuse a run with more epochs of a source than useful, or than ``data.allow_epochs``.

    Raises:
        UserError: names the source with the most epochs.
    """
    most = MOST_EPOCHS if config.data.allow_epochs is None else config.data.allow_epochs
    worst = max(found, key=lambda one: one.epochs, default=None)
    if worst is not None and worst.epochs > most:
        raise UserError(
            f"data source {worst.source!r} would be read {worst.epochs:.4g} times (it has "
            f"{worst.unique} tokens), and past {most:g} epochs "
            + (
                "the next token is worth less than 8 % of a new one (arXiv 2305.16264)"
                if config.data.allow_epochs is None
                else "data.allow_epochs stops it"
            )
            + "; add data, lower its weight, shorten the run, or allow it with "
            f"data.allow_epochs: {int(worst.epochs) + 1}"
        )


def repetition_advice(config: RunConfig, found: Sequence[Repetition]) -> Iterator[tuple[str, str]]:
    """Yield (rule, sentence) of advice about repeated sources and dropout."""
    if not found:
        return
    worst, dropout = max(found, key=lambda one: one.epochs), config.model.dropout
    if worst.epochs > SOME:
        how = (
            f"the next token is worth {worst.last:.0%} of a new one"
            if worst.epochs > MUCH
            else f"a token of it is worth {worst.average:.0%} of a new one on average"
        )
        yield (
            "source_is_repeated",
            f"source {worst.source} will be read {worst.epochs:.1f} times, which costs: {how} "
            "(arXiv 2305.16264); add data, lower its weight or shorten the run",
        )
    if worst.epochs > SOME and dropout == 0.0:
        more = " or more, as mixtures of experts suffer more" if _is_moe(config) else ""
        yield (
            "repeats_without_dropout",
            f"source {worst.source} will be read {worst.epochs:.1f} times with model.dropout=0; "
            f"0.1{more} lessens what repetition costs, also where a branch turns it on late "
            "(arXiv 2305.13230)",
        )
    if worst.epochs <= 1.0 and dropout > 0.0:
        yield (
            "dropout_without_repeats",
            f"no source is read twice, where nothing overfits: model.dropout={dropout:g} only "
            "slows (arXiv 1906.06669); set it to 0",
        )


def _is_moe(config: RunConfig) -> bool:
    return isinstance(config.model, MoEModel)


def facts_of(found: Sequence[Repetition]) -> dict[str, dict[str, Any]]:
    """Return the table as JSON, by source."""
    return {one.source: {k: v for k, v in asdict(one).items() if k != "source"} for one in found}


HEAD = ("source", "unique tokens", "epochs", "average worth", "next worth", "cost in loss")


def row_of(source: str, facts: Mapping[str, Any]) -> list[str]:
    """Return a row of the table, with the columns of ``HEAD``."""
    cost = "–" if facts["cost"] is None else f"{facts['cost']:.4f}"
    return [
        source,
        f"{facts['unique']:,}",
        f"{facts['epochs']:.3g}",
        f"{facts['average']:.3f}",
        f"{facts['last']:.3f}",
        cost,
    ]
