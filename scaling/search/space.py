"""Layouts proposed by a search; the trainer's own checks decide which of them are valid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.scaling.degrees import divisors
from allometry.scaling.layout import ONE_STAGE_SCHEDULES, V_SCHEDULES

CHECKPOINTING = ("none", "selective", "full")
MOST_CHUNKS, MOST_SEQUENCES = 4, 64
FREE = {
    "parallel.tp": "tp",
    "parallel.pp": "pp",
    "parallel.ep": "ep",
    "parallel.zero.stage": "zero",
    "parallel.zero.regather": "regather",
    "parallel.pipeline.schedule": "schedule",
    "parallel.pipeline.stages_per_rank": "chunks",
    "training.activation_checkpointing": "checkpointing",
    "batch.micro_batch_sequences": "micro_batch",
}
"""Keys chosen by a search, with the field of ``Choice``; all other keys are unchanged."""


@dataclass(frozen=True, slots=True)
class Core:
    """Degrees and sharding of a layout, which determine the parameters of each rank."""

    tp: int
    pp: int
    ep: int
    zero: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A value of each key in ``FREE``; ``chunks``: stages on each pipeline rank."""

    tp: int
    pp: int
    ep: int
    zero: int
    regather: str
    schedule: str
    chunks: int
    checkpointing: str
    micro_batch: int

    @property
    def core(self) -> Core:
        """Degrees and sharding of the choice."""
        return Core(self.tp, self.pp, self.ep, self.zero)

    def describe(self, world_size: int) -> dict[str, Any]:
        """Return the choice as JSON, with hdp."""
        return {"hdp": world_size // (self.tp * self.pp), **asdict(self)}

    def sections(self, world_size: int) -> dict[str, Any]:
        """Return the choice as config keys, by section."""
        fixed = self.schedule in (*ONE_STAGE_SCHEDULES, *V_SCHEDULES)
        return {
            "parallel": {
                "hdp": world_size // (self.tp * self.pp),
                "tp": self.tp,
                "pp": self.pp,
                "ep": self.ep,
                "pipeline": {
                    "schedule": self.schedule,
                    "stages_per_rank": None if fixed or self.pp == 1 else self.chunks,
                },
                "zero": {"stage": self.zero, "regather": self.regather},
            },
            "batch": {"micro_batch_sequences": self.micro_batch},
            "training": {"activation_checkpointing": self.checkpointing},
        }


def check_kept(keep: Sequence[str]) -> None:
    """Raise UserError for a key that a search does not choose."""
    for key in keep:
        if key not in FREE:
            raise UserError(
                f"{key} cannot be kept, as a search never changes it; it chooses {', '.join(FREE)}"
            )


def applied(config: RunConfig, choice: Choice, world_size: int, *, check: bool = True) -> RunConfig:
    """Return the run with this layout.

    With ``check`` the sections are validated as when a config is read, and invalid ones raise
    UserError; ``Layout.of`` checks the rest. For example,
    ``applied(config, search.best(1)[0], 8)``.
    """
    sections = choice.sections(world_size)
    asked, parallel = sections["parallel"], config.parallel
    asked["pipeline"] = parallel.pipeline.model_copy(update=asked["pipeline"])
    asked["zero"] = parallel.zero.model_copy(update=asked["zero"])
    placed = parallel.model_copy(update=asked)
    if check:
        try:
            placed = ParallelConfig.model_validate(placed.model_dump())
        except ValidationError as error:
            raise UserError(error.errors(include_url=False)[0]["msg"]) from None
    return config.model_copy(
        update={
            "parallel": placed,
            "batch": config.batch.model_copy(update=sections["batch"]),
            "training": config.training.model_copy(update=sections["training"]),
        }
    )


class Space:
    """Proposals for a run on ``world_size`` ranks, with fast links between ``node`` of them.

    Tensor parallelism stays within a node. In a pipeline ZeRO 2 communicates and stores as much as
    stage 1. Proposed schedules are those with known bubbles, and the run's own.
    """

    def __init__(
        self, config: RunConfig, world_size: int, node: int, keep: Sequence[str] = ()
    ) -> None:
        check_kept(keep)
        self.config, self.world_size, self.node = config, world_size, node
        self._kept = {FREE[key] for key in keep}
        pipeline = config.parallel.pipeline
        self._own: dict[str, Any] = {
            "tp": config.parallel.tp,
            "pp": config.parallel.pp,
            "ep": config.parallel.ep,
            "zero": config.parallel.zero.stage,
            "regather": config.parallel.zero.regather,
            "schedule": pipeline.schedule,
            "chunks": pipeline.stages_per_rank or _usual_chunks(pipeline.schedule),
            "checkpointing": config.training.activation_checkpointing,
            "micro_batch": config.batch.micro_batch_sequences,
        }

    def choices(self) -> Iterator[Choice]:
        """Yield every proposal; within a core those with the lowest memory first."""
        for core in self.cores():
            yield from self.of_core(core)

    def cores(self) -> Iterator[Core]:
        """Yield degrees whose product is the number of ranks, in ascending order of ZeRO stages."""
        number, model = self.world_size, self.config.model
        experts = model.experts.num_experts if isinstance(model, MoEModel) else 1
        within = [tp for tp in divisors(number) if tp <= self.node and model.num_heads % tp == 0]
        for tp in self._only("tp", within):
            depth = [pp for pp in divisors(number // tp) if pp <= model.num_layers]
            for pp in self._only("pp", depth):
                hdp, left = divmod(number, tp * pp)
                if left or not self._shares(hdp):
                    continue
                replica = hdp // self.config.parallel.zero.replicas
                for ep in self._only("ep", [n for n in divisors(experts) if replica % n == 0]):
                    for zero in self._only("zero", self._stages(hdp, pp)):
                        yield Core(tp, pp, ep, zero)

    def of_core(self, core: Core) -> Iterator[Choice]:
        """Yield the proposals with these degrees."""
        hdp = self.world_size // (core.tp * core.pp)
        micro_batches = self._only("micro_batch", self._micro_batches(hdp))
        checkpointing = self._only("checkpointing", CHECKPOINTING[::-1])
        for schedule, chunks in self.schedules(core.pp):
            # Otherwise stage 3 of a pipeline gathers once per step, like stage 1.
            usual = "micro_batch" if core.pp > 1 and core.zero == 3 else "auto"
            for regather in self._only("regather", [usual]):
                for micro_batch, how in itertools.product(micro_batches, checkpointing):
                    yield Choice(
                        core.tp,
                        core.pp,
                        core.ep,
                        core.zero,
                        regather,
                        schedule,
                        chunks,
                        how,
                        micro_batch,
                    )

    def _only(self, name: str, proposed: Sequence[Any]) -> Sequence[Any]:
        return [self._own[name]] if name in self._kept else proposed

    def _stages(self, hdp: int, pp: int) -> list[int]:
        zero = self.config.parallel.zero
        needs = zero.offload != "none" or zero.optimizer_states is not None
        if hdp == 1:
            return [zero.stage] if needs else [0]
        return [0, 1, 3] if pp > 1 else [0, 1, 2, 3]

    def schedules(self, pp: int) -> list[tuple[str, int]]:
        """Return the schedules for a pipeline of ``pp`` ranks, with the stages on each rank."""
        own = (self._own["schedule"], self._own["chunks"])
        if pp == 1:
            return [(self._own["schedule"], 1)]
        layers = self.config.model.num_layers
        proposed = [("1f1b", 1), ("zbv_zero_bubble", 2)]
        chunks = (n for n in (2, MOST_CHUNKS) if pp * n <= layers)
        proposed += [("interleaved_1f1b", n) for n in chunks]
        found = dict.fromkeys([*proposed, own])
        kept = {"schedule", "chunks"} & self._kept

        def stays(schedule: str, number: int) -> bool:
            asked = {"schedule": schedule, "chunks": number}
            return all(asked[name] == self._own[name] for name in kept)

        return [(name, n) for name, n in found if pp * n <= layers and stays(name, n)]

    def _sequences(self) -> int:
        """Return the greatest common divisor of the run's batch sizes."""
        batch = self.config.batch
        if batch.ramp is None:
            return batch.sequences
        ramp = batch.ramp
        return math.gcd(batch.sequences, ramp.start_sequences, ramp.increment_sequences)

    def _shares(self, hdp: int) -> bool:
        """Return True if hdp ranks may share every batch; proposals are checked again later."""
        return self.config.data.kind == "documents" or self._sequences() % hdp == 0

    def _micro_batches(self, hdp: int) -> list[int]:
        # Dropout masks depend on the micro-batch: another size would change the run.
        if self.config.data.kind == "documents" or self.config.model.dropout:
            return [self._own["micro_batch"]]
        return [n for n in divisors(self._sequences() // hdp) if n <= MOST_SEQUENCES]


def _usual_chunks(schedule: str) -> int:
    return 1 if schedule in ONE_STAGE_SCHEDULES else 2
