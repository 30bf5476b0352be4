"""Selection of documents: scorers, and samples of kept and dropped documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.data.select.text import Decode, decoder, line_of
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.losses import NO_RUNS
from allometry.launch.report.section import Section, Table
from allometry.launch.text import number

HEAD = ("run", "source", "scorer", "keep", "side", "kept tokens", "of", "scores kept", "settings")
SAMPLE_HEAD = ("run", "source", "", "score", "document", "tokens", "begins")


def selection(inputs: Inputs) -> Section:
    """Return each selection's provenance, and a few documents on each side of its threshold."""
    title = "Which documents were read"
    found = [
        (one, name, source["select"])
        for one in inputs.runs
        for name, source in _sources(one).items()
        if isinstance(source, Mapping) and source.get("select")
    ]
    if not found:
        why = "no run chooses documents by scores (select of data.sources)"
        return Section("selection", title, absent=why if inputs.runs else NO_RUNS)
    chosen = [(one.number, _row(one, name, select)) for one, name, select in found]
    decoders = {one.number: _decoder(one) for one, _, _ in found}
    samples = [
        (one.number, row)
        for one, name, select in found
        for row in _samples(one, name, select, decoders[one.number])
    ]
    text = (
        "A source with a select reads a share of its tokens, whole documents by score; held-out "
        "documents are never left out. Samples are evenly spread over the scores of what was kept "
        "and of what was dropped."
    )
    nameless = dict.fromkeys(one.name for one, _, _ in found if decoders[one.number] is None)
    notes = [
        f"{one} keeps no tokenizer, so its samples are shown without text." for one in nameless
    ]
    return Section(
        "selection",
        title,
        text,
        tables=(_table(HEAD, chosen), _table(SAMPLE_HEAD, samples)),
        notes=tuple(notes),
    )


def _table(head: tuple[str, ...], rows: list[tuple[int, tuple[str, ...]]]) -> Table:
    return Table(head, tuple(row for _, row in rows), run_s=tuple(number for number, _ in rows))


def _sources(one: Shown) -> Mapping[str, Any]:
    sources: Mapping[str, Any] = one.run.record.get("data", {}).get("sources") or {}
    return sources


def _decoder(one: Shown) -> Decode | None:
    path = Path(one.run.folder) / "tokenizer.json"
    try:
        return decoder(path) if path.is_file() else None
    except UserError:
        return None


def _row(one: Shown, name: str, select: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = select["kept_scores"]
    return (
        one.name,
        name,
        str(select["scorer"]),
        f"{select['keep']:g}",
        str(select["side"]),
        human(select["kept_tokens"]),
        human(select["tokens"]),
        f"{number(low, 4)} to {number(high, 4)}",
        ", ".join(f"{key} {value}" for key, value in select["settings"].items()) or "–",
    )


def _samples(
    one: Shown, name: str, select: Mapping[str, Any], decode: Decode | None
) -> list[tuple[str, ...]]:
    return [
        (
            one.name,
            name,
            kind,
            number(sample["score"], 4),
            str(sample["document"]),
            str(sample["length"]),
            "–" if decode is None else line_of(decode(sample["tokens"])),
        )
        for kind, samples in select["samples"].items()
        for sample in samples
    ]
