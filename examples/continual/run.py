"""Continual pretraining by law: how much old data to replay when code models go on with prose.

Pretrains models of three sizes on Python's standard library, continues each on its documentation
with 0, 10, 25, 50 and 75 % of replay, asks `allometry mix` for the ratio, and trains one more run
at the critical ratio to see whether the law was right:

    python examples/continual/run.py

The same command goes on where it was stopped. All it makes lies in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from allometry.data.processes import ended_with_this
from allometry.launch.laws.replay_text import text_of
from allometry.launch.text import table
from allometry.laws.replay import replay_runs

HERE = Path(__file__).resolve().parent
REPLAY = (0.0, 0.1, 0.25, 0.5, 0.75)
CODE, PROSE = "python-code", "python-prose"
HELD = "r=0.75"
"""The ratio to judge the law by (25 % replay), chosen before any run; and the largest size."""
LOSSES = ("general", "domain")
STOPS = (signal.SIGINT, signal.SIGTERM)
WITHIN = 1.0
"""Percent that losses held out may be off by."""


def main() -> None:
    """Do whatever is not done yet, then say what was found."""
    asked = arguments()
    store = asked.out / "store"
    if not (store / "manifest.json").is_file():
        inputs = [f"builtin:{CODE}", f"builtin:{PROSE}"]
        allometry("prepare", *inputs, "--out", store, "--vocab-size", 2048)
    for width in asked.widths:
        train(asked, width, REPLAY)
    found = mix(asked)
    print(text_of(found), flush=True)
    result = {
        "held out": judged(found),
        "check": check(asked, found),
        "runs": measured(asked),
        "law": found,
        "settings": {k: str(v) for k, v in vars(asked).items()},
    }
    (asked.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(summary(result))
    print(f"result: {asked.out / 'result.json'}, picture: {asked.out / 'frontier.png'}")


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("trees/continual"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--trunk-steps", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=350, help="of each continuation")
    parser.add_argument("--rise", type=float, default=3.0, help="percent of general loss to pay")
    parser.add_argument("--bound", type=float, default=0.05, help="of the critical ratio, nats")
    parser.add_argument("--skip", type=float, default=0.5, help="of each run, before its first row")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    asked = parser.parse_args()
    asked.widths = sorted(set(asked.widths))
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {asked.out} cannot be made ({error.strerror}); choose another folder")
    return asked


def train(asked: argparse.Namespace, width: int, ratios: tuple[float, ...]) -> None:
    """Train the trunk of one width and its branches, whatever of them is missing."""
    total, store = asked.trunk_steps + asked.steps, asked.out / "store"
    trunk = {
        "model.width": width,
        "model.ffn_width": 3 * width,
        "training.total_steps": asked.trunk_steps,
        "data.tokenizer": str(store / "tokenizer.json"),
    }
    for number, source in enumerate((CODE, PROSE)):
        for split in ("train", "validation"):
            trunk[f"data.sources.{number}.{split}"] = str(store / f"{source}.{split}")
    branches = [
        {
            "name": name_of(ratio),
            "at": asked.trunk_steps,
            "set": {
                "training.total_steps": total,
                "evaluation.every_steps": max(asked.steps // 10, 1),
                "data.sources.1.weight": 1.0,
                "data.replay": {"ratio": ratio, "sources": [CODE]},
            },
        }
        for ratio in ratios
    ]
    tree = {
        "kind": "tree",
        "folder": str(folder(asked, width)),
        "trunk": {"base": str(HERE / "base.yaml"), "set": trunk},
        "branches": branches,
        "launch": {"parallel": asked.parallel},
    }
    path = asked.out / f"width-{width}.yaml"
    path.write_text(json.dumps(tree, indent=2), encoding="utf-8")  # JSON is YAML
    allometry("branch", "--tree", path)


def mix(asked: argparse.Namespace) -> dict[str, Any]:
    """Ask for the ratio, by the runs at the declared ratios alone."""
    options = [f"--{name}={getattr(asked, name)}" for name in ("rise", "bound", "skip")]
    options.append("--count=total")  # D-CPT's N is all of a model's parameters
    picture = asked.out / "frontier.png"
    said = allometry("mix", *fitted(asked), *options, "--out", picture, "--json", capture=True)
    found: dict[str, Any] = json.loads(said)
    return found


def measured(asked: argparse.Namespace) -> list[dict[str, float]]:
    """The last held-out losses of each run that the law was fitted to."""
    rows = replay_runs(fitted(asked), ends=True, count="total").rows
    return [
        {name: float(column[i]) for name, column in rows.columns.items()} for i in range(len(rows))
    ]


def fitted(asked: argparse.Namespace) -> list[Path]:
    """The runs at the declared ratios, which the law is fitted to."""
    return [folder(asked, w) / "runs" / name_of(ratio) for w in asked.widths for ratio in REPLAY]


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """The largest errors, in percent, of the ratio and of the largest size, when held out.

    Of all rows, and of the last of each run (``ends``).
    """
    return {
        one["what"]: {
            **{kind: 100 * one[kind] for kind in LOSSES},
            "ends": {kind: 100 * one["ends"][kind] for kind in LOSSES},
        }
        for one in found["held_out"]
        if one["what"] == HELD or one["what"].startswith("N=")
    }


def check(asked: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Train the largest model at the critical ratio; what was predicted of it, and what it is."""
    predicted = found["critical"]["d_cpt"]
    if predicted["ratio"] is None:
        return {"why": predicted["why"]}
    width, replay = asked.widths[-1], round(1.0 - predicted["ratio"], 3)
    train(asked, width, (*REPLAY, *([] if name_of(replay) in map(name_of, REPLAY) else [replay])))
    run = folder(asked, width) / "runs" / name_of(replay)
    rows = replay_runs([run], ends=True).rows
    losses = {
        f"{kind} loss": {
            "predicted": predicted[kind]["value"],
            "low": predicted[kind]["low"],
            "high": predicted[kind]["high"],
            "measured": float(rows[kind][0]),
            "error in percent": 100 * (predicted[kind]["value"] / float(rows[kind][0]) - 1),
        }
        for kind in LOSSES
    }
    rise = {
        "predicted": predicted["general"]["value"] - found["start"],
        "measured": float(rows["general"][0] - rows["start"][0]),
    }
    return {"run": str(run), "replay": replay, "rise of the general loss": rise, **losses}


