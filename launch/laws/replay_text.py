"""Text output of ``allometry mix RUNS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allometry.configs.format import human
from allometry.launch.laws.predict import interval
from allometry.launch.text import number, table


def text_of(facts: Mapping[str, Any]) -> str:
    """Return the answer, followed by the numbers it is based on."""
    at, share = facts["at"], facts["share"]
    sizes = ", ".join(human(size) for size in facts["sizes"])
    lines = [
        f"{', '.join(facts['new']) or 'the domain'} after {', '.join(facts['old']) or 'the rest'}: "
        f"{facts['rows']} rows of N = {sizes}; for N = {number(at['N'])} and D = {number(at['D'])}",
        f"replay {1 - share['value']:.3f}, domain share {share['value']:.3f} "
        f"(95 % interval {interval(share['low'], share['high'], 3)}): the least domain loss with a "
        f"general loss of at most {facts['limit']:.4f} ({facts['start']:.4f} before)",
        f"there the domain's loss is {_loss(facts['domain'])}, the general loss "
        f"{_loss(facts['general'])}",
        "",
        _frontier(facts),
        "",
        *_critical(facts["critical"]),
        *_laws(facts),
        *repetition_words(facts["repetition"]),
        *_mixture(facts["mixture"]),
        *(f"warning: {one}" for one in facts["warnings"]),
    ]
    if "picture" in facts:
        lines.append(f"written {facts['picture']}")
    return "\n".join(lines)


def _loss(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['value']:.4f}"
    return f"{one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})"


def _frontier(facts: Mapping[str, Any]) -> str:
    rows = [["replay", "domain share", "domain loss", "general loss"]]
    for one in facts["frontier"]:
        losses = [_loss(one[which]) for which in ("domain", "general")]
        rows.append([f"{1 - one['share']:.3f}", f"{one['share']:.3f}", *losses])
    return table(rows)


def _critical(facts: Mapping[str, Any]) -> list[str]:
    one = facts["d_cpt"]
    lines = [f"critical domain share (the general loss rises by at most {facts['bound']:g}):"]
    if one["ratio"] is None:
        lines.append(f"  by D-CPT none: {one['why']}")
    else:
        ends = interval(one["low"], one["high"], 3)
        least = "" if one["bounded"] else "at least "
        lines.append(f"  by D-CPT at the target {least}{one['ratio']:.3f} (95 % interval {ends})")
        if not one["bounded"]:
            lines.append("  (the bound does not decide: that is the largest share that was run)")
    for of_size in facts["cmr"]:
        said = f"  by CMR for N = {human(of_size['N'])} "
        value = of_size["ratio"]
        lines.append(said + (f"{value:.3f}" if value is not None else f"none: {of_size['why']}"))
    return lines


def _laws(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    for which, law in facts["laws"].items():
        lines.append(f"D-CPT, {which} loss: R2 = {law['r_squared']:.5f}")
    for one in facts["held_out"]:
        off, end = (
            f"{100 * errors['domain']:.2g} % (domain) and {100 * errors['general']:.2g} % (general)"
            for errors in (one, one["ends"])
        )
        lines.append(
            f"held out {one['what']} ({one['rows']} rows): off by at most {off}; by {end} at the "
            "ends of the longest runs"
        )
    return lines


def repetition_words(one: Mapping[str, Any] | None) -> list[str]:
    """Return a sentence on the value of the domain's epochs."""
    if one is None:
        return ["repetition: unknown, as a table says no store's tokens; give --unique TOKENS"]
    says = f"{number(one['tokens'])} tokens of {number(one['unique'])} unique ones of the domain"
    half = f"{one['half_epochs']:.3g}"
    stops = f"more epochs stop paying (a token is worth less than half a new one) after {half}"
    if one["epochs"] <= 1.0:
        return [f"repetition: none, {says}; {stops} epochs by {one['by']}"]
    return [
        f"repetition: {says}, {one['epochs']:.3g} epochs, are worth {number(one['worth'])} unique "
        f"tokens, the last of them {one['last']:.2g} of a new one; {stops} epochs by {one['by']}"
    ]


def _mixture(one: Mapping[str, Any] | None) -> list[str]:
    if one is None:
        return []
    where = f"N = {human(one['at']['N'])}, D = {human(one['at']['D'])}, {one['runs']} runs"
    if "why" in one:
        return [f"shares of all sources ({where}): none: {one['why']}"]
    rows = [["source", "share", "95 % interval"]]
    for name, found in one["shares"].items():
        ends = interval(found["low"], found["high"], 3)
        rows.append([name, f"{found['share']:.3f}", ends])
    losses = one["losses"]
    return [
        f"shares of all sources by mixing laws ({where}): domain loss {losses['domain']:.4f}, "
        f"general loss {losses['general']:.4f}",
        table(rows),
    ]
