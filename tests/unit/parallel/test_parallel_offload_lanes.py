"""Activation offload with delayed copies: order, waits, time, host memory."""

# B sequences, L tokens in a sequence, D width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allometry.configs.model import DenseModel, MoEModel, StandardParameterization
from allometry.configs.precision import PrecisionConfig
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.moe import begin_step, routers
from allometry.models.precision import use_precision
from allometry.models.transformer import Transformer
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.offload.lanes import CudaLane, Transfer
from allometry.parallel.offload.pool import HostPool, Region
from allometry.parallel.offload.store import ActivationStore, _Kept
from allometry.scaling.parameterization import Parameterization
from late_lanes import Machine

CPU = torch.device("cpu")
VOCAB, D, LAYERS, L, SMALL = 32, 32, 5, 32, 1000
DENSE = {"kind": "dense", "vocab_size": VOCAB, "width": D, "num_layers": LAYERS}
DENSE |= {"num_heads": 2, "ffn_width": 48}
EXPERTS = {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 16}
MOE = {**DENSE, "kind": "moe", "experts": EXPERTS, "first_dense_layers": 1}
Checkpointing = Literal["none", "selective", "full"]


def make(
    checkpointing: Checkpointing = "none",
    kind: str = "dense",
    dtype: str = "fp64",
    fp8: bool = False,
) -> Transformer:
    if kind == "dense":
        config: DenseModel | MoEModel = DenseModel.model_validate(DENSE)
    else:
        config = MoEModel.model_validate(MOE)
    parameterization = Parameterization(StandardParameterization(), config)
    model = build_model(config, parameterization, dtype)
    model = model.double() if dtype == "fp64" else model
    initialize(model, parameterization, seed=1)
    if fp8:
        use_precision(model, PrecisionConfig(saved_activations="fp8"), None)
    if checkpointing != "none":
        apply_checkpointing(model, checkpointing, dropout=False)
    return model


def total(model: Transformer, seed: int = 0, length: int = L) -> Tensor:
    """Return the loss of sequences that are one document each."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(VOCAB, (2, length), generator=generator)
    return model(tokens_BL, tokens_BL.roll(-1, 1)).total


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Return gradients of two micro-batches in flight at once, the first one's backward first."""
    if routers(model):
        begin_step(model, 4 * L)
    first, second = total(model, 0), total(model, 1)
    first.backward()
    second.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert found
    return found


def offload(
    model: Transformer, machine: Machine, share: float = 1.0, pool: HostPool | None = None
) -> ActivationStore:
    pool = pool or HostPool(CPU, slab_bytes=2**14)
    store = ActivationStore(model, CPU, share, smallest_bytes=SMALL, lanes=machine.lanes, pool=pool)
    model.call_block = store.call_block
    return store


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("checkpointing", "kind", "fp8", "share"),
    [
        *((how, kind, False, 1.0) for how in get_args(Checkpointing) for kind in ("dense", "moe")),
        ("none", "dense", True, 1.0),
        ("full", "moe", True, 1.0),
        ("none", "moe", False, 0.5),
    ],
)
def test_late_copies_change_no_bit(
    checkpointing: Checkpointing, kind: str, fp8: bool, share: float
) -> None:
    model = make(checkpointing, kind, "fp32" if fp8 else "fp64", fp8)
    expected = gradients(model)
    machine = Machine()
    store = offload(model, machine, share)
    for _ in range(2):  # the second time reuses the first one's memory
        assert same(gradients(model), expected)
    assert machine.out.begun == machine.out.run > 0
    assert machine.back.begun == machine.back.run == machine.out.begun
    assert store.bytes_in == store.bytes_out
    assert store.pool.used_bytes == 0


def test_numbers_of_which_nobody_waits_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    expected = gradients(model)
    offload(model, Machine())
    monkeypatch.setattr(Transfer, "wait", lambda self: self._memory)
    assert not same(gradients(model), expected)


def test_memory_that_is_let_go_too_soon_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    offload(model, Machine())
    free, forgotten = _Kept.free_device_memory, []

    def forget_once(kept: _Kept) -> None:
        if kept._leaving is not None and not forgotten:
            forgotten.append(True)
            kept._leaving._ticket = kept._leaving = None
        free(kept)

    monkeypatch.setattr(_Kept, "free_device_memory", forget_once)
    with pytest.raises(AssertionError, match="memory was let go"):
        gradients(model)


def test_memory_of_the_host_that_is_given_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    expected = gradients(model)
    store = offload(model, Machine())
    take = store.pool.take

    def take_and_give_back(nbytes: int) -> Region:
        region = take(nbytes)
        store.pool.give_back(region)
        return region

    monkeypatch.setattr(store.pool, "take", take_and_give_back)
    monkeypatch.setattr(_Kept, "__del__", lambda kept: None)
    assert not same(gradients(model), expected)


def timed(model: Transformer, machine: Machine, forward_s: float = 1.0) -> None:
    """Give blocks a duration: a forward, and twice as long for the backward."""
    for layer, block in model.blocks.items():
        block.register_forward_hook(lambda *_, n=layer: machine.computes(f"F{n}", forward_s))
        block.attention_norm.register_full_backward_hook(
            lambda *_, n=layer: machine.computes(f"B{n}", 2 * forward_s)
        )


