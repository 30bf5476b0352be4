"""Simulate one rank of a mesh of any size in one process, without communication or storage.

The code that builds and runs a distributed model is unchanged, but messages are not sent (torch's
"fake" process group) and values are not computed (torch's FakeTensorMode). The result is exact in
shapes: the tensors of a rank, and the collectives that the rank calls, with their sizes.
"""

# R ranks of an exchange, t tp ranks, e experts of a rank

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from allometry.configs.execution import ParallelConfig
from allometry.models.moe import Experts
from allometry.models.transformer import Transformer
from allometry.parallel.expert import AllToAll, Sizes
from allometry.parallel.mesh import Mesh, open_mesh

# torch's operator names, without namespace and trailing underscore, and common names.
_KINDS = {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base": "all-gather",
    "allgather": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall_base": "all-to-all",
    "alltoall": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}
_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier")


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective call: kind, mesh axis, number of ranks, bytes and type of the full tensor.

    The full tensor is the output of an all-gather, the input of a reduce-scatter or an all-reduce,
    and the sent tensor of an all-to-all. ``dtype`` is torch's name without "torch.".
    """

    kind: str
    axis: str
    ranks: int
    bytes: int
    dtype: str


class CollectiveLog(TorchDispatchMode):
    """Record of the collectives that are called in this context."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.calls: list[Collective] = []
        self._axes = axis_names(mesh)
        self._ep = mesh.ep.group.group_name if mesh.ep.size > 1 else None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, and record the call if ``func`` is a collective."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            short = name.rstrip("_")
            if short not in _SILENT:
                self._note(short, args, result)
        return result

    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        assert name in _KINDS, f"an unknown collective: {name}"
        group = _group(args)
        assert group is not None, name
        ranks = group.size()
        if ranks == 1:
            return
        (dtype,) = {tensor.dtype for value in args for tensor in _tensors(value)}
        size = max(sum(t.nbytes for t in _tensors(value)) for value in (*args, result))
        axis = self._axes.get(group.group_name, "ranks")
        if group.group_name == self._ep and _KINDS[name] == "all-to-all":
            axis = "ep"  # if hdp has the same ranks
        self.calls.append(Collective(_KINDS[name], axis, ranks, size, dtype_name(dtype)))


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Return mesh dimensions by group name; the dimensions of hdp keep their own names.

    A group of several axes has the name of the largest axis that contains them.
    """
    names: dict[str, str] = {}
    for whole in (mesh.expert_mesh, mesh.device_mesh):
        for name in whole.mesh_dim_names or ():
            names[whole.get_group(name).group_name] = name
    for name in ("stage", "edp", "hdp", "tp", "pp"):
        axis = mesh.axis(name)
        if axis.size > 1:
            names[axis.group.group_name] = name
    return names


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except RuntimeError:  # a ReduceOp
                continue
    names = [value for value in args if isinstance(value, str)]
    for name in reversed(names):  # the name of the reduction comes before the group
        try:
            return dist.distributed_c10d._resolve_process_group(name)
        except (RuntimeError, ValueError, KeyError):
            continue
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a type without "torch."; for example, ``float32``."""
    return str(dtype).removeprefix("torch.")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


@contextmanager
def simulated_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """Simulate rank ``rank`` of ``world_size``; a process group must not exist yet.

    For example::

        with simulated_rank(config.parallel, 0, 64) as mesh, CollectiveLog(mesh) as log:
            ...
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with open_mesh(parallel, torch.device("cpu")) as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


def without_storage() -> FakeTensorMode:
    """Return a context in which tensors have shapes but neither storage nor values.

    Build and distribute models on the meta device before the context, and materialize them inside.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class EvenExchange(AllToAll):
    """All-to-all of expert parallelism with equal numbers of tokens for all experts.

    Real numbers of tokens depend on data, which a simulation lacks. Sizes are mean sizes.
    """

    @override
    def sizes(self, sent_Re: Tensor, got_tRe: Tensor, rows: int) -> Sizes:
        each = [rows // self.ranks + (i < rows % self.ranks) for i in range(self.ranks)]
        return Sizes(each, each, [rows] * len(got_tRe))


def even_experts(part: Transformer) -> None:
    """Replace the all-to-all of the experts of ``part`` by ``EvenExchange``."""
    for module in part.modules():
        if isinstance(module, Experts) and isinstance(module.exchange, AllToAll):
            module.exchange = EvenExchange(module.exchange.axis, module.exchange.cut)
