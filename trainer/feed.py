"""Make this rank's micro-batches: sequences in round-robin order, documents by a plan."""

# B sequences of a micro-batch, L tokens in a sequence

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE, Batch
from allometry.data.documents import DocumentStream, Pieces
from allometry.data.prefetch import Prefetcher
from allometry.data.stream import Stream
from allometry.models.documents import Documents
from allometry.models.multi_token import ahead_of
from allometry.parallel.hdp.filling import TOKENS, Filling
from allometry.parallel.hdp.orders import Orders, schedule_orders
from allometry.parallel.hdp.replay import Replay, replay
from allometry.parallel.hdp.shard import chunks, ring_table
from allometry.parallel.mesh import Mesh
from allometry.scaling.context import mode_of
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Mode, Plan, Unit, make_plan
from allometry.scaling.layout import INTERLEAVED_ROUNDS, Layout, least_micro_batches
from allometry.scaling.memory import COMPUTE_BYTES
from allometry.scaling.plan import RunPlan


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on the device.

    ``sources`` is the source index of each sequence [B], or of each token [B, L]. With ``data.kind:
    documents`` all micro-batches of a step have the same ``position``, and ``first`` is the index
    of the first document. ``squared_lengths`` is the sum of the squared document lengths, from
    which FLOPs are counted; for a micro-batch that several ranks share, the first of these ranks
    has the full sum and the others 0. ``ahead_MBL``: the tokens ahead (``models/multi_token.py``)
    of a micro-batch that several ranks share; None: they follow from the targets.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    sources: Tensor
    documents: Documents | None
    position: int
    first: int = 0
    squared_lengths: int = 0
    ahead_MBL: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device, position: int) -> DeviceBatch:
        """Copy a batch to the device; ``position`` is the position of its first sequence."""
        packed = batch.documents
        rows, length = batch.tokens_BL.shape
        squares = rows * length**2 if packed is None else int(np.square(packed.lengths).sum())
        return cls(
            tokens_BL=_move(batch.tokens_BL, device),
            targets_BL=_move(batch.targets_BL, device),
            sources=_move(batch.source_B, device).long(),
            documents=None
            if packed is None
            else Documents(
                cu_lengths=_move(packed.cu_lengths, device),
                max_length=packed.max_length,
                positions_BL=_move(packed.positions_BL, device),
                cu_host=torch.as_tensor(packed.cu_lengths),
            ),
            position=position,
            squared_lengths=squares,
        )

    def to(self, device: torch.device) -> DeviceBatch:
        """Return the micro-batch on ``device``; the description of a ring stays on the CPU."""
        if device == self.tokens_BL.device:
            return self
        documents = self.documents
        if documents is not None:
            counted = documents.counted_BL
            documents = replace(
                documents,
                cu_lengths=_move(documents.cu_lengths, device),
                positions_BL=_move(documents.positions_BL, device),
                counted_BL=None if counted is None else _move(counted, device),
            )
        return replace(
            self,
            tokens_BL=_move(self.tokens_BL, device),
            targets_BL=_move(self.targets_BL, device),
            sources=_move(self.sources, device),
            documents=documents,
            ahead_MBL=None if self.ahead_MBL is None else _move(self.ahead_MBL, device),
        )

    def targets_ahead(self, depths: int) -> Tensor:
        """Return how many targets each depth of multi-token prediction has, [depths]."""
        ahead_MBL = self.ahead_MBL
        if ahead_MBL is None:
            ahead_MBL = ahead_of(self.targets_BL, self.documents, depths)
        return (ahead_MBL[1:] != IGNORE).flatten(1).sum(1)

    @property
    def num_tokens(self) -> int | Tensor:
        """Number of tokens without padding."""
        counted = None if self.documents is None else self.documents.counted_BL
        return self.tokens_BL.numel() if counted is None else counted.sum()


@dataclass(frozen=True)
class StepInput:
    """This rank's micro-batches of a step; ``plan`` assigns documents, None with sequences."""

    batches: list[DeviceBatch]
    plan: Plan | None = None


