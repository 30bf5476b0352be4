"""Observations from run folders: one row for each finished run."""

# n: runs

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.laws.comparable import check_comparable
from allometry.laws.losses import LossChoice, final_loss
from allometry.laws.observations import Observations
from allometry.laws.runs import Run, read_run

CountName = Literal["non_embedding", "total", "with_head"]
COUNTS: tuple[CountName, ...] = get_args(CountName)
Grouping = Literal["cell", "run", "model"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
Unfinished = Literal["refuse", "skip"]

_MEANING = {
    "N_total": "all parameters, a tied embedding once",
    "N_active": "parameters that a token uses: of E routed experts the k it visits",
    "D": "tokens read",
    "C": "model FLOPs as counted step by step: products, head and causal attention; not 6 N D",
    "M": "D/N",
    "B": "tokens of a batch at the end of the run",
    "S": "steps",
    "S1": "sum of the learning rate over steps, warm-up included",
    "S2": "annealing of the learning rate, momentum 0.999, from the end of warm-up",
    "lr": "optimizer.lr, the peak rate before any rule of the parameterization",
    "U": "unique tokens: of each source what was read, at most its store",
}
COUNT_MEANING: dict[CountName, str] = {
    "non_embedding": "parameters without embedding and head",
    "total": "all parameters, a tied embedding once",
    "with_head": "parameters without the embedding, the head counted (also where it is tied)",
}
"""Descriptions of the conventions for N."""
# Config sections that do not affect the model or its training, except by the seed.
_NOT_OF_A_CELL = ("run", "parallel", "evaluation", "checkpoint", "record")


def from_runs(
    folders: Sequence[str | Path],
    *,
    count: CountName = "non_embedding",
    loss: str = "validation",
    last: float = 0.1,
    unfinished: Unfinished = "refuse",
    group_by: Grouping = "cell",
) -> Observations:
    """Return one row for each run from its own records; a folder of runs gives all its runs.

    Columns: ``N`` by ``count``, ``N_total``, ``N_non_embedding`` and ``N_active``; ``D`` tokens,
    ``C`` FLOPs, ``M`` = D/N, ``B`` tokens of a batch, ``S`` steps, ``S1`` and ``S2``, ``lr``,
    ``seed``, ``width``, ``layers``, ``experts``, ``experts_per_token`` (1 and 1 in a dense model),
    ``expert_width``; for each source ``r/NAME`` (its share of the training tokens) and ``U/NAME``
    (unique tokens), ``U`` their sum; ``loss``, and ``validation/NAME`` if every run has it.
    ``conventions`` describe each column.

    ``loss``: ``validation`` (held-out losses of the sources, weighted by their shares of the
    mixture), ``train`` (mean over the ``last`` share of the run's steps), or the loss of one
    source, ``validation/NAME`` and ``train/NAME``.

    ``group_by``: rows of one group are resampled and held out together. ``cell``: runs that differ
    only in the seed, so that no held-out row has a copy among the fitted rows, and an interval does
    not count two deviations of one cell as independent. ``model``: all runs of one model, for
    horizons that branch from one trunk and share its noise, or to hold out a size. ``run``: each
    run is a group. Raises UserError: a folder has no run; a run has not finished
    (``unfinished="skip"`` leaves such runs out and lists them in ``conventions["left out"]``) or
    its record is too old; or the runs' losses are not comparable (other tokenizers, held-out tokens
    or shares). For example, ``from_runs(["runs/ladder"], loss="train")``.
    """
    runs, skipped = finished_runs(folders, unfinished)
    choice = LossChoice.parse(loss, last)
    check_comparable(runs, choice)
    rows = [run_facts(run, count) | {"loss": final_loss(run, choice)} for run in runs]
    # Missing sources have share 0; other columns that a run lacks are left out.
    columns = {
        name: np.array([row.get(name, 0.0) for row in rows], dtype=np.float64)
        for name in dict.fromkeys(name for row in rows for name in row)
        if name.startswith(("r/", "U/")) or all(np.isfinite(row.get(name, np.nan)) for row in rows)
    }
    return Observations(
        columns=columns,
        groups=group_names(runs, rows, group_by),
        conventions={
            **_MEANING,
            "N": COUNT_MEANING[count],
            "N_non_embedding": COUNT_MEANING["non_embedding"],
            "loss": choice.describe(runs[0]),
            **({"left out": f"not finished: {', '.join(skipped)}"} if skipped else {}),
        },
    )


def expand(folders: Sequence[str | Path]) -> list[Path]:
    """Return run folders: the given ones, and the runs in a given folder or in its ``runs/``.

    Raises UserError: a folder has no run, or the same run is given twice.
    """
    expanded: list[Path] = []
    for given in map(Path, folders):
        if not given.is_dir():
            raise UserError(f"{given} is not a folder; give the folder of a run or of runs")
        inside = given / "runs" if (given / "runs").is_dir() else given
        runs = [given] if _is_run(given) else sorted(filter(_is_run, inside.iterdir()))
        if not runs:
            raise UserError(
                f"{given} holds no config.yaml and no run folder; give the folder of a run "
                "(run.folder) or one that holds such folders"
            )
        expanded += runs
    resolved = [path.resolve() for path in expanded]
    for path in expanded:
        if resolved.count(path.resolve()) > 1:
            raise UserError(f"{path} is given twice; give each run once")
    return expanded


def finished_runs(
    folders: Sequence[str | Path], unfinished: Unfinished = "refuse"
) -> tuple[list[Run], list[str]]:
    """Return the finished runs, and the folders of unfinished runs.

    Raises UserError: see ``from_runs``.
    """
    runs, skipped = [], []
    for path in expand(folders):
        if unfinished == "skip" and not (path / "metrics.jsonl").is_file():
            skipped.append(str(path))
        elif (problem := not_finished(run := read_run(path))) is None:
            check_record(run)
            runs.append(run)
        elif unfinished == "skip":
            skipped.append(str(path))
        else:
            raise UserError(
                f"{path} {problem}, so its loss is not that of its plan; let it finish, or leave "
                "such runs out (--unfinished skip)"
            )
    if not runs:
        raise UserError(f"none of the runs has finished: {', '.join(skipped)}")
    return runs, skipped


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def not_finished(run: Run) -> str | None:
    """Return a clause on the state of an unfinished run, to follow its name; None if finished."""
    step = int(run.metrics["step"][-1])
    ends = [event for event in run.events if event.get("event") in ("finished", "not_finite")]
    if ends and ends[-1]["event"] == "not_finite" and int(ends[-1].get("step", 0)) >= step:
        return f"ended at step {ends[-1].get('step')} as its loss was not finite"
    if any(end["event"] == "finished" and end.get("step") == step for end in ends):
        return None
    total = run.record.get("plan", {}).get("total_steps", "?")
    return f"is at step {step} of {total}"


def check_record(run: Run) -> None:
    """Check that a run's record has the values that laws read. Raises UserError."""
    plan = run.record.get("plan", {})
    needed = {
        "plan.parameters": plan.get("parameters"),
        "plan.batch": plan.get("batch"),
        "plan.warmup_steps": plan.get("warmup_steps"),
        "data.sources": run.record.get("data", {}).get("sources"),
    }
    for key, value in needed.items():
        if value is None:
            raise UserError(
                f"{run.folder}/run.json has no {key}, so it says too little for a law; launch the "
                "run once more with this version (a finished run only writes its record)"
            )
    for name in ("tokens", "flops", "lr", "s1", "s2"):
        if name not in run.metrics:
            raise UserError(
                f"{run.folder}/metrics.jsonl has no column {name!r}, which laws need; give a run "
                "of this framework"
            )


def run_facts(run: Run, count: CountName) -> dict[str, float]:
    """Return a number for each column of ``from_runs`` except ``loss``, for a finished run."""
    plan, config, metrics = run.record["plan"], run.config, run.metrics
    parameters = plan["parameters"]
    tokens = float(metrics["tokens"][-1])
    model, batch = config["model"], plan["batch"]
    experts = model.get("experts") or {}
    counted = float(count_of(run, count))
    facts = {
        "N": counted,
        "N_total": float(parameters["total"]),
        "N_non_embedding": float(parameters["non_embedding"]),
        "N_active": float(parameters.get("active", parameters["total"])),
        "D": tokens,
        "C": float(metrics["flops"][-1]),
        "M": tokens / counted,
        "B": float(batch["stages"][-1]["sequences"] * batch["sequence_length"]),
        "S": float(metrics["step"][-1]),
        "S1": float(metrics["s1"][-1]),
        "S2": float(metrics["s2"][-1]),
        "lr": float(config["optimizer"]["lr"]),
        "seed": float(config["run"]["seed"]),
        "width": float(model["width"]),
        "layers": float(model["num_layers"]),
        "experts": float(experts.get("num_experts", 1)),
        "experts_per_token": float(experts.get("experts_per_token", 1)),
        "U": 0.0,
    }
    if experts:
        facts["expert_width"] = float(experts["width"])
    for name, source in run.record["data"]["sources"].items():
        seen = float(metrics[f"tokens/{name}"][-1])
        facts[f"r/{name}"] = seen / tokens
        facts[f"U/{name}"] = min(seen, float(source["train"]["tokens"]))
        facts["U"] += facts[f"U/{name}"]
        held_out = metrics.get(f"validation/{name}", np.full(1, np.nan))
        facts[f"validation/{name}"] = float(held_out[-1])
    return facts


def count_of(run: Run, count: CountName) -> int:
    """Return a run's number of parameters by one of the conventions, as counted in run.json."""
    parameters = run.record["plan"]["parameters"]
    by_role: Mapping[str, int] = parameters["by_role"]
    if count == "with_head":
        head = by_role["input"] if run.config["model"]["tied_embeddings"] else by_role["output"]
        return int(parameters["non_embedding"] + head)
    return int(parameters[count])


def group_names(
    runs: Sequence[Run], rows: Sequence[Mapping[str, float]], group_by: Grouping
) -> tuple[str, ...]:
    """Return the name of each run's group (see ``from_runs``)."""
    if group_by == "run":
        return run_names(runs)
    if group_by == "cell":
        keys = [json.dumps(_cell(run.config), sort_keys=True) for run in runs]
        labels = [f"N={human(row['N'])} D={human(row['D'])}" for row in rows]
    else:
        keys = [json.dumps(run.config["model"], sort_keys=True) for run in runs]
        labels = [f"N={human(row['N'])}" for row in rows]
    names: dict[str, str] = {}
    for key, label in zip(keys, labels, strict=True):
        if key not in names:
            used = [name for name in names.values() if name.partition(" #")[0] == label]
            names[key] = label if not used else f"{label} #{len(used) + 1}"
    return tuple(names[key] for key in keys)


def run_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the name of each run, from its folder (see ``distinct_names``)."""
    return distinct_names([run.folder for run in runs])


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return names of different files or folders: the shortest distinct ends of their paths."""
    resolved = [path.resolve() for path in paths]
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return tuple("/".join(path.parts[-depth:]) for path in resolved)


def _cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that runs of one cell share: all but the seed."""
    kept = {name: part for name, part in config.items() if name not in _NOT_OF_A_CELL}
    kept["batch"] = {k: v for k, v in config["batch"].items() if k != "micro_batch_sequences"}
    return kept
