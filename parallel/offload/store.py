"""Offload activations of some layers to host memory until the backward pass.

Of the l layers of a part all but two can be offloaded. The earliest layers are offloaded first,
since their backward comes last: a share of the layers given by the run
(``training.activation_offload``) or by ``documents.offload`` of a micro-batch (ByteScale, arXiv
2502.21231, section 5.3 and Eq. 3)::

    forward    block 0 | block 1 | block 2         backward   block 2 | block 1 | block 0
    to host            | of 0    | of 1            to device  of 1    | of 0    |

While one block runs, the activations of its neighbour are in transfer. With k of l layers
offloaded, the device thus stores the activations of l - k layers at any time; this is why two
layers cannot be offloaded.

Offloaded tensors are the tensors that autograd saves for a block's backward and that grow with the
number of tokens. Parameters, casts and views of a single parameter, tensors shared by all blocks
(rotary tables, document bounds) and small tensors stay on the device. On CUDA the copies run on
separate streams (``lanes.py``): the memory of a block is released after the next block has run, and
its activations return while the next block runs its backward. Host memory is allocated from a pool
(``pool.py``).

The calls of blocks are replaced rather than the blocks, so offloading happens outside compiled
code, checkpointed functions and ZeRO's hooks. The tensors that a compiled block saves are packed
when the block returns. Of a checkpointed block its input is packed, and the results that selective
checkpointing saves (``results.py``).
"""

# B sequences, L tokens in a sequence, D width

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from allometry.models.products import stacks
from allometry.models.rotary import Geometry
from allometry.models.router import RouterStatistics
from allometry.models.transformer import Transformer
from allometry.parallel.offload.lanes import Lane, Transfer, lanes_of
from allometry.parallel.offload.pool import HostPool, Region
from allometry.scaling.offload import offloaded_layers

SMALLEST_BYTES = 64 * 1024
"""Minimum size of an offloaded tensor; smaller tensors are not worth a transfer."""


def apply_offload(part: Transformer, device: torch.device, share: float = 0.0) -> ActivationStore:
    """Offload activations of ``part``: of a ``share`` of its layers, or as documents request.

    The function can be applied before or after compilation, checkpointing and ZeRO. Gradients are
    bit-identical. Returns the store, which counts the transferred bytes. For example, a ``share``
    of 0.5 offloads half of the layers that can be offloaded.
    """
    store = ActivationStore(part, device, share)
    part.call_block = store.call_block
    return store


class ActivationStore:
    """Offloaded activations of one part of a model.

    Any number of micro-batches may be in flight. Host memory returns to ``pool`` when the autograd
    graph is released, with or without a backward pass. ``bytes_out``, ``bytes_in``: bytes copied to
    the host and back so far; a tensor saved by several operators is copied once. A backward pass in
    two halves (zero-bubble schedules) copies tensors that both halves read back twice, and the
    second half waits for each tensor in turn.

    ``lanes``: copies to the host and back; None: the lanes of the device. For example,
    ``store.bytes_out`` after the first step is the amount of data offloaded by that step.
    """

    def __init__(
        self,
        part: Transformer,
        device: torch.device,
        share: float = 0.0,
        *,
        smallest_bytes: int = SMALLEST_BYTES,
        lanes: tuple[Lane, Lane] | None = None,
        pool: HostPool | None = None,
    ) -> None:
        self.device, self.share, self.smallest_bytes = device, share, smallest_bytes
        self.pool = HostPool(device) if pool is None else pool
        self.bytes_out = self.bytes_in = 0
        self._places = {id(block): place for place, block in enumerate(part.blocks.values())}
        self._before: _Moved | None = None  # moved by the previous block of this forward
        self._outward, self._inward = lanes_of(device) if lanes is None else lanes

    def call_block(
        self, block: nn.Module, x_BLD: Tensor, geometry: Geometry
    ) -> tuple[Tensor, RouterStatistics | None]:
        """Run a block; implements ``Transformer.call_block``."""
        place = self._places[id(block)]
        before, self._before = self._before if place else None, None
        asked = geometry.documents.offload if geometry.documents is not None else 0.0
        share = max(self.share, asked)
        if share <= 0.0 or not torch.is_grad_enabled():
            return block(x_BLD, geometry)
        if place < offloaded_layers(share, len(self._places)):
            packing = _Packing(self, block, geometry)
            with saved_tensors_hooks(packing.pack, _unpack):
                y_BLD, statistics = block(x_BLD, geometry)
            self._before = packing.close()
        else:
            y_BLD, statistics = block(x_BLD, geometry)
        if before is not None:
            before.free_device_memory()
            if y_BLD.requires_grad:
                y_BLD.register_hook(before.bring_back)
        return y_BLD, statistics

    def send(self, source: Tensor) -> tuple[Region, Transfer]:
        """Start to copy bytes from the device to the host."""
        region = self.pool.take(source.numel())
        self.bytes_out += source.numel()
        return region, Transfer(source, self._outward(source, region.memory))

    def fetch(self, host: Tensor) -> Transfer:
        """Start to copy bytes from the host to new device memory."""
        target = torch.empty(host.numel(), dtype=torch.uint8, device=self.device)
        self.bytes_in += host.numel()
        return Transfer(target, self._inward(host, target))


