"""Kernels on CUDA at 4096 tokens: against the reference, bitwise repeatability, choice of auto."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allometry.configs.run import RunConfig
from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.models.kernels import NORMS
from allometry.optim import adamw
from allometry.optim.matrix_ops import LocalMatrixOps
from allometry.optim.states import Item
from allometry.scaling.attention import BACKENDS, AttentionCall, refusal
from allometry.scaling.kernels import apex_folder
from allometry.trainer.deterministic import algorithms
from allometry.trainer.train import train
from run_folders import events, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CUDA = torch.device("cuda")
L, H = 4096, 128
EDGES = (64, 64, 128, 127, 1, 1, 127, 129, 256, 63, 65, 1, 1, 1, 125, 1000, 384, 512)
DOCUMENTS = {
    "edges": (*EDGES, L - sum(EDGES), L),
    "whole": (L, L),
    "singles": (*(1,) * 300, L - 300, *(37,) * 110, L - 37 * 110),
    "concatenated": None,
}
BF16 = 2e-2  # largest difference over largest element; the reference is fp64
HALF = [b.name for b in BACKENDS if b.devices == ("cuda",) or b.name in ("flash", "masked")]


def skip_unless_able(name: str, packed: bool, deterministic: bool = False) -> None:
    call = AttentionCall("cuda", "bf16", packed, L, False, H, deterministic)
    reason = refusal(name, call)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    if name == "flash3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("flash3 is for Hopper")


def documents(lengths: tuple[int, ...] | None) -> Documents | None:
    if lengths is None:
        return None
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(-1, L)
    return Documents(ends.to(CUDA), max(lengths), positions.to(CUDA), cu_host=ends)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    own = torch.Generator(CUDA).manual_seed(2)
    return [
        torch.randn(2, L, n, H, generator=own, device=CUDA)
        .to(torch.bfloat16)
        .to(dtype)
        .requires_grad_()
        for n in (4, 2, 2)
    ]


def outcome(
    name: str, packed: Documents | None, dtype: torch.dtype, window: int | None = None
) -> list[Tensor]:
    qkv = inputs(dtype)
    o_BLNH = attend(*qkv, packed, H**-0.5, name, window=window)
    weights = torch.linspace(-3, 3, o_BLNH.numel(), device=CUDA).sin().view(o_BLNH.shape)
    return [o_BLNH.detach(), *torch.autograd.grad(o_BLNH, qkv, weights.to(dtype))]


@pytest.mark.parametrize("case", list(DOCUMENTS))
@pytest.mark.parametrize("name", HALF)
def test_gradients_equal_the_reference(name: str, case: str) -> None:
    packed = documents(DOCUMENTS[case])
    skip_unless_able(name, packed is not None)
    expected = outcome("reference", packed, torch.float64)
    for some, other in zip(outcome(name, packed, torch.bfloat16), expected, strict=True):
        assert (some - other).abs().max() < BF16 * other.abs().max()
    if packed is not None and case != "whole":
        whole = outcome("reference", None, torch.float64)
        assert (whole[0] - expected[0]).abs().max() > 2 * BF16 * expected[0].abs().max()


@pytest.mark.parametrize("case", list(DOCUMENTS))
@pytest.mark.parametrize("window", [1, 100, 128, 333])
@pytest.mark.parametrize("name", ["flash3", "flash2", "flex", "masked"])
def test_gradients_of_windows_equal_the_reference(name: str, window: int, case: str) -> None:
    packed = documents(DOCUMENTS[case])
    call = AttentionCall("cuda", "bf16", packed is not None, L, False, H, window=window)
    if reason := refusal(name, call):
        pytest.skip(reason)
    expected = outcome("reference", packed, torch.float64, window)
    for some, other in zip(outcome(name, packed, torch.bfloat16, window), expected, strict=True):
        assert (some - other).abs().max() < BF16 * other.abs().max()


@pytest.mark.parametrize("case", ["edges", "whole", "concatenated"])
@pytest.mark.parametrize("name", HALF)
def test_bits_twice_where_they_are_promised(name: str, case: str) -> None:
    """More than one block of keys: atomic additions to the queries' gradients would differ."""
    packed = documents(DOCUMENTS[case])
    skip_unless_able(name, packed is not None, deterministic=True)
    with algorithms(deterministic=True):
        first = outcome(name, packed, torch.bfloat16)
        for _ in range(5):
            for some, other in zip(first, outcome(name, packed, torch.bfloat16), strict=True):
                assert torch.equal(some, other)


