"""The description of a cluster's hardware: what the planner computes times from."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from allometry.configs.base import Count, Section
from allometry.configs.errors import ConfigError
from allometry.configs.loader import validate_as
from allometry.configs.paths import expanded
from allometry.configs.source import parse_file

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Generation = Literal["ampere", "hopper", "blackwell", "cdna2", "cdna3", "other"]
THIS_MACHINE = "this-machine"
PeakName = Literal["fp32", "fp16", "bf16", "fp8", "fp4"]


class Accelerator(Section):
    """One GPU; of a card with two dies that run as two devices, one die."""

    peak_flops: dict[PeakName, Positive] = Field(
        min_length=1, description="dense FLOP/s of matrix products by type, without sparsity"
    )
    attainable: dict[PeakName, Share] = Field(
        min_length=1, description="share of the peak that a large matrix product reaches"
    )
    attention: Share = Field(
        description="share of the bf16 peak of causal attention, forward and backward, 4K tokens"
    )
    memory_bytes: Positive = Field(description="device memory")
    memory_bandwidth: Positive = Field(description="bytes/s of the specification")
    copy_efficiency: Share = Field(description="share of memory_bandwidth that a copy reaches")
    power_w: Positive = Field(description="watts that its board draws at most")
    asynchronous: bool = Field(
        default=True, description="false: the processor that computes launches too, as of a CPU"
    )


class Links(Section):
    """What messages between GPUs take, in one direction."""

    bandwidth: Positive = Field(description="bytes/s of one GPU (inside) or of one NIC (across)")
    latency_s: Positive = Field(description="seconds of one step of a collective")


class Host(Section):
    """The CPU side of a node."""

    memory_bytes: Positive = Field(description="host memory of a node")
    bandwidth: Positive = Field(description="bytes/s between the host and one GPU, one direction")
    disk_bandwidth: Positive = Field(description="bytes/s written to a node's local disks")
    adam_rate: Positive = Field(description="parameters/s that AdamW updates on a node's CPUs")
    power_w: Positive = Field(description="watts that a node draws at most besides its GPUs")


class Crowd(Section):
    """Ranks of a node that share a processor, and what each one's rates are of one rank's alone."""

    ranks: Count = Field(gt=1, description="ranks at once")
    products: Share = Field(description="share of the rate of products and attention")
    memory: Share = Field(description="share of the memory's bandwidth")


class HardwareConfig(Section):
    """A kind of node, and the network between nodes of that kind."""

    name: str = Field(min_length=1, description="what tables call it")
    generation: Generation = Field(
        default="other", description="of its GPU: what calibration carries over within"
    )
    gpu: Accelerator
    gpus_per_node: Count = Field(gt=0, description="GPUs that the inside links join")
    nics_per_node: Count = Field(gt=0, description="NICs of those GPUs together")
    inside: Links
    across: Links
    host: Host
    crowds: tuple[Crowd, ...] = Field(
        default=(), description="what ranks that share a processor leave each other; none on GPUs"
    )
    constants: dict[str, Positive] = Field(
        default={}, description="constants of the cost model that were measured here, by name"
    )

    def left(self, ranks: int) -> tuple[float, float]:
        """Return the shares of a rank's rates that ``ranks`` on a node leave: (products, memory).

        Between the numbers that were measured, straight lines; beyond the last, ranks share what
        there is.
        """
        before: tuple[int, float, float] = (1, 1.0, 1.0)
        for crowd in sorted(self.crowds, key=lambda one: one.ranks):
            here = (crowd.ranks, crowd.products, crowd.memory)
            if ranks <= crowd.ranks:
                part = (ranks - before[0]) / (here[0] - before[0])
                at = [a + part * (b - a) for a, b in zip(before[1:], here[1:], strict=True)]
                return at[0], at[1]
            before = here
        beyond = before[0] / ranks if self.crowds else 1.0
        return before[1] * beyond, before[2] * beyond

    def rank_memory(self, ranks: int) -> float:
        """Bytes of memory that each of ``ranks`` on a node has; ranks of a CPU share it."""
        shared = 1 if self.gpu.asynchronous else min(ranks, self.gpus_per_node)
        return self.gpu.memory_bytes / shared

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s across nodes that one GPU has when all GPUs of its node send."""
        return self.across.bandwidth * self.nics_per_node / self.gpus_per_node


def known_hardware() -> dict[str, Path]:
    """Return the descriptions that ship with the package, by name."""
    folder = Path(__file__).parent / "hardware"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def measured_file() -> Path:
    """Return where this machine's own description is kept, by its name on the network."""
    return Path(expanded(f"~/.cache/allometry/machine-{platform.node()}.yaml"))


def load_hardware(name: str) -> HardwareConfig:
    """Read a shipped description (``h100``), ``this-machine``'s own or a YAML file of one.

    Raises ConfigError, one sentence with file, line and key.
    """
    known = known_hardware()
    if name in known:
        file = known[name]
    elif name == THIS_MACHINE:
        file = measured_file()
        if not file.exists():
            raise ConfigError(
                f"{THIS_MACHINE} was not measured yet ({file} is not there); run "
                "allometry doctor --measure"
            )
    elif name.endswith((".yaml", ".yml")):
        file = Path(expanded(name))
    else:
        raise ConfigError(
            f"there is no hardware {name!r}; use one of {', '.join(known)}, {THIS_MACHINE}, "
            "or a YAML file"
        )
    return validate_as(HardwareConfig, parse_file(file))
