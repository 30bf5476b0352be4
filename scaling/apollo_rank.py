"""The rank of APOLLO's projections (arXiv 2412.05270)."""

from __future__ import annotations

from collections.abc import Iterable

from allometry.configs.errors import UserError


def projection_rank(rank: int | None, smaller: int) -> int:
    """Return ``optimizer.rank`` for a matrix of this smaller side; None: a quarter of it."""
    return rank or max(1, smaller // 4)


def check_ranks(rank: int | None, smaller_sides: Iterable[tuple[str, int]]) -> None:
    """Raise UserError for a projection that would not make gradients smaller.

    ``smaller_sides``: the names and smaller sides of the matrices with this ``optimizer.rank``.
    """
    for name, smaller in smaller_sides:
        if rank is not None and rank > smaller:
            raise UserError(
                f"optimizer.rank={rank} is above the smaller side of {name}, {smaller}; choose a "
                "smaller one, or null for a quarter of each"
            )
