"""Evaluation of a Hugging Face folder with EleutherAI's lm-evaluation-harness (lm_eval)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError

_NEEDED = ("lm_eval", "transformers", "accelerate", "datasets")
_RESAMPLINGS = 1000
_PLACES = ("dataset_path", "dataset_kwargs", "metadata")
_SHARES = ("acc", "exact_match")
"""Prefixes of the names of metrics that are fractions of correct answers."""


@dataclass(frozen=True)
class Score:
    """Value of one metric of one task; ``filter`` names the harness' answer filter.

    See ``laws/scores.py`` for the file format.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    chance: float | None
    higher_is_better: bool | None
    fewshot: int
    task_version: str | None
    task_hash: str

    @property
    def is_accuracy(self) -> bool:
        """True if the metric is a fraction of correct answers."""
        return self.metric.startswith(_SHARES) and 0.0 <= self.value <= 1.0


def require_harness() -> str:
    """Return "lm_eval" and its version. Raises UserError if a package is missing."""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"evaluate needs {name}, which is not installed; pip install 'allometry[evaluate]'"
            )
    return f"lm_eval {metadata.version('lm_eval')}"


class Harness:
    """Tasks of the harness, loaded once for all checkpoints.

    ``tasks``: task names of the harness, YAML files, or folders of YAML files; paths of data files
    in a YAML file are relative to its folder. ``limit``: number of documents per task, the first
    ones. For example, ``Harness(["arc_easy", "my_task.yaml"], limit=100)``.

    Raises:
        UserError: a task is unknown, or its data cannot be loaded.
    """

    def __init__(
        self, tasks: Sequence[str], *, fewshot: int | None = None, limit: int | None = None
    ) -> None:
        self.version = require_harness()
        self._fewshot, self._limit = fewshot, limit
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self._manager, loaded = _load(tasks)
        self._tasks: dict[str, Any] = loaded["tasks"]
        if not self._tasks:
            raise UserError(f"--tasks={','.join(tasks)} holds no task; name one")
        groups = loaded.get("groups", {})
        self._groups = {name: one for name, one in groups.items() if one.has_aggregation}
        below = {inner for one in groups.values() for inner in one.child_names}
        self._asked = [one for name, one in (groups | self._tasks).items() if name not in below]
        self.hashes = {name: _hash(task, limit) for name, task in self._tasks.items()}
        for name, members in self._members().items():
            text = "".join(self.hashes[member] for member in members)
            self.hashes[name] = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _members(self) -> dict[str, list[str]]:
        """Return the member tasks of each group that has an aggregated score."""
        return {
            name: sorted({task.task_name for task in one.get_all_tasks()})
            for name, one in self._groups.items()
        }

    def scores(self, folder: Path, *, device: str, dtype: str, batch_size: int) -> list[Score]:
        """Return the scores of the model in a Hugging Face folder, task by task.

        Raises:
            UserError: the harness cannot load or evaluate the model.
        """
        from lm_eval import simple_evaluate

        model = {"pretrained": str(folder), "dtype": dtype}
        try:
            results = simple_evaluate(
                model="hf",
                model_args=model,
                tasks=list(self._asked),
                task_manager=self._manager,
                num_fewshot=self._fewshot,
                limit=self._limit,
                batch_size=batch_size,
                device=device,
                bootstrap_iters=_RESAMPLINGS,
                log_samples=False,
            )
        except (ValueError, TypeError, KeyError, OSError, AssertionError) as error:
            raise UserError(
                f"the harness cannot evaluate {folder} ({_said(error)}); see that the tasks and "
                "the model's tokenizer fit"
            ) from error
        assert results is not None, "one process"
        members = {name: [name] for name in self._tasks} | self._members()
        return [one for name, of in members.items() for one in self._of(name, of, results)]

    def _of(self, name: str, members: Sequence[str], results: Any) -> Iterator[Score]:
        """Yield the scores of a task or of a group of tasks."""
        where = results["groups"] if name in self._groups else results["results"]
        found = where[name]
        counts = {one: int(results["n-samples"][one]["effective"]) for one in members}
        better = results.get("higher_is_better", {}).get(name, {})
        version = results.get("versions", {}).get(name)
        for key, value in found.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            spread = found.get(f"{metric}_stderr,{how}")
            known = isinstance(spread, int | float) and math.isfinite(spread)
            share = metric.startswith(_SHARES)
            yield Score(
                task=name,
                metric=metric,
                filter=how,
                value=float(value),
                stderr=float(spread) if known else None,
                n=sum(counts.values()),
                chance=self._chance(counts) if share else None,
                higher_is_better=better.get(metric),
                fewshot=int(results.get("n-shot", {}).get(members[0]) or 0),
                task_version=None if version is None else str(version),
                task_hash=self.hashes[name],
            )

    def _chance(self, counts: Mapping[str, int]) -> float | None:
        """Return the chance level over all documents of these tasks; None if unknown for a task."""
        each = {name: _chance(self._tasks[name], n) for name, n in counts.items()}
        known = [chance * counts[name] for name, chance in each.items() if chance is not None]
        return sum(known) / sum(counts.values()) if len(known) == len(counts) else None


