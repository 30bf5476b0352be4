"""Messages whose tensors lie where their group cannot send from."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def on_wire(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensor, or a copy on this rank's GPU of one that the group cannot send.

    Gradients of offloaded parameters lie in the host's memory, which NCCL does not read.
    """
    on_gpu = tensor.is_cuda or dist.get_backend(group) != "nccl"
    return tensor if on_gpu else tensor.cuda()


def sum_over(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Replace a tensor, wherever it lies, by its sum over the ranks of ``group``."""
    summed = on_wire(tensor, group)
    dist.all_reduce(summed, group=group)
    if summed is not tensor:
        tensor.copy_(summed)
