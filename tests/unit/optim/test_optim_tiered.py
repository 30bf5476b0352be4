"""The tiered optimizer on one process, for every rule: placement, and buckets in flight."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allometry.configs.execution import OptimizerStates, Zero
from allometry.optim.fp8_states import Fp8States
from allometry.optim.matrix_ops import LocalMatrixOps
from allometry.optim.offload import stream as streams
from allometry.optim.offload.plan import Tier, assign
from allometry.optim.offload.stream import HostHome, Stream
from allometry.optim.offload.swap import StatesLost
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.tiered import TieredOptimizer
from allometry.scaling.update_rules import UPDATE_RULES
from rule_groups import give, group, weights

SHAPES = {f"w{i}": (96, 64 + 32 * (i % 3)) for i in range(7)} | {"norm": (1, 20)}


def tiered(
    rule: str,
    parameters: Mapping[str, nn.Parameter],
    states: dict[str, Any],
    fp8: Fp8States | None = None,
    **more: Any,
) -> TieredOptimizer:
    zero = Zero(optimizer_states=OptimizerStates.model_validate({"bucket_mib": 0.15} | states))
    sizes = {name: 8 * parameter.numel() for name, parameter in parameters.items()}
    made = group(rule, parameters, **({"fp8": fp8} if fp8 else {}))
    return TieredOptimizer([made], LocalMatrixOps(), zero, sizes, **more)


def all_states(optimizer: RuleOptimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    names = {parameter: name for name, parameter in parameters.items()}
    found = {
        f"{names[p]}.{key}": value.clone()  # type: ignore[index]
        for p, held in optimizer.state.items()
        for key, value in held.items()
    }
    if isinstance(optimizer, TieredOptimizer):
        for p, key, stored in optimizer.stored():
            assert f"{names[p]}.{key}" not in found  # type: ignore[index]
            found[f"{names[p]}.{key}"] = stored.read().clone()  # type: ignore[index]
    return found


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("place", ["cpu", "nvme", "all"])
def test_every_rule_has_the_bits_of_memory(rule: str, place: str, tmp_path: Path) -> None:
    states = {
        "cpu": {},
        "nvme": {"nvme": str(tmp_path)},
        "all": {"device": 0.3, "cpu": 0.3, "nvme": str(tmp_path)},
    }[place]
    one, other = weights(SHAPES), weights(SHAPES)
    plain = RuleOptimizer([group(rule, one)])
    moving = tiered(rule, other, states)
    for step in range(1, 8):
        give(one, step)
        give(other, step)
        plain.step()
        moving.step()
        if step == 4:  # like a checkpoint between steps
            assert all_states(moving, other).keys() == all_states(plain, one).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    wanted, got = all_states(plain, one), all_states(moving, other)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    held = moving.held_bytes()
    travels = sum(held[tier] for tier in (Tier.CPU, Tier.NVME))
    assert travels > 0 or rule == "apollo_mini"  # its states are too small to offload
    assert held[Tier.DEVICE] + travels == sum(each.nbytes for each in wanted.values())
    if place == "all" and travels:
        assert all(held.values())


@pytest.mark.parametrize("rule", ["adamw", "muon", "muonh", "adamh"])
@pytest.mark.parametrize("place", ["nvme", "all"])
def test_states_in_fp8_have_the_bits_of_memory(rule: str, place: str, tmp_path: Path) -> None:
    """Twenty steps with stochastic rounding."""
    states = {"device": 0.3, "cpu": 0.3} if place == "all" else {}
    fp8 = Fp8States("stochastic", 3)
    one, other = weights(SHAPES), weights(SHAPES)
    plain = RuleOptimizer([group(rule, one, fp8=fp8)])
    moving = tiered(rule, other, {"nvme": str(tmp_path), "bucket_mib": 0.05} | states, fp8=fp8)
    for step in range(1, 21):
        give(one, step)
        give(other, step)
        plain.step()
        moving.step()
        if step == 10:
            assert all_states(moving, other).keys() == all_states(plain, one).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    wanted, got = all_states(plain, one), all_states(moving, other)
    codes = {name for name in wanted if name.endswith(".q")}
    assert len(codes) == (2 if rule in ("adamw", "adamh") else 1) * len(SHAPES)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        bits = [each.view(torch.uint8) if name in codes else each for each in (tensor, got[name])]
        assert torch.equal(*bits), name
    held = moving.held_bytes()
    assert sum(held.values()) == sum(each.nbytes for each in wanted.values())
    assert held[Tier.NVME] > (sum(wanted[name].nbytes for name in codes) / 4)
    assert place == "nvme" or held[Tier.CPU] > 0


CUT_SHAPES = {"odd": (601, 61), "experts": (3, 80, 50), "vector": (9000,), "small": (20, 30)}


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("place", ["cpu", "nvme", "all"])
def test_large_parameters_travel_in_pieces(rule: str, place: str, tmp_path: Path) -> None:
    """Slots are no larger than a bucket, and results equal those of full parameters bitwise."""
    states: dict[str, Any] = {
        "cpu": {},
        "nvme": {"nvme": str(tmp_path)},
        "all": {"device": 0.1, "cpu": 0.3, "nvme": str(tmp_path)},
    }[place]
    shapes = {name: s for name, s in CUT_SHAPES.items() if rule != "muon" or name != "vector"}
    one, other, third = weights(shapes), weights(shapes), weights(shapes)
    plain = RuleOptimizer([group(rule, one)])
    moving = tiered(rule, other, states | {"bucket_mib": 0.04})
    for step in range(1, 6):
        for parameters in (one, other):
            give(parameters, step)
        plain.step()
        moving.step()
    wanted, got = all_states(plain, one), all_states(moving, other)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert moving._stream is not None
    most = max(len(slot.device) for slot in moving._stream._slots)
    whole = max(4 * parameter.numel() for parameter in one.values())
    assert (most >= whole) if rule == "muon" else (most < 0.05 * 2**20 < whole)
    assert set(moving.state) == set(other.values()), "what stands for pieces is not remembered"
    # Load the saved states into an optimizer with different pieces.
    again = tiered(rule, third, {"bucket_mib": 0.03})
    again.init_states()
    for name, parameter in one.items():
        third[name].data.copy_(parameter)
        for key, value in plain.state[parameter].items():
            if key in again.state[third[name]]:
                again.state[third[name]][key].copy_(value)
    for p, key, stored in again.stored():
        name = next(name for name, parameter in third.items() if parameter is p)
        stored.write(plain.state[one[name]][key])
    for step in (6, 7):
        for parameters, optimizer in ((one, plain), (third, again)):
            give(parameters, step)
            optimizer.step()
    assert all(torch.equal(one[name], third[name]) for name in one)


def test_what_is_loaded_between_steps_is_used(tmp_path: Path) -> None:
    """Prefetched buckets are fetched again."""
    one, other = weights(SHAPES), weights(SHAPES)
    first, second = (
        tiered("adamw", parameters, {"nvme": str(tmp_path)}) for parameters in (one, other)
    )
    for step in range(1, 4):
        give(one, step)
        first.step()
    for step in range(1, 3):  # to create its own states and prefetch some
        give(other, step + 100)
        second.step()
    with torch.no_grad():
        for name, parameter in one.items():
            other[name].copy_(parameter)
    for p, key, stored in second.stored():
        name = next(name for name, parameter in other.items() if parameter is p)
        taken = next(s for q, k, s in first.stored() if q is one[name] and k == key)
        stored.write(taken.read())
    for name, parameter in one.items():
        for key, value in first.state[parameter].items():
            second.state[other[name]][key].copy_(value)
    for step in range(4, 8):
        give(one, step)
        give(other, step)
        first.step()
        second.step()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_failed_write_ends_the_run_at_the_next_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = weights(SHAPES)
    moving = tiered("adamw", parameters, {"nvme": str(tmp_path)})
    give(parameters, 1)
    moving.step()
    assert moving._swap is not None

    def full(data: Any, start: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moving._swap, "_pwrite", full)

    def use_all() -> None:
        for _ in range(2):
            moving.step()

    with pytest.raises(StatesLost, match=r"writing .*nvme=.* failed: No space left on device"):
        use_all()


def test_a_checkpoint_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    one, other = weights(SHAPES), weights(SHAPES)
    plain, moving = (RuleOptimizer([group("adamw", one)]), tiered("adamw", other, {}))
    for step in (1, 2):
        give(one, step)
        give(other, step)
        plain.step()
        moving.step()
    assert moving._stream is not None
    gate = threading.Event()
    empty = HostHome.empty

    def slow(self: HostHome, slot: Any) -> None:
        assert gate.wait(10)
        empty(self, slot)

    threading.Timer(0.2, gate.set).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostHome, "empty", slow)
        give(one, 3)
        give(other, 3)
        plain.step()
        moving.step()
        wanted, got = all_states(plain, one), all_states(moving, other)
    assert gate.is_set()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_device_that_hangs_is_said_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(HostHome, "fill", lambda self, slot: gate.wait(10))
    homes = [HostHome([8192], torch.device("cpu"))]
    stream = Stream(homes, torch.device("cpu"), 0.05, files=False)
    try:
        with pytest.raises(StatesLost, match=r"longer than parallel.timeout_s=0.05"):
            stream.take()
    finally:
        gate.set()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_homes_keep_their_own_bytes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For few homes too, and with delayed threads."""
    monkeypatch.setattr(streams, "SLOTS", 3)
    homes = [HostHome([4096], torch.device("cpu")) for _ in range(count)]
    stream = Stream(homes, torch.device("cpu"), 5.0, files=False)
    for turn in range(1, 9):
        for number in range(count):
            flat = stream.take()
            assert int(flat[0]) == int(flat[-1]) == (turn - 1) * (number + 1) % 256
            flat.add_(number + 1)
            stream.give_back()
        if turn == 5:
            stream.drain()
    stream.drain()
    assert [int(home.get(0)[17]) for home in homes] == [8 * (n + 1) for n in range(count)]


