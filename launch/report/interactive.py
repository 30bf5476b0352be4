"""Figures as plotly's JSON: traces and a layout that plotly.js draws in the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from allometry.launch.figures.figure import Column, Figure, Panel, Series, Ticks

HEIGHT, COLUMNS = 392, 2
TITLE, GAP_X, TOP, BOTTOM = 24, 0.09, 30, 62
SYMBOLS = {"dots": "circle", "star": "star", "cross": "x"}
SIZES = {"dots": 5, "star": 13, "cross": 9}


def specification(figure: Figure) -> dict[str, Any]:
    """Return ``{"data": [...], "layout": {...}}`` with nothing but JSON in it.

    Each trace's ``meta`` says whose it is (``run``) and of which ``layer``. Names are escaped, as
    plotly reads a little HTML in them.
    """
    columns = min(COLUMNS, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    height = TOP + rows * HEIGHT
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": TOP, "b": BOTTOM},
        "showlegend": figure.legend,
        "legend": {"font": {"size": 11}, "itemsizing": "constant"},
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "annotations": [],
    }
    data: list[dict[str, Any]] = []
    for number, panel in enumerate(figure.panels):
        suffix = "" if number == 0 else str(number + 1)
        _axes(layout, panel, suffix, _domain(number, columns, rows, height))
        for series in panel.series:
            data += _traces(series, panel, suffix, figure.legend)
    seen: set[str] = set()  # each thing is named once, though several panels show it
    for trace in data:
        if trace["showlegend"]:
            trace["showlegend"] = trace["name"] not in seen
            seen.add(trace["name"])
    return {"data": data, "layout": layout}


def _domain(number: int, columns: int, rows: int, height: int) -> tuple[list[float], list[float]]:
    """Where a panel lies, as shares of the figure: ([left, right], [bottom, top])."""
    row, column = divmod(number, columns)
    width = (1.0 - GAP_X * (columns - 1)) / columns
    left = column * (width + GAP_X)
    inner = height - TOP - BOTTOM  # what shares are of
    top = 1.0 - (row * HEIGHT + TITLE) / inner
    bottom = 1.0 - ((row + 1) * HEIGHT - BOTTOM) / inner
    return [left, min(1.0, left + width)], [max(0.0, bottom), top]


def _axes(
    layout: dict[str, Any], panel: Panel, suffix: str, domain: tuple[list[float], list[float]]
) -> None:
    common = {"gridcolor": "#e6e6e6", "zeroline": False, "linecolor": "#999", "ticks": "outside"}
    layout[f"xaxis{suffix}"] = {
        **common,
        "domain": domain[0],
        "anchor": f"y{suffix}",
        "title": {"text": _text(panel.x_label), "standoff": 8},
        "tickangle": 0,
        **_scale(panel.x_log, panel.x_ticks, [one.x for one in panel.series]),
    }
    layout[f"yaxis{suffix}"] = {
        **common,
        "domain": domain[1],
        "anchor": f"x{suffix}",
        "title": {"text": _text(panel.y_label), "standoff": 8},
        **_scale(panel.y_log, "plain", [one.y for one in panel.series]),
    }
    layout["annotations"].append(
        {
            "text": f"<b>{_text(panel.title)}</b>",
            "x": domain[0][0],
            "y": domain[1][1],
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "yshift": 6,
            "showarrow": False,
            "font": {"size": 13},
        }
    )


def _scale(log: bool, ticks: Ticks, values: Sequence[Column]) -> dict[str, Any]:
    """Type of an axis and how its numbers are written.

    On a logarithmic axis plotly labels 1, 2, 5 of each decade where there are more than 0.3 decades
    to a tick, every digit where there are fewer, and the labels then overlap.
    """
    if not log:
        most = max((np.nanmax(np.abs(one)) for one in values if len(one)), default=0.0)
        return {"type": "linear", "exponentformat": "B" if most >= 1000.0 else "e"}
    joined = np.concatenate([one[one > 0.0] for one in values]) if values else np.empty(0)
    decades = float(np.log10(joined.max() / joined.min())) if len(joined) else 0.0
    number = 6 if decades < 0.85 else int(max(decades, 1.0) / 0.31)
    if decades > 3.0:
        number = min(12, int(decades) + 1)
    form = {"count": "B", "power": "power", "plain": "none"}[ticks]
    labels = "none" if ticks == "power" else "complete"
    return {"type": "log", "exponentformat": form, "minorloglabels": labels, "nticks": number}


def _traces(series: Series, panel: Panel, suffix: str, legend: bool) -> list[dict[str, Any]]:
    name = _text(series.name)
    hover = f"{_text(panel.x_label)}: %{{x:.5~g}}<br>{_text(panel.y_label)}: %{{y:.5~g}}"
    common: dict[str, Any] = {
        "type": "scatter",
        "name": name,
        "x": numbers(series.x),
        "y": numbers(series.y),
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
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
        return [{**common, "mode": "markers", "marker": marker}]
    if series.style == "joined":
        common["marker"] = {"size": 5, "color": series.colour}
    width, opacity = (1.0, 0.35) if series.layer == "recorded" else (1.8, 1.0)
    line = {"color": series.colour, "width": width}
    if series.style == "dashed":
        line["dash"] = "dash"
    mode = "lines+markers" if series.style == "joined" else "lines"
    return [{**common, "mode": mode, "line": line, "opacity": opacity}]


def _band(series: Series, common: dict[str, Any]) -> dict[str, Any]:
    """One closed polygon: along the low end and back along the high one."""
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
    """Text as plotly takes it: it reads tags, templates in braces, and few entities by name."""
    return html.escape(text, quote=False).replace("{", "&#123;")


def numbers(values: Column) -> list[float | None]:
    """Six digits of each value, None where it is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
