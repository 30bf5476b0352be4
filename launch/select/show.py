"""Display and import of scores: ``allometry select show`` and ``select import``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import Select
from allometry.configs.errors import UserError
from allometry.data.order import permutation
from allometry.data.select.kept import Selection, select_documents
from allometry.data.select.scores import Scores, read_scores, write_scores
from allometry.data.select.text import decoder_of, line_of
from allometry.data.store import TokenStore
from allometry.launch.command import Report
from allometry.launch.select.commands import Import, Random, Show
from allometry.launch.text import number, table

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
SIDES = ("top", "middle", "bottom")


def shown(asked: Show) -> Report:
    """Show scores. Raises UserError: the files do not belong together."""
    store = TokenStore(asked.store)
    selection = None
    check_share(asked.keep, asked.side)
    if asked.keep is None:
        scores = read_scores(asked.scores, store)
    else:
        select = Select(scores=str(asked.scores), keep=asked.keep, side=cast(Any, asked.side))
        selection = select_documents(store, select, Path(store.prefix).name)
        scores = selection.scores
    facts = {
        **scores.record.model_dump(mode="json"),
        "quantiles": {str(share): value for share, value in _quantiles(scores, store).items()},
    }
    lines = [
        f"scores of {facts['scorer']}: {settings_line(facts['settings'])}",
        f"{store.num_documents:,} documents of {store.num_tokens:,} tokens, "
        f"{scores.record.unscored:,} without a score",
        _quantile_table(scores, store),
    ]
    if selection is not None:
        facts["select"] = described = selection.describe()
        lines += _kept_lines(selection, described, asked)
    return Report(facts, "\n".join(lines))


def settings_line(settings: Mapping[str, Any]) -> str:
    """Return a scorer's settings on one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "no settings"


def check_share(keep: float | None, side: str | None) -> None:
    """Raise UserError for invalid --keep and --side; None for both means no selection."""
    if (keep is None) != (side is None):
        raise UserError("--keep and --side belong together; give both, or neither")
    if keep is not None and not 0.0 < keep <= 1.0:
        raise UserError(f"--keep={keep:g} must be a share, above 0 and up to 1")
    if side is not None and side not in SIDES:
        raise UserError(f"--side={side} is not known; use {', '.join(SIDES)}")


def _quantiles(scores: Scores, store: TokenStore) -> dict[float, float]:
    """Return, for each of SHARES, the score below which this share of the scored tokens is."""
    known = np.flatnonzero(~np.isnan(scores.values))
    order = known[np.argsort(scores.values[known], kind="stable")]
    ends = np.cumsum(store.lengths[order])
    at = np.searchsorted(ends, np.array(SHARES) * ends[-1]).clip(0, len(order) - 1)
    return dict(zip(SHARES, scores.values[order[at]].astype(float).tolist(), strict=True))


def _quantile_table(scores: Scores, store: TokenStore) -> str:
    found = _quantiles(scores, store)
    return table(
        [
            ["share of the tokens", *(f"{share:.0%}" for share in found)],
            ["at scores up to", *(number(value, 4) for value in found.values())],
        ]
    )


def _kept_lines(selection: Selection, facts: Mapping[str, Any], asked: Show) -> list[str]:
    low, high = facts["kept_scores"]
    lines = [
        f"kept: {facts['kept_documents']:,} documents, {facts['kept_tokens']:,} tokens "
        f"({facts['kept_tokens'] / facts['tokens']:.2%} of all), scores {number(low, 4)} to "
        f"{number(high, 4)}",
    ]
    decode = decoder_of(selection.store.prefix, asked.tokenizer)
    for kind, samples in facts["samples"].items():
        for one in samples:
            text = "" if decode is None else line_of(decode(one["tokens"]))
            lines.append(
                f"  {kind:<8}{number(one['score'], 4):>10}  document {one['document']}  {text}"
            )
    select = selection.select
    said = f"select: {{scores: {select.scores}, keep: {select.keep:g}, side: {select.side}}}"
    return [*lines, "in data.sources:", f"  {said}"]


def imported(asked: Import) -> Report:
    """Write the scores. Raises UserError: the values cannot be scores of the store."""
    store = TokenStore(asked.store)
    settings = {"imported": asked.values.name}
    for text in asked.settings:
        key, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--with {text} is not KEY=VALUE; write it so")
        settings[key] = value
    scores = write_scores(store, asked.scorer, _numbers(asked.values), settings)
    facts = {"scores": str(scores.path), **scores.record.model_dump(mode="json")}
    return Report(facts, f"{len(scores.values):,} scores in {scores.path}")


def random(asked: Random) -> Report:
    """Write scores in (0, 1) that depend only on the seed and the store. Raises UserError."""
    store = TokenStore(asked.store)
    order = permutation(f"scores:{asked.seed}:{store.fingerprint}", store.num_documents)
    values = (order + 0.5) / store.num_documents
    scores = write_scores(store, asked.name, values, {"seed": asked.seed})
    facts = {"scores": str(scores.path), **scores.record.model_dump(mode="json")}
    return Report(facts, f"{len(scores.values):,} random scores in {scores.path}")


def _numbers(path: Path) -> NDArray[Any]:
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
            if values.ndim != 1 or values.dtype.kind not in "fiu":
                raise ValueError(f"it holds {values.dtype} of shape {values.shape}")
            return values
        return np.array([float(line) for line in path.read_text().split()])
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a row of numbers ({error}); give .npy or a number a line"
        ) from None
