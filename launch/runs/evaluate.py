"""Scores of checkpoints by the lm-evaluation-harness: ``allometry evaluate``."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from allometry.configs.errors import UserError
from allometry.interop.harness import Harness, Score, require_harness
from allometry.interop.huggingface.convert import Dtype, export_hf
from allometry.interop.huggingface.origin import read_origin
from allometry.interop.huggingface.weights import hash_of
from allometry.launch.command import Report
from allometry.launch.runs.commands import Evaluate
from allometry.launch.text import table
from allometry.laws.losses import LossChoice, loss_curve
from allometry.laws.runs import Run, read_run
from allometry.laws.scores import SCORES, Row, read_scores, with_rows
from allometry.trainer.state.folder import write_atomically
from allometry.trainer.state.integrity import COMPLETE

_TORCH = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class _Model:
    """Model to evaluate: a checkpoint of a run, or a model folder (``step`` is None).

    ``facts``: its step, tokens and loss in training, for the rows.
    """

    folder: Path
    step: int | None
    checkpoint: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(self.folder) if self.step is None else f"{self.folder} step {self.step}"


def evaluated(asked: Evaluate) -> Report:
    """Evaluate and append the scores to scores.jsonl. Raises UserError."""
    require_harness()
    tasks = [name for text in asked.tasks for name in text.split(",") if name]
    if not tasks:
        raise UserError("--tasks names none; give the harness' names or .yaml files")
    dtype = asked.dtype or "fp32"
    if dtype not in _TORCH:
        raise UserError(f"--dtype={dtype} is not known; use fp32 or bf16")
    models = list(_models(asked))
    harness = Harness(tasks, fewshot=asked.fewshot, limit=asked.limit)
    rows: list[Row] = []
    for model in models:
        known = [] if asked.again else _known(model, harness, asked)
        if known:
            print(f"{model.name}: evaluated before; --again does it anew", file=sys.stderr)
            rows += known
            continue
        scores = _scores(model, harness, asked, cast(Dtype, dtype))
        new = [_row(model, one, harness.version, asked) for one in scores]
        _append(model.folder, new)
        rows += new
    facts = {"source": str(asked.source), "harness": harness.version, "scores": rows}
    return Report(facts, _text(rows))


def _models(asked: Evaluate) -> Iterator[_Model]:
    """Yield the models to evaluate, the earliest checkpoint first."""
    source = asked.source
    if (source / "config.yaml").is_file():
        run, loss = _read(source)
        for step in _steps(source, asked.checkpoints):
            content = (source / "checkpoints" / f"step-{step}" / COMPLETE).read_bytes()
            facts = _facts(source, step, run, loss)
            yield _Model(source, step, hashlib.sha256(content).hexdigest()[:16], facts)
    elif (source / "config.json").is_file():
        for name, value in (
            ("tokenizer", asked.tokenizer),
            ("end-of-document", asked.end_of_document),
            ("checkpoints", None if asked.checkpoints == "last" else asked.checkpoints),
        ):
            if value is not None:
                raise UserError(f"--{name} goes with a run, and {source} is a model; leave it out")
        origin = read_origin(source) or {}
        facts = {"run": source.name, "step": origin.get("step"), "tokens": origin.get("tokens")}
        yield _Model(source, None, hash_of(source), facts)
    else:
        raise UserError(
            f"{source} holds neither config.yaml (a run) nor config.json (a Hugging Face model); "
            "name a folder that does"
        )


def _steps(folder: Path, wanted: str) -> list[int]:
    there = sorted(
        int(path.parent.name.removeprefix("step-"))
        for path in (folder / "checkpoints").glob(f"step-*/{COMPLETE}")
    )
    if not there:
        raise UserError(f"{folder} has no checkpoint yet; train it first")
    if wanted in ("all", "last"):
        return there if wanted == "all" else there[-1:]
    steps = [int(text) if text.isdigit() else -1 for text in wanted.split(",")]
    missing = [
        text for text, step in zip(wanted.split(","), steps, strict=True) if step not in there
    ]
    if missing:
        raise UserError(
            f"--checkpoints={wanted}: {folder} has no checkpoint {missing[0]}; use all, last or of "
            f"{', '.join(map(str, there))}"
        )
    return sorted(set(steps))


def _read(folder: Path) -> tuple[Run | None, dict[int, float]]:
    """Return the run's record and its held-out loss by step; None and {} before training."""
    try:
        run = read_run(folder)
    except UserError:
        return None, {}
    try:
        steps, losses = loss_curve(run, LossChoice.parse("validation"))
    except (UserError, KeyError):  # no held-out tokens, or a record of an old version
        return run, {}
    return run, {int(step): float(loss) for step, loss in zip(steps, losses, strict=True)}


