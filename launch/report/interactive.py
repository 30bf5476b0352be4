"""Panels as plotly's JSON: traces and a layout that plotly.js draws in the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from allometry.launch.figures.figure import Column, Panel, Series, Ticks, shortened

HEIGHT, LEGEND_ROW = 390, 20
SYMBOLS = {"dots": "circle", "point": "square", "star": "star", "cross": "x"}
SIZES = {"dots": 5, "point": 6, "star": 13, "cross": 9}
FAINT = 0.35
POWERS = 2.0
"""Number of decades above which only powers of ten label an axis."""
DASHES = {"dashed": "dash", "dotted": "2px,6px"}
LEGEND = {
    "orientation": "h",
    "x": 0,
    "y": 0,
    "yref": "container",
    "yanchor": "bottom",
    "font": {"size": 11},
    "itemsizing": "constant",
}
BESIDE = 460
"""Width in pixels of a legend row, from which the number of legend rows is computed."""


def specification(panel: Panel, *, legend: bool) -> dict[str, Any]:
    """Return ``{"data": [...], "layout": {...}}``, which contains JSON types only.

    The ``meta`` of each trace has its ``run`` and ``layer``. ``legend``: True for a legend below
    the axes. Names are escaped, because plotly interprets some HTML in them.
    """
    series = panel.drawn()
    data = [trace for one in series for trace in _traces(one, panel, legend)]
    seen: set[str] = set()
    for trace in data:
        if trace["showlegend"]:
            trace["showlegend"] = trace["name"] not in seen
            seen.add(trace["name"])
    named = [trace["name"] for trace in data if trace["showlegend"]]
    common = {"gridcolor": "#e6e6e6", "zeroline": False, "linecolor": "#999", "ticks": "outside"}
    below = LEGEND_ROW * _legend_rows(named)
    return {
        "data": data,
        "layout": {
            "height": HEIGHT + below,
            "margin": {"l": 64, "r": 16, "t": 56, "b": 56 + below},
            "title": {
                "text": f"<b>{_text(shortened(panel.title))}</b>",
                "font": {"size": 13},
                "x": 0,
                "xref": "paper",
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "pad": {"b": 8},  # the buttons are above the title
            },
            "xaxis": {
                **common,
                "title": {"text": _text(panel.x_label), "standoff": 8},
                "tickangle": 0,
                **_scale(panel.x_log, panel.x_ticks, [one.x for one in series]),
            },
            "yaxis": {
                **common,
                "title": {"text": _text(panel.y_label), "standoff": 8},
                "automargin": True,
                **_scale(panel.y_log, "plain", [one.y for one in series]),
            },
            "showlegend": bool(named),
            "legend": dict(LEGEND),
            "hovermode": "closest",
            "hoverlabel": {"namelength": -1},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
            "paper_bgcolor": "#fff",
            "plot_bgcolor": "#fff",
        },
    }


def _legend_rows(names: Sequence[str]) -> int:
    """Return the number of rows of a legend in a narrow panel, with columns of equal width."""
    if not names:
        return 0
    longest = 48 + 6 * max(map(len, names))
    return -(-len(names) // max(1, BESIDE // longest))


def _scale(log: bool, ticks: Ticks, values: Sequence[Column]) -> dict[str, Any]:
    """Return the type of an axis and the format of its numbers.

    On a logarithmic axis plotly labels 1, 2, 5 of each decade if there are more than 0.3 decades
    per tick, and every digit if there are fewer, where labels overlap. With an explicit format all
    labels have one size.
    """
    finite = [one[np.isfinite(one)] for one in values]
    joined = np.concatenate(finite) if finite else np.empty(0)
    if not log:
        most = float(np.abs(joined).max()) if len(joined) else 0.0
        return {"type": "linear", "exponentformat": "B" if most >= 1000.0 else "e"}
    joined = joined[joined > 0.0]
    decades = float(np.log10(joined.max() / joined.min())) if len(joined) else 0.0
    number = 6 if decades < 0.85 else int(max(decades, 1.0) / 0.31)
    if decades > 3.0:
        number = min(12, int(decades) + 1)
    scale: dict[str, Any] = {"type": "log", "minorloglabels": "complete", "nticks": number}
    if ticks == "power" and decades >= POWERS:
        return scale | {"exponentformat": "power", "minorloglabels": "none"}
    return scale | {"tickformat": {"count": "~s", "plain": "~g", "power": "~e"}[ticks]}


def _traces(series: Series, panel: Panel, legend: bool) -> list[dict[str, Any]]:
    name = _text(series.name)
    hover = f"{_text(panel.x_label)}: %{{x:.5~g}}<br>{_text(panel.y_label)}: %{{y:.5~g}}"
    common: dict[str, Any] = {
        "type": "scatter",
        "name": _text(shortened(series.name)),
        "x": numbers(series.x),
        "y": numbers(series.y),
        "meta": {"run": series.run, "layer": series.layer},
        "showlegend": legend and series.named,
        "legendgroup": name,
    }
    if series.style == "band":
        return [_band(series, common)]
    if series.notes is not None:
        common["text"] = [_text(note) for note in series.notes]
        hover += "<br>%{text}"
    common["hovertemplate"] = hover + f"<extra>{name}</extra>"
    if series.low is not None and series.high is not None:
        common["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": numbers(series.high - series.y),
            "arrayminus": numbers(series.y - series.low),
            "thickness": 1.2,
            "width": 3,
            "color": series.colour,
        }
    if series.style in SYMBOLS:
        marker = {
            "symbol": SYMBOLS[series.style],
            "size": SIZES[series.style],
            "color": series.colour,
            "line": {"width": 0.8 if series.style == "star" else 0, "color": "#222"},
        }
        opacity = FAINT if series.layer == "recorded" else 1.0
        return [{**common, "mode": "markers", "marker": marker, "opacity": opacity}]
    if series.style == "joined":
        common["marker"] = {"size": 5, "color": series.colour}
    width, opacity = (1.0, FAINT) if series.layer == "recorded" else (1.8, 1.0)
    line: dict[str, Any] = {"color": series.colour, "width": width}
    if series.style in DASHES:
        line["dash"] = DASHES[series.style]
    mode = "lines+markers" if series.style == "joined" else "lines"
    return [{**common, "mode": mode, "line": line, "opacity": opacity}]


def _band(series: Series, common: dict[str, Any]) -> dict[str, Any]:
    """Return one closed polygon: along the low end and back along the high end."""
    assert series.low is not None
    assert series.high is not None
    red, green, blue = (int(series.colour[i : i + 2], 16) for i in (1, 3, 5))
    return {
        **common,
        "x": numbers(np.concatenate([series.x, series.x[::-1]])),
        "y": numbers(np.concatenate([series.low, series.high[::-1]])),
        "mode": "lines",
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.14)",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _text(text: str) -> str:
    """Return text escaped for plotly, which parses tags, braces and few named entities."""
    return html.escape(text, quote=False).replace("{", "&#123;")


def numbers(values: Column) -> list[float | None]:
    """Return six digits of each value, None for values that are not finite.

    For example, ``numbers(np.array([1.0, np.nan]))`` returns ``[1.0, None]``.
    """
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
