"""Branches: one trunk at a constant learning rate, and decays that begin at its checkpoints.

    python examples/branch.py --out branches

Trains a trunk and two decays: one from its middle, one from its end. Each gives the loss that a WSD
run of its length would have, and the stable steps are trained once (MiniCPM, arXiv 2404.06395).
The text is the documentation in Python's standard library. Everything is written to --out, and the
same command continues where it was interrupted. docs/runs.md explains trees of branches,
docs/resume.md what a branch may change.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Tokenize, train the tree, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("branches"))
    parser.add_argument("--steps", type=int, default=240, help="of the trunk")
    asked = parser.parse_args()
    store = asked.out / "store"
    allometry("prepare", "builtin:python-prose", "--out", store, "--vocab-size", 2048)

    path = asked.out / "tree.yaml"
    path.write_text(json.dumps(tree(asked, store), indent=2), encoding="utf-8")  # JSON is YAML
    allometry("branch", "--tree", path)

    print("\nstep at the end, held-out loss, by run")
    for name in ("trunk", "early", "late"):
        rows = (asked.out / "tree" / "runs" / name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(rows[-1])  # a branch's record has the trunk's steps before its own
        print(f"{name:6} {last['step']:6} {last['validation/python-prose']:.4f}")
    allometry("report", asked.out / "tree", "--out", asked.out / "report.html")


def tree(asked: argparse.Namespace, store: Path) -> dict[str, object]:
    """The trunk and its branches; a branch says only what differs from the trunk."""
    half, full = asked.steps // 2, asked.steps
    splits = {s: str(store / f"python-prose.{s}") for s in ("train", "validation")}
    trunk = {
        "data.tokenizer": str(store / "tokenizer.json"),
        "data.sources": [{"name": "python-prose", "weight": 1.0, **splits}],
        "training.total_tokens": None,
        "training.total_steps": full,
        "schedule": {"kind": "constant", "warmup_steps": 16},
    }
    decay = {"kind": "wsd", "warmup_steps": 16, "decay_fraction": 0.2}
    branches = [
        {"name": name, "at": at, "set": {"training.total_steps": at * 5 // 4, "schedule": decay}}
        for name, at in (("early", half), ("late", full))
    ]
    return {
        "kind": "tree",
        "folder": str(asked.out / "tree"),
        "trunk": {"base": "preset:ladder_base", "set": trunk},
        "branches": branches,
        "launch": {"parallel": 2},
    }


def allometry(*arguments: object) -> None:
    """Run a command; stop where it fails."""
    words = [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)]
    print("\n$ allometry", *words[3:], flush=True)
    if code := subprocess.run(words).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
