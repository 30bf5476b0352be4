"""Work of several ranks of which any may find that it cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from allometry.configs.errors import UserError
from allometry.parallel.mesh import Mesh

T = TypeVar("T")


def on_all_ranks(mesh: Mesh, work: Callable[[], T]) -> T:
    """Do ``work`` on every rank; if any rank cannot, all of them raise the first one's error."""
    result: list[T] = []
    failure: str | None = None
    try:
        result.append(work())
    except UserError as error:
        failure = str(error)
    failures = [text for text in mesh.gather_objects(failure) if text is not None]
    if failures:
        raise UserError(failures[0])
    return result[0]


def on_main_rank(mesh: Mesh, work: Callable[[], T]) -> T | None:
    """Do ``work`` on the main rank; its UserError is raised on all ranks."""
    return on_all_ranks(mesh, lambda: work() if mesh.is_main else None)


def from_main_rank(mesh: Mesh, work: Callable[[], T]) -> T:
    """Do ``work`` on the main rank and hand its result to all ranks."""
    result = mesh.broadcast_object(on_main_rank(mesh, work))
    assert result is not None
    return result
