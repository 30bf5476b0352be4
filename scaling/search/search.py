"""The best layouts of a run on a number of GPUs: what fits, and of that the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Literal

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig
from allometry.configs.run import RunConfig
from allometry.scaling.batch import BatchPlan
from allometry.scaling.degrees import Degrees
from allometry.scaling.layout import Layout
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.plan import memory_of
from allometry.scaling.planner.calibrate import Calibration
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.cost import step_time
from allometry.scaling.search.case import SCHEDULES, check_precision, row_of
from allometry.scaling.search.space import CHECKPOINTING, Choice, Core, Space, applied

Objective = Literal["time", "cost", "memory"]
OBJECTIVES: tuple[Objective, ...] = ("time", "cost", "memory")
RESERVE = 0.1
"""Share of a card's memory that no estimate has in it: the CUDA context, buffers of NCCL, gaps."""

ALIKE = 1.01
"""Times the shortest step up to which steps are taken to be as fast."""
NEAR = 1.25
"""Times the limit up to which another schedule of a pipeline may need less than 1F1B."""


@dataclass(frozen=True)
class Asked:
    """What a search is to serve.

    ``name``: what tables call the hardware; ``reserve``: share of the card's memory left free;
    ``keep``: keys of ``space.FREE`` that stay as the run has them; ``device``: whose kernels.
    """

    hardware: HardwareConfig
    name: str
    objective: Objective = "time"
    reserve: float = RESERVE
    keep: tuple[str, ...] = ()
    device: str = "cuda"
    belief: Calibration | None = None

    @property
    def constants(self) -> Constants:
        """The cost model's constants."""
        return self.calibration.constants

    @property
    def calibration(self) -> Calibration:
        """What is believed of the constants: without measurements, the hardware's and defaults."""
        return self.belief or Calibration.before(self.hardware)

    def memory_of(self, world_size: int) -> float:
        """Return the bytes of memory of a rank's card; ranks of a CPU share theirs."""
        return self.hardware.rank_memory(world_size)


