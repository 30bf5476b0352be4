"""One rank of a mesh of any size on one process: groups that say nothing, tensors without storage.

Everything that builds and runs a distributed model is the real code; only messages are not sent
(torch's "fake" process group) and numbers are not computed (torch's FakeTensorMode). What remains
is exact in shapes: which tensors a rank holds and which collectives it calls, with their sizes.
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

# torch's names, without namespace and trailing underscore, and what people call them.
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
    """What is called: its kind, mesh axis and ranks, and the bytes and type of the whole tensor.

    The whole is what an all-gather ends with, a reduce-scatter or an all-reduce starts from, and
    an all-to-all hands over. ``dtype`` is torch's name without "torch.".
    """

    kind: str
    axis: str
    ranks: int
    bytes: int
    dtype: str


class CollectiveLog(TorchDispatchMode):
    """Notes the collectives that are called while it is active."""

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
        """Call ``func``, having noted it if it communicates."""
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
            axis = "ep"  # where hdp is the same ranks
        self.calls.append(Collective(_KINDS[name], axis, ranks, size, dtype_name(dtype)))


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Return the mesh dimension of each group by the group's name; hdp's parts under their own.

    A group of several axes has the name of the longest one that they are parts of.
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
    for name in reversed(names):  # the reduction comes before the group
        try:
            return dist.distributed_c10d._resolve_process_group(name)
        except (RuntimeError, ValueError, KeyError):
            continue
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


@contextmanager
def simulated_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """Be this rank of so many. No process group may be there already."""
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

    Models are made and distributed before, on the meta device, and materialized inside.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class EvenExchange(AllToAll):
    """The exchange of expert parallelism with every expert visited equally often.

    Real counts are data, which a simulation does not have. Sizes are those of the mean.
    """

    @override
    def sizes(self, sent_Re: Tensor, got_tRe: Tensor, rows: int) -> Sizes:
        each = [rows // self.ranks + (i < rows % self.ranks) for i in range(self.ranks)]
        return Sizes(each, each, [rows] * len(got_tRe))


def even_experts(part: Transformer) -> None:
    """Replace the exchange of all experts of ``part`` by one that needs no data."""
    for module in part.modules():
        if isinstance(module, Experts) and isinstance(module.exchange, AllToAll):
            module.exchange = EvenExchange(module.exchange.axis, module.exchange.cut)
