"""Rewind a run to a checkpoint after bad steps, and pass over the batches after it.

``rewinds.json`` in the run's folder has an entry for each rewind: the ``step`` of the checkpoint,
the number of ``samples`` after it that are passed over, and the ``bad_steps``. A launch that begins
at that checkpoint passes over these samples (``with_passed``); later launches read them from the
mixture's changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allometry.configs.bad_steps import Rewind
from allometry.configs.errors import UserError
from allometry.configs.json_file import read_object
from allometry.configs.run import RunConfig
from allometry.parallel.agree import from_main_rank, on_all_ranks
from allometry.parallel.mesh import Mesh
from allometry.scaling.batch import BatchPlan
from allometry.trainer.state.checkpoint import saved, step_of
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.identity import problem_of
from allometry.trainer.state.local import LocalCopies


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)
    step: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=0, lt=2**48)]
    bad_steps: list[int]


def go_back(
    folder: RunFolder,
    local: LocalCopies | None,
    config: RunConfig,
    batch: BatchPlan,
    bad_steps: tuple[int, ...],
    mesh: Mesh,
    report: Callable[..., None],
) -> None:
    """Let the next launch begin at the newest checkpoint before ``bad_steps``.

    The batches up to the last bad step are passed over, or ``skip_batches`` batches if these are
    more. Every rank calls this.

    Raises:
        UserError: there is no such checkpoint.
    """
    policy = config.training.bad_steps
    assert policy is not None
    assert policy.rewind is not None
    if local is not None:  # copies of steps that will be repeated
        on_all_ranks(mesh, local.forget, "removing local copies")
    choose = partial(_choose, folder, policy.rewind, batch, bad_steps)
    entry = from_main_rank(mesh, choose, "going back to a checkpoint")
    told = {key: entry[key] for key in ("samples", "bad_steps")}
    report("going_back", step=bad_steps[-1], checkpoint=entry["step"], **told)


def not_new(config: RunConfig) -> RunConfig:
    """Return the config of a run whose folder is no longer new."""
    if config.run.resume != "never":
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})


def _choose(
    folder: RunFolder, rewind: Rewind, batch: BatchPlan, bad_steps: tuple[int, ...]
) -> dict[str, Any]:
    before = [path for path in saved(folder) if step_of(path) < bad_steps[0]]
    whole = [path for path in before if problem_of(folder, path) is None]
    if not whole:
        raise UserError(
            f"steps {', '.join(map(str, bad_steps))} were bad, and training.bad_steps.rewind finds "
            f"no checkpoint before step {bad_steps[0]} to go back to; lower checkpoint.every_steps "
            "or raise checkpoint.keep_last, or pass these steps over with training.skip_steps"
        )
    step = step_of(whole[-1])
    last = max(bad_steps[-1], step + rewind.skip_batches)
    samples = batch.sequences_before(last + 1) - batch.sequences_before(step + 1)
    entry = {"step": step, "samples": samples, "bad_steps": list(bad_steps)}
    # If killed between these writes, the run repeats the same steps and rewinds again.
    write_atomically(folder.latest, whole[-1].name + "\n")
    _write(folder, [*rewinds(folder), entry])
    return entry


def rewinds(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rewinds of a run so far.

    Raises:
        UserError: the file cannot be read.
    """
    if not folder.rewinds.exists():
        return []
    try:
        found = read_object(folder.rewinds)["rewinds"]
        return [_Entry.model_validate(one).model_dump() for one in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(
            f"{folder.rewinds} cannot be read ({said}); restore it, or remove it to read the "
            "batches that it passes over"
        ) from None


def with_passed(folder: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a checkpoint with the number of samples to ``pass_over`` there."""
    samples = sum(one["samples"] for one in rewinds(folder) if one["step"] == facts["step"])
    return {**facts, "pass_over": samples}


def forget_after(folder: RunFolder, step: int) -> None:
    """Clear the samples of rewinds past ``step`` when the run is continued from ``step``."""
    found = rewinds(folder)
    if any(one["step"] > step and one["samples"] for one in found):
        _write(folder, [one | {"samples": 0} if one["step"] > step else one for one in found])


def _write(folder: RunFolder, found: list[dict[str, Any]]) -> None:
    write_atomically(folder.rewinds, json.dumps({"rewinds": found}, indent=2) + "\n")
