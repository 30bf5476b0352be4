"""Text output shared by the commands: tables, numbers, and sentences about fits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from allometry.configs.errors import UserError

if TYPE_CHECKING:
    from allometry.laws.fit.bootstrap import Bootstrap


def table(
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    least: Sequence[int] = (),
    gap: str = "  ",
) -> str:
    """Return rows as columns of equal width; the first row is usually the header.

    In a row with fewer cells than the first row, the last cell may extend over the following
    columns. ``right``: indices of right-aligned columns. ``least``: minimum widths of the first
    columns. For example, ``table([["run", "loss"], ["a", "3.14"]], right={1})``.
    """
    widths = [*least, *[0] * (len(rows[0]) - len(least))]
    for row in rows:
        for i, cell in enumerate(row if len(row) == len(widths) else row[:-1]):
            widths[i] = max(widths[i], len(cell))
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        if len(row) < len(widths):
            cells[-1] = row[-1]
        lines.append(gap.join(cells).rstrip())
    return "\n".join(lines)


def number(value: float, digits: int = 5) -> str:
    """Return a number with ``digits`` significant digits.

    Magnitudes below 1e-99 are printed as 0: a parameter fitted as a logarithm cannot get closer to
    0.
    """
    if abs(value) < 1e-99:
        value = 0.0
    return f"{value:.{digits}g}"


def counted(count: int, what: str) -> str:
    """Return ``1 seed`` or ``3 seeds``, for a word whose plural ends in s."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, or their full paths if two folders have the same name."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def finite(value: float) -> float | None:
    """Return the number, or None for NaN and infinities, which JSON cannot represent."""
    return float(value) if math.isfinite(value) else None


def edge_words(sampled: Bootstrap) -> list[str]:
    """Return a sentence for each parameter at an end of its 95 % interval, or outside of it."""
    words = []
    for parameter in sampled.fit.form.parameters:
        name, value = parameter.name, sampled.fit.values[parameter.name]
        if not sampled.at_edge(name):
            continue
        low, high = sampled.interval(name)
        at = f"at the edge of its interval: {name} = {number(value)}"
        if name in sampled.fit.certificate.at_bounds:
            side = "least" if value - parameter.low <= parameter.high - value else "most"
            words.append(
                f"{at}, the {side} that the law allows, "
                + (
                    "in every sample: the interval has no width and says nothing"
                    if low == high
                    else "so the interval is one-sided: only its other end says something"
                )
            )
        elif low <= value <= high:
            words.append(f"{at}: the samples lie to one side of the fit, so the interval is rough")
        else:
            words.append(
                f"outside of its interval: {name} = {number(value)}: the samples lie to one side "
                "of the fit, so neither is sure"
            )
    return words


def size(number: float) -> str:
    """Return bytes with a binary unit, such as 1.50 GiB."""
    if abs(number) >= 2**28:
        return f"{number / 2**30:.2f} GiB"
    if abs(number) >= 2**18:
        return f"{number / 2**20:.1f} MiB"
    return f"{number / 2**10:.1f} KiB" if abs(number) >= 2**10 else f"{number:.0f} B"


def write_yaml(path: Path, option: str, content: Mapping[str, Any]) -> None:
    """Write part of a configuration to a YAML file.

    Raises UserError: the file cannot be written; the message names the ``option`` that gave it.
    """
    out = StringIO()
    YAML().dump(content, out)
    try:
        path.write_text(out.getvalue(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option}={path} cannot be written ({error.strerror})") from None
