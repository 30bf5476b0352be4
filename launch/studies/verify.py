"""What ``allometry verify`` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from allometry.configs.run import RunConfig
from allometry.studies.certificate.verify import Certificate, LayoutResult, verify


def run(
    config: RunConfig, layouts: Sequence[str] | None, out: Path, *, as_json: bool
) -> tuple[str, bool]:
    """Make the certificate; return the report and whether all layouts agree."""
    certificate = verify(config, layouts, out, _say)
    text = json.dumps(certificate.describe(), indent=2) if as_json else _table(certificate, out)
    return text, certificate.passed


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(certificate: Certificate, out: Path) -> str:
    width = max(len(result.layout) for result in certificate.results)
    lines = [
        f"{'layout':<{width}}  ranks  gradients fp64     fp32  two steps     routers  carried over"
        "  resumed  exported"
    ]
    lines += [_line(result, width) for result in certificate.results]
    verdict = "all agree with one process" if certificate.passed else "NOT all agree"
    return "\n".join([*lines, f"{verdict}; written to {out}"])


def _line(result: LayoutResult, width: int) -> str:
    start = f"{result.layout:<{width}}  {result.world_size:>5}  "
    if result.refused is not None:
        return f"{start}not possible: {result.refused}"
    exported = {True: "equal", False: "DIFFERS", None: "no family"}[result.export_equal]
    double, single = result.steps["fp64"], result.steps["fp32"]
    routers = max(double[kind]["worst"] for kind in ("routing", "routers"))
    return (
        f"{start}{double['gradients']['worst']:>14.1e}  {single['gradients']['worst']:>7.1e}  "
        f"{double['parameters']['worst']:>9.1e}  {routers:>10.1e}  {result.loss or 0.0:>12.1e}  "
        f"{'same bits' if result.resume_bit_exact else 'DIFFERS':>7}  {exported}"
        f"{'' if result.passed else '   FAILED'}"
    )
