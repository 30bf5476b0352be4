"""Hand-written loop on FSDP2: ``torchrun --nproc-per-node 2 -m contenders.fsdp2 --out FILE``.

``fully_shard`` is applied to each block and to the model, as in torch's tutorial; the global batch
is the same as on one process.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from contenders.llama import Llama
from contenders.plain import optimizer_of, random_tokens
from contenders.shape import parse_task, report


def main() -> None:
    task = parse_task()
    shape = task.shape
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = Llama(shape)
    policy = MixedPrecisionPolicy()
    if task.dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = optimizer_of(model, shape)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1 + rank)
    seconds, losses = [], []
    for _ in range(task.total_steps):
        start = time.perf_counter()
        tokens = random_tokens(shape, shape.sequences // world, generator)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, shape.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        report(task, seconds, losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
