"""Search for the best layouts of a run on a number of GPUs: the fastest that fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig
from allometry.configs.run import RunConfig
from allometry.configs.stages import InStage
from allometry.scaling.batch import BatchPlan
from allometry.scaling.degrees import Degrees
from allometry.scaling.layout import Layout
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.plan import memory_of
from allometry.scaling.planner.calibrate import Calibration
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.cost import step_time
from allometry.scaling.planner.store import published
from allometry.scaling.search.case import check_precision, row_of, sequence_of
from allometry.scaling.search.space import CHECKPOINTING, FREE, Choice, Core, Space, applied
from allometry.scaling.stages import places_of

Objective = Literal["time", "cost", "memory"]
OBJECTIVES: tuple[Objective, ...] = ("time", "cost", "memory")
RESERVE = 0.1
"""Share of a card's memory not included in estimates: CUDA context, NCCL buffers, fragmentation."""

ALIKE = 1.01
"""Ratio to the shortest step up to which steps count as equally fast."""
NEAR = 1.25
"""Ratio to the memory limit up to which another schedule, or a lower stage of ZeRO in a model of
few blocks, may still need less.
"""


@dataclass(frozen=True)
class Asked:
    """Objective and constraints of a search.

    ``name``: name of the hardware in tables; ``reserve``: share of the card's memory kept free;
    ``keep``: keys of ``space.FREE`` that keep their configured values; ``device``: selects kernels.
    """

    hardware: HardwareConfig
    name: str
    objective: Objective = "time"
    reserve: float = RESERVE
    keep: tuple[str, ...] = ()
    device: str = "cuda"
    belief: Calibration | None = None

    @cached_property
    def constants(self) -> Constants:
        """Constants of the cost model."""
        return self.calibration.constants(self.hardware.generation)

    @cached_property
    def calibration(self) -> Calibration:
        """Distribution of the constants: published runs, and measurements on this hardware."""
        return self.belief or published(self.hardware)

    def memory_of(self, world_size: int) -> float:
        """Return the memory in bytes of a rank's card; ranks on a CPU share its memory."""
        return self.hardware.rank_memory(world_size)


