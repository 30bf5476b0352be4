"""Optimizers with states in FP8: bytes, rules, refusals; their Triton kernels, interpreted."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.optimization import OptimizerConfig
from allometry.optim import dre
from allometry.optim.build import build_optimizer, init_states
from allometry.optim.dre import Encoded, Table
from allometry.optim.fp8_states import Fp8States
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.update_rules import state_bytes
from fp8_steps import Rounding, stepped
from mixtures import described
from rule_groups import normal, weights

CPU = torch.device("cpu")
PRESETS = Path(__file__).resolve().parents[3] / "configs" / "presets"
RULES = ("adamw", "muon", "muonh", "adamh")


def config_of(kind: str, **states: Any) -> Any:
    described = {"kind": kind, "lr": 0.01, "states": {"kind": "fp8", **states}}
    return TypeAdapter(OptimizerConfig).validate_python(described)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rounding", "most"), [("nearest", 0.03), ("stochastic", 0.045)])
def test_updates_are_near_those_of_fp32_states(rule: str, rounding: Rounding, most: float) -> None:
    plain, _ = stepped(rule, None)
    ours, _ = stepped(rule, Fp8States(rounding, 0))
    for name, start in weights({name: tuple(p.shape) for name, p in plain.items()}).items():
        moved = (plain[name] - start).norm()
        off = (ours[name] - plain[name]).norm() / moved
        if name == "gain":
            assert torch.equal(ours[name], plain[name]), "vectors keep fp32"
        else:
            assert 0.0 < float(off.detach()) < most


def test_adamw_is_written_out() -> None:
    """Compare with moments that are decoded, updated and encoded in this test."""
    table, p, group = Table.on(CPU), normal("w matrix", (40, 300)), {"lr": 0.02}
    parameters, made = stepped("adamw", Fp8States("nearest", 0), steps=3)
    m, v = (Encoded.zeros((40, 300), CPU) for _ in range(2))
    for step in range(3):
        g = 0.01 * normal(f"g matrix {step}", (40, 300))
        mean, square = dre.decode(m, table), dre.decode(v, table)
        mean = 0.9 * mean + 0.1 * g
        square = 0.95 * square + 0.05 * g * g
        p = p * (1 - group["lr"] * 0.1)
        corrected = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
        p = p - group["lr"] * mean / (1 - 0.9 ** (step + 1)) / corrected
        dre.encode(mean, m, table)
        dre.encode(square, v, table)
    torch.testing.assert_close(parameters["matrix"].detach(), p, rtol=1e-5, atol=1e-6)
    held = made.state[parameters["matrix"]]
    same = held["exp_avg.q"].view(torch.uint8) == m.q.view(torch.uint8)
    assert same.double().mean() > 0.999
    assert set(held) == {"step"} | {
        f"{key}.{part}" for key in ("exp_avg", "exp_avg_sq") for part in ("q", "scale", "exponent")
    }


@pytest.mark.parametrize("rule", RULES)
def test_rounding_at_random_repeats_and_depends_on_the_seed(rule: str) -> None:
    def parts(seed: int) -> list[Tensor]:
        return [p.detach() for p in stepped(rule, Fp8States("stochastic", seed), 3)[0].values()]

    one, same, other = parts(0), parts(0), parts(1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    matrices = [i for i, p in enumerate(one) if p.dim() > 1]
    assert not any(torch.equal(one[i], other[i]) for i in matrices)


@pytest.mark.parametrize("kind", ["adamw", "muon", "muonh", "adamh"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_are_those_of_the_table(kind: str, rounding: str) -> None:
    model = described(first_dense_layers=1)
    specs = {spec.name: spec for spec in inventory(model)}
    config = config_of(kind, rounding=rounding)
    parameters = weights({name: spec.shape for name, spec in specs.items()})
    rules = Parameterization(TypeAdapter(Any).validate_python(_sp()), model, config)
    made = build_optimizer(parameters.items(), specs, rules, config)
    init_states(made)
    for name, p in parameters.items():
        held = sum(tensor.nbytes for tensor in made.state[p].values())
        assert held == state_bytes(specs[name], specs[name].shape, config), name


def _sp() -> Any:
    from allometry.configs.model import StandardParameterization

    return StandardParameterization()


@pytest.mark.parametrize("preset", ["dense_25m", "dense_1b", "dense_7b", "moe_ling_mini"])
def test_adam_keeps_2_2_bytes_of_a_parameter(preset: str) -> None:
    run = load(
        PRESETS / f"{preset}.yaml",
        ["run.folder=none", "data.sources=[{name: a, train: a}]", "data.tokenizer=null"],
    )
    specs = inventory(run.model)
    total = sum(math.prod(spec.shape) for spec in specs)
    held = sum(state_bytes(spec, spec.shape, config_of("adamw")) for spec in specs)
    assert 2.0 < held / total <= 2.20, held / total


@pytest.mark.parametrize("kind", ["lion", "sgd_sai", "apollo", "apollo_mini"])
def test_other_optimizers_refuse_it(tiny: Callable[..., Any], kind: str) -> None:
    with pytest.raises(UserError, match=r"optimizer\S*states"):
        tiny(f"optimizer.kind={kind}", "optimizer.states.kind=fp8")


def test_kernels_are_the_twin_under_triton_s_interpreter() -> None:
    """Run triton_checks.py in a process whose Triton interprets from the start."""
    pytest.importorskip("triton")
    checks = Path(__file__).with_name("triton_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "14 passed" in done.stdout
