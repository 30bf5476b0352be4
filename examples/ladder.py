"""A ladder: small models, a scaling law through their losses, and a prediction of a larger model.

    python examples/ladder.py --out ladder

Trains three widths at two lengths on the documentation in Python's standard library, fits a law to
the held-out losses, predicts a wider and longer run, trains that and compares. Everything is
written to --out, and the same command continues where it was interrupted. docs/ladder.md explains
the keys, docs/laws.md the law.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the commands of a ladder, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ladder"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[98_304, 196_608])
    asked = parser.parse_args()

    store = asked.out / "store"
    allometry("prepare", "builtin:python-prose", "--out", store, "--vocab-size", 2048)
    path = asked.out / "ladder.yaml"
    path.write_text(json.dumps(description(asked), indent=2), encoding="utf-8")  # JSON is YAML

    allometry("ladder", "run", path, "--only", "rungs")
    allometry("ladder", "fit", path)
    allometry("ladder", "predict", path)  # recorded before the target is trained
    allometry("ladder", "run", path, "--only", "target")
    allometry("ladder", "predict", path)  # and compared with what was measured
    allometry("report", asked.out / "runs", "--out", asked.out / "report.html")


def description(asked: argparse.Namespace) -> dict[str, object]:
    """The ladder: its base run, what varies, and the target to predict."""
    base, store = asked.out / "base.yaml", asked.out / "store"
    splits = {s: str(store / f"python-prose.{s}") for s in ("train", "validation")}
    run = {
        "base": "preset:ladder_base",
        "data": {
            "tokenizer": str(store / "tokenizer.json"),
            "sources": [{"name": "python-prose", "weight": 1.0, **splits}],
        },
    }
    base.write_text(json.dumps(run, indent=2), encoding="utf-8")
    return {
        "kind": "ladder",
        "base": "base.yaml",
        "folder": str(asked.out / "runs"),
        "widths": asked.widths,
        "tokens": asked.tokens,
        "seeds": [0],
        "target": {"size": {"width": 2 * asked.widths[-1]}, "tokens": 2 * asked.tokens[-1]},
        "law": "over_training",
        "fix": {"E": 0},  # so short runs do not identify the constant
        "loss": "validation",
        "launch": {"kind": "local", "parallel": 2},
    }


def allometry(*arguments: object) -> None:
    """Run a command; stop where it fails."""
    words = [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)]
    print("\n$ allometry", *words[3:], flush=True)
    if code := subprocess.run(words).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
