"""Live memory at each moment of a step: loss, backward of each block, update.

The estimate uses no tensors: bytes are derived from the model's config and from the tensors that
the code of a step keeps, as measured by ``studies/memory``.
"""

# T tokens of a micro-batch, D width, F hidden width, V vocabulary

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from allometry.configs.execution import Zero
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.blocks import RankBlocks
from allometry.scaling.moment import (
    COPIES,
    GRADIENTS,
    LOSS,
    PARAMETERS,
    STATES,
    WORKSPACE,
    Moment,
    later,
    positive,
    rule_workspace,
    with_saved,
)
from allometry.scaling.roles import EXPERTS, Role
from allometry.scaling.saved import (
    GATE_UP,
    RESIDUAL,
    Block,
    Checkpointing,
    Kernels,
    norm,
)
from allometry.scaling.saved_streams import weighted_sum
from allometry.scaling.shards import PREFETCHED, RankParts

_FP32 = 4
_LOGITS_ON_CPU, _LOGITS_AT_MOST = 8 << 20, 8192


@dataclass(frozen=True)
class Step:
    """A step of one rank, as described by ``memory.estimate_memory``.

    ``held``, ``gradients``, ``states``: bytes of parameters, gradients and optimizer states
    resident on the device; ``reduction`` and ``copies`` as in ``MemoryEstimate``; ``gathered``:
    bytes that ZeRO gathers for each block, and outside blocks; ``away``: layers with offloaded
    activations. ``dormant``: layers without a backward, which save no activations.
    """

    part: RankParts
    kernels: Kernels
    checkpointing: Checkpointing
    zero: Zero
    hdp: int
    pipelined: bool
    optimizer: OptimizerConfig | None
    on_cpu: bool
    compiled: bool
    tokens: int
    chunk: int | None
    micro_batches: int
    in_flight: int
    held: int
    gradients: int
    states: int
    reduction: int
    copies: int
    gathered: Mapping[int | None, int]
    away: frozenset[int] = frozenset()
    dormant: frozenset[int] = frozenset()

    def saved(self) -> Counter[str]:
        """Return bytes saved for backward by all micro-batches in flight, by operation."""
        total = self._ends()
        total += self._blocks.staying()
        return Counter({name: self.in_flight * size for name, size in total.items()})

    def moments(self) -> tuple[Moment, ...]:
        """Return the moments of the step that may be the peak."""
        found = [*self._forward(), *self._backward(), self._end(), self._update()]
        return (self._head(), *found) if self.part.last else tuple(found)

    # --- the model on this rank

    @cached_property
    def _rows(self) -> int:
        """Tokens of a micro-batch in all streams, as the blocks compute them."""
        return self.tokens * self.part.model.num_streams

    @cached_property
    def _blocks(self) -> RankBlocks:
        how = self._rows, self.checkpointing, self.away, self.dormant
        return RankBlocks(self.part, self.kernels, *how)

    @property
    def _vocabulary(self) -> int:
        return math.ceil(self.part.model.vocab_size / self.part.tp)

    def _ends(self) -> Counter[str]:
        """Return bytes saved by the final norm and, in a pipeline, of received and sent tensors."""
        model, part = self.part.model, self.part
        c, local = self.kernels.compute, self._rows // part.tp
        kept: Counter[str] = Counter()
        if part.last:
            trained = any(spec.name == "final_norm.weight" for spec in self.part.trained)
            of_norm = norm(model.width, self.kernels, trained=trained)
            kept += Counter({name: round(local * n) for name, n in of_norm.items()})
            # Each depth has three norms more, and keeps what its projection reads.
            for _ in range(model.num_depths):
                kept += Counter({name: round(3 * local * n) for name, n in of_norm.items()})
                kept[RESIDUAL] += 2 * c * local * model.width
            of_sum = weighted_sum(model, self.kernels)
            kept += Counter({name: self.tokens // part.tp * n for name, n in of_sum.items()})
        if self.pipelined:
            kept[RESIDUAL] += c * local * model.width * ((not part.first) + (not part.last))
        return kept

    # --- resident while micro-batches run

    def _base(self, copies: int, gradients: int) -> Counter[str]:
        if self.zero.stage == 0:
            copies = self.copies
        return Counter(
            {PARAMETERS: self.held, STATES: self.states, COPIES: copies, GRADIENTS: gradients}
        )

    @cached_property
    def _flat(self) -> int:
        """Bytes of stage 0 buckets that a CPU keeps between steps."""
        if not self.on_cpu or self.zero.stage or self.hdp == 1:
            return 0
        alone = self.part.ep == self.hdp  # unreplicated experts are not summed
        return _FP32 * sum(
            size for spec, size in self.part.trained.items() if not (alone and spec.role in EXPERTS)
        )

    @cached_property
    def _added_up(self) -> int:
        """Maximum gradient bytes accumulated by earlier micro-batches during a micro-batch."""
        if self.micro_batches <= self.in_flight:
            return 0
        whole = _FP32 * sum(self.part.trained.values())
        if self.zero.stage == 0 or self.pipelined or self.zero.stage == 1:
            return whole
        return self.gradients

    # --- the moments

    def _head(self) -> Moment:
        model, part = self.part.model, self.part
        local, rows = self.tokens // part.tp, 1 + model.num_depths
        c, wide = self.kernels.compute, self.kernels.wide
        vocabulary = self._vocabulary
        chunk = self._chunk_tokens()
        head = vocabulary * model.width
        logits = chunk * vocabulary
        # The softmax widens the logits; with a sharded vocabulary it scales a copy of them.
        softmax = logits * (c if c == wide else c + wide)
        if part.tp > 1:
            softmax = logits * (c + 2 * wide if c < wide else c + wide)
        first = (
            rows == 1 and chunk >= self.tokens and not (self.pipelined and self.micro_batches > 1)
        )
        summed = 0 if first else wide * head
        product = logits * c + (head * (wide if c == wide else c + wide) if first else c * head)
        if not self._head_is_trained:
            summed, product = 0, logits * c
        inputs = c * rows * self.tokens * model.width * self.in_flight  # their gradients
        normed = c * rows * model.width * (local if part.tp == 1 else local + self.tokens)
        gathered = c * head + (_FP32 * head if model.tied_embeddings and part.first else 0)
        if self.zero.stage:
            gathered = self._gathered(None)
        kinds = self._base(gathered, self._added_up + self._flat)
        kinds[LOSS] = summed + max(softmax, product) + inputs
        kinds[WORKSPACE] = normed
        if self.zero.stage >= 2 and self.micro_batches > 1 and not self.pipelined:
            # The buffer of the previous reduction.
            kinds[WORKSPACE] += _FP32 * head if self._head_is_trained else 0
        if self.zero.stage == 3 and not self.pipelined:
            kinds[WORKSPACE] += c * head  # the buffer of the previous all-gather
        return Moment("head", with_saved(kinds, self.saved()))

    def _chunk_tokens(self) -> int:
        """Return tokens per chunk of logits, as ``models.loss.default_chunk_tokens``."""
        chunk = self.chunk
        if chunk is None:
            row = self._vocabulary * self.kernels.compute
            on_gpu = min(max(self.tokens * row // 8, 256 << 20), 1 << 30)
            room = _LOGITS_ON_CPU if self.on_cpu else on_gpu
            chunk = min(max(room // row // 128 * 128, 128), _LOGITS_AT_MOST)
        count = max(1, -(-self.tokens // chunk))
        return min(-(-self.tokens // (count * 64)) * 64, chunk, self.tokens)

    def _forward(self) -> list[Moment]:
        """Return the moment of rounding gate and up of the last block.

        Without FP8 the list is empty, since the head needs more memory.
        """
        block = self._blocks.block(self._blocks.layers[-1])
        if not self._rounding(block):
            return []
        kinds = self._base(self._gathered(None), self._added_up + self._flat)
        kinds[WORKSPACE] = self._rounding(block)
        kept = self.saved() - later(self._blocks.saved(self._blocks.layers[-1]))
        return [Moment("forward", with_saved(kinds, kept))]

    def _rounding(self, block: Block) -> int:
        """Return bytes while uncompiled operators compute or save gate and up in FP8.

        Widening, division and clamping use three fp32 copies at once. An emulated product (itself,
        its scales, both) uses as many, and so does rounding of a weight.
        """
        kernels, model, part = self.kernels, self.part.model, self.part
        c, wide, experts = kernels.compute, kernels.wide, block.mixture is not None
        recipe = kernels.recipe(Role.EXPERT_UP if experts else Role.HIDDEN, block.layer)
        if self.compiled or not (recipe or kernels.saves):
            return 0
        local = self._rows // part.tp
        emulated = recipe and self.on_cpu
        copies = 3 if emulated or c < wide else 2
        activations = copies * wide * 2 * block.widest * local if emulated or kernels.saves else 0
        weights = 3 * wide * 2 * self._blocks.down(block.layer) if recipe else 0
        stream = 2 * c * model.width * local
        return max(activations, weights) + 2 * c * block.widest * local + stream

    def _backward(self) -> list[Moment]:
        """Return the moments of the backward of each block, the last first, and after it."""
        c, model = self.kernels.compute, self.part.model
        one = self.saved()
        others = Counter(
            {name: n * (self.in_flight - 1) // self.in_flight for name, n in one.items()}
        )
        left = Counter({name: n - others[name] for name, n in one.items()})
        done = self._ends_gradients
        stream = c * self._rows // self.part.tp * model.width
        found, here = [], set[int]()
        if self.part.last:
            final = self._norm_backward(model.width) * (self._rows // self.part.tp)
            kinds = self._base(self._gathered(None), max(self._added_up, done) + self._flat)
            kinds[WORKSPACE] = final + stream
            found.append(Moment("backward of the head", with_saved(kinds, left + others)))
        telling = self._blocks.telling
        for place, layer in reversed(list(enumerate(self._blocks.layers))):
            if layer in self.dormant:
                continue
            block = self._blocks.block(layer)
            kept = self._blocks.saved(layer)
            # Offloaded activations return one block before their use.
            back = [i for i in self._blocks.layers[max(place - 1, 0) : place + 1] if i in self.away]
            for i in set(back) - here:
                here.add(i)
                left += self._blocks.saved(i)
            if place in telling:
                found += self._of_block(layer, block, done, left, others)
            left -= kept
            size = self.part.by_layer[layer]
            done += _FP32 * size // (max(self.part.shards, 1) if self.zero.stage else 1)
            if self.zero.stage and place in telling:
                found.append(
                    self._reduced(size, self._gathered(layer, after=True), done, left + others)
                )
        return found

    def _of_block(
        self,
        layer: int,
        block: Block,
        done: int,
        left: Counter[str],
        others: Counter[str],
    ) -> list[Moment]:
        """Return the moments of the backward of one block."""
        stream = self.kernels.compute * self._rows // self.part.tp * self.part.model.width
        kept = self._blocks.saved(layer)
        again: Counter[str] = Counter()
        if self.checkpointing != "none":
            again = self._blocks.saved(layer, "none") - kept
        kinds = self._base(self._gathered(layer), max(self._added_up, done) + self._flat)
        kinds[WORKSPACE] = self._block_backward(block) + stream
        found = [Moment("backward", with_saved(kinds, left + others + again))]
        if self.checkpointing != "none":
            kinds[WORKSPACE] = max(self._rounding(block) - kept[GATE_UP], 0) + stream
            held = left + others + again - later(again)
            found.append(Moment("backward", with_saved(kinds, held)))
        return found

    @property
    def _head_is_trained(self) -> bool:
        """True if the weight used by the head (its own, or the embedding's) is trained."""
        role = Role.INPUT if self.part.model.tied_embeddings else Role.OUTPUT
        return any(spec.role is role for spec in self.part.trained)

    @property
    def _ends_gradients(self) -> int:
        """Bytes of the head's gradient, which exists before the gradients of blocks."""
        if not (self.part.last and self._head_is_trained):
            return 0
        head = self._vocabulary * self.part.model.width
        return head * (_FP32 if self.zero.stage == 0 else self.kernels.compute)

    def _gathered(self, layer: int | None, *, after: bool = False) -> int:
        """Return bytes of gathered weights, at stages 1 to 3, in or after a block's backward.

        ``layer`` None: during the backward of the head, when the last block is still gathered.
        """
        if self.pipelined or not self.zero.frees(1):
            gone = (
                self._blocks.layers[self._blocks.layers.index(layer) :]
                if after and layer is not None
                else []
            )
            return self.copies - (0 if self.pipelined else sum(self.gathered[i] for i in gone))
        model, part = self.part.model, self.part
        head = self.gathered.get(None, 0)
        if part.first and not model.tied_embeddings:
            head -= max(_FP32, self.kernels.compute) * self._vocabulary * model.width
        place = len(self._blocks.layers) - 1 if layer is None else self._blocks.layers.index(layer)
        here = self._blocks.layers[max(place - PREFETCHED, 0) : place + (not after)]
        return head + sum(self.gathered[i] for i in (here[-1:] if layer is None else here))

    def _reduced(self, size: int, copies: int, gradients: int, saved: Mapping[str, int]) -> Moment:
        """Return the moment of FSDP2's reduction of ``size`` elements, with the previous buffer."""
        before = max(self.part.units.values(), default=0)
        kinds = self._base(copies, max(self._added_up, gradients))
        kinds[WORKSPACE] = _FP32 * (size + before)
        kinds[LOSS] = self._ends_gradients  # of the last reduced unit
        return Moment("backward", with_saved(kinds, saved))

    def _norm_backward(self, width: int) -> int:
        """Return bytes per token for the backward of a norm, in addition to its saved tensors."""
        c, wide = self.kernels.compute, self.kernels.wide
        if self.kernels.fused_norm:
            return 2 * c * width
        return (4 if c < wide else 3) * wide * width

    def _block_backward(self, block: Block) -> int:
        """Return peak bytes of a block's backward, in addition to saved tensors."""
        part, tokens = self.part, self._rows
        c, wide = self.kernels.compute, self.kernels.wide
        hidden = block.hidden * tokens // part.tp
        # In half types one product computes gate and up, so one tensor receives their gradients.
        found = [c * hidden * (3 if c < wide else 2)]
        down = self._blocks.down(block.layer)
        fresh = c if c < wide else _FP32
        again = _FP32 if self.micro_batches > 1 else 0
        found.append(c * hidden + fresh * down + again * down)
        if block.mixture is not None:
            rows = block.rows_width * tokens
            found.append((c + wide) * rows)
            found.append(c * (rows + hidden) + fresh * down + again * down)
        found.append(self._norm_backward(part.model.width) * tokens // part.tp - c * hidden)
        if self.kernels.saves and not self.compiled:  # gate and up, widened and multiplied
            found.append(2 * wide * 2 * block.widest * tokens // part.tp + c * hidden)
        if part.tp > 1:
            found = [n + c * tokens * part.model.width for n in found]
        return max(found)

    def _end(self) -> Moment:
        """Return the moment after the last block's backward, with pending reductions."""
        part, c = self.part, self.kernels.compute
        trained = part.first and any(spec.role is Role.INPUT for spec in self.part.trained)
        embedding = self._vocabulary * part.model.width if trained else 0
        whole = _FP32 * sum(self.part.trained.values())
        if self.zero.stage == 0:
            kinds = self._base(0, whole + (self._flat or self.reduction))
        else:
            ends = _FP32 * self.part.by_layer[None] // max(part.shards, 1)
            head = c * self._vocabulary * part.model.width * part.last
            table = _FP32 * embedding if self.zero.stage < 3 else 0
            kinds = self._base(head + table, max(self._added_up, self.gradients - ends))
            blocks = max((self.part.by_layer[i] for i in self._blocks.layers), default=0)
            kinds[WORKSPACE] = _FP32 * (2 * embedding + blocks)
            kinds[LOSS] = self._ends_gradients
        if part.model.tied_embeddings and part.first and part.last:
            kinds[WORKSPACE] += _FP32 * embedding
        return Moment("backward's end", positive(kinds))

    def _update(self) -> Moment:
        kinds = self._base(0, self._flat or self.gradients)
        kinds[WORKSPACE] = rule_workspace(self.part, self.part.trained, self.optimizer, self.on_cpu)
        return Moment("optimizer step", positive(kinds))
