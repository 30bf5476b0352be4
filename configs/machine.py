"""The description of a cluster's hardware, from which the planner computes times."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from allometry.configs.base import Count, Section
from allometry.configs.errors import ConfigError
from allometry.configs.loader import validate_as
from allometry.configs.paths import expanded
from allometry.configs.renamed import parse

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Generation = Literal["ampere", "hopper", "blackwell", "cdna2", "cdna3", "other"]
THIS_MACHINE = "this-machine"
PeakName = Literal["fp32", "fp16", "bf16", "fp8", "fp4"]


class Accelerator(Section):
    """One GPU; for a card with two dies that run as two devices, one die."""

    peak_flops: dict[PeakName, Positive] = Field(
        min_length=1, description="dense FLOP/s of matrix products by type, without sparsity"
    )
    attainable: dict[PeakName, Share] = Field(
        min_length=1,
        description="fraction of the peak that a large matrix product attains, by type",
    )
    attention: Share = Field(
        description="fraction of the bf16 peak that causal attention attains, forward and "
        "backward, at 4K tokens"
    )
    memory_bytes: Positive = Field(description="device memory in bytes")
    memory_bandwidth: Positive = Field(description="specified memory bandwidth in bytes/s")
    copy_efficiency: Share = Field(description="fraction of memory_bandwidth that a copy attains")
    power_w: Positive = Field(description="maximum power of the board in watts")
    asynchronous: bool = Field(
        default=True,
        description="true: the device computes while the host launches kernels; false: the same "
        "processor does both, as on a CPU",
    )


class Links(Section):
    """Bandwidth and latency of messages between GPUs, in one direction."""

    bandwidth: Positive = Field(description="bytes/s of one GPU (inside) or of one NIC (across)")
    latency_s: Positive = Field(description="latency of one step of a collective, in seconds")


class Host(Section):
    """CPUs, memory and disks of a node."""

    memory_bytes: Positive = Field(description="host memory of a node in bytes")
    bandwidth: Positive = Field(description="bytes/s between the host and one GPU in one direction")
    disk_bandwidth: Positive = Field(description="bytes/s of writes to a node's local disks")
    adam_rate: Positive = Field(description="parameters/s that AdamW updates on a node's CPUs")
    power_w: Positive = Field(description="maximum power of a node without its GPUs, in watts")


class Crowd(Section):
    """Rates of several ranks that share a processor, relative to one rank alone."""

    ranks: Count = Field(gt=1, description="number of concurrent ranks")
    products: Share = Field(description="fraction of the rate of matrix products and attention")
    memory: Share = Field(description="fraction of the memory bandwidth")


class HardwareConfig(Section):
    """A type of node, and the network between nodes of this type."""

    name: str = Field(min_length=1, description="name in tables")
    generation: Generation = Field(
        default="other",
        description="GPU generation; calibrated constants are shared within a generation",
    )
    gpu: Accelerator
    gpus_per_node: Count = Field(gt=0, description="number of GPUs that the inside links connect")
    nics_per_node: Count = Field(gt=0, description="number of NICs of these GPUs together")
    inside: Links
    across: Links
    host: Host
    crowds: tuple[Crowd, ...] = Field(
        default=(), description="rates of ranks that share a processor; empty for GPUs"
    )
    constants: dict[str, Positive] = Field(
        default={}, description="constants of the cost model measured on this hardware, by name"
    )

    def left(self, ranks: int) -> tuple[float, float]:
        """Return the fractions of a rank's rates with ``ranks`` on a node: (products, memory).

        Interpolated linearly between measured numbers of ranks; beyond the last, the ranks share
        its total rate.
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
        """Return the bytes of memory per rank with ``ranks`` on a node; ranks of a CPU share it."""
        shared = 1 if self.gpu.asynchronous else min(ranks, self.gpus_per_node)
        return self.gpu.memory_bytes / shared

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s per GPU across nodes while all GPUs of the node send."""
        return self.across.bandwidth * self.nics_per_node / self.gpus_per_node


def known_hardware() -> dict[str, Path]:
    """Return the descriptions that ship with the package, by name."""
    folder = Path(__file__).parent / "hardware"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def measured_file() -> Path:
    """Return the path of this machine's own description, which contains its network name."""
    return Path(expanded(f"~/.cache/allometry/machine-{platform.node()}.yaml"))


def load_hardware(name: str) -> HardwareConfig:
    """Read a shipped description (``h100``), that of ``this-machine``, or a YAML file.

    Raises:
        ConfigError: one sentence with file, line and key.
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
    return validate_as(HardwareConfig, parse(file, "hardware"))
