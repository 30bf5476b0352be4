"""The package itself: which version, quiet, and with the groups of this mesh."""

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
    """Prepare for the first import: on which kind of device it works, and that it is quiet."""
    os.environ["DS_ACCELERATOR"] = device
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls functions of torch that are to be renamed, in every step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "torch.distributed"
    )


def opened(mesh: Mesh) -> ModuleType:
    """Return the package, with the hdp group of ``mesh`` as the group it shards over."""
    quieten(mesh.device.type)
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)  # how it knows which device is ours
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Else a first run compiles a kernel for inference when it is opened.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if comm.cdb is None:
        deepspeed.init_distributed(verbose=False)
    # Its own copy of the group of all ranks would have another timeout, and outlive the mesh.
    groups._WORLD_GROUP = mesh.hdp.group
    _forget(parameter_offload, partition_parameters)
    return deepspeed


def _forget(parameter_offload: ModuleType, partition_parameters: ModuleType) -> None:
    """Begin to count modules and parameters anew: ranks compare their numbers.

    Processes that have had other models before, not all the same, would differ.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    register = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module
    (count,) = register.__defaults__
    count[0] = 0
    partition_parameters.Init.param_id = 0
