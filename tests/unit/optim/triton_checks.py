"""Triton kernels of FP8 states against the reference; test_optim_fp8_states.py runs this file.

Triton reads TRITON_INTERPRET when it is first imported, which may have happened in another test.
"""

from __future__ import annotations

import math

import pytest
import torch

from allometry.optim import dre, dre_triton, fp8_states
from allometry.optim.dre import Dither, Encoded, Table
from allometry.optim.fp8_states import Fp8States
from fp8_steps import SHAPES, Rounding, stepped
from rule_groups import normal

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(6, 300), (3, 5, 128), (4, 7), (0, 128), (9, 1000)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_kernels_write_the_same_bits(shape: tuple[int, ...], rounding: str) -> None:
    x = normal("x", shape) ** 3 * 1e-4
    if x.numel():
        x.view(-1)[::7] = 0.0
        x.view(-1, shape[-1])[0] = 0.0
        x.view(-1, shape[-1])[1, 0] = 1e-25
    rows = torch.arange(math.prod(shape[:-1])) + 77
    dither = Dither((123456789, 4111222333), rows, 640) if rounding == "stochastic" else None
    table, twin, ours = Table.on(CPU), Encoded.zeros(shape, CPU), Encoded.zeros(shape, CPU)
    wanted = dre.encode(x, twin, table, dither)
    seen = dre_triton.encode(x, ours, table, dither)
    for mine, other in zip(ours, twin, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=0.0)
    assert torch.equal(dre_triton.decode(ours, table), dre.decode(twin, table))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_kernels_keep_what_is_not_finite(bad: float) -> None:
    x, table, to = torch.ones(2, 256), Table.on(CPU), Encoded.zeros((2, 256), CPU)
    x[1, 130] = bad
    dre_triton.encode(x, to, table)
    found = dre_triton.decode(to, table)
    assert torch.equal(found[0], x[0])
    assert not found[1, 128:].isfinite().any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_fused_step_is_the_twin_s(monkeypatch: pytest.MonkeyPatch, rounding: Rounding) -> None:
    """Parameters within fp32 rounding, almost all codes equal, others one step off."""
    found = []
    for module in (None, dre_triton):
        monkeypatch.setattr(fp8_states, "kernels_for", lambda tensor, module=module: module)
        fp8 = Fp8States(rounding, 0, watched={})
        parameters, made = stepped("adamw", fp8, steps=3)
        found.append((parameters, made.state, fp8.watched))
    (twin, twins, wanted), (ours, states, seen) = found
    for name in SHAPES:
        torch.testing.assert_close(ours[name], twin[name], rtol=1e-6, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            mine, other = states[ours[name]], twins[twin[name]]
            codes = [held[f"{key}.q"].view(torch.uint8).int() for held in (mine, other)]
            apart = (codes[0] - codes[1]).abs()
            assert int(apart.max()) <= 1
            assert float((apart > 0).double().mean()) < 1e-3
            torch.testing.assert_close(
                mine[f"{key}.scale"], other[f"{key}.scale"], rtol=1e-6, atol=0.0
            )
            assert seen is not None
            assert wanted is not None
            sums = (seen[ours[name], key], wanted[twin[name], key])
            torch.testing.assert_close(*sums, rtol=1e-3, atol=1.0)
