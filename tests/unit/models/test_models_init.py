"""Initial values are bitwise the same in every layout."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from allometry.configs.model import (
    DenseModel,
    HyperP,
    MaximalUpdateParameterization,
    StandardParameterization,
)
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import Box, draw_rows, fill_random, initialize, local_box
from allometry.scaling.parameterization import Parameterization

MODEL = DenseModel(
    vocab_size=512, width=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=96, qk_norm=True
)
SP = Parameterization(StandardParameterization(), MODEL)


def part(shape, offset, size, name="w", seed=0, kind="normal", alike=False) -> torch.Tensor:
    local = torch.full(size, float("nan"))
    fill_random(Box(local, shape, offset), kind, 0.5, name, seed, alike=alike)
    return local


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(37, 20), (5, 3), (3, 7, 20), (11,)], ids=str)
def test_a_shard_holds_the_same_bits(shape, kind):
    whole = part(shape, (0,) * len(shape), shape, kind=kind)
    assert whole.isfinite().all()
    for dim, length in enumerate(shape):
        for start, stop in [(0, 1), (0, length), (1, length), (length // 2, length), (2, 2)]:
            size = list(shape)
            size[dim] = stop - start
            offset = [0] * len(shape)
            offset[dim] = start
            expected = whole.narrow(dim, start, stop - start)
            got = part(shape, tuple(offset), tuple(size), kind=kind)
            assert torch.equal(got, expected)


def test_a_corner_holds_the_same_bits():
    whole = part((4, 6, 20), (0, 0, 0), (4, 6, 20))
    corner = part((4, 6, 20), (1, 2, 5), (2, 3, 9))
    assert torch.equal(corner, whole[1:3, 2:5, 5:14])


def test_many_rows_and_threads_change_nothing():
    whole = part((1000, 20), (0, 0), (1000, 20))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(part((1000, 20), (0, 0), (1000, 20)), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(part((1000, 20), (700, 0), (300, 20)), whole[700:])
    assert whole.unique(dim=0).shape[0] == 1000


def test_a_row_is_what_the_contract_says():
    number = int.from_bytes(hashlib.sha256(b"5|some.name|3").digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    expected = torch.empty(20, dtype=torch.float64).normal_(generator=generator)
    assert torch.equal(draw_rows([3], 20, "some.name", 5)[0], expected)


def test_name_and_seed_decide():
    values = [part((8, 20), (0, 0), (8, 20), name, seed) for name in "ab" for seed in (0, 1)]
    for i, one in enumerate(values):
        assert not any(torch.equal(one, other) for other in values[:i])


def test_numbers_are_normal():
    x = part((4096, 64), (0, 0), (4096, 64)) / 0.5
    assert float(x.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(x.std()) == pytest.approx(1.0, abs=0.01)
    assert float(x.pow(4).mean()) == pytest.approx(3.0, abs=0.1)
    # Rows and columns are independent.
    assert (x.T @ x / 4096 - torch.eye(64)).abs().max() < 0.1


def test_uniform_numbers_fill_their_interval():
    x = part((4096, 64), (0, 0), (4096, 64), kind="uniform") / 0.5
    assert float(x.abs().max()) == pytest.approx(3**0.5, abs=1e-3)
    assert float(x.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(x.std()) == pytest.approx(1.0, abs=0.01)
    assert float(x.pow(4).mean()) == pytest.approx(1.8, abs=0.02)  # 9/5
    assert x.unique(dim=0).shape[0] == 4096


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_experts_that_start_alike_are_the_first_one_on_every_shard(kind):
    shape = (5, 7, 20)
    apart = part(shape, (0, 0, 0), shape, kind=kind)
    alike = part(shape, (0, 0, 0), shape, kind=kind, alike=True)
    assert torch.equal(alike, apart[:1].expand(shape))
    assert not torch.equal(apart[1], apart[0])
    some = part(shape, (3, 2, 5), (2, 4, 9), kind=kind, alike=True)
    assert torch.equal(some, alike[3:, 2:6, 5:14])


@pytest.mark.parametrize("parameterization", ["sp", "mup", "hyperp"])
def test_every_parameter_gets_its_own_std(parameterization):
    rules = SP
    if parameterization == "mup":
        rules = Parameterization(MaximalUpdateParameterization(base_width=16), MODEL)
    if parameterization == "hyperp":
        rules = Parameterization(HyperP(base_width=16, base_layers=1), MODEL)
    model = build_model(MODEL, rules, "fp32")
    initialize(model, rules, seed=1)
    for name, spec in parameter_specs(model).items():
        value = model.get_parameter(name).detach()
        resolved = rules.resolve(spec)
        if resolved.init_kind == "ones":
            assert (value == 1.0).all()
        else:
            assert resolved.init_std > 0
            bounded = value.abs().max() <= resolved.init_std * 3**0.5 * (1 + 1e-6)
            assert bounded == (resolved.init_kind == "uniform")
            assert float(value.std()) == pytest.approx(resolved.init_std, rel=0.05)


def test_from_the_meta_device_the_same_bits():
    model = build_model(MODEL, SP, "bf16")
    initialize(model, SP, seed=1)
    with torch.device("meta"):
        other = build_model(MODEL, SP, "bf16")
    assert all(p.is_meta for p in other.parameters())
    other.to_empty(device="cpu")
    initialize(other, SP, seed=1)
    for (name, value), (_, same) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert value.dtype == torch.float32
        assert torch.equal(value, same), name
    initialize(other, SP, seed=2)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


@pytest.fixture
def fake_world():
    """Yield a function that makes this process rank r of a simulated world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank: int, world_size: int) -> None:
        stop()
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    def stop() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    assert not dist.is_initialized()
    yield start
    stop()


LAYOUTS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicas of shards": ((2, 2), [Replicate(), Shard(0)]),
    "rows then columns": ((2, 2), [Shard(0), Shard(1)]),
    "rows of tensor-parallel rows": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
}


@pytest.mark.parametrize("shape", [(10, 20), (3, 20), (7, 9)], ids=str)  # uneven and empty shards
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_tensors_hold_the_same_bits(fake_world, layout, shape):
    mesh_shape, placements = LAYOUTS[layout]
    whole = part(shape, (0, 0), shape)
    covered = torch.zeros(shape)
    for rank in range(4):
        fake_world(rank, 4)
        mesh = init_device_mesh("cpu", mesh_shape)
        tensor = distribute_tensor(torch.zeros(shape), mesh, placements, src_data_rank=None)
        box = local_box(tensor)
        fill_random(box, "normal", 0.5, "w", 0)
        window = tuple(
            slice(start, start + size)
            for start, size in zip(box.offset, box.local.shape, strict=True)
        )
        assert torch.equal(tensor.to_local(), whole[window])
        covered[window] += 1
    assert (covered == covered.max()).all()
    assert covered.max() == (2 if layout == "replicas of shards" else 1)
