"""Self-test of the ranks for a configuration: correctness and speed of its operations.

Sends every message of the configuration's step with known numbers; measures latency and bandwidth
of every axis; compares one step's gradients of a small model in the same layout with one rank's;
measures each device alone, and the disk of the checkpoints.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextConfig
from allometry.configs.run import RunConfig
from allometry.models.build import torch_dtype
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.parallel.rendezvous import launched_world_size, read_launch
from allometry.scaling.layout import Layout
from allometry.studies.certificate import rank as certificate_rank
from allometry.studies.certificate.small import longest, shrunk, small_run, smallest_batch
from allometry.studies.certificate.step import differences, layout_steps, reference_steps
from allometry.studies.selftest.machine import (
    DiskRates,
    Machine,
    Rates,
    measure_disk,
    measure_rates,
)
from allometry.studies.selftest.messages import messages_of
from allometry.studies.selftest.network import Timing, time_messages
from allometry.trainer.state.folder import write_atomically

TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
"""Largest relative error of a gradient in fp32, by the device of the ranks."""
SLOW = 0.8
"""Share of the median rate below which a device is reported as slow."""


@dataclass(frozen=True)
class GradientCheck:
    """Largest error of the gradients of one step in the layout from one rank's, over all ranks."""

    worst: float
    where: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance."""
        return self.worst <= self.tolerance


@dataclass(frozen=True)
class SelfTest:
    """Complete result; equal on every rank.

    ``faults`` must be fixed before a run is started, ``warnings`` make a run slow.
    """

    machines: tuple[Machine, ...]
    rates: tuple[Rates, ...]
    timings: tuple[Timing, ...]
    gradients: GradientCheck
    disk: DiskRates
    axes: dict[str, int]
    seconds: float

    @property
    def faults(self) -> list[str]:
        """Faults, a sentence each."""
        found = list(_differing(self.machines))
        for timing in self.timings:
            if timing.wrong_ranks:
                message = timing.message
                ranks = ", ".join(map(str, timing.wrong_ranks[:8]))
                found.append(
                    f"{message.kind} over {message.axis} of {message.bytes} bytes: wrong numbers "
                    f"arrive at {len(timing.wrong_ranks)} ranks ({ranks})"
                )
        if not self.gradients.passed:
            found.append(
                f"gradients differ from one rank's by {self.gradients.worst:.1e} at "
                f"{self.gradients.where}, where {self.gradients.tolerance:.0e} is rounding"
            )
        return found

    @property
    def warnings(self) -> list[str]:
        """Devices that are slower than the others, a sentence each."""
        middle = statistics.median(rates.flops_per_s for rates in self.rates)
        return [
            f"rank {machine.rank} on {machine.host} multiplies at {rates.flops_per_s / 1e12:.3g} "
            f"TFLOP/s, the median rank at {middle / 1e12:.3g}"
            for machine, rates in zip(self.machines, self.rates, strict=True)
            if rates.flops_per_s < SLOW * middle
        ]

    @property
    def passed(self) -> bool:
        """True if a run may be started."""
        return not self.faults

    @property
    def step_seconds(self) -> float:
        """Seconds of all messages of a step, one after another and without overlap."""
        return sum(t.seconds * (t.message.per_step or 0) for t in self.timings)

    def describe(self) -> dict[str, Any]:
        """Return JSON."""
        return {
            "passed": self.passed,
            "faults": self.faults,
            "warnings": self.warnings,
            "world_size": len(self.machines),
            "axes": self.axes,
            "hosts": {
                host: [m.rank for m in self.machines if m.host == host]
                for host in dict.fromkeys(m.host for m in self.machines)
            },
            "device": self.machines[0].device,
            "versions": self.machines[0].versions,
            "ranks": [rates.describe() for rates in self.rates],
            "messages": [timing.describe() for timing in self.timings],
            "communication_seconds_per_step": self.step_seconds,
            "gradients": {
                "worst": self.gradients.worst,
                "where": self.gradients.where,
                "tolerance": self.gradients.tolerance,
            },
            "disk": self.disk.describe(),
            "seconds": self.seconds,
        }


def selftest(config: RunConfig, out: Path, seconds: float, disk_bytes: int) -> SelfTest | None:
    """Test the launched ranks; the main rank writes ``out`` and returns the result.

    ``seconds``: approximate time for messages; ``disk_bytes``: written and read by each rank.
    Raises UserError: the configuration has no layout on this number of ranks.
    """
    begun = time.perf_counter()
    world_size = launched_world_size()
    Layout.of(config, world_size)
    small = shrunk(config, world_size)
    # Before the process group is created, because this simulates a process group of its own.
    first = read_launch(os.environ).rank == 0
    messages = messages_of(config, world_size) if first else ()
    with open_mesh(config.parallel) as mesh:
        messages = mesh.broadcast_object(messages)
        result = SelfTest(
            machines=tuple(mesh.gather_objects(Machine.of(mesh))),
            rates=_rates(config, mesh),
            timings=tuple(time_messages(mesh, messages, seconds)),
            gradients=check_gradients(small, mesh),
            disk=measure_disk(mesh, Path(config.run.folder), disk_bytes),
            axes={name: mesh.axis(name).size for name in ("pp", "hdp", "tp", "ep", "edp", "stage")},
            seconds=time.perf_counter() - begun,
        )
        if not mesh.is_main:
            return None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(result.describe(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None
    return result


def _rates(config: RunConfig, mesh: Mesh) -> tuple[Rates, ...]:
    mesh.barrier("measuring the devices")
    own = measure_rates(mesh.device, torch_dtype(config.training.compute_dtype))
    return tuple(mesh.gather_objects(own))


def check_gradients(config: RunConfig, mesh: Mesh) -> GradientCheck:
    """Compare the gradients of one step in fp32 with one rank's, on every rank.

    ``config``: a small configuration with the layout of ``mesh`` (``certificate.small.shrunk``).
    """
    with tempfile.TemporaryDirectory(prefix="allometry-selftest-") as scratch:
        config = small_run(config, Path(scratch))
        batch = smallest_batch([config], mesh.world_size)
        sized = config.batch.model_copy(update={"sequences": batch})
        config = config.model_copy(update={"batch": sized})
        alone: dict[str, Any] = dict.fromkeys(("pp", "tp", "ep", "hdp"), 1)
        alone["zero"] = type(config.parallel.zero)()
        if config.data.kind == "documents":
            alone["context"] = ContextConfig(capacity_tokens=longest(config))
        one = config.model_copy(update={"parallel": config.parallel.model_copy(update=alone)})
        wanted = reference_steps(one, certificate_rank.batches(one, 1))
        got = layout_steps(config, mesh, certificate_rank.batches_of_rank(config, mesh, 1))
    apart = differences(got, wanted)
    told = mesh.gather_objects(apart["gradients"])
    where, worst = max(told, key=lambda pair: pair[1])
    return GradientCheck(worst, where, TOLERANCE[mesh.device.type])


def _differing(machines: Sequence[Machine]) -> list[str]:
    """Return a sentence for each version or device that differs between ranks."""
    found: list[str] = []
    for name in sorted({name for machine in machines for name in machine.versions}):
        found += _other(machines, name, [m.versions.get(name, "none") for m in machines])
    found += _other(machines, "the device", [machine.device for machine in machines])
    return found


def _other(machines: Sequence[Machine], what: str, values: Sequence[str]) -> list[str]:
    for machine, value in zip(machines, values, strict=True):
        if value != values[0]:
            return [
                f"{what} is {value} on rank {machine.rank} ({machine.host}) and {values[0]} on "
                f"rank 0 ({machines[0].host}); install the same everywhere"
            ]
    return []
