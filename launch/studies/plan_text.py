"""Text output of ``allometry plan``."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.configs.format import human
from allometry.launch.text import counted, size, table
from allometry.laws.predictions import Compared
from allometry.scaling.count import count_parameters
from allometry.scaling.search.proposal import Proposal
from allometry.scaling.search.remedies import Remedy, nearest
from allometry.scaling.search.search import Search
from allometry.scaling.search.sensitivity import Turn
from allometry.scaling.search.space import Choice

WORTH = 0.01
"""Smallest share of a step saved by another layout that is printed."""


def described(
    searches: Sequence[Search],
    best: Sequence[Proposal],
    turns: Sequence[Turn],
    saved: Sequence[Remedy],
    explain: int,
) -> str:
    """Return the complete result: fitting layouts, the best of them, and their sensitivity."""
    able = [search for search in searches if search.cores]
    lines = [_heading(able[-1]), *(_fits(search) for search in searches)]
    if not best:
        return "\n".join([*lines, *_nothing(able[-1], saved)])
    first = next(search for search in able if search.world_size == best[0].gpus)
    lines += ["", _layouts(best), *_notes(first, best)]
    for number, one in enumerate(best[:explain], 1):
        lines += ["", f"{number}. {words(one.choice, one.gpus)}", _terms(one), "", _memory(one)]
    lines += ["", *_turns(turns, best[0])] if turns else []
    return "\n".join(lines)


def learnt_text(learnt: Sequence[Compared]) -> str:
    """Return a table of the runs used for calibration: measured and predicted steps."""
    rows = [
        [
            str(one.folder),
            f"{one.steps}",
            f"{one.measured_s:.4g}",
            f"{one.before_s:.4g} ({one.interval[0]:.3g} to {one.interval[1]:.3g})",
            f"{one.after_s:.4g}",
        ]
        for one in learnt
    ]
    heads = ["learnt from", "steps", "measured s", "predicted s before (90 %)", "after"]
    return table([heads, *rows], right=(1, 2, 4))


def words(choice: Choice, gpus: int) -> str:
    """Return a layout as text: degrees above 1, the ZeRO stage, the schedule."""
    degrees = [("hdp", gpus // (choice.tp * choice.pp)), ("tp", choice.tp), ("pp", choice.pp)]
    said = [f"{name}={n}" for name, n in (*degrees, ("ep", choice.ep)) if n > 1]
    said.append(f"zero={choice.zero}")
    if choice.pp > 1:
        chunks = f" x{choice.chunks}" if choice.chunks > 1 else ""
        said.append(f"{choice.schedule}{chunks}")
    return " ".join(said)


def _heading(search: Search) -> str:
    config = search.config
    total = count_parameters(config.model).total
    tokens = config.batch.sequences * config.data.sequence_length
    return (
        f"{human(total)} parameters, {human(tokens)} tokens a step, on {search.asked.hardware.name}"
    )


def _fits(search: Search) -> str:
    asked, can, fit = search.asked, len(search.degrees), len(search.fitting_degrees)
    within = f"{size(search.limit)} of {size(asked.memory_of(search.world_size))}"
    gpus = counted(search.world_size, "GPU")
    if not can:
        return f"{gpus}: no layout shares the batches"
    if not fit:
        return f"{gpus}: does not fit {within} in any of {can} ways (tp x pp x ep)"
    return f"{gpus}: fits {within} in {fit} of {can} ways (tp x pp x ep)"


def _layouts(best: Sequence[Proposal]) -> str:
    priced = best[0].cost is not None
    header = ["", "GPUs", "layout", "recompute", "micro", "s/step", "90 %", "tok/s/GPU", "MFU"]
    header += ["bubble", "exposed", "memory", "days", "GPU-hours"]
    header += ["cost"] * priced + ["MWh"]
    rows = [header]
    for number, one in enumerate(best, 1):
        row = [
            *(str(number), str(one.gpus), words(one.choice, one.gpus)),
            *(one.choice.checkpointing, str(one.choice.micro_batch)),
            *(f"{one.seconds:.4g}", f"{one.low:.3g}-{one.high:.3g}"),
            *(f"{one.tokens_per_second:,.0f}", f"{one.mfu:.1%}", f"{one.bubble:.1%}"),
            *(f"{one.exposed:.1%}", size(one.memory.total), f"{one.days:.3g}"),
            human(one.gpu_hours),
        ]
        row += [human(one.cost)] if one.cost is not None else []
        row += [f"{one.kwh / 1e3:,.4g}"]
        rows.append(row)
    return table(rows, right=(0, 1, *range(4, len(header))))


def _notes(search: Search, best: Sequence[Proposal]) -> list[str]:
    lines = ["", f"days, GPU-hours and what follows from them: of {human(best[0].tokens)} tokens"]
    lines[-1] += ", at these steps"
    lines.append("energy: of cards and nodes at the most that they draw")
    if any(one.unseen for one in best):
        lines.append(
            "constants: believed, not measured on this card, precision and kind of model; the "
            "intervals are as wide as that belief"
        )
    lines += _batches(search)
    missing = dict.fromkeys(phrase for one in best for phrase in one.left_out)
    lines += [f"not in the prediction: {phrase}" for phrase in missing]
    return lines


def _batches(search: Search) -> list[str]:
    """Return a line on batch sizes that divide evenly over all GPUs."""
    config, gpus = search.config, search.world_size
    sequences = config.batch.sequences
    if config.data.kind == "documents" or sequences % gpus == 0 or sequences < gpus:
        return []
    near = " or ".join(str(n * gpus) for n in (sequences // gpus, sequences // gpus + 1))
    return [
        f"batch.sequences={sequences} is no multiple of {gpus} GPUs, so that pp or tp must take "
        f"some of them; {near} would be one"
    ]


def _terms(one: Proposal) -> str:
    rows = [["term", "seconds", "share"]]
    rows += [[name, f"{s:.4g}", f"{s / one.seconds:.1%}"] for name, s in one.terms.items()]
    return table(rows, right=(1, 2))


def _memory(one: Proposal) -> str:
    peak = one.memory.peak
    rows = [[f"memory at {peak.name}", "bytes"]]
    ordered = sorted(peak.kinds.items(), key=lambda item: -item[1])
    return table([*rows, *([name, size(n)] for name, n in ordered)], right=(1,))


def _turns(turns: Sequence[Turn], first: Proposal) -> list[str]:
    other = [t for t in turns if t.best is None or t.loses is None or t.loses > WORTH]
    asked = len({turn.assumption for turn in turns})
    if not other:
        return [
            f"the first layout stays the best, or within {WORTH:.0%} of it, when any of {asked} "
            "assumptions changes (rates and bandwidths by 2/3 and 3/2, memory left free)"
        ]
    rows = [["assumption", "becomes", "then the best is", "the first then"]]
    for turn in other:
        best = "nothing fits" if turn.best is None else words(turn.best, first.gpus)
        if turn.best is not None:
            best += f", recompute {turn.best.checkpointing}, micro {turn.best.micro_batch}"
        loses = "does not fit" if turn.loses is None else f"takes {turn.loses:.1%} longer"
        rows.append([turn.assumption, turn.to, best, loses])
    return [f"of {asked} assumptions, the choice hangs on these:", table(rows)]


def _nothing(search: Search, saved: Sequence[Remedy]) -> list[str]:
    choice, least = nearest(search)
    how = f"{words(choice, search.world_size)}, recompute {choice.checkpointing}"
    lines = [f"nearest: {how}, micro {choice.micro_batch}, needs {size(least)}"]
    if not saved:
        return [*lines, "nothing tried makes it fit: more GPUs, offload, FP8; use a smaller model"]
    rows = [["what makes it fit", "least memory", "in"]]
    rows += [[one.change, size(one.bytes), words(one.choice, one.gpus)] for one in saved]
    return [*lines, "", table(rows, right=(1,))]
