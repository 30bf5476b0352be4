"""Activation offload to the host: bitwise gradients, bytes moved, memory held and released."""

# B sequences, L tokens in a sequence, D width

import gc
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from allometry.configs.model import DenseModel, MoEModel, StandardParameterization
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.init import initialize
from allometry.models.moe import begin_step
from allometry.models.transformer import Part, Transformer
from allometry.parallel.apply import compile_parts
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.offload.lanes import Transfer
from allometry.parallel.offload.pool import Region
from allometry.parallel.offload.store import SMALLEST_BYTES, ActivationStore, apply_offload
from allometry.scaling.offload import offloaded_layers
from allometry.scaling.parameterization import Parameterization

CPU = torch.device("cpu")
VOCAB, D, F, LAYERS, L = 32, 16, 24, 5, 48
SMALL = 1000  # bytes: activations [L, D] are larger, document bounds and statistics smaller
DENSE = {"kind": "dense", "vocab_size": VOCAB, "width": D, "num_layers": LAYERS}
DENSE |= {"num_heads": 2, "ffn_width": F}
EXPERTS = {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 8}

Kind = Literal["dense", "moe"]


def make(kind: Kind = "dense", dtype: str = "fp32", part: Part | None = None, **more: Any) -> Any:
    if kind == "dense":
        config: DenseModel | MoEModel = DenseModel.model_validate({**DENSE, **more})
    else:
        changes = {"kind": "moe", "experts": EXPERTS, "first_dense_layers": 1}
        config = MoEModel.model_validate({**DENSE, **changes, **more})
    parameterization = Parameterization(StandardParameterization(), config)
    model = build_model(config, parameterization, dtype, part)
    initialize(model, parameterization, seed=1)
    if kind == "moe":
        begin_step(model, L)
    return model


def documents(share: float, length: int = L) -> Documents:
    cut = length // 3
    cuts = torch.tensor([0, cut, length], dtype=torch.int32)
    positions_BL = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
    return Documents(cuts, length - cut, positions_BL, offload=share)


def forward(model: Transformer, share: float, seed: int = 0, length: int = L) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(VOCAB, (1, length), generator=generator)
    return model(tokens_BL, tokens_BL.roll(-1, 1), documents(share, length)).total


def take_gradients(model: Transformer) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert gradients
    return gradients


def gradients(model: Transformer, share: float) -> dict[str, Tensor]:
    forward(model, share).backward()
    return take_gradients(model)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watched(ActivationStore):
    """Store that records the memory of each copy by weak reference."""

    def __init__(self, part: Transformer, smallest_bytes: int = SMALL) -> None:
        super().__init__(part, CPU, smallest_bytes=smallest_bytes)
        part.call_block = self.call_block
        self.sources: list[StorageWeakRef] = []
        self.hosts: list[StorageWeakRef] = []
        self.arrivals: list[StorageWeakRef] = []

    def send(self, source: Tensor) -> tuple[Region, Transfer]:
        host, transfer = super().send(source)
        self.sources.append(StorageWeakRef(source.untyped_storage()))
        self.hosts.append(StorageWeakRef(host.memory.untyped_storage()))
        assert self.sources[-1].cdata != self.hosts[-1].cdata
        return host, transfer

    def fetch(self, host: Tensor) -> Transfer:
        transfer = super().fetch(host)
        self.arrivals.append(StorageWeakRef(transfer.wait().untyped_storage()))
        return transfer


def alive(references: list[StorageWeakRef]) -> int:
    return sum(not reference.expired() for reference in references)


def test_number_of_layers():
    assert [offloaded_layers(share, 5) for share in (0.0, 1 / 3, 0.5, 2 / 3, 1.0)] == [
        0,
        1,
        2,
        2,
        3,
    ]
    # A share that equals n layers gives n layers, despite the rounding of the division.
    for layers in range(3, 130):
        for number in range(layers - 1):
            assert offloaded_layers(number / (layers - 2), layers) == number
    assert [offloaded_layers(1.0, layers) for layers in (0, 1, 2, 3)] == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_gradients_are_the_same_to_the_bit(kind: Kind, dtype: str):
    model = make(kind, dtype)
    expected = gradients(model, 0.0)
    moved = []
    for share in (0.0, 0.5, 1.0):
        store = Watched(model)
        assert same(gradients(model, share), expected)
        assert store.bytes_in == store.bytes_out
        moved.append(store.bytes_out)
    assert moved[0] == 0 < moved[1] < moved[2]