@pytest.mark.parametrize("place", ["cpu", "nvme", "all"])
def test_slots_apart_from_the_host(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where bytes of a file reach the device through the host."""
    inner = streams.Slot.__init__

    def apart(self: streams.Slot, nbytes: int, device: torch.device, *, files: bool) -> None:
        inner(self, nbytes, device, files=files)
        self.device = torch.full((nbytes,), 255, dtype=torch.uint8)

    monkeypatch.setattr(streams.Slot, "__init__", apart)
    test_every_rule_has_the_bits_of_memory("muonh", place, tmp_path)


def test_places_are_filled_to_their_limits_and_no_further() -> None:
    sizes = [10] * 20
    for near, middle in ((0, 0), (0, 100), (50, 50), (200, 0), (95, 1000), (5, 5)):
        limits = {Tier.DEVICE: near, Tier.CPU: middle, Tier.NVME: 200}
        tiers = assign(sizes, limits)
        held = {tier: 10 * tiers.count(tier) for tier in Tier}
        assert held[Tier.DEVICE] <= near
        assert held[Tier.CPU] <= middle
        assert held[Tier.DEVICE] == min(near // 10 * 10, 200)
    mixed = [512, *[10] * 20, 300, 512]
    roomy = assign(mixed, {Tier.DEVICE: 350, Tier.CPU: 64 << 30, Tier.NVME: sum(mixed)})
    assert Tier.NVME not in roomy, "the host has room for all that the device leaves"
    half = assign(sizes, {Tier.DEVICE: 100, Tier.CPU: 200})
    assert half.count(Tier.DEVICE) == 10
    assert len(set(half[:4])) == 2, "what stays and what travels alternate"


def test_a_rehearsal_makes_no_file_and_leaves_states_where_they_are(tmp_path: Path) -> None:
    parameters = weights(SHAPES)
    folder = tmp_path / "swap"
    moving = tiered("adamw", parameters, {"nvme": str(folder)}, still=True)
    give(parameters, 1)
    moving.step()
    assert not folder.exists()
    assert all({"exp_avg", "exp_avg_sq", "step"} <= moving.state[p].keys() for p in moving.state)


def test_a_tensor_that_a_rule_makes_anew_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """States may be replaced instead of changed in place."""
    from allometry.optim import lion as module

    inner = module.lion

    def replacing(items: Any, state: Any, ops: Any) -> None:
        inner(items, state, ops)
        for item in items:
            held: dict[str, Tensor] = state[item.parameter]
            held["exp_avg"] = held["exp_avg"].clone()

    one, other = weights(SHAPES), weights(SHAPES)
    plain, moving = RuleOptimizer([group("lion", one)]), tiered("lion", other, {})
    for step in range(1, 5):
        give(one, step)
        give(other, step)
        plain.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "lion", replacing)
            moving.step()
    assert all(torch.equal(one[name], other[name]) for name in one)