class DocumentPlanner:
    """Plans steps of complete documents and builds this rank's micro-batches.

    All ranks compute the same plan from the document lengths; each plan is simulated before use.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        degrees = layout.degrees
        self.context = config.parallel.context
        self.mode: Mode = mode_of(config, degrees)
        layers = [len(stage) for stage in layout.stages]
        self.cost = CostModel.of(
            config.model,
            self.context.costs,
            compute_bytes=COMPUTE_BYTES[config.training.compute_dtype],
            tp=degrees.tp,
            checkpointing=config.training.activation_checkpointing,
            precision=config.precision,
        )
        self.layout, self._ranks, self._tp = layout, degrees.hdp, degrees.tp
        self._layers, self._depths = min(layers), config.model.num_depths
        self._orders = lru_cache(self._make_orders)

    def plan(self, lengths: Sequence[int], mode: Mode | None = None) -> Plan:
        """Return the plan of a step; ``mode`` overrides the mode of the run."""
        schedule, pp = self.layout.schedule, self.layout.pp
        plan = make_plan(
            lengths,
            self._ranks,
            self.context,
            self.cost,
            mode or self.mode,
            layers=self._layers,
            multiple=self._tp,
            round_count=pp if pp > 1 and schedule in INTERLEAVED_ROUNDS else 1,
            least=least_micro_batches(schedule, pp) if pp > 1 else 1,
            pp=pp,
        )
        self.replay(plan)
        return plan

    def replay(self, plan: Plan) -> Replay:
        """Simulate a plan in this layout."""
        return replay(plan, self._orders if self.layout.pp > 1 else None)

    def _make_orders(self, count: int) -> Orders:
        pp = self.layout.pp
        return schedule_orders(self.layout.schedule, pp, len(self.layout.stages) // pp, count)

    def batches(
        self, plan: Plan, pieces: Pieces, rank: int, device: torch.device, position: int
    ) -> list[DeviceBatch]:
        """Return the micro-batches of hdp rank ``rank``, in the plan's order."""
        return [
            filling(device, self._tp, position)
            if number is None
            else document_batch(
                *(plan.units[number], rank, pieces, device, self._tp),
                **{"tag": number, "position": position, "depths": self._depths},
            )
            for number in plan.orders[rank]
        ]


def sequence_steps(
    stream: Stream, plan: RunPlan, mesh: Mesh, steps_taken: int
) -> Iterator[StepInput]:
    """Yield this rank's micro-batches of sequences for each step, prefetched in the background.

    Micro-batch j of rank r contains the m sequences from position P + (j * hdp + r) * m, where P is
    the step's first position and m the number of sequences in a micro-batch. The sequences of a
    step therefore do not depend on the layout. For example, with hdp=2 and m=4 rank 1 reads
    positions 4-7 and 12-15 of a step of 16 sequences.
    """
    size = plan.micro_batch_sequences
    steps = range(steps_taken + 1, plan.total_steps + 1)

    def positions() -> Iterator[int]:
        for step in steps:
            first = plan.batch.sequences_before(step)
            for turn in range(plan.micro_batches(step)):
                yield first + (turn * mesh.hdp.size + mesh.hdp.rank) * size

    def fetch(position: int) -> tuple[int, Batch]:
        return position, stream.batch(position, size)

    with Prefetcher(fetch, positions()) as ahead:
        for step in steps:
            held = [next(ahead) for _ in range(plan.micro_batches(step))]
            yield StepInput(
                [DeviceBatch.of(batch, mesh.device, position) for position, batch in held]
            )


_SURELY = 32
"""Documents of maximum length per step above which every step is assumed to begin one."""


def check_steps(stream: DocumentStream, plan: RunPlan) -> None:
    """Check that a document begins in every step of the run, before the first step is taken.

    A step can fall inside one long document of each source. The check reads no tokens (about 0.1 ms
    per step) and returns at once if steps are so large that this cannot happen.

    Raises:
        UserError: no document begins in a step; the message names the first such step.
    """
    first, window = plan.steps_before + 1, stream.sequence_length
    least, changes = plan.batch.sequences(first), stream.mixture.changes
    # A document may have begun in an earlier training stage.
    longest = max(change.limit or 0 for change in changes)
    # Lower bound on the windows of the heaviest source in a step; 0 if the shares change.
    heaviest = int(max(changes[0].shares.values()) * least) - 1 if len(changes) == 1 else 0
    lone = any(int(store.lengths.min()) < 2 for store in stream.stores)
    if not lone and (heaviest * window > longest or least * window >= _SURELY * longest):
        return
    before = stream.tokens(plan.batch.sequences_before(first))
    for step in range(first, plan.total_steps + 1):
        tokens = stream.tokens(plan.batch.sequences_before(step + 1))
        if tokens == before:
            raise UserError(
                f"no document of two tokens or more begins in step {step} of {plan.total_steps} "
                f"(batch.sequences={plan.batch.sequences(step)} windows of {window} tokens, shared "
                f"by {len(stream.sources)} sources), so there is nothing to train on; raise "
                f"batch.sequences, lower data.max_document_tokens={stream.max_document_tokens} or "
                "end the run before"
            )
        before = tokens


