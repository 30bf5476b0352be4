"""Collectives on tensors that may be on a device that the group does not support."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def on_wire(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensor, or a copy on this rank's GPU if the group cannot send the tensor.

    Gradients of offloaded parameters are in host memory, which NCCL does not access.
    """
    on_gpu = tensor.is_cuda or dist.get_backend(group) != "nccl"
    return tensor if on_gpu else tensor.cuda()


def sum_over(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Replace a tensor on any device by its sum over the ranks of ``group``."""
    summed = on_wire(tensor, group)
    dist.all_reduce(summed, group=group)
    if summed is not tensor:
        tensor.copy_(summed)