class Search:
    """Search for one run on one number of GPUs: proposals, their memory and their step time.

    Memory estimates are cached, so repeated searches with other assumptions are fast; ``known``:
    estimates of another search of the same run on as many GPUs. ``run`` is the requested run; for a
    run with stages the longest one, ``config``, is timed, and all stages must fit. For example,
    ``Search(config, 8, asked).best(3)``.
    """

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        asked: Asked,
        known: dict[Choice, MemoryEstimate | str] | None = None,
    ) -> None:
        for one in config.of_stages():
            check_precision(one, asked.hardware, asked.name)
        _check_graphs(config, world_size)
        self.run, self.world_size, self.asked = config, world_size, asked
        self.config, decided = _longest(config)
        self.limit = asked.memory_of(world_size) * (1 - asked.reserve)
        """Bytes of a card that the run may use."""
        keep = (*asked.keep, *decided)
        self.space = Space(self.config, world_size, asked.hardware.gpus_per_node, keep)
        self._batch = BatchPlan(self.config.batch, self.config.data.sequence_length)
        self.known = {} if known is None else known
        self.cores: dict[Core, tuple[Choice, int]] = {}
        """Valid degrees: the proposal with the lowest memory, and its bytes."""
        self.refusals: list[str] = []
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._look()

    # --- memory

    def memory(self, choice: Choice) -> MemoryEstimate | None:
        """Return the memory of the largest rank; None if the trainer rejects the layout."""
        found = self.known.get(choice)
        if found is None:
            try:
                run = applied(self.run, choice, self.world_size)
                places = [(one.config, one.batch) for one in places_of(run)] if run.stages else []
                found = max(
                    (
                        memory_of(one, Layout.of(one, self.world_size), batch, self.asked.device)
                        for one, batch in places or [(run, self._batch)]
                    ),
                    key=attrgetter("total"),
                )
            except (UserError, InStage) as error:
                found = str(error)
            self.known[choice] = found
        return None if isinstance(found, str) else found

    def _look(self) -> None:
        """Find the lowest memory of each core; skip lower ZeRO stages if one is far too large."""
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
                if least[1] > NEAR * self.limit:
                    too_large.add(degrees)
                break

    def _least(self, like: Choice, total: int) -> tuple[Choice, int]:
        """Return the schedule with the lowest memory, for proposals otherwise equal to ``like``."""
        found = [(like, total)]
        for schedule, chunks in self.space.schedules(like.pp):
            other = replace(like, schedule=schedule, chunks=chunks)
            if (estimate := self.memory(other)) is not None:
                found.append((other, estimate.total))
        return min(found, key=lambda one: one[1])

    @property
    def fitting(self) -> list[Core]:
        """Cores with at least one proposal that fits."""
        return [core for core, (_, least) in self.cores.items() if least <= self.limit]

    @property
    def degrees(self) -> set[tuple[int, int, int]]:
        """Valid degrees (tp, pp, ep) of the run."""
        return {(core.tp, core.pp, core.ep) for core in self.cores}

    @property
    def fitting_degrees(self) -> set[tuple[int, int, int]]:
        """Degrees with at least one proposal that fits."""
        return {(core.tp, core.pp, core.ep) for core in self.fitting}

    # --- time

    def cases(self, choices: Sequence[Choice], hardware: HardwareConfig | None = None) -> Cases:
        """Return proposals as input of the cost model.

        Proposals that differ only in degrees and micro-batch share one call of ``row_of``, unless
        offloaded shares depend on the degrees.
        """
        config, card = self.config, hardware or self.asked.hardware
        parallel = config.parallel
        tiers = parallel.zero.offload != "none" or parallel.zero.optimizer_states is not None
        away = config.training.activation_offload > 0.0
        alone = tiers or away or parallel.tp_overlap != "off"
        places: dict[tuple[Any, ...], int] = {}
        member = []
        for c in choices:
            own = (c.tp, c.pp, c.ep, c.chunks) if alone else (c.tp > 1, c.pp > 1, c.ep > 1)
            key = (c.checkpointing, c.schedule, c.zero, c.regather, *own)
            if key not in self._rows:
                self._rows[key] = self._row(c)
            member.append(places.setdefault(key, len(places)))
        rows = [self._rows[key] for key in places]
        shared = Cases.of(rows, {self.asked.name: card}).take(np.array(member, dtype=int))
        names = ("tp", "pp", "ep", "chunks", "micro_batch")
        columns = np.array([attrgetter(*names)(c) for c in choices], dtype=float).T
        tp, pp, ep, chunks, micro_batch = columns
        hdp, length = self.world_size / (tp * pp), sequence_of(config)
        tokens = micro_batch * length
        if config.data.kind == "documents":
            tokens = np.full(len(choices), config.parallel.context.capacity_tokens)
        cp = np.minimum(np.maximum(1, np.ceil(length / tokens)), hdp)
        degrees = {"tp": tp, "pp": pp, "ep": ep, "chunks": chunks, "cp": cp, "dp": hdp / cp}
        return replace(shared, n={**shared.n, **degrees, "micro_batch": tokens * cp / length})

    def _row(self, choice: Choice) -> dict[str, Any]:
        """Return ``row_of`` a proposal, even if it is invalid."""
        config = applied(self.config, choice, self.world_size, check=False)
        try:
            layout = Layout.of(config, self.world_size)
        except UserError:  # other proposals of the group may be valid
            layout = self._even(config, choice)
        asked = self.asked
        return row_of(config, layout, asked.hardware, asked.name, asked.device)

    def _even(self, config: RunConfig, choice: Choice) -> Layout:
        """Return the unchecked layout of a proposal with stages as even as possible."""
        parallel, layers = config.parallel, config.model.num_layers
        assert parallel.hdp != "auto"
        count = choice.pp * choice.chunks
        degrees = Degrees(
            pp=choice.pp,
            hdp=parallel.hdp,
            tp=choice.tp,
            ep=choice.ep,
            replicas=parallel.zero.replicas,
            whole_experts=parallel.expert_tp == 1 and choice.tp > 1,
        )
        bounds = [layers * n // count for n in range(count + 1)]
        stages = tuple(itertools.starmap(range, itertools.pairwise(bounds)))
        return Layout(degrees, choice.schedule, stages)

    @cached_property
    def _pool(self) -> tuple[list[Choice], Cases, Floats]:
        """Proposals of cores that fit, their cases, and tie-breaking keys."""
        choices = [choice for core in self.fitting for choice in self.space.of_core(core)]
        # Prefer the proposal with the least sharding.
        plain = np.array([(c.zero, c.pp, c.tp, c.ep, -c.micro_batch) for c in choices])
        return choices, self.cases(choices), plain

    def ordered(
        self,
        hardware: HardwareConfig | None = None,
        constants: Constants | None = None,
        wanted: Callable[[Choice, float], bool] = lambda choice, seconds: True,
    ) -> Iterator[tuple[Choice, float]]:
        """Yield valid proposals that fit, the best first, with the seconds of a step.

        ``hardware``, ``constants``: replacements of the search's own, for times only. ``wanted``:
        filter of proposals to check.
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
            cases = replace(cases, hw=self.cases(choices, hardware).hw)
        seconds = step_time(cases, constants or self.asked.constants).seconds
        order: Sequence[int] = range(len(choices))
        if plain is not None:
            order = np.lexsort((*plain.T[::-1], np.round(np.log(seconds), 9))).tolist()
        for index in order:
            choice, time = choices[index], float(seconds[index])
            if not wanted(choice, time):
                continue
            estimate = self.memory(choice)
            if estimate is not None and estimate.total <= self.limit:
                yield choice, time

    def best(self, count: int) -> list[Choice]:
        """Return the best proposal of each of the ``count`` best degrees (tp, pp, ep).

        By time: among those within ``ALIKE`` of the best, the one with least sharding and
        recomputation.
        """
        found: dict[tuple[int, int, int], tuple[float, list[Choice]]] = {}
        alone = self.asked.objective == "memory"

        def wanted(choice: Choice, seconds: float) -> bool:
            degrees = choice.tp, choice.pp, choice.ep
            if degrees not in found:
                return len(found) < count
            return not alone and seconds <= ALIKE * found[degrees][0]

        for choice, seconds in self.ordered(wanted=wanted):
            degrees = choice.tp, choice.pp, choice.ep
            found.setdefault(degrees, (seconds, []))[1].append(choice)
        if alone:
            return [alike[0] for _, alike in found.values()]
        return [min(alike, key=_plainness) for _, alike in found.values()]


def _longest(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the stage that trains most tokens, and the keys of ``FREE`` that it sets."""
    if config.stages is None:
        return config, []
    place = max(places_of(config), key=attrgetter("asked_tokens"))
    stage = config.stages[place.number - 1]
    changed = {"batch": stage.batch, "training": stage.training}
    keys = [f"{section}.{key}" for section, changes in changed.items() for key in changes]
    return place.config, [key for key in keys if key in FREE]


def _plainness(choice: Choice) -> tuple[int, ...]:
    again = CHECKPOINTING.index(choice.checkpointing)
    return choice.zero, again, choice.chunks, -choice.micro_batch


def _check_graphs(config: RunConfig, world_size: int) -> None:
    """Reject CUDA graphs on several ranks, which ``parallel.graphs`` rejects for any layout."""
    if config.training.cuda_graphs is True and world_size > 1:
        raise UserError(
            f"training.cuda_graphs=true cannot be on {world_size} GPUs, as its ranks communicate "
            "in forward or backward; use training.cuda_graphs=auto"
        )
