"""Write a checkpoint of given tensors in the format of runs, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from allometry.parallel.mesh import Mesh
from allometry.trainer.state.integrity import ShardWriter, seal


def write_sealed(path: Path, state: dict[str, Any], mesh: Mesh) -> None:
    """Write the tensors of all ranks, and the list of files; every rank calls this function."""
    writer = ShardWriter(path)
    dcp.save(state, storage_writer=writer, process_group=mesh.checkpoint_group)
    files = mesh.gather_objects(writer.files)
    if mesh.is_main:
        listed = {name: entry for mine in files for name, entry in mine.items()}
        seal(path, 1, listed, {"step": 1, "weights_only": True})
    mesh.barrier("a checkpoint")
