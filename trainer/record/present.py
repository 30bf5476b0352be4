"""The callbacks of a launch, and how its record ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from allometry.configs.run import RunConfig
from allometry.parallel.agree import on_main_rank
from allometry.parallel.mesh import Mesh
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.services import standard_callbacks
from allometry.trainer.record.writer import Recorder
from allometry.trainer.state.folder import RunFolder


def present_callbacks(
    callbacks: Sequence[Callback] | None, config: RunConfig, folder: RunFolder, mesh: Mesh
) -> list[Callback]:
    """The callbacks of a launch, which its main rank has; None: those of the configuration."""
    if callbacks is None:
        make = partial(standard_callbacks, config.record, folder)
        callbacks = on_main_rank(mesh, make, "making callbacks")
    return list(callbacks or ()) if mesh.is_main else []


def close(recorder: Recorder | None, callbacks: Sequence[Callback]) -> str | None:
    """End what the main rank writes; what of the record could not be written."""
    if recorder is None:
        return None
    try:
        for callback in callbacks:
            callback.on_end()
    finally:
        lost = recorder.close()
    return lost
