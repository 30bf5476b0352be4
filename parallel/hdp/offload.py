"""Selective offload: kept activations of some layers wait for the backward in the host's memory.

A long document may then need fewer ranks (ByteScale, arXiv 2502.21231, section 5.3 and Eq. 3). Of
the l layers of a part all but two can be offloaded, and of these a micro-batch offloads the share
that its ``documents.offload`` says, the earliest ones, whose backward comes last::

    forward    block 0 | block 1 | block 2         backward   block 2 | block 1 | block 0
    to host            | of 0    | of 1            to device  of 1    | of 0    |

While one block runs what another kept is on its way, so that what k of l layers keep is offloaded
means that the device holds what l - k layers keep, at any time: hence the two.

What goes is what autograd keeps for a block's backward and grows with the tokens: neither
parameters, nor what is made of one of them alone (a cast, a view), nor what all blocks share
(rotary tables, document bounds), nor what is small. On CUDA the copies run on streams of their
own: the block's memory is given back when the block after it has run, and what a block kept comes
back while the block after it runs backward.

The calls of blocks are replaced, not the blocks, so that all happens outside of compiled code, of
checkpointed functions and of ZeRO's hooks. What a compiled block keeps passes here when the block
returns; of a checkpointed block its input does, and what selective checkpointing keeps.
"""

# B sequences, L tokens in a sequence, D width

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

from allometry.models.products import stacks
from allometry.models.router import RouterStatistics
from allometry.models.transformer import Geometry, Transformer

SMALLEST_BYTES = 64 * 1024
"""Less is not worth a transfer of its own."""


def apply_offload(part: Transformer, device: torch.device) -> ActivationStore:
    """Let micro-batches of ``part`` keep activations on the host, as their documents ask.

    Before or after compilation, checkpointing and ZeRO: it changes none of them. Gradients do not
    change by a bit. Returns what counts the bytes that moved.
    """
    store = ActivationStore(part, device)
    part.call_block = store.call_block
    return store


def offloaded_layers(share: float, layers: int) -> int:
    """Return how many of a part's ``layers`` are offloaded: ``share`` of all but two.

    Rounded up, so that no more stays on the device than was planned.
    """
    return math.ceil(share * max(layers - 2, 0) - 1e-9)


class ActivationStore:
    """What one part of a model keeps on the host; it owns no memory itself.

    Host memory belongs to the graph that needs it and is freed with it, whether backward has run
    or not. Any number of micro-batches may be in flight. ``bytes_out``, ``bytes_in``: what has
    been copied to the host and back so far; what several operators keep is moved once. A backward
    that is run in two halves (zero-bubble schedules) brings back twice what both of them read,
    and the second half waits for each tensor in turn.
    """

    def __init__(
        self, part: Transformer, device: torch.device, smallest_bytes: int = SMALLEST_BYTES
    ) -> None:
        self.device, self.smallest_bytes = device, smallest_bytes
        self.bytes_out = self.bytes_in = 0
        self._places = {id(block): place for place, block in enumerate(part.blocks.values())}
        self._before: _Moved | None = None  # what the block before this one moved, this forward
        on_cuda = device.type == "cuda"
        self._outward = torch.cuda.Stream(device) if on_cuda else None
        self._inward = torch.cuda.Stream(device) if on_cuda else None

    def call_block(
        self, block: nn.Module, x_BLD: Tensor, geometry: Geometry
    ) -> tuple[Tensor, RouterStatistics | None]:
        """Run a block: ``Transformer.call_block``."""
        place = self._places[id(block)]
        before, self._before = self._before if place else None, None
        share = geometry.documents.offload if geometry.documents is not None else 0.0
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

    def send(self, source: Tensor) -> tuple[Tensor, Transfer]:
        """Copy bytes of the device to new memory of the host."""
        pinned = self._outward is not None
        host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=pinned)
        self.bytes_out += source.numel()
        return host, Transfer(source, _copy(source, host, self._outward))

    def fetch(self, host: Tensor) -> Transfer:
        """Copy bytes of the host to new memory of the device."""
        target = torch.empty(host.numel(), dtype=torch.uint8, device=self.device)
        self.bytes_in += host.numel()
        return Transfer(target, _copy(host, target, self._inward))


