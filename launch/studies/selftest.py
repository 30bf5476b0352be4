"""Test of the machines: ``allometry selftest``."""

from __future__ import annotations

import logging
import statistics

from allometry.launch.command import Report
from allometry.launch.studies.commands import SelfTest as Asked
from allometry.launch.text import counted, table
from allometry.studies.selftest.network import Timing
from allometry.studies.selftest.selftest import SelfTest, selftest

HEAD = ["message", "axis", "ranks", "type", "bytes", "a step", "seconds", "slowest", "GB/s"]


def tested(asked: Asked) -> Report:
    """Test the ranks; passed if there is no fault. Only the main rank returns text."""
    mib = 2**20
    # torch warns that full gradients are gathered dimension by dimension, which is intended here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    result = selftest(asked.load(), asked.out, asked.seconds, int(asked.disk_mib) * mib)
    if result is None:
        return Report({}, "")
    lines = [_machines(result), table([HEAD, *map(_cells, result.timings)], right=range(2, 9))]
    if not result.timings:
        lines = [_machines(result), "one rank sends no messages"]
    lines += [*_others(result), *(f"slow: {text}" for text in result.warnings)]
    lines += [f"WRONG: {text}" for text in result.faults]
    verdict = "a run may be started" if result.passed else "NOT fit for a run"
    lines.append(f"{verdict}; {result.seconds:.0f} s; written to {asked.out}")
    return Report(result.describe(), "\n".join(lines), result.passed)


def _machines(result: SelfTest) -> str:
    hosts = len({machine.host for machine in result.machines})
    axes = ", ".join(f"{name} {size}" for name, size in result.axes.items() if size > 1)
    return (
        f"{counted(len(result.machines), 'rank')} on {counted(hosts, 'host')}, "
        f"{result.machines[0].device}" + (f": {axes}" if axes else "")
    )


def _cells(timing: Timing) -> list[str]:
    message = timing.message
    often = {0: "probe", None: "varies"}.get(message.per_step, str(message.per_step))
    wrong = "  WRONG" if timing.wrong_ranks else ""
    return [
        *(message.kind, message.axis, str(message.ranks), message.dtype),
        *(f"{message.bytes:,}", often, f"{timing.seconds:.2e}", f"{timing.slowest_seconds:.2e}"),
        f"{timing.bus_bytes_per_s / 1e9:.3g}{wrong}",
    ]


def _others(result: SelfTest) -> list[str]:
    rates = [one.flops_per_s / 1e12 for one in result.rates]
    disk = result.disk
    return [
        f"messages of a step, one after another: {result.step_seconds:.3g} s",
        f"gradients against one rank (fp32): {result.gradients.worst:.1e} at most, at "
        f"{result.gradients.where}",
        f"products: {statistics.median(rates):.3g} TFLOP/s (least {min(rates):.3g})",
        f"disk at {disk.folder}: writes {disk.write_bytes_per_s / 1e9:.3g} GB/s, reads "
        f"{disk.read_bytes_per_s / 1e9:.3g} GB/s, all ranks together",
    ]