def summary(result: dict[str, Any]) -> str:
    """What was held out and what was checked, as tables."""
    rows = [
        [
            "held out (r: the domain's share)",
            "loss",
            "ends of runs",
            "all rows",
            f"within {WITHIN:g} %",
        ]
    ]
    for what, one in result["held out"].items():
        for kind in LOSSES:
            end, most = one["ends"][kind], one[kind]
            within = "no" if end > WITHIN else "yes" if most <= WITHIN else "at the ends"
            rows.append([what, kind, f"{end:.2f} %", f"{most:.2f} %", within])
    made = result["check"]
    if "why" in made:
        return f"\n{table(rows)}\n\nno critical ratio to check: {made['why']}"
    lines = [[f"at the critical ratio, replay {made['replay']:g}", "predicted", "measured"]]
    for what, one in made.items():
        if isinstance(one, dict):
            lines.append([what, f"{one['predicted']:.4f}", f"{one['measured']:.4f}"])
    return f"\n{table(rows)}\n\n{table(lines)}"


def folder(asked: argparse.Namespace, width: int) -> Path:
    """The tree of one width."""
    return Path(asked.out / f"width-{width}")


def name_of(ratio: float) -> str:
    """A branch's name."""
    return f"replay_{1000 * ratio:04.0f}"


def allometry(*arguments: object, capture: bool = False) -> str:
    """Run a command in a process of its own, which is told of signals; end where it fails."""
    words = [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)]
    pipe = subprocess.PIPE if capture else None
    environment = os.environ | ended_with_this()
    with subprocess.Popen(
        words, stdout=pipe, text=True, start_new_session=True, env=environment
    ) as child:
        for number in STOPS:
            signal.signal(number, lambda received, _: child.send_signal(received))
        said = child.communicate()[0]
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    if child.returncode:
        sys.exit(child.returncode)
    return said or ""


if __name__ == "__main__":
    main()
