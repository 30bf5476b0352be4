"""Read all tensors of a checkpoint, for bitwise comparisons of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from allometry.configs.run import RunConfig


def bits(config: RunConfig, step: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, unsharded, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    reader = FileSystemReader(Path(config.run.folder) / "checkpoints" / f"step-{step}")
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(found, storage_reader=reader, planner=planner, no_dist=True)
    flat: dict[str, Tensor] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            flat[prefix] = value
        else:
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, inner)

    flatten("", found)
    return flat
