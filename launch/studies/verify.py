"""Equality of layouts with one process: ``allometry verify``."""

from __future__ import annotations

import sys

from allometry.launch.command import Report
from allometry.launch.studies.commands import Verify
from allometry.launch.text import table
from allometry.studies.certificate.verify import LayoutResult, verify

HEAD = [
    *("layout", "ranks", "gradients fp64", "fp32", "two steps", "routers"),
    *("carried over", "resumed", "exported"),
]


def verified(asked: Verify) -> Report:
    """Create the certificate; passed if all layouts agree."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    certificate = verify(asked.load(), asked.layout or None, asked.out, say)
    shown = table([HEAD, *map(_cells, certificate.results)], right=range(1, 7))
    verdict = "all agree with one process" if certificate.passed else "NOT all agree"
    text = f"{shown}\n{verdict}; written to {asked.out}"
    return Report(certificate.describe(), text, certificate.passed)


def _cells(result: LayoutResult) -> list[str]:
    start = [result.layout, str(result.world_size)]
    if result.refused is not None:
        return [*start, f"not possible: {result.refused}"]
    exported = {True: "equal", False: "DIFFERS", None: "no family"}[result.export_equal]
    double, single = result.steps["fp64"], result.steps["fp32"]
    return [
        *start,
        f"{double['gradients']['worst']:.1e}",
        f"{single['gradients']['worst']:.1e}",
        f"{double['parameters']['worst']:.1e}",
        f"{max(double[kind]['worst'] for kind in ('routing', 'routers')):.1e}",
        f"{result.loss or 0.0:.1e}",
        "same bits" if result.resume_bit_exact else "DIFFERS",
        exported + ("" if result.passed else "   FAILED"),
    ]
