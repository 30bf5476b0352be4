"""The description of a cluster's hardware: what the planner computes times from."""

from __future__ import annotations

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


class Links(Section):
    """What messages between GPUs take, in one direction."""

    bandwidth: Positive = Field(description="bytes/s of one GPU (inside) or of one NIC (across)")
    latency_s: Positive = Field(description="seconds of one step of a collective")


class Host(Section):
    """The CPU side of a node."""

    memory_bytes: Positive = Field(description="host memory of a node")
    bandwidth: Positive = Field(description="bytes/s between the host and one GPU, one direction")
    disk_bandwidth: Positive = Field(description="bytes/s of a node's local disk")


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

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s across nodes that one GPU has when all GPUs of its node send."""
        return self.across.bandwidth * self.nics_per_node / self.gpus_per_node


def known_hardware() -> dict[str, Path]:
    """Return the descriptions that ship with the package, by name."""
    folder = Path(__file__).parent / "hardware"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_hardware(name: str) -> HardwareConfig:
    """Read a shipped description (``h100``) or a YAML file of one.

    Raises ConfigError, one sentence with file, line and key.
    """
    known = known_hardware()
    if name in known:
        file = known[name]
    elif name.endswith((".yaml", ".yml")):
        file = Path(expanded(name))
    else:
        raise ConfigError(
            f"there is no hardware {name!r}; use one of {', '.join(known)}, or a YAML file"
        )
    return validate_as(HardwareConfig, parse_file(file))
