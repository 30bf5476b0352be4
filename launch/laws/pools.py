"""Choice of data pools and their epochs at given budgets: ``allometry mix pools``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.data.store import TokenStore
from allometry.launch.command import Report
from allometry.launch.laws.commands import MixPools
from allometry.launch.laws.predict import LEVEL, interval
from allometry.launch.laws.sources import assignments, numbers
from allometry.launch.text import number, table, write_yaml
from allometry.laws.fit.store import StoredFit, load_fit
from allometry.laws.forms.quality import QualityPools
from allometry.laws.pools import ALL_SUBSETS, PoolChoice, choose_pools, most_epochs, pool_changes

BEYOND = 10.0
"""Changes of the choice are searched up to this factor below and above the budgets."""


def pools(asked: MixPools) -> Report:
    """Return the best pools at each budget.

    Raises UserError: the file is not a fit of quality_pools, sizes or budgets are not numbers, or
    ``yaml`` is given without token files or with several budgets.
    """
    stored = load_fit(asked.fit)
    form = stored.fit.form
    if not isinstance(form, QualityPools):
        raise UserError(
            f"{asked.fit} is a fit of {form.name}, which knows no pools; give one of "
            "quality_pools:COLUMN,COLUMN"
        )
    sizes, stores = _sizes(_texts(asked.sizes))
    budgets = [
        numbers({"--tokens": one.strip()}, "budget")["--tokens"] for one in asked.tokens.split(",")
    ]
    sampled = None if stored.fit.unidentified else stored.bootstrap
    values = stored.fit.values
    chosen = choose_pools(form, values, sizes, budgets, sampled, LEVEL)
    changes = pool_changes(form, values, sizes, min(budgets) / BEYOND, max(budgets) * BEYOND)
    warnings = _warnings(stored, form, chosen, sampled is not None)
    facts = {
        "law": form.name,
        "level": LEVEL,
        "sizes": sizes,
        "choices": [_facts(one) for one in chosen],
        "changes": [
            {"tokens": at, "before": list(before), "after": list(after)}
            for at, before, after in changes
        ],
        "warnings": warnings,
    }
    lines = [_table(chosen), *_change_lines(facts["changes"], budgets)]
    lines += [f"warning: {one}" for one in warnings]
    if asked.yaml is not None:
        _write(asked.yaml, chosen, stores)
        lines.append(f"data.sources of it in {asked.yaml}")
    return Report(facts, "\n".join(lines))


def _texts(texts: Sequence[str]) -> dict[str, str]:
    """Return the NAME=VALUE texts as a mapping; a text may have several, separated by commas."""
    return assignments([one for text in texts for one in text.split(",") if one], "--sizes")


def _sizes(texts: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the tokens of each pool, and the paths of the pools given as token files."""
    sizes, stores = {}, {}
    for name, text in texts.items():
        if Path(f"{text}.idx").is_file():
            sizes[name], stores[name] = float(TokenStore(text).num_tokens), text
        else:
            sizes[name] = numbers({name: text}, "--sizes")[name]
    return sizes, stores


def _warnings(
    stored: StoredFit, form: QualityPools, chosen: Sequence[PoolChoice], sampled: bool
) -> list[str]:
    warnings = []
    fitted = most_epochs(form, stored.fit.observations)
    far = [one for one in chosen if one.epochs > fitted]
    if far:
        warnings.append(
            f"{number(far[-1].epochs, 3)} epochs at {number(far[-1].tokens)} tokens are more than "
            f"the {number(fitted, 3)} that were fitted: what repetition costs there is a guess"
        )
    if len(form.domains) > ALL_SUBSETS:
        warnings.append(
            f"of {len(form.domains)} pools only the best 1, 2, ... by b were compared, not all sets"
        )
    if not sampled:
        why = stored.fit.unidentified
        said = f"the data do not identify {', '.join(why)}" if why else "no bootstraps were made"
        warnings.append(f"no intervals: {said}")
    return warnings


def _facts(one: PoolChoice) -> dict[str, Any]:
    low, high = one.interval or (None, None)
    second = None
    if one.second is not None:
        second = {"pools": list(one.second.pools), "loss": one.second_loss}
    return {
        "tokens": one.tokens,
        "pools": list(one.best.pools),
        "shares": dict(zip(one.best.pools, one.best.shares, strict=True)),
        "epochs": one.epochs,
        "loss": one.loss,
        "low": low,
        "high": high,
        "agree": one.agree,
        "second": second,
    }


def _table(chosen: Sequence[PoolChoice]) -> str:
    rows = [["tokens", "pools", "epochs", "loss", "95 % interval", "samples agree", "next best"]]
    for one in chosen:
        names = zip(one.best.pools, one.best.shares, strict=True)
        low, high = one.interval or (None, None)
        second = "-"
        if one.second is not None and one.second_loss is not None:
            more = number(one.second_loss - one.loss, 2)
            second = f"{'+'.join(one.second.pools)} (+{more})"
        rows.append(
            [
                number(one.tokens),
                ", ".join(f"{name} {share:.1%}" for name, share in names),
                number(one.epochs, 3),
                number(one.loss),
                interval(low, high),
                "-" if one.agree is None else f"{one.agree:.0%}",
                second,
            ]
        )
    return table(rows)


def _change_lines(changes: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> list[str]:
    if not changes:
        low, high = min(budgets) / BEYOND, max(budgets) * BEYOND
        return [f"the choice is the same from {number(low, 3)} to {number(high, 3)} tokens"]
    return [
        f"at {number(one['tokens'], 3)} tokens the choice changes from "
        f"{'+'.join(one['before'])} to {'+'.join(one['after'])}"
        for one in changes
    ]


def _write(path: Path, chosen: Sequence[PoolChoice], stores: Mapping[str, str]) -> None:
    """Write the sources of the only budget to a YAML file."""
    if len(chosen) > 1:
        raise UserError(f"--yaml={path} is of one budget; give --tokens one number")
    (one,) = chosen
    without = [pool for pool in one.best.pools if pool not in stores]
    if without:
        raise UserError(
            f"--yaml={path} names token files, and pool {without[0]} is given by its size alone; "
            f"give --sizes {without[0]}=PATH, without .bin/.idx"
        )
    sources = [
        {"name": pool, "train": stores[pool], "weight": round(share, 9)}
        for pool, share in zip(one.best.pools, one.best.shares, strict=True)
    ]
    write_yaml(path, "--yaml", {"data": {"sources": sources}})