def document_steps(
    stream: DocumentStream,
    plan: RunPlan,
    planner: DocumentPlanner,
    mesh: Mesh,
    steps_taken: int,
) -> Iterator[StepInput]:
    """Yield this rank's micro-batches of documents for each step, planned and prefetched."""
    steps = range(steps_taken + 1, plan.total_steps + 1)
    host = torch.device("cpu")

    def fetch(step: int) -> StepInput:
        position = plan.batch.sequences_before(step)
        pieces = stream.pieces(position, plan.batch.sequences(step))
        assert len(pieces), f"step {step} has no document, which check_steps should have found"
        made = planner.plan(pieces.lengths.tolist())
        return StepInput(planner.batches(made, pieces, mesh.hdp.rank, host, position), made)

    with Prefetcher(fetch, steps) as ahead:
        for step in steps:
            planned = next(ahead)
            assert planned.plan is not None
            # Plans are computed in float64: another processor or numpy version may round
            # differently, and ranks with different plans would deadlock or exchange the keys of the
            # wrong documents.
            if not mesh.all_equal(fingerprint(planned.plan)):
                raise UserError(
                    f"ranks planned the documents of step {step} differently; give all nodes the "
                    "same versions of Python and numpy, or use parallel.context.policy: static"
                )
            yield StepInput([batch.to(mesh.device) for batch in planned.batches], planned.plan)


def fingerprint(plan: Plan) -> int:
    """Return a hash that differs between plans that ranks cannot run together."""
    units = [(unit.documents, unit.ring, unit.offload) for unit in plan.units]
    text = repr((list(plan.lengths), plan.mode, units, plan.orders))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def document_batch(
    unit: Unit,
    rank: int,
    pieces: Pieces,
    device: torch.device,
    multiple: int = 1,
    *,
    tag: int = 0,
    position: int = 0,
    depths: int = 0,
) -> DeviceBatch:
    """Return hdp rank ``rank``'s tokens of a unit, padded to a multiple of ``multiple``.

    Only the rank's own tokens are read, and with ``depths`` of multi-token prediction those ahead
    of them. ``tag`` distinguishes the unit's messages from those of other units.
    """
    size, member = len(unit.ring), unit.ring.index(rank)
    tokens, targets, positions, sources, runs = [], [], [], [], []
    ahead: list[np.ndarray] = []  # where several ranks share documents
    for index in unit.documents:
        for part in _parts(int(pieces.lengths[index]), size, member):
            part_tokens, part_targets = pieces.read(index, part.start, part.stop)
            tokens.append(part_tokens)
            targets.append(part_targets)
            positions.append(np.arange(part.start, part.stop))
            sources.append(np.full(len(part), pieces.sources[index], np.int64))
            runs.append(len(part))
            if size > 1 and depths:
                ahead.append(_ahead(pieces, index, part, depths))
    held = sum(runs)
    padding = max(-held % multiple, 0) if held else TOKENS * multiple
    if padding:
        tokens.append(np.zeros(padding, np.int64))
        targets.append(np.full(padding, IGNORE, np.int64))
        positions.append(np.arange(padding))
        sources.append(np.zeros(padding, np.int64))
        if size > 1 and depths:
            ahead.append(np.full((depths + 1, padding), IGNORE, np.int64))
        if size == 1:
            runs.append(padding)
    lengths = [int(pieces.lengths[index]) for index in unit.documents]
    ends = np.cumsum([0, *runs], dtype=np.int32)
    documents = Documents(
        cu_lengths=_move(ends, device),
        max_length=max(runs),
        positions_BL=_row(positions, device),
        counted_BL=(torch.arange(held + padding, device=device) < held)[None] if padding else None,
        ring=ring_table(unit.ring, member, lengths, tag) if size > 1 else None,
        offload=unit.offload,
        cu_host=torch.as_tensor(ends),
    )
    return DeviceBatch(  # type: ignore[call-arg]
        *(_row(x, device) for x in (tokens, targets, sources)),
        documents,
        position,
        first=unit.documents[0],
        squared_lengths=sum(length**2 for length in lengths) if member == 0 else 0,
        ahead_MBL=_move(np.concatenate(ahead, axis=1)[:, None], device) if ahead else None,
    )


def _ahead(pieces: Pieces, index: int, part: range, depths: int) -> np.ndarray:
    """Return the tokens 1, 2, ... ``depths`` + 1 ahead of a part of a document, or IGNORE."""
    length = int(pieces.lengths[index])
    _, targets = pieces.read(index, part.start, min(part.stop + depths, length))
    padded = np.full(len(part) + depths, IGNORE, np.int64)
    padded[: len(targets)] = targets
    return np.stack([padded[depth : depth + len(part)] for depth in range(depths + 1)])


def filling(device: torch.device, multiple: int, position: int) -> DeviceBatch:
    """Return a micro-batch of padding, without targets."""
    made = Filling.of(device, multiple)
    nowhere = torch.zeros_like(made.tokens_BL)
    return DeviceBatch(made.tokens_BL, made.targets_BL, nowhere, made.documents, position)


def _parts(length: int, size: int, member: int) -> Sequence[range]:
    return (range(length),) if size == 1 else chunks(length, size, member)


def _row(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return _move(np.concatenate(parts)[None].astype(np.int64), device)


def _move(array: object, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
