"""FP8 statistics of the observer: error, underflow and saturation by role."""

from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.precision import PrecisionConfig
from allometry.models import fp8
from allometry.models.observe import FP8_ROLES, ROUNDING, Observer
from allometry.models.precision import use_precision
from allometry.models.products import Stacked
from allometry.models.transformer import Transformer
from allometry.scaling.roles import Role
from allometry.trainer.record.alarms import find
from mixtures import described, small, tokens


def watched(model: Transformer, **more: Any) -> Observer:
    observer = Observer(len(model.blocks), torch.device("cpu"), **more)
    with torch.no_grad(), observer.watching([model]):
        model(tokens(), tokens())
    return observer


def of(observer: Observer, role: Role) -> dict[str, float]:
    row = observer.rounding[FP8_ROLES.index(role)].tolist()
    return dict(zip(ROUNDING, row, strict=True))


@pytest.fixture
def model() -> Transformer:
    made: Transformer = small("shared")
    use_precision(made, PrecisionConfig(linears="fp8_rowwise", saved_activations="fp8"))
    return made


def test_sums_are_those_of_the_inputs(model: Transformer) -> None:
    seen: dict[Role, list[Tensor]] = {role: [] for role in FP8_ROLES}
    whole = watched(model)
    for module in model.blocks.modules():
        for stacked in vars(module).values():
            if isinstance(stacked, Stacked):
                stacked.watch = lambda x, role=stacked.role: seen[role].append(x.flatten(0, -2))
    with torch.no_grad():
        model(tokens(), tokens())
    for role, inputs in seen.items():
        squares = errors = zeros = elements = 0.0
        for x in inputs:
            block = fp8.ACTIVATION_BLOCKS["fp8_rowwise"]
            kept = fp8.dequantise(fp8.quantise(x, block), block, torch.float64)
            squares += float(x.double().square().sum())
            errors += float((kept - x).square().sum())
            zeros += float(((kept == 0) & (x != 0)).sum())
            elements += x.numel()
        got = of(whole, role)
        assert got["squares"] == pytest.approx(squares, rel=1e-5)
        assert got["errors"] == pytest.approx(errors, rel=1e-4)
        assert (got["underflows"], got["elements"], got["saturated"]) == (zeros, elements, 0.0)
        assert 0.01 < (errors / squares) ** 0.5 < 0.04


def test_nothing_in_the_compute_type_is_counted() -> None:
    assert not watched(small("shared")).rounding.any()


def test_what_is_not_finite_is_an_alarm(model: Transformer) -> None:
    with torch.no_grad():
        model.blocks["0"].attention.wo.weight[3] = float("inf")
    got = of(watched(model), Role.HIDDEN)
    assert got["saturated"] > 0
    percent = 100 * got["saturated"] / got["elements"]
    found = find({"monitors/fp8_saturated_percent/hidden": percent}, {}, 1.0)
    assert found == {"fp8_saturated": {"percent": {"hidden": percent}}}
    assert not find({"monitors/fp8_saturated_percent/hidden": 0.0}, {}, 1.0)


def test_nothing_is_left_behind(model: Transformer) -> None:
    watched(model)
    assert described("shared").num_layers == len(model.blocks)
    for module in model.modules():
        assert all(s.watch is None for s in vars(module).values() if isinstance(s, Stacked))
