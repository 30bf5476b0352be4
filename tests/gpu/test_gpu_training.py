"""On CUDA: gradients and runs against a CPU, resume, ZeRO stages, compiled and eager."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from allometry.configs.run import RunConfig
from allometry.data.stream import Stream
from allometry.models.moe import begin_step
from allometry.parallel.mesh import open_mesh
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import make_model
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.train import train
from run_folders import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# A head width that CUDA's flash kernels support.
MOE = {
    "kind": "moe",
    "vocab_size": 64,
    "width": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "experts": {
        "kind": "swiglu",
        "num_experts": 8,
        "experts_per_token": 2,
        "width": 64,
        "num_shared_experts": 1,
    },
    "router": {"gate": "sqrt", "z_loss": 1e-3},
}
SHAPE = ("model.width=128", "model.ffn_width=256", "model.num_heads=4", "model.num_kv_heads=2")
EXACT = "training.deterministic=true"
PACKINGS = ("per_document", "concatenated")
# Largest difference over largest element of a parameter's gradient. bf16 has 8 bits, and the two
# devices round at different places of a sum.
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(config: RunConfig, device: torch.device, position: int = 0) -> dict[str, Tensor]:
    """Return full gradients of two micro-batches from ``position`` on, computed as in a run."""
    plan = RunPlan.of(config, 1)
    size = plan.micro_batch_sequences
    stream = Stream(config.data, config.run.seed)
    with open_mesh(config.parallel, device) as mesh:
        parallel = make_model(config, plan, mesh)
        for part in parallel.parts.values():
            begin_step(part, 2 * size * config.data.sequence_length)
        batches = [
            DeviceBatch.of(stream.batch(at, size), mesh.device, at)
            for at in (position, position + size)
        ]
        parallel.execution.train(batches, torch.ones((), device=mesh.device), lambda *_: None)
        found = {}
        for name, parameter in parallel.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name] = whole.detach().double().cpu()
    return found


def worst(some: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error of a gradient relative to its largest element, and its name."""
    assert some.keys() == others.keys()
    errors = {
        name: float((some[name] - other).abs().max() / other.abs().max())
        for name, other in others.items()
    }
    name = max(errors, key=lambda n: errors[n])
    return errors[name], name


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_gradients_equal_those_of_a_cpu(
    tiny: Make, packing: str, dtype: str, compiled: str
) -> None:
    common = (*SHAPE, f"data.packing={packing}")
    reference = gradients(tiny(*common), CPU)
    config = tiny(*common, f"training.compute_dtype={dtype}", f"training.compile={compiled}")
    error, name = worst(gradients(config, CUDA), reference)
    assert error < TOLERANCE[dtype], name
    control, _ = worst(gradients(config, CUDA, position=64), reference)
    assert control > 2 * TOLERANCE["bf16"], "other samples must be told apart"


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stages_equal_stage_0(tiny: Make, dtype: str, stage: int, compiled: str) -> None:
    common = (*SHAPE, f"training.compute_dtype={dtype}", f"training.compile={compiled}")
    reference = gradients(tiny(*common), CUDA)
    error, name = worst(gradients(tiny(*common, f"parallel.zero.stage={stage}"), CUDA), reference)
    # In bf16, stage 0 accumulates products in fp32; the other stages round each to bf16 first.
    assert error < {"fp32": 1e-6, "bf16": 1e-2}[dtype], name


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_experts_have_the_gradients_of_a_cpu(
    tiny: Make, checkpointing: str, stage: int, compiled: str
) -> None:
    model = f"model={json.dumps(MOE)}"
    reference = gradients(tiny(model), CPU)
    config = tiny(
        model,
        f"parallel.zero.stage={stage}",
        f"training.compile={compiled}",
        f"training.activation_checkpointing={checkpointing}",
    )
    error, name = worst(gradients(config, CUDA), reference)
    assert error < TOLERANCE["fp32"], name


def test_experts_in_bf16_learn_and_resume_to_the_bit(tiny: Make, tmp_path: Path) -> None:
    chosen = (f"model={json.dumps(MOE)}", "training.compute_dtype=bf16", EXACT)
    straight, parts = (tiny(*chosen, folder=tmp_path / name) for name in ("straight", "parts"))
    train(straight, device=CUDA, callbacks=[])
    for stop in (7, None):
        train(parts, device=CUDA, callbacks=[], stop_at_step=stop)
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("straight", "parts")]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.95 * losses[0][0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_runs_on_both_devices_learn_alike(tiny: Make, tmp_path: Path, packing: str) -> None:
    losses = {}
    for device in (CPU, CUDA):
        folder = tmp_path / device.type
        config = tiny(*SHAPE, f"data.packing={packing}", "optimizer.lr=1e-3", folder=folder)
        train(config, device=device, callbacks=[])
        losses[device.type] = torch.tensor([row["loss"] for row in rows(folder)])
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-3, atol=0)
    assert losses["cuda"][-1] < 0.95 * losses["cuda"][0]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "extra",
    [
        ["training.compute_dtype=fp32"],
        ["training.compute_dtype=bf16", "training.compile=true"],
        ["training.compute_dtype=bf16", "data.packing=concatenated"],
        ["training.compute_dtype=bf16", "model.dropout=0.1"],
    ],
    ids=",".join,
)
def test_resume_is_bit_exact(tiny: Make, tmp_path: Path, extra: list[str], stage: int) -> None:
    chosen = (*SHAPE, *extra, EXACT, f"parallel.zero.stage={stage}", "training.total_steps=8")
    straight = tiny(*chosen, folder=tmp_path / "straight")
    train(straight, device=CUDA, callbacks=[])
    parts = tiny(*chosen, folder=tmp_path / "parts")
    for stop in (3, 6, None):
        train(parts, device=CUDA, callbacks=[], stop_at_step=stop)
    keys = ("step", "loss", "grad_norm", "lr", "tokens/up", "loss/down")
    for one, other in zip(rows(tmp_path / "straight"), rows(tmp_path / "parts"), strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]
