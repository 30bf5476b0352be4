"""On CUDA, kernels of FP8 states are bitwise equal to the CPU reference, and runs resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allometry.configs.run import RunConfig
from allometry.optim import dre, fp8_states
from allometry.optim.dre import Dither, Encoded, Table
from allometry.optim.fp8_states import Fp8States
from allometry.trainer.train import train
from fp8_steps import SHAPES, Rounding, stepped
from rule_groups import normal
from run_folders import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def written(x: Tensor, device: torch.device, rounding: str) -> tuple[Encoded, Tensor]:
    """Return the encoding, written twice so that exponents can persist, and its values."""
    kernels = fp8_states.kernels_for(torch.empty(0, device=device)) or dre
    assert (kernels is dre) == (device == CPU)
    rows_R = torch.arange(math.prod(x.shape[:-1]), device=device) + 77
    dither = Dither((123456789, 4111222333), rows_R, 640) if rounding == "stochastic" else None
    to, table = Encoded.zeros(tuple(x.shape), device), Table.on(device)
    for scale in (1.0, 0.97):
        kernels.encode((scale * x).to(device), to, table, dither)
    return to, kernels.decode(to, table).cpu()


@pytest.mark.parametrize("shape", [(6, 300), (3, 50, 128), (4, 7), (0, 128), (900, 1000)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bits_are_those_of_a_cpu(shape: tuple[int, ...], rounding: str) -> None:
    x = normal("x", shape) ** 3 * 1e-4
    if x.numel():
        x.view(-1)[::7] = 0.0
        x.view(-1, shape[-1])[0] = 0.0
        x.view(-1, shape[-1])[1, 0] = 1e-25
    (ours, values), (twin, wanted) = (written(x, device, rounding) for device in (CUDA, CPU))
    for mine, other in zip(ours, twin, strict=True):
        assert torch.equal(mine.cpu().view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(values, wanted)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(2, 256)
    x[1, 130] = bad
    _, found = written(x, CUDA, "nearest")
    assert found[:, :128].isfinite().all()
    assert not found[1, 128:].isfinite().any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_fused_step_is_the_twin_s(rounding: Rounding) -> None:
    (twin, twins), (ours, states) = (
        stepped("adamw", Fp8States(rounding, 0), 3, device) for device in (CPU, CUDA)
    )
    for name in SHAPES:
        torch.testing.assert_close(ours[name].cpu(), twin[name], rtol=1e-5, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            mine, other = states.state[ours[name]], twins.state[twin[name]]
            codes = [held[f"{key}.q"].cpu().view(torch.uint8).int() for held in (mine, other)]
            apart = (codes[0] - codes[1]).abs()
            assert int(apart.max()) <= 1
            assert float((apart > 0).double().mean()) < 1e-3


@pytest.mark.parametrize("kind", ["adamw", "muonh"])
def test_two_resumes_are_bit_exact(tiny: Make, tmp_path: Path, kind: str) -> None:
    said = (f"optimizer.kind={kind}", "optimizer.states={kind: fp8, rounding: stochastic}")
    straight, parts = (tiny(*said, folder=tmp_path / name) for name in ("straight", "parts"))
    train(straight, device=CUDA, callbacks=[])
    for stop in (7, 12, None):
        train(parts, device=CUDA, callbacks=[], stop_at_step=stop)
    found = [[row["loss"] for row in rows(tmp_path / name)] for name in ("straight", "parts")]
    assert found[0] == found[1]