def test_copies_go_behind_the_next_block_and_come_back_one_block_ahead() -> None:
    """Checkpointed blocks offload one tensor, the input, so each copy is one line of the log."""
    model, machine = make("full"), Machine()
    timed(model, machine)
    offload(model, machine)
    total(model).backward()
    forward = "out F0 out F1 [out] out F2 [out] F3 [out] F4"
    backward = "B4 back B3 back [back] B2 back [back] B1 [back] B0"
    wanted = f"{forward} {backward}".replace("[", "wait ").replace("]", "")
    assert " ".join(machine.log) == wanted


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_copies_cost_nothing_while_they_are_shorter_than_a_forward(
    checkpointing: Checkpointing,
) -> None:
    """The condition of ``scaling.offload.Traffic.hides``: a layer's bytes within its forward."""
    model = make(checkpointing)
    store = offload(model, Machine())
    total(model).backward()
    layer_bytes = store.bytes_out / 3
    for copy_s, hidden in ((0.5, True), (1.0, True), (3.0, False)):
        model = make(checkpointing)
        machine = Machine(copy_s / layer_bytes)
        timed(model, machine)
        offload(model, machine)
        total(model).backward()
        computing = 3.0 * LAYERS
        assert (machine.now < computing + 1e-6) == hidden, (copy_s, machine.now)


def test_the_host_is_asked_for_memory_in_the_first_step_alone() -> None:
    model, machine = make(), Machine()
    store = offload(model, machine)
    gradients(model)
    held, allocations = store.pool.held_bytes, store.pool.allocations
    assert allocations > 1
    for _ in range(3):
        gradients(model)
    assert (store.pool.held_bytes, store.pool.allocations) == (held, allocations)
    # Both micro-batches were in flight at once; the difference is unused space in slabs.
    assert store.bytes_out / 4 < held < 1.5 * store.bytes_out / 4


def test_lengths_that_vary_need_no_more_than_the_longest() -> None:
    model, machine = make(), Machine()
    store = offload(model, machine)
    total(model, length=2 * L).backward()
    allocations = store.pool.allocations
    for length in (L, 2 * L - 1, L + 7, 2 * L, L + 1):
        total(model, length=length).backward()
    assert store.pool.allocations == allocations
    assert store.pool.used_bytes == 0


class FakeStream:
    """Record the calls of a CUDA stream, and the current stream."""

    current: FakeStream

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, CPU

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        assert FakeStream.current is self
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_a_cuda_lane_waits_for_computation_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Records its calls to CUDA, in order; tests/gpu has the real test."""
    log: list[str] = []
    computing, other = FakeStream("computing", log), FakeStream("other", log)
    FakeStream.current = computing

    @contextmanager
    def entered(stream: FakeStream) -> Iterator[None]:
        before, FakeStream.current = FakeStream.current, stream
        yield
        FakeStream.current = before

    class Bytes:
        def copy_(self, source: object, non_blocking: bool) -> None:
            log.append(f"{FakeStream.current.name} copies{' and goes on' if non_blocking else ''}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("lane", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    target: Any = Bytes()
    ticket = CudaLane(CPU)(target, target)
    begun = ["lane waits for computing", "lane copies and goes on", "lane records"]
    assert log == begun
    ticket.wait()
    assert log == [*begun, "computing waits for event of lane"]
    FakeStream.current = other
    ticket.wait()
    assert log[4:] == ["computing waits for event of lane", "other waits for event of lane"]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
def test_regions_never_overlap_and_become_whole_again(turns: list[tuple[bool, int]]) -> None:
    pool = HostPool(CPU, slab_bytes=4096)
    held: list[tuple[Region, int]] = []
    for number, (gives, size) in enumerate(turns):
        if gives and held:
            region, mark = held.pop(size % len(held))
            assert bool((region.memory == mark).all())
            pool.give_back(region)
        else:
            region = pool.take(size)
            assert region.memory.numel() == size
            region.memory.fill_(number % 251)
            held.append((region, number % 251))
        assert pool.used_bytes == sum(region.size for region, _ in held)
    for region, mark in held:
        assert bool((region.memory == mark).all())
        pool.give_back(region)
    assert pool.used_bytes == 0
    for _ in range(pool.allocations):
        pool.take(4096)
    assert pool.held_bytes == pool.used_bytes == 4096 * pool.allocations


def test_what_is_larger_than_a_slab_has_one_to_itself() -> None:
    pool = HostPool(CPU, slab_bytes=1024)
    pool.take(5000)
    assert (pool.held_bytes, pool.used_bytes) == (5120, 5120)


def test_no_storage_goes_twice_and_no_parameter_goes() -> None:
    """For every caller: each address of a forward once, and no parameter's."""
    model = make()
    sources: list[int] = []

    class Noting(ActivationStore):
        def send(self, source: Tensor) -> Any:
            sources.append(source.untyped_storage().data_ptr())
            held.append(source)
            return super().send(source)

    held: list[Tensor] = []
    model.call_block = Noting(model, CPU, 1.0, smallest_bytes=SMALL).call_block
    total(model).backward()
    assert sources
    assert len(set(sources)) == len(sources)
    assert not set(sources) & {p.untyped_storage().data_ptr() for p in model.parameters()}
