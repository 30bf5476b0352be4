"""Activations of some layers wait for the backward in the host's memory.

Of the l layers of a part all but two can be offloaded, and of these the earliest ones go, whose
backward comes last: a share of them, the run's (``training.activation_offload``) or what a
micro-batch's ``documents.offload`` says (ByteScale, arXiv 2502.21231, section 5.3 and Eq. 3)::

    forward    block 0 | block 1 | block 2         backward   block 2 | block 1 | block 0
    to host            | of 0    | of 1            to device  of 1    | of 0    |

While one block runs what another kept is on its way, so that what k of l layers keep is offloaded
means that the device holds what l - k layers keep, at any time: hence the two.

What goes is what autograd keeps for a block's backward and grows with the tokens: neither
parameters, nor what is made of one of them alone (a cast, a view), nor what all blocks share
(rotary tables, document bounds), nor what is small. On CUDA the copies run on streams of their
own (``lanes.py``): the block's memory is given back when the block after it has run, and what a
block kept comes back while the block after it runs backward. The host's memory is a pool's
(``pool.py``).

The calls of blocks are replaced, not the blocks, so that all happens outside of compiled code, of
checkpointed functions and of ZeRO's hooks. What a compiled block keeps passes here when the block
returns; of a checkpointed block its input does, and what selective checkpointing keeps
(``results.py``).
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
"""Less is not worth a transfer of its own."""


def apply_offload(part: Transformer, device: torch.device, share: float = 0.0) -> ActivationStore:
    """Let ``part`` keep activations on the host: of a ``share`` of its layers, or as documents ask.

    Before or after compilation, checkpointing and ZeRO: it changes none of them. Gradients do not
    change by a bit. Returns what counts the bytes that moved.
    """
    store = ActivationStore(part, device, share)
    part.call_block = store.call_block
    return store


class ActivationStore:
    """What one part of a model keeps on the host.

    Any number of micro-batches may be in flight; a graph's memory on the host goes back to
    ``pool`` when the graph is freed, whether backward has run or not. ``bytes_out``,
    ``bytes_in``: what has been copied to the host and back so far; what several operators keep is
    moved once. A backward that is run in two halves (zero-bubble schedules) brings back twice what
    both of them read, and the second half waits for each tensor in turn.

    ``lanes``: what copies to the host and back; None: as the device does.
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
        self._before: _Moved | None = None  # what the block before this one moved, this forward
        self._outward, self._inward = lanes_of(device) if lanes is None else lanes

    def call_block(
        self, block: nn.Module, x_BLD: Tensor, geometry: Geometry
    ) -> tuple[Tensor, RouterStatistics | None]:
        """Run a block: ``Transformer.call_block``."""
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
        """Copy bytes of the device to the host."""
        region = self.pool.take(source.numel())
        self.bytes_out += source.numel()
        return region, Transfer(source, self._outward(source, region.memory))

    def fetch(self, host: Tensor) -> Transfer:
        """Copy bytes of the host to new memory of the device."""
        target = torch.empty(host.numel(), dtype=torch.uint8, device=self.device)
        self.bytes_in += host.numel()
        return Transfer(target, self._inward(host, target))


class _Kept:
    """One storage away from the device. ``handles`` saved tensors lie in it.

    Its memory on the device is let go when each of them has been read once, that on the host when
    no graph needs it any more.
    """

    def __init__(self, store: ActivationStore, source: Tensor) -> None:
        self._store = store
        self._region, leaving = store.send(source)
        self._leaving = leaving if leaving.on_its_way else None
        self._arriving: Transfer | None = None
        self.handles = self._unread = 0

    def free_device_memory(self) -> None:
        """Give the memory on the device back, in the order of the stream that computes."""
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None

    def bring_back(self) -> None:
        """Start the way back unless it is done."""
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
        # Before another graph's copy may fill the host's memory, this one's are waited for.
        self.free_device_memory()
        if self._arriving is not None:
            self._arriving.wait()
        self._store.pool.give_back(self._region)


class _Handle(NamedTuple):
    """A saved tensor that is away."""

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
    """What one block moved in one micro-batch. It keeps none of it: graphs outlive backwards."""

    def __init__(self) -> None:
        self._kept: list[weakref.ref[_Kept]] = []

    def add(self, kept: _Kept) -> None:
        self._kept.append(weakref.ref(kept))

    def free_device_memory(self) -> None:
        """Give the memory on the device back."""
        for kept in self._alive():
            kept.free_device_memory()

    def bring_back(self, _: Tensor) -> None:
        """Start the way back of all, the last kept first: a hook on a gradient."""
        for kept in self._alive():
            kept.bring_back()

    def _alive(self) -> Iterator[_Kept]:
        for reference in reversed(self._kept):
            kept = reference()
            if kept is not None:
                yield kept


class _Packing:
    """Decides, while a block runs forward, what becomes of each tensor that is saved."""

    def __init__(self, store: ActivationStore, block: nn.Module, geometry: Geometry) -> None:
        self._moved = _Moved()
        self._store, self._block = store, block
        copies = (stacked.copy for stacked in stacks(block))
        shared = [*_tensors(geometry), *(copy for copy in copies if copy is not None)]
        self._shared = {tensor.untyped_storage()._cdata for tensor in shared}
        # By storage and version. The reference keeps the number of a storage that has gone from
        # being given to another.
        self._seen: dict[tuple[int, int], tuple[StorageWeakRef, _Kept]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        """Return what is saved instead of ``tensor``."""
        plain = tensor
        if isinstance(tensor, AsyncCollectiveTensor):
            plain = tensor.trigger_wait()
        if not self._moves(plain):
            # Not the tensor itself: an output that its own operator saves would own itself.
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
        """Forget all but what moved: torch may hold ``pack`` for as long as the graph."""
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
        # Listed each time: ZeRO swaps parameters while the block runs.
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
    """Whether ``tensor`` is one of ``parameters`` or was made of one of them and nothing else."""
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
