"""Sizes of the mesh axes, and their consistency with the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig


@dataclass(frozen=True, slots=True)
class Degrees:
    """Sizes of the mesh axes. ``hdp`` = ``replicas`` x ``shard``; ``ep`` divides ``shard``.

    ``whole_experts``: tp shards experts by number rather than by width.
    """

    pp: int
    hdp: int
    tp: int
    ep: int
    replicas: int
    whole_experts: bool = False

    @property
    def expert_ranks(self) -> int:
        """Number of ranks over which experts are sharded by number."""
        return self.ep * self.tp if self.whole_experts else self.ep

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp * self.hdp * self.tp

    @property
    def shard(self) -> int:
        """Number of ranks that share one replica of ZeRO's shards."""
        return self.hdp // self.replicas


def resolve_degrees(parallel: ParallelConfig, world_size: int) -> Degrees:
    """Return the sizes of the mesh axes on ``world_size`` ranks.

    Raises UserError for an unresolved ``auto``, and for degrees whose product is not ``world_size``
    or that do not divide each other. For example, 8 ranks with ``pp: 2`` and ``tp: 2`` give hdp =
    2.
    """
    if parallel.auto is not None:
        raise UserError(
            "parallel=auto chooses a layout when a run begins, but a layout is needed here; write "
            "one, as allometry plan --write does"
        )
    pp, tp = parallel.pp, parallel.tp
    others = pp * tp
    if parallel.hdp == "auto":
        if world_size % others:
            raise UserError(
                f"parallel.pp={pp} x parallel.tp={tp} must divide the number of ranks, "
                f"{world_size}; start a multiple of {others} ranks or change one of them"
            )
        hdp = world_size // others
    else:
        hdp = parallel.hdp
        if hdp * others != world_size:
            fits = f"set parallel.hdp={world_size // others} or auto, or "
            fits *= world_size % others == 0
            raise UserError(
                f"parallel.hdp={hdp} (with pp={pp} and tp={tp}) needs {hdp * others} ranks, but "
                f"there {'is' if world_size == 1 else 'are'} {world_size}; {fits}start "
                f"{hdp * others} ranks (torchrun --nproc-per-node)"
            )
    replicas, ep = parallel.zero.replicas, parallel.ep
    check_divides("parallel.zero.replicas", replicas, "hdp", hdp)
    check_divides("parallel.ep", ep, "hdp" if replicas == 1 else "hdp/replicas", hdp // replicas)
    whole = parallel.expert_tp == 1 and tp > 1
    return Degrees(pp=pp, hdp=hdp, tp=tp, ep=ep, replicas=replicas, whole_experts=whole)


def check_divides(key: str, value: int, name: str, whole: int, common: int | None = None) -> None:
    """Raise UserError unless ``value`` divides ``whole``; suggest divisors of ``common``."""
    if whole % value:
        raise UserError(
            f"{key}={value} must divide {name}={whole}; use {either(divisors(common or whole))}"
        )


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order.

    For example, 12 has 1, 2, 3, 4, 6 and 12.
    """
    return [d for d in range(1, number + 1) if number % d == 0]


def either(values: Sequence[int]) -> str:
    """Return text such as "1, 2 or 4" for the values 1, 2, 4."""
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