class Search:
    """One run on one number of GPUs: proposals, what each needs, how long each takes.

    What is found of a proposal's memory is kept, so that asking again under other assumptions is
    quick; ``known``: what another search of the same run on as many GPUs found.
    """

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        asked: Asked,
        known: dict[Choice, MemoryEstimate | str] | None = None,
    ) -> None:
        check_precision(config, asked.hardware, asked.name)
        _check_graphs(config, world_size)
        self.config, self.world_size, self.asked = config, world_size, asked
        self.limit = asked.memory_of(world_size) * (1 - asked.reserve)
        """Bytes of a card that the run may fill."""
        self.space = Space(config, world_size, asked.hardware.gpus_per_node, asked.keep)
        self._batch = BatchPlan(config.batch, config.data.sequence_length)
        self.known = {} if known is None else known
        self.cores: dict[Core, tuple[Choice, int]] = {}
        """Degrees that can be: the proposal that needs least memory, and how much."""
        self.refusals: list[str] = []
        self._look()

    # --- memory

    def memory(self, choice: Choice) -> MemoryEstimate | None:
        """Return what the fullest rank needs; None: the trainer refuses the layout."""
        found = self.known.get(choice)
        if found is None:
            try:
                config = applied(self.config, choice, self.world_size)
                layout = Layout.of(config, self.world_size)
                found = memory_of(config, layout, self._batch, self.asked.device)
            except UserError as error:
                found = str(error)
            self.known[choice] = found
        return None if isinstance(found, str) else found

    def _look(self) -> None:
        """Find the least memory of each core; the stages of ZeRO below one too large are too."""
        too_large: set[tuple[int, int, int]] = set()
        for core in sorted(self.space.cores(), key=lambda core: -core.zero):
            degrees = core.tp, core.pp, core.ep
            if degrees in too_large:
                continue
            for choice in self.space.of_core(core):
                found = self.memory(choice)
                if found is None:
                    self.refusals.append(str(self.known[choice]))
                    continue
                least = choice, found.total
                if self.limit < found.total < NEAR * self.limit:
                    least = self._least(choice, found.total)
                self.cores[core] = least
                if least[1] > self.limit:
                    too_large.add(degrees)
                break

    def _least(self, like: Choice, total: int) -> tuple[Choice, int]:
        """Return the schedule that needs least of proposals that are ``like`` one else."""
        found = [(like, total)]
        for schedule, chunks in self.space.schedules(like.pp):
            other = replace(like, schedule=schedule, chunks=chunks)
            if (estimate := self.memory(other)) is not None:
                found.append((other, estimate.total))
        return min(found, key=lambda one: one[1])

    @property
    def fitting(self) -> list[Core]:
        """Cores of which some proposal fits."""
        return [core for core, (_, least) in self.cores.items() if least <= self.limit]

    @property
    def degrees(self) -> set[tuple[int, int, int]]:
        """Degrees (tp, pp, ep) that the run can have."""
        return {(core.tp, core.pp, core.ep) for core in self.cores}

    @property
    def fitting_degrees(self) -> set[tuple[int, int, int]]:
        """Those of them that fit in some way."""
        return {(core.tp, core.pp, core.ep) for core in self.fitting}

    # --- time

    def cases(self, choices: Sequence[Choice]) -> Cases:
        """Return proposals as the cost model takes them, as ``row_of`` does, but all at once."""
        config, asked = self.config, self.asked
        one = self._one(asked.hardware).take(np.zeros(len(choices), dtype=int))

        def column(read: Callable[[Choice], float]) -> Floats:
            return np.array([read(choice) for choice in choices], dtype=float)

        tp, pp, ep, chunks = (column(attrgetter(name)) for name in ("tp", "pp", "ep", "chunks"))
        hdp, length = self.world_size / (tp * pp), config.data.sequence_length
        each = config.parallel.context.capacity_tokens
        tokens = column(lambda c: c.micro_batch * length)
        tokens = np.full(len(choices), each) if config.data.kind == "documents" else tokens
        cp = np.minimum(np.maximum(1, np.ceil(length / tokens)), hdp)
        zero = column(attrgetter("zero"))
        freed = column(
            lambda c: c.regather == "micro_batch" or (c.regather == "auto" and c.pp == 1)
        )
        n = {
            **one.n,
            **{"tp": tp, "pp": pp, "ep": ep, "chunks": chunks, "cp": cp, "dp": hdp / cp},
            "micro_batch": tokens * cp / length,
            "zero": np.where((zero == 3) & (freed == 0), 2.0, zero),
            "reduces": np.where((zero >= 2) & (pp == 1), 1.0, 0.0),
            "repeats": column(lambda c: c.checkpointing == "selective"),
        }
        return replace(
            one,
            n=n,
            recompute=np.array([c.checkpointing for c in choices]),
            schedule=np.array([SCHEDULES[c.schedule] if c.pp > 1 else "1f1b" for c in choices]),
        )

    def _one(self, hardware: HardwareConfig) -> Cases:
        """The run on one rank, but for its layout."""
        config, asked = self.config, self.asked
        degrees = Degrees(pp=1, hdp=self.world_size, tp=1, ep=1, replicas=1)
        plain = Layout(degrees, "1f1b", (range(config.model.num_layers),))
        row = row_of(config, plain, hardware, asked.name, asked.device)
        return Cases.of([row], {asked.name: hardware})

    def hardware_columns(self, hardware: HardwareConfig, count: int) -> dict[str, Floats]:
        """Return ``Cases.hw`` of this run's products on other hardware, for ``count`` cases."""
        return self._one(hardware).take(np.zeros(count, dtype=int)).hw

    @cached_property
    def _pool(self) -> tuple[list[Choice], Cases, Floats]:
        """What is ordered by time: proposals of cores that fit, and which goes first of equals."""
        choices = [choice for core in self.fitting for choice in self.space.of_core(core)]
        # The one that shards and cuts least.
        plain = np.array([(c.zero, c.pp, c.tp, c.ep, -c.micro_batch) for c in choices])
        return choices, self.cases(choices), plain

    def ordered(
        self, hardware: HardwareConfig | None = None, constants: Constants | None = None
    ) -> Iterator[tuple[Choice, float]]:
        """Yield the proposals that fit and can be, the best first, with the seconds of a step.

        ``hardware``, ``constants``: other ones than the search was asked for, for times alone.
        """
        if not self.fitting:
            return
        if self.asked.objective == "memory":
            by_least = sorted(self.fitting, key=lambda core: self.cores[core][1])
            choices = [self.cores[core][0] for core in by_least]
            cases, plain = self.cases(choices), None
        else:
            choices, cases, plain = self._pool
        if hardware is not None:
            cases = replace(cases, hw=self.hardware_columns(hardware, len(choices)))
        seconds = step_time(cases, constants or self.asked.constants).seconds
        order: Sequence[int] = range(len(choices))
        if plain is not None:
            order = np.lexsort((*plain.T[::-1], np.round(np.log(seconds), 9))).tolist()
        for index in order:
            estimate = self.memory(choices[index])
            if estimate is not None and estimate.total <= self.limit:
                yield choices[index], float(seconds[index])

    def best(self, count: int) -> list[Choice]:
        """Return the best proposal of each of the ``count`` best degrees (tp, pp, ep).

        By time: of those within ``ALIKE`` of it, the one that shards and recomputes least.
        """
        found: dict[tuple[int, int, int], tuple[float, list[Choice]]] = {}
        for choice, seconds in self.ordered():
            degrees = choice.tp, choice.pp, choice.ep
            if degrees not in found and len(found) == count:
                if all(seconds > ALIKE * first for first, _ in found.values()):
                    break
                continue
            first, alike = found.setdefault(degrees, (seconds, []))
            if seconds <= ALIKE * first:
                alike.append(choice)
        if self.asked.objective == "memory":
            return [alike[0] for _, alike in found.values()]
        return [min(alike, key=_plainness) for _, alike in found.values()]


def _plainness(choice: Choice) -> tuple[int, ...]:
    again = CHECKPOINTING.index(choice.checkpointing)
    return choice.zero, again, choice.chunks, -choice.micro_batch


def _check_graphs(config: RunConfig, world_size: int) -> None:
    """Refuse what ``parallel.graphs`` refuses of any layout of several ranks."""
    if config.training.cuda_graphs is True and world_size > 1:
        raise UserError(
            f"training.cuda_graphs=true cannot be on {world_size} GPUs, as its ranks communicate "
            "in forward or backward; use training.cuda_graphs=auto"
        )