class _Kept:
    """One offloaded storage, shared by ``handles`` saved tensors.

    Its device memory is released after each saved tensor has been read once, its host memory when
    the last graph is released.
    """

    def __init__(self, store: ActivationStore, source: Tensor) -> None:
        self._store = store
        self._region, leaving = store.send(source)
        self._leaving = leaving if leaving.on_its_way else None
        self._arriving: Transfer | None = None
        self.handles = self._unread = 0

    def free_device_memory(self) -> None:
        """Release the device memory, in the order of the computing stream."""
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None

    def bring_back(self) -> None:
        """Start the copy to the device unless it was started."""
        self.free_device_memory()
        if self._arriving is None:
            self._arriving, self._unread = self._store.fetch(self._region.memory), self.handles

    def read(self) -> UntypedStorage:
        """Return the bytes on the device."""
        self.bring_back()
        assert self._arriving is not None
        memory = self._arriving.wait()
        self._unread -= 1
        if self._unread == 0:
            self._arriving = None
        return memory.untyped_storage()

    def __del__(self) -> None:
        # Wait for pending copies before another graph can reuse the host memory.
        self.free_device_memory()
        if self._arriving is not None:
            self._arriving.wait()
        self._store.pool.give_back(self._region)


class _Handle(NamedTuple):
    """An offloaded saved tensor."""

    kept: _Kept
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Tensor | _Handle) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    empty = torch.empty(0, dtype=saved.dtype, device=saved.device)
    return empty.set_(saved.kept.read(), saved.offset, saved.size, saved.stride)


class _Moved:
    """Storages offloaded by one block in one micro-batch; weak, since graphs outlive backward."""

    def __init__(self) -> None:
        self._kept: list[weakref.ref[_Kept]] = []

    def add(self, kept: _Kept) -> None:
        self._kept.append(weakref.ref(kept))

    def free_device_memory(self) -> None:
        """Release the device memory of all storages."""
        for kept in self._alive():
            kept.free_device_memory()

    def bring_back(self, _: Tensor) -> None:
        """Start to copy all storages to the device, the last saved first; a gradient hook."""
        for kept in self._alive():
            kept.bring_back()

    def _alive(self) -> Iterator[_Kept]:
        for reference in reversed(self._kept):
            kept = reference()
            if kept is not None:
                yield kept


class _Packing:
    """Pack hook of one forward call of a block: decides which saved tensors are offloaded."""

    def __init__(self, store: ActivationStore, block: nn.Module, geometry: Geometry) -> None:
        self._moved = _Moved()
        self._store, self._block = store, block
        copies = (stacked.copy for stacked in stacks(block))
        shared = [*_tensors(geometry), *(copy for copy in copies if copy is not None)]
        self._shared = {tensor.untyped_storage()._cdata for tensor in shared}
        # Keyed by storage and version. The weak reference prevents reuse of the number of a freed
        # storage.
        self._seen: dict[tuple[int, int], tuple[StorageWeakRef, _Kept]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        """Return the object to save in place of ``tensor``."""
        plain = tensor
        if isinstance(tensor, AsyncCollectiveTensor):
            plain = tensor.trigger_wait()
        if not self._moves(plain):
            # Detached: an output that its own operator saves would otherwise reference itself.
            return tensor.detach()
        storage = plain.untyped_storage()
        key = (storage._cdata, plain._version)
        if key in self._seen:
            kept = self._seen[key][1]
        else:
            source = torch.empty(0, dtype=torch.uint8, device=plain.device).set_(storage)
            kept = _Kept(self._store, source)
            self._seen[key] = (StorageWeakRef(storage), kept)
            self._moved.add(kept)
        kept.handles += 1
        return _Handle(
            kept, plain.device, plain.dtype, plain.size(), plain.stride(), plain.storage_offset()
        )

    def close(self) -> _Moved:
        """Release all but the moved storages: torch may keep ``pack`` as long as the graph."""
        self._seen.clear()
        self._shared.clear()
        return self._moved

    def _moves(self, tensor: Tensor) -> bool:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != self._store.device.type:
            return False
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._store.smallest_bytes or storage._cdata in self._shared:
            return False
        # Computed each time: ZeRO replaces parameters while the block runs.
        parameters = list(self._block.parameters())
        return storage._cdata not in set(map(_storage, parameters)) and not _made_of_one(
            tensor, parameters
        )


def _tensors(geometry: Geometry) -> Iterator[Tensor]:
    yield from geometry.turn
    yield from geometry.windowed
    documents = geometry.documents
    if documents is not None:
        yield documents.cu_lengths
        yield documents.positions_BL
        if documents.counted_BL is not None:
            yield documents.counted_BL


def _storage(parameter: Tensor) -> int:
    local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    return local.untyped_storage()._cdata


def _made_of_one(tensor: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Return True if ``tensor`` is one of ``parameters`` or computed from one of them alone."""
    if tensor.grad_fn is None:
        return any(tensor is parameter for parameter in parameters)
    node = tensor.grad_fn
    while True:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return any(leaf is parameter for parameter in parameters)
        inputs = [function for function, _ in node.next_functions if function is not None]
        if len(inputs) != 1:
            return False
        node = inputs[0]
