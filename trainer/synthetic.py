"""Advice on synthetic text in a run's data, and detection of leaked held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from allometry.configs.run import RunConfig
from allometry.data.manifest import manifest_of
from allometry.data.sources import sums_by_kind

MOST_REPHRASED = 0.5


def synthetic_advice(config: RunConfig, tokens: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (rule, sentence) about the synthetic share of ``tokens``, the tokens of each source.

    A third of rephrased text was best, and rephrased or textbook text alone gave no gain (arXiv
    2510.01631); a rephrased document whose parent is held out puts held-out text into training.
    """
    kinds = {source.name: source.kind for source in config.data.sources}
    sums = sums_by_kind(kinds, tokens)
    total = sum(sums.values())
    rephrased = sums.get("rephrased", 0)
    if total and not sums.get("natural", 0):
        yield (
            "no_natural_text",
            "no natural text is trained on, and synthetic text alone gains nothing or hurts (arXiv "
            "2510.01631); add a natural source",
        )
    elif total and rephrased > MOST_REPHRASED * total:
        yield (
            "much_is_rephrased",
            f"{rephrased / total:.0%} of the tokens are rephrased, where a third was best (arXiv "
            "2510.01631); lower the weights of these sources",
        )
    for source in config.data.sources:
        if source.parent is not None and (why := leak(config, source.name)) is not None:
            yield (
                "held_out_parents",
                f"documents of source {source.name} may be rephrased from held-out ones of "
                f"{source.parent}, as {why}; prepare it with --split-key, the field of what the "
                "parent was split by, its text or id, and the parent's --validation-fraction",
            )


def leak(config: RunConfig, child: str) -> str | None:
    """Return why source ``child`` may train on children of held-out documents, else None.

    Also None if the parent has no held-out text.
    """
    sources = {source.name: source for source in config.data.sources}
    parent = sources[sources[child].parent or ""]
    if parent.validation is None:
        return None
    ours, theirs = (manifest_of(one.train) for one in (sources[child], parent))
    if ours is None or theirs is None:
        return "how both were split is not known (no manifest.json of `allometry prepare`)"
    if ours[0].request.get("split_key") is None:
        return "its own text decided what was held out"
    fractions = [one[0].request.get("validation_fraction") for one in (ours, theirs)]
    if None in fractions:
        return "how much of both was held out is not known"
    if fractions[0] < fractions[1]:
        return f"{fractions[0]:g} of it were held out and {fractions[1]:g} of its parent"
    return None