def _load(tasks: Sequence[str]) -> tuple[Any, Any]:
    """Return the harness' task manager and the loaded tasks."""
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks]
    local = [file.is_dir() or file.suffix in (".yaml", ".yml") for file in files]
    manager = TaskManager(include_defaults=not all(local))
    wanted: list[Any] = []
    for task, file, is_local in zip(tasks, files, local, strict=True):
        if not is_local:
            wanted += _named(manager, task)
        elif file.is_dir():
            inside = sorted(path for path in file.iterdir() if path.suffix in (".yaml", ".yml"))
            if not inside:
                raise UserError(f"--tasks={task} holds no .yaml file; name a task's file")
            wanted += [_described(path) for path in inside]
        else:
            wanted.append(_described(file))
    try:
        return manager, manager.load(wanted)
    except Exception as error:  # raised by the hub, its library, or a task's script
        raise UserError(
            f"--tasks={','.join(tasks)}: the tasks cannot be loaded ({_said(error)}); tasks whose "
            "data are not local files fetch them over the network, once"
        ) from error


def _named(manager: Any, task: str) -> list[str]:
    found: list[str] = manager.match_tasks([task])
    if not found:
        raise UserError(
            f"--tasks={task} is no task of the harness and no .yaml file; lm-eval ls tasks lists "
            "them"
        )
    return found


def _described(path: Path) -> dict[str, Any]:
    """Return the task of a YAML file, with the paths of its data files made absolute."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        described: dict[str, Any] = load_yaml(path)
    except Exception as error:  # invalid YAML, a missing function, a missing file
        raise UserError(f"--tasks={path} cannot be read ({_said(error)}); mend it") from error
    if not isinstance(described.get("task"), str):
        raise UserError(f"--tasks={path} describes no task: it has no 'task: NAME'; add it")
    options = described.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        described["dataset_kwargs"] = options | {
            "data_files": _beside(path.parent, options["data_files"])
        }
    return described


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _beside(folder, inner) for split, inner in files.items()}
    if isinstance(files, list):
        return [_beside(folder, inner) for inner in files]
    local = folder / str(files)
    return str(local.resolve()) if local.exists() else files


def _documents(task: Any, limit: int | None) -> list[Any]:
    documents = task.eval_docs
    return [documents[place] for place in range(min(len(documents), limit or len(documents)))]


def _chance(task: Any, n: int) -> float | None:
    """Return the chance level, the mean of 1/choices; None for tasks without multiple choice."""
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice" or not n:
        return None
    try:
        return sum(1.0 / len(task.doc_to_choice(one)) for one in _documents(task, n)) / n
    except (AttributeError, TypeError, KeyError, ZeroDivisionError):
        return None


def _hash(task: Any, limit: int | None) -> str:
    """Return a hash of a task's settings and documents, independent of the paths of its files."""
    config = {key: value for key, value in task.dump_config().items() if key not in _PLACES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=_name).encode())
    for one in _documents(task, limit):
        digest.update(json.dumps(one, sort_keys=True, default=_name).encode())
    return digest.hexdigest()[:16]


def _name(value: Any) -> str:
    """Return a JSON string for a value without a JSON form, without memory addresses."""
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def _said(error: BaseException) -> str:
    """Return the message of an error as one line of at most 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:297] + "..."
