"""GPU readings from a fake NVML, and the conditions for an alarm."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allometry.configs.checks import CardsConfig
from allometry.trainer.record.cards import CardRows, NvmlCard, Reading, open_card
from run_folders import undeclared

GOOD = Reading(60, 1980, 650.0, 0, 0, ())


class FakeNvml:
    """The part of pynvml in use; None values raise an error."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_VOLATILE_ECC = 0, 1, 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwThermalSlowdown = 64

    class NVMLError(Exception):
        pass

    def __init__(self, ecc: bool = True) -> None:
        self.ecc = ecc

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 71

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return 1755

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 512_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 4 | 64

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        if not self.ecc:
            raise self.NVMLError("Not Supported")
        return 3 + kind


class FakeMesh:
    """Four ranks with given readings of the other ranks."""

    def __init__(self) -> None:
        self.others: list[Reading | None] = [GOOD] * 3

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, *(self.others if isinstance(value, Reading) else [value] * 3)]


class Cards:
    def __init__(self) -> None:
        self.reading = GOOD

    def read(self) -> Reading:
        return self.reading


@pytest.mark.parametrize("ecc", [True, False])
def test_what_nvml_says(monkeypatch: pytest.MonkeyPatch, ecc: bool) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(ecc))
    properties = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    errors = (3, 4) if ecc else (None, None)
    reading = NvmlCard(torch.device("cuda", 0)).read()
    assert reading == Reading(71, 1755, 512.5, *errors, ("power cap", "heat (hardware)"))


def test_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_card(torch.device("cpu")) == (None, None)
    card, why = open_card(torch.device("cuda", 0))
    assert card is None
    assert "pip install nvidia-ml-py" in str(why)


def test_rows_and_alarms() -> None:
    said: list[tuple[str, dict[str, Any]]] = []

    def report(kind: str, **details: Any) -> None:
        said.append((kind, details))

    mesh, card = FakeMesh(), Cards()
    rows = CardRows(CardsConfig(every_steps=2), lambda: (card, None), mesh, report)  # type: ignore[arg-type]

    def step(number: int, reading: Reading) -> dict[str, Any]:
        card.reading = reading
        said.clear()
        rows.after_step(number)
        return rows.additions(SimpleNamespace(step=number))  # type: ignore[arg-type]

    assert step(1, GOOD) == {}
    row = step(2, GOOD._replace(temperature_c=80, throttled=("power cap",)))
    assert row["cards/temperature_c"] == 80
    assert row["cards/power_w"] == 4 * 650.0
    assert row["cards/throttled"] == 1
    assert not undeclared(row)
    assert said == []
    step(4, GOOD._replace(sm_mhz=1500, ecc_uncorrected=2, throttled=("power brake",)))
    alarms = {details["alarm"]: details for _, details in said}
    assert alarms["card_slow"]["sm_mhz"] == {0: 1500}
    assert alarms["card_slow"]["median"] == 1980
    assert alarms["card_throttled"]["ranks"] == {0: ["power brake"]}
    assert alarms["card_ecc"]["uncorrected"] == {0: 2}
    step(6, GOOD._replace(sm_mhz=1500, ecc_uncorrected=2))
    assert said == []  # reported before, without new errors
    mesh.others = [None] * 3
    assert step(8, GOOD._replace(sm_mhz=900))["cards/sm_mhz"] == 900
    assert said == []  # no reference to be slow against


def test_cards_that_cannot_be_read_are_said_once() -> None:
    said: list[str] = []
    rows = CardRows(
        CardsConfig(every_steps=1),
        lambda: (None, "no library"),
        FakeMesh(),  # type: ignore[arg-type]
        lambda kind, **details: said.append(kind),  # type: ignore[arg-type]
    )
    for number in (1, 2):
        rows.after_step(number)
        assert rows.additions(SimpleNamespace(step=number)) == {}  # type: ignore[arg-type]
    assert said == ["cards_not_read"]
