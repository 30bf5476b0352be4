"""Read the GPUs' temperatures, clocks, ECC errors and throttling reasons through NVML."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from typing_extensions import override

from allometry.configs.checks import CardsConfig
from allometry.parallel.mesh import Mesh
from allometry.trainer.record.alarms import Alarms
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.writer import Row

_REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat (driver)",
    "HwThermalSlowdown": "heat (hardware)",
    "HwPowerBrakeSlowdown": "power brake",
}
_BAD = frozenset(_REASONS.values()) - {"power cap"}
"""Reasons that make a GPU slower than specified; a power cap is normal operation."""


class Reading(NamedTuple):
    """One reading of a GPU; None: not available. ECC errors count from the start of the driver."""

    temperature_c: int | None
    sm_mhz: int | None
    power_w: float | None
    ecc_corrected: int | None
    ecc_uncorrected: int | None
    throttled: tuple[str, ...]


class Card(Protocol):
    """A GPU that can be read."""

    def read(self) -> Reading:
        """Read the GPU; takes less than a millisecond and does not wait for running kernels."""


class NvmlCard:
    """This rank's GPU, through nvidia-ml-py. Raises ImportError or NVML's error if unavailable."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        self._nvml: Any = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> Reading:
        """Read NVML; values that the GPU does not provide are None."""
        nvml, handle = self._nvml, self._handle

        def asked(function: str, *arguments: Any) -> Any:
            with suppress(nvml.NVMLError, AttributeError):
                return getattr(nvml, function)(handle, *arguments)
            return None

        def errors(kind: int) -> Any:
            return asked("nvmlDeviceGetTotalEccErrors", kind, nvml.NVML_VOLATILE_ECC)

        power = asked("nvmlDeviceGetPowerUsage")
        mask = asked("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return Reading(
            temperature_c=asked("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            sm_mhz=asked("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            power_w=None if power is None else power / 1e3,
            ecc_corrected=errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            throttled=tuple(
                said
                for name, said in _REASONS.items()
                if mask & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
            ),
        )


def open_card(device: torch.device) -> tuple[Card | None, str | None]:
    """Return this rank's card, or None and the reason; on a CPU both are None."""
    if device.type != "cuda":
        return None, None
    try:
        return NvmlCard(device), None
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    except Exception as error:  # NVML's own exceptions: no library, no permission
        return None, str(error)


class CardRows(Callback):
    """Reads the GPUs at the configured steps, and compares them; runs on every rank.

    ``open`` returns this rank's card, once the launch has begun. The readings are gathered between
    hosts, without device synchronization.
    """

    def __init__(
        self,
        config: CardsConfig,
        open: Callable[[], tuple[Card | None, str | None]],
        mesh: Mesh,
        report: Reporter,
    ) -> None:
        assert config.every_steps is not None
        self._every, self._slow = config.every_steps, config.slow_percent
        self._open, self._mesh, self._report = open, mesh, report
        self._card: Card | None = None
        self._opened = False
        self._alarms = Alarms()
        self._errors: dict[int, int] = {}  # uncorrected errors at the last reading, by rank
        self._seen: dict[int, list[Reading | None]] = {}

    @override
    def after_step(self, step: int) -> None:
        if not self._opened:
            self._opened = True
            self._card, why = self._open()
            reasons = [one for one in self._mesh.gather_objects(why) if one is not None]
            if reasons:
                self._report("cards_not_read", step=step, reason=reasons[0], ranks=len(reasons))
        if step % self._every == 0:
            reading = None if self._card is None else self._card.read()
            self._seen[step] = self._mesh.gather_objects(reading)

    @override
    def additions(self, finished: FinishedStep) -> Row:
        """Add the extremes over ranks, and report alarms."""
        readings = self._seen.pop(finished.step, [])
        there = {rank: one for rank, one in enumerate(readings) if one is not None}
        if not there:
            return {}
        for kind, details in self._alarms.new(self._findings(there)).items():
            self._report("alarm", step=finished.step, alarm=kind, **details)
        row: Row = {"cards/throttled": sum(bool(one.throttled) for one in there.values())}
        for name, key, extreme in _COLUMNS:
            values = [v for one in there.values() if (v := getattr(one, key)) is not None]
            if values:
                row[f"cards/{name}"] = extreme(values)
        return row

    def _findings(self, there: dict[int, Reading]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        clocks = {rank: one.sm_mhz for rank, one in there.items() if one.sm_mhz is not None}
        usual = statistics.median(clocks.values()) if clocks else 0.0
        slow = {r: mhz for r, mhz in clocks.items() if mhz < usual * (1.0 - self._slow / 100.0)}
        if slow:
            found["card_slow"] = {"sm_mhz": slow, "median": usual}
        reasons = {rank: bad for rank, one in there.items() if (bad := _BAD & {*one.throttled})}
        if reasons:
            found["card_throttled"] = {"ranks": {r: sorted(bad) for r, bad in reasons.items()}}
        more = {}
        for rank, one in there.items():
            count = one.ecc_uncorrected or 0
            if count > self._errors.get(rank, 0):
                more[rank] = count
            self._errors[rank] = count
        if more:
            found["card_ecc"] = {"uncorrected": more}
        return found


_COLUMNS: tuple[tuple[str, str, Callable[[list[Any]], Any]], ...] = (
    ("temperature_c", "temperature_c", max),
    ("sm_mhz", "sm_mhz", min),
    ("power_w", "power_w", sum),
    ("ecc_corrected", "ecc_corrected", sum),
    ("ecc_uncorrected", "ecc_uncorrected", sum),
)
