"""Messages between the ranks of a configuration, found without sending them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from allometry.configs.run import RunConfig
from allometry.models.build import torch_dtype
from allometry.scaling.layout import Layout
from allometry.studies.rehearse import rehearse

SHIFTS = {
    "send forward": 1,
    "send backward": -1,
    "send tied weight": -1,  # from the first stage to the last
    "send tied gradient": 1,
    "ring hop": 1,
}
"""Point-to-point kinds, and the distance of a message along the (cyclic) axis."""

SMALL, LARGE = 2**10, 2**25
"""Bytes of the messages that determine latency and bandwidth of an axis."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message between the ranks of one axis.

    ``kind``, ``axis``, ``ranks``, ``bytes`` and ``dtype`` as in ``parallel.simulate.Collective``.
    ``per_step``: number of messages of the busiest rank in a step; 0 for a probe of the axis, None
    if the number depends on the documents of a step.
    """

    kind: str
    axis: str
    ranks: int
    bytes: int
    dtype: str
    per_step: int | None

    @property
    def bus_bytes(self) -> float:
        """Bytes that cross the slowest link, as counted by nccl-tests for the bus bandwidth.

        For n ranks an all-reduce moves 2 (n - 1) / n of its bytes over each link, an all-gather, a
        reduce-scatter and an all-to-all (n - 1) / n, a broadcast and a send all of them.
        """
        around = (self.ranks - 1) / self.ranks
        if self.kind == "all-reduce":
            return 2 * around * self.bytes
        if self.kind in ("all-gather", "reduce-scatter", "all-to-all"):
            return around * self.bytes
        return self.bytes


def messages_of(config: RunConfig, world_size: int) -> tuple[Message, ...]:
    """Return the messages of a step, then a small and a large probe of each kind on each axis.

    ``rehearse`` finds the messages of a step in the training code; of rings, which every step
    plans, the largest hop is added. Call this function before a process group exists. For example,
    ``max(message.bytes for message in messages_of(config, 8))``.
    """
    counts: dict[tuple[str, str, int, int, str], int] = {}
    for report in rehearse(config, world_size):
        for call, number in report.collectives:
            key = (call.kind, call.axis, call.ranks, call.bytes, call.dtype)
            counts[key] = max(counts.get(key, 0), number)
    sent = [Message(*key, per_step=number) for key, number in counts.items()]
    sent += _ring_hops(config, world_size)
    probed = {(m.kind, m.axis): m for m in sent}
    probes = [
        Message(m.kind, m.axis, m.ranks, size, m.dtype, per_step=0)
        for m in probed.values()
        for size in (SMALL, LARGE)
    ]
    return (*sent, *probes)


def _ring_hops(config: RunConfig, world_size: int) -> Iterator[Message]:
    """Yield the largest hop of a ring: keys and values of a full rank."""
    degrees = Layout.of(config, world_size).degrees
    if config.data.kind != "documents" or degrees.hdp == 1:
        return
    model = config.model
    heads = (model.num_kv_heads or model.num_heads) // degrees.tp
    dtype = torch_dtype(config.training.compute_dtype)
    row = 2 * heads * model.head_width * dtype.itemsize
    size = row * config.parallel.context.capacity_tokens
    name = str(dtype).removeprefix("torch.")
    yield Message("ring hop", "hdp", degrees.hdp, size, name, per_step=None)