def test_what_came_back_is_what_is_computed_with():
    """The control of all comparisons here: lost bytes are detected."""

    class Losing(ActivationStore):
        def fetch(self, host: Tensor) -> Transfer:
            return super().fetch(torch.zeros_like(host))

    model = make()
    expected = gradients(model, 0.0)
    model.call_block = Losing(model, CPU, smallest_bytes=SMALL).call_block
    assert not same(gradients(model, 1.0), expected)


def test_bytes_that_move_are_those_of_the_earliest_layers():
    """Each saved activation once: by hand, for a dense layer in fp32."""
    model = make()
    # Inputs and outputs of both norms, q, k, v and the attention's output: D wide. Gate, its SiLU,
    # up and their product: F wide. Norms on a CPU also save their input times rsqrt.
    layer = 4 * L * (8 * D + 4 * F + 2 * D)
    for share, layers in ((0.3, 1), (2 / 3, 2), (1.0, 3)):
        store = Watched(model)
        gradients(model, share)
        assert store.bytes_out == layers * layer, (share, layer)


def test_small_tensors_parameters_and_shared_ones_stay():
    """Wide weights, their casts and tables stay; only the tokens' own activations are offloaded."""
    model = make(dtype="bf16", width=128, num_heads=32, num_kv_heads=32, ffn_width=320)
    moved = set()

    class Noting(Watched):
        def send(self, source: Tensor) -> tuple[Region, Transfer]:
            moved.add(source.numel())
            return super().send(source)

    Noting(model, smallest_bytes=1000)
    gradients(model, 1.0)
    # [L, D] in bf16 and widened to fp32 by the norms, [L, F] and [L, 2F] of gate and up together,
    # log-sum-exp of each head in fp32.
    assert moved == {L * 128 * 2, L * 128 * 4, L * 320 * 2, L * 640 * 2, L * 32 * 4}
    # Not moved: [D, D] and [D, F] in fp32 or bf16, whose sizes differ from all of these, and tables
    # [L, 2] in fp32, 384 bytes; nor any tensor below the default limit.
    apply_offload(model, CPU)
    store = Watched(model, SMALLEST_BYTES)
    gradients(model, 1.0)
    assert store.bytes_out == 0


def test_default_limit_moves_what_is_large():
    model = make()
    store = apply_offload(model, CPU)
    expected = forward(model, 0.0, length=1024)
    expected.backward()
    without = take_gradients(model)
    assert store.bytes_out == 0
    forward(model, 1.0, length=1024).backward()
    assert same(take_gradients(model), without)
    assert store.bytes_out == store.bytes_in > 3 * SMALLEST_BYTES


class LiveBytes(TorchDispatchMode):
    """Measure the peak bytes of live results, except those in ``elsewhere``."""

    def __init__(self, elsewhere: Callable[[], list[StorageWeakRef]]) -> None:
        super().__init__()
        self.peak, self._elsewhere = 0, elsewhere
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._seen = {key: seen for key, seen in self._seen.items() if not seen[0].expired()}
        away = {reference.cdata for reference in self._elsewhere()}
        self.peak = max(
            self.peak, sum(size for key, (_, size) in self._seen.items() if key not in away)
        )
        return made


@pytest.mark.parametrize("layers", [6, 10])
def test_what_is_held_on_the_device_falls(layers: int):
    """At share 1 the device stores the saved tensors of two layers, and one layer's working set."""
    model = make(num_layers=layers)
    forward(model, 0.0).backward()
    grads = [StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters()]
    peaks, layer = [], 4 * L * (10 * D + 4 * F)
    for share in (0.0, 1.0):
        store = Watched(model)
        store.pool.give_back(store.pool.take(1))
        (slab,) = (StorageWeakRef(memory.untyped_storage()) for memory in store.pool._slabs)
        with LiveBytes(lambda slab=slab: [slab, *grads]) as live:
            forward(model, share).backward()
        peaks.append(live.peak)
    assert peaks[0] - peaks[1] > (layers - 2.1) * layer, (peaks, layer)


def test_sources_go_at_once_and_copies_come_back_one_block_ahead():
    model = make()
    store = Watched(model)
    held: list[tuple[int, int]] = []
    total = forward(model, 1.0)
    assert alive(store.sources) == 0
    per_layer = len(store.hosts) // 3
    assert 3 * per_layer == len(store.hosts)
    assert store.pool.used_bytes >= store.bytes_out

    def note(module: Any, grad_input: Any, grad_output: Any) -> None:
        held.append((len(store.arrivals), alive(store.arrivals)))

    for block in model.blocks.values():  # the end of a block's backward
        block.attention_norm.register_full_backward_hook(note)
    take = forward(model, 1.0, seed=1)
    del total
    take.backward()
    # Blocks 4 to 0: block 2's tensors return while block 3 runs, and so on; used tensors are freed.
    assert [arrived for arrived, _ in held] == [n * per_layer for n in (0, 1, 2, 3, 3)]
    assert max(there for _, there in held) < 2 * per_layer
    assert alive(store.arrivals) == store.pool.used_bytes == 0


