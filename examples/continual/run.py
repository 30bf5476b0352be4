"""Continual pretraining by law: how much old data to replay when code models go on with prose.

Pretrains models of three sizes on Python's standard library, continues each on its documentation
with 0, 10, 25, 50 and 75 % of replay, asks `allometry mix` for the ratio, and trains one more run
at the critical ratio to see whether the law was right. From the repository's root:

    python examples/continual/run.py

The same command goes on where it was stopped. All it makes lies in --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from allometry.laws.replay import replay_runs

HERE = Path(__file__).resolve().parent
STORE = Path("store/continual")
REPLAY = (0.0, 0.1, 0.25, 0.5, 0.75)
CODE, PROSE = "python-code", "python-prose"


def main() -> None:
    """Do whatever is not done yet, then say what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("trees/continual"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--trunk-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=500, help="of each continuation")
    parser.add_argument("--rise", type=float, default=3.0, help="percent of general loss to pay")
    parser.add_argument("--bound", type=float, default=0.05, help="of the critical ratio, nats")
    parser.add_argument("--skip", type=float, default=0.4, help="of each run, before its first row")
    parser.add_argument("--parallel", type=int, default=2)
    asked = parser.parse_args()
    if not (STORE / "tokenizer.json").is_file():
        inputs = [f"builtin:{CODE}", f"builtin:{PROSE}"]
        allometry("prepare", *inputs, "--out", STORE, "--vocab-size", 2048)
    asked.out.mkdir(parents=True, exist_ok=True)
    for width in asked.widths:
        train(asked, width, REPLAY)
    found = mix(asked, "--out", asked.out / "frontier.png")
    critical = found["critical"]["d_cpt"]["ratio"]
    checked = None
    if critical is not None:
        checked = check(asked, round(1.0 - critical, 3), found)
    result = {
        "law": found,
        "check": checked,
        "settings": {k: str(v) for k, v in vars(asked).items()},
    }
    (asked.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(checked, indent=2))
    print(f"result: {asked.out / 'result.json'}, picture: {asked.out / 'frontier.png'}")


def train(asked: argparse.Namespace, width: int, ratios: tuple[float, ...]) -> None:
    """Train the trunk of one width and its branches, whatever of them is missing."""
    total = asked.trunk_steps + asked.steps
    every = max(asked.steps // 10, 1)
    branches = [
        {
            "name": name_of(ratio),
            "at": asked.trunk_steps,
            "set": {
                "training.total_steps": total,
                "evaluation.every_steps": every,
                "data.sources.1.weight": 1.0,
                "data.replay": {"ratio": ratio, "sources": [CODE]},
            },
        }
        for ratio in ratios
    ]
    tree = {
        "kind": "tree",
        "folder": str(folder(asked, width)),
        "trunk": {
            "base": str(HERE / "base.yaml"),
            "set": {
                "model.width": width,
                "model.ffn_width": 3 * width,
                "training.total_steps": asked.trunk_steps,
            },
        },
        "branches": branches,
        "launch": {"parallel": asked.parallel},
    }
    path = asked.out / f"width-{width}.yaml"
    path.write_text(json.dumps(tree, indent=2), encoding="utf-8")  # JSON is YAML
    allometry("branch", "--tree", path)


def check(asked: argparse.Namespace, replay: float, found: dict[str, Any]) -> dict[str, Any]:
    """Train the largest model at the critical ratio; what was predicted of it, and what it is."""
    width = asked.widths[-1]
    if name_of(replay) not in map(name_of, REPLAY):
        train(asked, width, (*REPLAY, replay))
    run = folder(asked, width) / "runs" / name_of(replay)
    rows = replay_runs([run], ends=True).rows
    predicted = found["critical"]["d_cpt"]
    return {
        "run": str(run),
        "replay": replay,
        "rise of the general loss": float(rows["general"][0] - rows["start"][0]),
        "predicted rise": found["critical"]["bound"],
        **{
            f"{kind} loss": {
                "predicted": predicted[kind]["value"],
                "measured": float(rows[kind][0]),
                "error in percent": 100 * (predicted[kind]["value"] / float(rows[kind][0]) - 1),
            }
            for kind in ("general", "domain")
        },
    }


def mix(asked: argparse.Namespace, *options: object) -> dict[str, Any]:
    """Ask for the ratio, by the runs at the declared ratios; print what is said."""
    runs = [folder(asked, w) / "runs" / name_of(ratio) for w in asked.widths for ratio in REPLAY]
    command = ("mix", *runs, "--rise", asked.rise, "--bound", asked.bound)
    command = (*command, "--skip", asked.skip, *options)
    allometry(*command)
    said = allometry(*command, "--json", capture=True)
    found: dict[str, Any] = json.loads(said)
    return found


def folder(asked: argparse.Namespace, width: int) -> Path:
    """The tree of one width."""
    return Path(asked.out / f"width-{width}")


def name_of(ratio: float) -> str:
    """A branch's name."""
    return f"replay_{1000 * ratio:04.0f}"


def allometry(*arguments: object, capture: bool = False) -> str:
    """Run a command in a process of its own; end with its exit code where it fails."""
    words = [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


if __name__ == "__main__":
    main()
