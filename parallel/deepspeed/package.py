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


def opened(mesh: Mesh) -> ModuleType:
    """Return the package, with the hdp group of ``mesh`` as the group it shards over.

    Raises UserError: see ``check_installed``.
    """
    check_installed()
    # It chooses its device, and which one is this rank's, by these.
    os.environ["DS_ACCELERATOR"] = mesh.device.type
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls functions of torch that are to be renamed, in every step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "torch.distributed"
    )
    # Else a first run compiles a kernel for inference when it is opened.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if comm.cdb is None:
        deepspeed.init_distributed(verbose=False)
    # Its own copy of the group of all ranks would have another timeout, and outlive the mesh.
    groups._WORLD_GROUP = mesh.hdp.group
    parameter_offload.FWD_MODULE_STACK.clear()
    return deepspeed