class Transfer:
    """A copy that may still be on its way, and the device's memory that it reads or fills.

    That memory must not return to the allocator while a stream of ours uses it: the stream that
    computes waits for the copy before it is let go. (``record_stream`` would keep it until the
    copy has really run, long after a host that runs ahead wants it for the next block.)
    """

    def __init__(self, memory: Tensor, done: torch.cuda.Event | None = None) -> None:
        self._memory, self._done = memory, done
        self._stream = torch.cuda.current_stream(memory.device) if done is not None else None

    @property
    def on_its_way(self) -> bool:
        """Whether nothing has waited for the copy yet."""
        return self._done is not None

    def wait(self) -> Tensor:
        """Let the stream that computes wait for the copy; return the device's memory."""
        if self._done is not None and self._stream is not None:
            self._stream.wait_event(self._done)
            torch.cuda.current_stream(self._memory.device).wait_event(self._done)
            self._done = None
        return self._memory

    def __del__(self) -> None:
        # A graph may be dropped before its backward, with copies on their way.
        self.wait()


class _Kept:
    """One storage away from the device. ``handles`` saved tensors lie in it.

    Its memory on the device is let go when each of them has been read once, that on the host when
    no graph needs it any more.
    """

    def __init__(self, store: ActivationStore, source: Tensor) -> None:
        self._store = store
        self._host, leaving = store.send(source)
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
            self._arriving, self._unread = self._store.fetch(self._host), self.handles

    def read(self) -> UntypedStorage:
        """Return the bytes on the device."""
        self.bring_back()
        assert self._arriving is not None
        memory = self._arriving.wait()
        self._unread -= 1
        if self._unread == 0:
            self._arriving = None
        return memory.untyped_storage()


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
    yield geometry.cos_BL1h
    yield geometry.sin_BL1h
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


def _copy(
    source: Tensor, target: Tensor, lane: torch.cuda.Stream | None
) -> torch.cuda.Event | None:
    """Copy on ``lane`` after all that the current stream was asked for; return when it is done."""
    if lane is None:
        target.copy_(source)
        return None
    lane.wait_stream(torch.cuda.current_stream(lane.device))
    with torch.cuda.stream(lane):
        target.copy_(source, non_blocking=True)
        return lane.record_event()


def with_saved_tensor_hooks(make_contexts: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Pass what selective checkpointing keeps through the saved-tensor hooks that are set.

    ``make_contexts`` is what ``torch.utils.checkpoint`` takes as ``context_fn`` and made by
    ``create_selective_checkpoint_contexts``, whose results autograd does not save. Without hooks,
    and for the compiler, which keeps all results alike, the contexts stay what they are.
    """
    caching, cached = make_contexts()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (caching if hooks is None else _through_hooks(caching, *hooks)), cached


@contextmanager
def _through_hooks(
    caching: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> Iterator[None]:
    with caching:
        yield
    for results in caching.storage.values():
        # By number; before torch 2.13 in a list.
        for number in list(results) if isinstance(results, dict) else range(len(results)):
            results[number] = tree_map_only(
                _is_kept, lambda kept: _Result(kept, pack, unpack), results[number]
            )


def _is_kept(entry: Any) -> bool:
    return hasattr(entry, "get_val") and isinstance(entry.val, Tensor)


class _Result:
    """What selective checkpointing kept of one operator, as it will ask for it."""

    def __init__(
        self, kept: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
    ) -> None:
        self._saved, self._unpack = pack(kept.val), unpack

    def get_val(self, _: bool) -> Tensor:
        """Return the result; the name is torch's."""
        return self._unpack(self._saved)