@pytest.mark.parametrize("name", HALF)
def test_outputs_repeat_without_the_promise_too(name: str) -> None:
    """A forward has a fixed order of sums; repeatability of gradients is printed, not required."""
    packed = None if name == "flash" else documents(DOCUMENTS["edges"])
    skip_unless_able(name, packed is not None)
    first = outcome(name, packed, torch.bfloat16)
    same = [True] * 4
    for _ in range(5):
        again = outcome(name, packed, torch.bfloat16)
        same = [s and torch.equal(a, b) for s, a, b in zip(same, first, again, strict=True)]
    print(f"{name}: the bits of o, dq, dk, dv repeat: {same}")
    assert same[0]


MODEL = (
    "model.width=256",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.ffn_width=256",
    "data.sequence_length=4096",
    "batch.sequences=4",
    "batch.micro_batch_sequences=2",
    "training.compute_dtype=bf16",
    "training.total_steps=6",
    "checkpoint.every_steps=3",
    "evaluation.sequences_per_source=2",
)


@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_deterministic_run_resumes_to_the_bit(
    tiny: Make, tmp_path: Path, packing: str, compiled: str
) -> None:
    torch._dynamo.reset()
    settings = (
        *(*MODEL, f"data.packing={packing}", f"training.compile={compiled}"),
        "training.deterministic=true",
    )
    straight = tiny(*settings, folder=tmp_path / "straight")
    train(straight, device=CUDA, callbacks=[])
    parts = tiny(*settings, folder=tmp_path / "parts")
    for stop in (2, 4, None):
        train(parts, device=CUDA, callbacks=[], stop_at_step=stop)
    losses = [[row["loss"] for row in rows(Path(c.run.folder))] for c in (straight, parts)]
    assert losses[0] == losses[1]
    assert recorded(parts)["attention"]["by"] == "record"
    assert not [e for e in events(tmp_path / "parts") if e["event"] == "kernels_changed"]


def recorded(config: RunConfig) -> dict:
    return json.loads((Path(config.run.folder) / "run.json").read_text())["kernels"]


@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
def test_auto_measures_and_takes_the_fastest(tiny: Make, packing: str) -> None:
    config = tiny(*MODEL, f"data.packing={packing}")
    train(config, device=CUDA, callbacks=[])
    attention = recorded(config)["attention"]
    print(attention)
    times = attention["milliseconds"]
    assert attention["by"] == "measured"
    assert len(times) >= 2
    assert times[attention["name"]] <= 1.03 * min(times.values())
    assert not any("other numbers" in reason for reason in attention["left_out"].values())


def test_cudnn_waits_for_nothing() -> None:
    """Documents of similar length are grouped without a device synchronization."""
    skip_unless_able("cudnn", packed=True)
    packed, qkv = documents(DOCUMENTS["edges"]), inputs(torch.bfloat16)
    attend(*qkv, packed, 0.1, "cudnn").sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*qkv, packed, 0.1, "cudnn").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(each.grad.isfinite().all() for each in qkv)


apex = pytest.mark.skipif(apex_folder() is None, reason="needs NVIDIA's apex")


@apex
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apexs_norm_is_torchs(dtype: torch.dtype) -> None:
    found = []
    for name in ("torch", "apex"):
        own = torch.Generator(CUDA).manual_seed(1)
        x = torch.randn(512, 1024, generator=own, device=CUDA).to(dtype).requires_grad_()
        weight = torch.linspace(0.5, 2, 1024, device=CUDA).to(dtype).requires_grad_()
        y = NORMS[name](x, (1024,), weight, 1e-5)
        found.append([y, *torch.autograd.grad(y, (x, weight), torch.sin(y.detach()))])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for some, other in zip(*found, strict=True):
        assert (some - other).abs().max() < tolerance * other.abs().max()


@apex
def test_apexs_adamw_is_torchs() -> None:
    ends = []
    for kernel in ("torch", "apex"):
        own = torch.Generator(CUDA).manual_seed(1)
        parameters = [torch.randn(n, 64, generator=own, device=CUDA) for n in (3, 128, 1000)]
        group = {
            "kernel": kernel,
            **{"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
        }
        items = [Item(str(i), p, group) for i, p in enumerate(parameters)]
        state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in parameters}
        adamw.init_states(items, state)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=own, device=CUDA)
            adamw.adamw(items, state, LocalMatrixOps())
        assert all(float(state[p]["step"]) == 5 for p in parameters)
        ends.append(parameters)
    for some, other in zip(*ends, strict=True):
        torch.testing.assert_close(some, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
def test_the_packages_that_are_looked_for(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    module = importlib.import_module(package)
    assert callable(module.flash_attn_func)
    assert callable(module.flash_attn_varlen_func)
