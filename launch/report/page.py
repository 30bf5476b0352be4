"""HTML page of a report, with all its resources embedded."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from allometry.launch.figures.figure import Figure, Panel, rows_of
from allometry.launch.report.inputs import Inputs
from allometry.launch.report.interactive import specification
from allometry.launch.report.section import Section, Table

NARROW, WIDE, SHARES = 2, 3, 6
"""Panels per row of a narrow and of a wide page, and the number of grid columns of a row."""
WORD = 14
"""Length of words, such as paths, above which words of a table may be broken."""
GROUPS_FROM = 2
"""Number of runs from which the page offers a selection."""


def page(sections: Sequence[Section], inputs: Inputs, title: str, made: str) -> str:
    """Return the report as one HTML document that needs no network.

    The content security policy forbids every request, and every script except the two embedded
    scripts (by their hashes), so that even a malicious run name cannot fetch or execute anything.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _resource("page.js")]
    panels = {
        key: specification(panel, legend=figure.legend)
        for section in sections
        for figure in section.figures
        for key, panel in _panels(figure)
    }
    links = "".join(
        f"<li{' class=absent' if section.absent else ''}>"
        f'<a href="#{section.key}">{html.escape(section.title)}</a></li>'
        for section in sections
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_resource('page.css')}</style></head><body>",
        f"<nav><ul>{links}</ul>{_selection(inputs)}</nav>",
        f"<main><header><h1>{html.escape(title)}</h1><p>{html.escape(made)}</p></header>",
        *(_section(section) for section in sections),
        "</main>",
        f'<script type="application/json" id="figures">{_json(panels)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _resource(name: str) -> str:
    file = resources.files("allometry.launch.report").joinpath(name)
    return file.read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return a policy without requests; plotly.js sets styles and makes pictures of its figures."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        for script in scripts
    ]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; form-action 'none'; base-uri 'none'"
    )


def _json(value: Any) -> str:
    """Return JSON that is safe inside a script element: it cannot contain a tag."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _selection(inputs: Inputs) -> str:
    if not inputs.runs:
        return ""
    boxes = "".join(
        f'<li><label title="{html.escape(one.name)}"><input type="checkbox" checked '
        f'data-run="{one.number}"><i style="background:{one.colour}"></i>'
        f"<span>{html.escape(one.name)}</span></label></li>"
        for one in inputs.runs
    )
    tools = ""
    if len(inputs.runs) >= GROUPS_FROM:
        tools = (
            '<input type="search" id="filter" placeholder="name contains" '
            'aria-label="show only runs whose name contains">'
            '<p><button id="all">all</button> <button id="none">none</button></p>'
        )
    return (
        "<h2>Runs</h2>"
        f'{tools}<ul id="runs">{boxes}</ul>'
        '<h2>Training losses</h2><select id="layers" aria-label="which training losses">'
        '<option value="both">smoothed and recorded</option>'
        '<option value="smooth" selected>smoothed</option>'
        '<option value="recorded">as recorded</option></select>'
    )


def _section(section: Section) -> str:
    body = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    if section.absent:
        body = f'<p class="absent">Not shown: {html.escape(section.absent)}.</p>'
    for figure in section.figures:
        body += f"<p>{html.escape(figure.text)}</p>" if figure.text else ""
        body += _figure(figure)
    body += "".join(f'<p class="note">{html.escape(note)}</p>' for note in section.notes)
    body += "".join(_table(table) for table in section.tables)
    return f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>{body}</section>'


def _panels(figure: Figure) -> list[tuple[str, Panel]]:
    return [(f"{figure.key}-{number}", panel) for number, panel in enumerate(figure.panels, 1)]


def _figure(figure: Figure) -> str:
    """Return a container for each panel, with its share of a row on a narrow and on a wide page."""
    spans = [
        [SHARES // number for number in rows_of(len(figure.panels), most) for _ in range(number)]
        for most in (NARROW, WIDE)
    ]
    places = "".join(
        f'<div class="panel" data-figure="{html.escape(key)}" '
        f'style="--narrow:{narrow};--wide:{wide}"></div>'
        for (key, _), narrow, wide in zip(_panels(figure), *spans, strict=True)
    )
    return f'<div class="figure">{places}</div>'


def _table(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.head)
    kinds = [_kind(column) for column in columns]
    head = "".join(
        f"<th class={kind}>{html.escape(name)}</th>"
        for name, kind in zip(table.head, kinds, strict=True)
    )
    rows = []
    for number, row in enumerate(table.rows):
        mark = f' data-row-run="{table.run_s[number]}"' if table.run_s else ""
        cells = "".join(
            f"<td class={kind}>{html.escape(cell)}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        rows.append(f"<tr{mark}>{cells}</tr>")
    caption = f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    return (
        f'{caption}<div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _kind(column: Sequence[str]) -> str:
    """Return the CSS class of a column: no line breaks, between words, or anywhere."""
    if column and all(map(_is_number, column)):
        return "number"
    longest = max((len(word) for cell in column for word in cell.split()), default=0)
    return "long" if longest > WORD else "words"


def _is_number(cell: str) -> bool:
    begins = cell[:1].isdigit() or cell[:1] in ("-", "–", "+") or cell in ("nan", "inf")
    return begins and len(cell) <= 2 * WORD