def test_nothing_is_left_after_a_backward_or_without_one():
    model = make("moe")
    store = Watched(model)
    gc.disable()
    try:
        total = forward(model, 1.0)
        assert store.pool.used_bytes > 0
        total.backward()
        # The loss is still alive, with its graph's nodes only.
        assert store.pool.used_bytes == alive(store.arrivals) == alive(store.sources) == 0
        dropped = forward(model, 1.0)
        assert store.pool.used_bytes > 0
        del dropped
        assert store.pool.used_bytes == alive(store.arrivals) == alive(store.sources) == 0
    finally:
        gc.enable()
    take_gradients(model)


def test_micro_batches_in_flight_do_not_mix():
    model = make("moe")
    shares = (1.0, 0.0, 0.5)
    for turn in ([0, 1, 2], [2, 0, 1]):
        for seed in turn:
            forward(model, 0.0, seed).backward()
        expected = take_gradients(model)
        store = Watched(model)
        totals = [forward(model, share, seed) for seed, share in enumerate(shares)]
        for seed in turn:
            totals[seed].backward()
        assert same(take_gradients(model), expected)
        assert store.bytes_in == store.bytes_out
        assert store.pool.used_bytes == 0


def test_evaluation_moves_nothing():
    model = make()
    store = Watched(model)
    with torch.no_grad():
        forward(model, 1.0)
    assert store.bytes_out == 0


def test_a_retained_graph_is_read_twice():
    model = make()
    expected = gradients(model, 0.0)
    store = Watched(model)
    total = forward(model, 1.0)
    total.backward(retain_graph=True)
    assert same(take_gradients(model), expected)
    total.backward()
    assert same(take_gradients(model), expected)
    assert store.bytes_in == 2 * store.bytes_out
    assert store.pool.used_bytes == 0


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_backward_in_two_halves(kind: Kind):
    """As in zero-bubble schedules: gradients of inputs first, those of weights later."""
    part = make(kind, part=Part(range(LAYERS), first=False, last=False))
    tokens_BL = torch.zeros(1, L, dtype=torch.int64)
    grad_BLD = torch.randn(1, L, D, generator=torch.Generator().manual_seed(2))

    def run(share: float) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(3)
        x_BLD = torch.randn(1, L, D, generator=generator).requires_grad_()
        y_BLD = part(tokens_BL, None, documents(share), x_BLD)
        inputs, groups = stage_backward_input([y_BLD], [grad_BLD], [x_BLD], part.parameters())
        stage_backward_weight(part.parameters(), groups)
        assert inputs[0] is not None
        return inputs[0], take_gradients(part)

    expected_x, expected = run(0.0)
    store = Watched(part)
    x, gradient = run(1.0)
    assert torch.equal(x, expected_x)
    assert same(gradient, expected)
    assert store.bytes_out <= store.bytes_in <= 2 * store.bytes_out
    gc.collect()  # torch's split backward leaves cycles
    assert store.pool.used_bytes == alive(store.arrivals) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_with_checkpointing(checkpointing: Literal["full", "selective"], kind: Kind, dtype: str):
    """A recomputed layer offloads its input and the tensors saved by selective checkpointing."""
    model = make(kind, dtype)
    apply_checkpointing(model, checkpointing, dropout=False)
    expected = gradients(model, 0.0)
    store = Watched(model)
    total = forward(model, 1.0)
    assert alive(store.sources) == 0
    total.backward()
    assert same(take_gradients(model), expected)
    assert store.bytes_in == store.bytes_out
    assert store.pool.used_bytes == alive(store.arrivals) == 0
    inputs = 3 * L * D * (2 if dtype == "bf16" else 4)
    if checkpointing == "full":
        assert store.bytes_out == inputs
    else:
        assert store.bytes_out > 4 * inputs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_compiled_blocks_stay_whole(checkpointing: Literal["none", "full", "selective"]):
    model = make(dtype="bf16")
    if checkpointing != "none":
        apply_checkpointing(model, checkpointing, dropout=False)
    compile_parts(model)  # fails on a graph break
    expected = gradients(model, 0.0)
    store = Watched(model)
    total = forward(model, 1.0)
    assert alive(store.sources) == 0
    total.backward()
    assert same(take_gradients(model), expected)
    assert store.bytes_in == store.bytes_out >= 3 * L * D * 2
    assert store.pool.used_bytes == alive(store.arrivals) == 0
    # Code compiled with the hooks installed is the same.
    torch.compiler.reset()
    assert same(gradients(model, 1.0), expected)
