"""On CUDA: steps with and without graphs, steps without synchronization, bits of kernels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.run import RunConfig
from allometry.models.grouped import grouped_linear, loop_linear
from allometry.models.visits import Sorting, sort_by_expert, sorted_by_sort
from allometry.optim.newton_schulz import DION, newton_schulz, orthogonal
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.loop import Loop
from allometry.trainer.train import train
from faulty_steps import launch_with_faults
from run_folders import events, rows
from small_experts import experts_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CUDA = torch.device("cuda")
FIXED = (
    "data.packing=concatenated",
    "training.compute_dtype=bf16",
    "training.total_steps=10",
    "record.monitors.every_steps=null",
    "record.monitors.singular_values_every_steps=null",
)
SHAPE = ("model.width=128", "model.ffn_width=256", "model.num_heads=4", "model.num_kv_heads=2")
MODELS = {"dense": SHAPE, "experts": (f"model={json.dumps(experts_model(width=128))}",)}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(config: RunConfig) -> list[dict[str, Any]]:
    train(config, device=CUDA, callbacks=[])
    kept = ("step", "loss", "grad_norm", "router/entropy", "router/max_vio")
    return [{k: row.get(k) for k in kept} for row in rows(Path(config.run.folder))]


@pytest.mark.parametrize("micro_batch", [2, 8])
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("model", MODELS)
def test_graphs_give_the_bits_of_kernels_one_by_one(
    tiny: Make, tmp_path: Path, model: str, compiled: str, micro_batch: int
) -> None:
    settings = (
        *FIXED,
        *MODELS[model],
        f"training.compile={compiled}",
        f"batch.micro_batch_sequences={micro_batch}",
    )
    wanted = trained(tiny(*settings, "training.cuda_graphs=off", folder=tmp_path / "off"))
    torch._dynamo.reset()
    assert trained(tiny(*settings, "training.cuda_graphs=on", folder=tmp_path / "on")) == wanted
    (said,) = [e for e in events(tmp_path / "on") if e["event"] == "cuda_graphs_recorded"]
    assert (said["step"], said["graphs"]) == (4, 1 if micro_batch == 8 else 2)


@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize("optimizer", ["adamw", "muonh", "judged"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_for_nothing(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, model: str, optimizer: str, graphs: str
) -> None:
    """From the sixth step on, after compilation, state creation and graph capture."""
    take, move, strict = Loop._take, DeviceBatch.of, []

    def taken(self: Loop, step: int, given: Any) -> None:
        if step > 5:
            torch.cuda.set_sync_debug_mode("error")
            strict.append(step)
        try:
            take(self, step, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def moved(*args: Any) -> DeviceBatch:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return move(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "_take", taken)
    monkeypatch.setattr(DeviceBatch, "of", moved)
    kind = {"muonh": ("optimizer.kind=muonh",), "judged": ("training.bad_steps={}",)}
    trained(
        tiny(*FIXED, *MODELS[model], *kind.get(optimizer, ()), f"training.cuda_graphs={graphs}")
    )
    assert strict == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("kind", ["adamw", "muonh"])
def test_a_bad_batch_leaves_no_trace(tiny: Make, tmp_path: Path, kind: str) -> None:
    settings = (*FIXED, *MODELS["dense"], f"optimizer.kind={kind}", "training.bad_steps={}")
    bad, told = (
        tiny(*settings, *more, folder=tmp_path / name)
        for name, more in (("bad", ()), ("told", ("training.skip_steps=[3, 7]",)))
    )
    for config in (bad, told):
        launch_with_faults(config, dict.fromkeys((3, 7), math.nan), device=CUDA)
    kept = ("step", "loss", "grad_norm", "lr", "s1", "skipped")
    found = [[[row.get(k) for k in kept] for row in rows(tmp_path / n)] for n in ("bad", "told")]
    assert found[0] == found[1]
    assert [row[5] for row in found[0]].count(1) == 2


def test_documents_wait_for_nothing_either(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    take, strict = Loop._take, []

    def taken(self: Loop, step: int, given: Any) -> None:
        if step > 5:
            torch.cuda.set_sync_debug_mode("error")
            strict.append(step)
        try:
            take(self, step, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "_take", taken)
    trained(tiny(*FIXED, *SHAPE, "data.packing=per_document"))
    assert strict == [6, 7, 8, 9, 10]


def test_a_wait_is_an_error_in_this_mode() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=CUDA).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(256, 768), (768, 256), (512, 512), (2048, 2048), (130, 70)])
def test_newton_schulz_has_the_same_bits_in_any_company(shape: tuple[int, int]) -> None:
    drawn = torch.randn(37, *shape, generator=torch.Generator().manual_seed(0))
    matrices = dict(enumerate(drawn[: 37 if shape[0] < 1024 else 5].to(CUDA, torch.bfloat16)))
    alone = {i: dict(orthogonal([(i, x)], DION))[i].clone() for i, x in matrices.items()}
    for chosen in (list(matrices), list(matrices)[::-1], [1, 3]):
        found = dict(orthogonal([(i, matrices[i]) for i in chosen], DION))
        assert all(torch.equal(found[i], alone[i]) for i in found)
    exact = newton_schulz(matrices[0].double(), DION, dtype=torch.float64)
    apart = (alone[0].double() - exact).norm() / exact.norm()
    plain = (newton_schulz(matrices[0], DION).double() - exact).norm() / exact.norm()
    assert apart < 2 * plain + 1e-3, "as exact as plain products in bf16"


def test_symmetric_products_are_symmetric_and_exact_in_fp32_sums() -> None:
    from allometry.optim.symmetric_cuda import symmetric_product

    for batch, rows_, columns in ((1, 2048, 5632), (32, 256, 768), (3, 130, 70)):
        generator = torch.Generator().manual_seed(rows_)
        x = torch.randn(batch, rows_, columns, generator=generator).to(CUDA, torch.bfloat16)
        wanted = x.double() @ x.double().mT
        found = symmetric_product(x)
        assert torch.equal(found, found.mT)
        assert (found.double() - wanted).abs().max() < 2.0**-8 * wanted.abs().max()


@pytest.mark.parametrize(("T", "k", "experts"), [(32768, 6, 64), (4096, 8, 256), (1, 1, 1)])
def test_visits_are_counted_in_the_order_of_a_stable_sort(T: int, k: int, experts: int) -> None:
    scores = torch.rand(T, experts, generator=torch.Generator().manual_seed(T))
    chosen = scores.topk(k).indices.to(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sort_by_expert(chosen, experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, one, other in zip(
        Sorting._fields, found, sorted_by_sort(chosen, experts), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("counts", [[3, 0, 70, 2], [0, 0, 75, 0], [75, 0, 0, 0]])
def test_groups_without_rows_have_gradients_of_zeros(counts: list[int]) -> None:
    def gradients(product: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(75, 256, device=CUDA).to(torch.bfloat16).to(dtype).requires_grad_()
        weight = torch.randn(4, 64, 256, device=CUDA).to(torch.bfloat16).to(dtype).requires_grad_()
        product(x, weight, torch.tensor(counts, device=CUDA)).square().sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        return [x.grad.double(), weight.grad.double()]

    for _ in range(3):  # fills freed memory with NaN
        junk = torch.full((4, 64, 256), float("nan"), device=CUDA, dtype=torch.bfloat16)
        del junk
        found = gradients(grouped_linear, torch.bfloat16)
        for one, other in zip(found, gradients(loop_linear, torch.float64), strict=True):
            assert (one - other).abs().max() < 2e-2 * other.abs().max()
        assert not found[1][torch.tensor(counts, device=CUDA) == 0].any()
