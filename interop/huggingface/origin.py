"""Origin of converted models: the origin file of an export, and the origin record of an import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.texts import write_json
from allometry.interop.huggingface.weights import OPTIMIZER, CheckpointWeights, read_json
from allometry.trainer.state.checkpoint import read_facts, step_of
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.integrity import COMPLETE

ORIGIN, STATES = "allometry.json", "allometry_optimizer"
_KIND = {"kind": "allometry.origin", "version": 1}
_SECTIONS = ("model", "parameterization", "optimizer")


def write_origin(folder: Path, run: RunFolder, config: RunConfig, checkpoint: Path) -> None:
    """Write run, step, seed and data of the weights into an exported folder (``ORIGIN``)."""
    facts = read_facts(checkpoint)
    content = {
        **_KIND,
        "run": config.run.folder,
        "step": step_of(checkpoint),
        "seed": config.run.seed,
        **{key: facts[key] for key in ("tokens", "data", "reading") if key in facts},
        **run.origin(),
        **{section: getattr(config, section).model_dump(mode="json") for section in _SECTIONS},
    }
    write_json(folder / ORIGIN, content)


def read_origin(folder: Path) -> dict[str, Any] | None:
    """Return the content written by ``write_origin``; None for a folder not exported by us."""
    path = folder / ORIGIN
    if not path.is_file():
        return None
    content = read_json(path)
    known = {"run", "step", "seed", *_SECTIONS} <= content.keys()
    known = known and all(isinstance(content[section], dict) for section in _SECTIONS)
    if not known or any(content.get(key) != value for key, value in _KIND.items()):
        raise UserError(f"{path} was not written by this version; move it away to do without it")
    return content


def kept_origin(source: Path, family: str, said: dict[str, Any] | None) -> dict[str, Any]:
    """Return the origin of an imported model for the run.json of its run (JSON)."""
    kept = {"source": str(source.resolve()), "family": family}
    run = {key: value for key, value in (said or {}).items() if key not in (*_KIND, *_SECTIONS)}
    return {**kept, **({"parameterization": said["parameterization"], **run} if said else {})}


def notes(origin: dict[str, Any] | None, config: RunConfig) -> list[str]:
    """Return lines about the run that an imported model was exported from."""
    if origin is None:
        return []
    lines = [f"origin: {origin['run']}, step {origin['step']}"]
    different = _different(origin["parameterization"], config)
    if different is not None:
        lines.append(
            f"{different}: the model computes the same, but learning rates and other settings do "
            "not carry over"
        )
    return lines


def _different(before: dict[str, Any], config: RunConfig) -> str | None:
    """Return a line on the first differing key of the parameterization, ``kind`` first, or None."""
    now = config.parameterization.model_dump(mode="json")
    for key in ("kind", *sorted(before.keys() | now.keys())):
        if before.get(key) != now.get(key):
            return f"parameterization.{key}={now.get(key)} (there {before.get(key)})"
    return None


def states_to_keep(
    source: Path, origin: dict[str, Any] | None, config: RunConfig
) -> CheckpointWeights:
    """Return the optimizer states in an exported folder.

    Raises UserError if the folder has no states, or if the run uses another optimizer or
    parameterization, for which the states are not valid.
    """
    path = source / STATES
    if origin is None or not path.is_dir():
        raise UserError(
            f"--optimizer-state: {source} holds none; export it with --optimizer-state, or leave "
            "the option out to begin with fresh states"
        )
    if not (path / COMPLETE).exists():
        raise UserError(
            f"--optimizer-state: {path} has no {COMPLETE}, as an earlier version wrote it, so what "
            "is read cannot be checked; export the checkpoint again"
        )
    different = _different(origin["parameterization"], config)
    kind = origin["optimizer"]["kind"]
    if config.optimizer.kind != kind:
        different = f"optimizer.kind={config.optimizer.kind} (there {kind})"
    if different is not None:
        raise UserError(
            f"--optimizer-state: {different}, for which the states have no meaning; set it as "
            "there, or leave the option out"
        )
    return CheckpointWeights(path, OPTIMIZER)