def _facts(folder: Path, step: int, run: Run | None, loss: dict[int, float]) -> dict[str, Any]:
    facts: dict[str, Any] = {"run": folder.name, "step": step, "loss": loss.get(step)}
    if run is None:
        return facts
    at = run.metrics["step"] == step
    for name in ("tokens", "flops"):
        values = run.metrics[name][at] if name in run.metrics else ()
        facts[name] = int(values[-1]) if len(values) else None
    counts = run.record.get("plan", {}).get("parameters", {})
    return facts | {"N": counts.get("non_embedding")}


def _known(model: _Model, harness: Harness, asked: Evaluate) -> list[Row]:
    """Return stored rows of the same evaluation of a model; empty if a task is missing."""
    rows = [
        row
        for row in read_scores(model.folder)
        if row.get("checkpoint") == model.checkpoint
        and row.get("harness") == harness.version
        and row.get("limit") == asked.limit
        and row.get("asked_fewshot") == asked.fewshot
        and harness.hashes.get(str(row.get("task"))) == row.get("task_hash")
    ]
    return rows if {row["task"] for row in rows} == set(harness.hashes) else []


def _scores(model: _Model, harness: Harness, asked: Evaluate, dtype: Dtype) -> list[Score]:
    import torch

    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {
        "device": device,
        "dtype": _TORCH[dtype],
        "batch_size": asked.batch_size,
    }
    if model.step is None:
        return harness.scores(model.folder, **options)
    with tempfile.TemporaryDirectory(prefix="allometry-evaluate-") as place:
        exported = export_hf(
            model.folder,
            Path(place) / "model",
            model.step,
            dtype=dtype,
            tokenizer=str(asked.tokenizer) if asked.tokenizer else None,
            end_of_document=asked.end_of_document,
        )
        if exported.unknown:
            flag = "--tokenizer" if exported.tokenizer is None else "--end-of-document"
            raise UserError(f"{model.folder}: {exported.unknown[0]}; give it with {flag}")
        return harness.scores(Path(exported.target), **options)


def _row(model: _Model, score: Score, harness: str, asked: Evaluate) -> Row:
    row: Row = {"time": time.time(), **model.facts, **asdict(score)}
    if score.is_accuracy:
        row |= {"accuracy": score.value, "error": 1.0 - score.value}
    return row | {
        "limit": asked.limit,
        "asked_fewshot": asked.fewshot,
        "checkpoint": model.checkpoint,
        "harness": harness,
    }


def _append(folder: Path, rows: Sequence[Row]) -> None:
    path = folder / SCORES
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        write_atomically(path, with_rows(text, rows))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


def _text(rows: Sequence[Row]) -> str:
    cells: list[tuple[str, ...]] = [
        ("step", "task", "metric", "value", "stderr", "chance", "n", "shots")
    ]
    for row in rows:
        step = "" if row.get("step") is None else str(row["step"])
        how = "" if row["filter"] == "none" else f" ({row['filter']})"
        numbers = (
            "" if row[name] is None else f"{row[name]:.4f}"
            for name in ("value", "stderr", "chance")
        )
        cells.append(
            (step, row["task"], row["metric"] + how, *numbers, str(row["n"]), str(row["fewshot"]))
        )
    return table(cells, right=(0, 3, 4, 5, 6, 7))
