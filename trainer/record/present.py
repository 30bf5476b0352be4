"""Create the callbacks of a launch, and close its record."""

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
    """Return the callbacks of a launch on its main rank; None: those of the config."""
    if callbacks is None:
        make = partial(standard_callbacks, config.record, folder)
        callbacks = on_main_rank(mesh, make, "making callbacks")
    return list(callbacks or ()) if mesh.is_main else []


def close(recorder: Recorder | None, callbacks: Sequence[Callback]) -> str | None:
    """Close the main rank's outputs; describe the rows that could not be written, None if none."""
    if recorder is None:
        return None
    try:
        for callback in callbacks:
            callback.on_end()
    finally:
        lost = recorder.close()
    return lost
