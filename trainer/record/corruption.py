"""What is done where a machine computed or remembered wrongly (``record.checks.on_failure``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.trainer.record.callbacks import Reporter

Action = Literal["event", "stop", "refuse_saves"]
_WORDS = 1 << 20  # of a piece that is summed at once: 8 MiB
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no bit is lost


class Response:
    """Reports what checks find and acts as ``action`` says; every rank has one and is told alike.

    ``refusal``: why no more checkpoint is made, None as long as they are.
    """

    def __init__(self, action: Action, report: Reporter) -> None:
        self._action, self._report = action, report
        self.refusal: str | None = None

    def found(self, kind: str, step: int, said: str, **details: Any) -> None:
        """Report an event of ``kind``; ``said`` is it in words.

        Raises:
            UserError: the run is to stop.
        """
        self._report(kind, step=step, said=said, **details)
        if self._action == "stop":
            raise UserError(
                f"step {step}: {said}; no checkpoint was made of it: take that machine out and run "
                "again, which goes on from the last one (record.checks.on_failure)"
            )
        if self._action == "refuse_saves":
            self.refusal = self.refusal or f"since step {step} {said}"


def names_of(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a sum over the bits of a tensor, 0-dim int64 on its device; nothing waits for it.

    Words of 64 bits are weighted by odd numbers modulo 2^64, so that a change of any one word
    changes it, and others go unseen with a chance of about 2^-64. The order in which a device adds
    does not matter.
    """
    flat = tensor.detach().contiguous().flatten()
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    octets = flat.view(torch.uint8)
    rest = octets.numel() % 8
    if rest or octets.storage_offset() % 8:
        octets = torch.cat([octets, octets.new_zeros(-octets.numel() % 8)])
    words = octets.view(torch.int64)
    weights = torch.arange(
        1, 2 * min(words.numel(), _WORDS), 2, dtype=torch.int64, device=words.device
    )
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for piece in words.split(_WORDS):
        total = total * _FACTOR + (piece * weights[: piece.numel()]).sum()
    return total


def combined(sums: Sequence[Tensor]) -> Tensor:
    """Return one checksum of several, in their order."""
    return checksum(torch.stack(list(sums)))
