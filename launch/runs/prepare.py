"""``allometry prepare``: what it prints when it is done."""

from __future__ import annotations

import json
from pathlib import Path

from allometry.data.manifest import Manifest
from allometry.data.prepare import PrepareRequest, prepare


def run(request: PrepareRequest, *, as_json: bool) -> str:
    """Prepare and return a table of what the folder holds, or the manifest as JSON."""
    manifest = prepare(request, quiet=as_json)
    if as_json:
        return json.dumps(manifest.model_dump(mode="json"), indent=2)
    return _table(manifest, Path(request.out))


def _table(manifest: Manifest, out: Path) -> str:
    lines = [f"{'source':<20}{'split':<12}{'documents':>12}{'tokens':>16}"]
    for name, source in manifest.sources.items():
        for split, record in source.splits.items():
            lines.append(f"{name:<20}{split:<12}{record.documents:>12,}{record.tokens:>16,}")
    lines.append(f"vocabulary {manifest.tokenizer.vocab_size:,}, token files in {out}")
    return "\n".join(lines)
