"""Import of DeepSpeed: version check, quiet logging, and the process groups of the mesh."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import warnings
from types import ModuleType

from allometry.configs.errors import UserError
from allometry.parallel.mesh import Mesh

VERSION = "0.19.8"
INSTALL = f"pip install deepspeed=={VERSION}"


def check_installed() -> None:
    """Raise UserError unless the pinned version is installed."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        there = "is not installed" if found is None else f"is installed as {found}"
        raise UserError(
            f"parallel.zero.engine=deepspeed needs DeepSpeed {VERSION}, which {there}; {INSTALL}, "
            "or use parallel.zero.engine: fsdp2"
        )


def quieten(device: str) -> None:
    """Prepare the first import: select the accelerator ``device`` and silence the log."""
    os.environ["DS_ACCELERATOR"] = device
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls deprecated functions of torch in every step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "torch.distributed"
    )


def opened(mesh: Mesh) -> ModuleType:
    """Return the DeepSpeed module, set up to shard over the hdp group of ``mesh``."""
    quieten(mesh.device.type)
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)  # DeepSpeed reads its device from here
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Otherwise the import compiles an inference kernel on its first run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if comm.cdb is None:
        deepspeed.init_distributed(verbose=False)
    # DeepSpeed's copy of the world group would have another timeout and outlive the mesh.
    groups._WORLD_GROUP = mesh.hdp.group
    _forget(parameter_offload, partition_parameters)
    return deepspeed


def _forget(parameter_offload: ModuleType, partition_parameters: ModuleType) -> None:
    """Reset the counters of modules and parameters, which ranks compare with each other.

    Without a reset the counters differ between processes that have had different models before.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    register = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module
    (count,) = register.__defaults__
    count[0] = 0
    partition_parameters.Init.param_id = 0
