"""Bytes by kind, predicted and, with ``--probe``, measured: ``allometry memory``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.command import Report
from allometry.launch.studies.commands import Memory
from allometry.launch.text import size, table
from allometry.scaling.batch import BatchPlan
from allometry.scaling.layout import Layout
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.moment import Moment
from allometry.scaling.plan import memory_of
from allometry.scaling.search.auto import settle

if TYPE_CHECKING:
    from allometry.studies.memory.probe import Measured


def counted(asked: Memory) -> Report:
    """Predict memory; with ``--probe`` also measure it."""
    config = asked.load()
    world_size = asked.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    if asked.rank is not None and asked.rank >= world_size:
        raise UserError(f"--rank={asked.rank} is not below --world-size={world_size}")
    if asked.device not in (None, "cuda", "cpu"):
        raise UserError(f"--device={asked.device} is not known; use cuda or cpu")
    config, _ = settle(config, world_size, asked.device or "cuda")
    return (
        _probed(asked, config, world_size) if asked.probe else _planned(asked, config, world_size)
    )


def _planned(asked: Memory, config: RunConfig, world_size: int) -> Report:
    layout, device = Layout.of(config, world_size), asked.device or "cuda"
    each = layout.degrees.hdp * layout.degrees.tp
    stage = None if asked.rank is None else asked.rank // each
    batch = BatchPlan(config.batch, config.data.sequence_length)
    estimate = memory_of(config, layout, batch, device, stage)
    who = f"rank {asked.rank}" if asked.rank is not None else "the fullest rank"
    of = f"{who} of {world_size}" if world_size > 1 else "one rank"
    lines = [
        f"{size(estimate.total)} at the peak of {of} on {device}: {estimate.peak.name}",
        table([["kind", "bytes"], *_rows(estimate.peak)], right=(1,)),
        "",
        table([["moment", "bytes"], *_moments(estimate)], right=(1,)),
    ]
    facts = {"world_size": world_size, "device": device, **estimate.describe()}
    facts["moments"] = _fullest(estimate)
    return Report(facts, "\n".join(lines))


def _rows(moment: Moment) -> list[list[str]]:
    ordered = sorted(moment.kinds.items(), key=lambda item: -item[1])
    return [[name, size(number)] for name, number in ordered]


def _fullest(estimate: MemoryEstimate) -> dict[str, int]:
    """Return the bytes of each moment, the maximum of moments with the same name."""
    found: dict[str, int] = {}
    for moment in estimate.moments:
        found[moment.name] = max(found.get(moment.name, 0), moment.total)
    return found


def _moments(estimate: MemoryEstimate) -> list[list[str]]:
    return [[name, size(number)] for name, number in _fullest(estimate).items()]


def _probed(asked: Memory, config: RunConfig, world_size: int) -> Report:
    import torch

    from allometry.studies.memory.probe import predicted
    from allometry.studies.memory.ranks import measure

    here = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.device not in (None, here):
        raise UserError(f"--device={asked.device} with --probe: this machine measures on {here}")
    found = measure(config, world_size)
    if found is None:
        return Report({}, "")
    fullest = found[asked.rank] if asked.rank is not None else max(found, key=lambda m: m.bytes)
    estimate = predicted(config, world_size, here, fullest.rank)
    facts = {
        "world_size": world_size,
        "device": here,
        "rank": fullest.rank,
        "predicted": estimate.describe(),
        "measured": {"total": fullest.bytes, **asdict(fullest)},
        "ratio": estimate.total / fullest.bytes,
        "ranks": [one.bytes for one in found],
    }
    return Report(facts, _beside(estimate, fullest, here))


def _beside(estimate: MemoryEstimate, measured: Measured, device: str) -> str:
    peak, real = estimate.peak, measured.peak
    names = sorted(
        {*peak.kinds, *real.kinds}, key=lambda n: -max(_of(peak.kinds, n), _of(real.kinds, n))
    )
    rows = [
        ["kind", "predicted", "measured"],
        *([name, size(_of(peak.kinds, name)), size(_of(real.kinds, name))] for name in names),
        ["all tensors", size(peak.total), size(real.bytes)],
    ]
    if measured.allocated is not None:
        rows.append(["allocator", "", size(measured.allocated)])
    error = estimate.total / measured.bytes - 1
    lines = [
        f"rank {measured.rank} on {device}, second of two steps, not compiled",
        table(rows, right=(1, 2)),
        f"peak: predicted at {peak.name}, measured at {real.moment} {real.scope}".rstrip(),
        f"predicted {error:+.1%} of measured",
    ]
    return "\n".join(lines)


def _of(kinds: Any, name: str) -> int:
    return int(kinds.get(name, 0))
