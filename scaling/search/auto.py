"""``parallel: auto``: choice of the layout when a run starts, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from allometry.scaling.search.proposal import proposals
from allometry.scaling.search.remedies import near_counts, nearest
from allometry.scaling.search.search import Asked, Search
from allometry.scaling.search.space import Choice, applied

OTHERS = 4  # number of next best degrees in the record
GB = 1e9


def without_auto(config: RunConfig) -> RunConfig:
    """Return the run with a placeholder layout, to be replaced by a search.

    Its steps are predicted for the cluster of the search, unless the run names another one.
    """
    auto, record = config.parallel.auto, config.record
    parallel = config.parallel.model_copy(update={"auto": None})
    if auto is not None and record.prediction.cluster is None:
        known = record.prediction.model_copy(update={"cluster": auto.cluster})
        record = record.model_copy(update={"prediction": known})
    return config.model_copy(update={"parallel": parallel, "record": record})


def settle(
    config: RunConfig,
    world_size: int,
    device: str,
    recorded: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, dict[str, Any] | None]:
    """Return the run with its layout, and the choice as JSON for the record; None without ``auto``.

    The function is pure: all ranks get the same result. ``device``: cuda or cpu. ``recorded``: the
    choice recorded by an earlier launch; it is kept if the question and the number of ranks are the
    same, so a continued run keeps its layout. The batch is never changed. Raises UserError if no
    layout fits, or none is valid for this number of ranks. For example,
    ``config, choice = settle(config, 8, "cuda")``.
    """
    auto = config.parallel.auto
    if auto is None:
        return config, None
    plain = without_auto(config)
    question = {**auto.model_dump(mode="json"), "world_size": world_size, "device": device}
    before = dict(recorded or {})
    if before.get("asked") == question:
        kept = applied(plain, Choice(**before["chosen"]), world_size)
        return kept, {**before, "reason": "as the launch before chose it"}
    hardware = load_hardware(auto.cluster)
    asked = Asked(hardware, auto.cluster, "time", auto.reserve, auto.keep, device)
    search = Search(plain, world_size, asked)
    if not search.cores:
        near = " or ".join(map(str, near_counts(plain, world_size, asked)))
        raise UserError(
            f"parallel=auto: {world_size} ranks cannot share batches of {config.batch.sequences} "
            f"sequences of this model in any layout; start {near or 'other numbers of'} ranks or "
            "change batch.sequences"
        )
    best = proposals(search, search.best(1 + OTHERS))
    if not best:
        least = nearest(search)[1]
        raise UserError(
            f"parallel=auto: no layout of {world_size} ranks fits {search.limit / GB:.3g} GB of "
            f"{hardware.name}, the nearest needs {least / GB:.3g} GB; start more ranks, or see "
            "what allometry plan says would fit"
        )
    first = best[0]
    facts = {
        "asked": question,
        "chosen": _fields(first.choice),
        "hdp": world_size // (first.choice.tp * first.choice.pp),
        "reason": _reason(search, before),
        "degrees": len(search.degrees),
        "degrees_that_fit": len(search.fitting_degrees),
        "predicted": _predicted(first),
        "others": [{**_fields(one.choice), **_predicted(one)} for one in best[1:]],
        "left_out": list(first.left_out),
    }
    return applied(plain, first.choice, world_size), facts


def _reason(search: Search, before: Mapping[str, Any]) -> str:
    count, fit = len(search.degrees), len(search.fitting_degrees)
    said = f"the shortest predicted step of the layouts that fit, in {fit} of {count} degrees"
    if before:
        was, now = before["asked"]["world_size"], search.world_size
        other = f"{was} ranks before, {now} now" if was != now else "parallel.auto changed"
        said = f"planned again, as {other}: {said}"
    return said


def _fields(choice: Choice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in Choice.__slots__}


def _predicted(one: Any) -> dict[str, Any]:
    names = ("seconds", "low", "high", "unseen", "tokens_per_second", "mfu", "bubble", "exposed")
    return {**{name: getattr(one, name) for name in names}, "memory_bytes": one.memory.total}
