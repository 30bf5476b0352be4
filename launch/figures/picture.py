"""SVG pictures whose text and axes have the colour of the page, light or dark."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

from allometry.launch.figures.drawing import draw
from allometry.launch.figures.figure import GREY, Figure

INK = "#0a0b0c"
"""Colour of text and axes in matplotlib, which becomes ``currentColor``."""
BLACK = ("#000000", INK)
LEAST = 0.15
"""Smallest relative luminance of a curve: contrast 3 with a page of colour #1b1b1b."""
FONT = "DejaVu Sans"
"""Font of matplotlib's layout; Verdana has nearly the same widths."""
SCHEME = (
    '<style class="scheme">svg{color:#222}'
    "@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
)
"""Colours of a picture that is opened alone; a page that contains the picture removes them."""


def picture(figure: Figure, title: str) -> str:
    """Return a figure as an SVG document; equal figures give equal text.

    ``title`` is read by screen readers. For example, ``picture(loss_figure, "Loss of 12 runs")``.
    """
    import matplotlib as mpl

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.key,
        "savefig.transparent": True,
        "font.family": FONT,
        "legend.framealpha": 0.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
        "grid.color": GREY,
    }
    drawn = io.StringIO()
    with mpl.rc_context(style):
        draw(figure, drawn)
    return _cleaned(drawn.getvalue(), figure.key, title)


def lifted(colour: str) -> str:
    """Return a colour that is visible on a dark page: a dark one is mixed with white.

    For example, ``lifted("#440154")``, the darkest of a scale, is a lighter purple.
    """
    whole = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    for tenths in range(10):
        mixed = [round(value + (255 - value) * tenths / 10) for value in whole]
        if luminance(mixed) >= LEAST:
            break
    return "#" + "".join(f"{value:02x}" for value in mixed)


def luminance(rgb: list[int]) -> float:
    """Return the relative luminance of 8-bit sRGB values, from 0 to 1 (WCAG 2.1)."""
    shares = [value / 255 for value in rgb]
    red, green, blue = (s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _cleaned(svg: str, key: str, title: str) -> str:
    """Return matplotlib's SVG without metadata, with unique ids and colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    svg = re.sub(rf"(['\"]?){FONT}\1", f"'{FONT}', Verdana, sans-serif", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", _page_colour, svg)
    head, rest = svg.split(">", 1)
    width = re.search(r' width="([\d.]+)pt"', head)
    assert width is not None
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    head += (
        f' role="img" style="width:{float(width[1]) / 72:g}in;max-width:100%;height:auto;'
        'stroke-linejoin:round;stroke-linecap:butt"'
    )
    whole = f"{head}>{SCHEME}<title>{html.escape(title)}</title>{rest}"
    return "\n".join(line.strip() for line in whole.splitlines() if line.strip()) + "\n"


def _page_colour(found: re.Match[str]) -> str:
    colour = found[0]
    return "currentColor" if colour in BLACK else lifted(colour)


def write_picture(figure: Figure, title: str, out: Path) -> None:
    """Write ``picture(figure, title)`` to a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture(figure, title), encoding="utf-8")
