"""Recipe of FP8 products of a launch, and messages about unsupported devices."""

from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.layout import Layout
from allometry.trainer import precision
from allometry.trainer.precision import Device, choose, refusal

HOPPER = Device("NVIDIA H200", (9, 0), scaled_mm=True, scaled_grouped_mm=True)
ADA = Device("NVIDIA L40S", (8, 9), scaled_mm=True, scaled_grouped_mm=True)
AMPERE = Device("NVIDIA A100", (8, 0), scaled_mm=True, scaled_grouped_mm=True)
DENSE = {"kind": "dense", "num_layers": 2, "vocab_size": 64, "width": 128, "num_heads": 4}
DENSE |= {"ffn_width": 384}
EXPERTS = {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 128}
MOE = {**DENSE, "kind": "moe", "ffn_width": None, "experts": EXPERTS}


def run(section: dict[str, Any], model: dict[str, Any] = DENSE, dtype: str = "bf16") -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": {"sequence_length": 16, "sources": [{"name": "none", "train": "none"}]},
            "batch": {"sequences": 1, "micro_batch_sequences": 1},
            "training": {"total_steps": 1, "compute_dtype": dtype},
            "precision": section,
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
        }
    )


@pytest.mark.parametrize(
    ("recipe", "device", "model", "says"),
    [
        ("fp8_tensorwise", AMPERE, DENSE, "capability 8.9, but NVIDIA A100 has 8.0"),
        ("fp8_rowwise", ADA, DENSE, "capability 9.0, but NVIDIA L40S has 8.9"),
        ("fp8_blockwise", ADA, DENSE, "capability 9.0, but NVIDIA L40S has 8.9"),
        ("fp8_tensorwise", ADA, MOE, "_scaled_grouped_mm on compute capability 9.0 for experts"),
        ("fp8_blockwise", HOPPER, MOE, "no grouped product for experts in torch"),
        ("fp8_rowwise", Device("old", (9, 0), False, False), DENSE, "needs torch._scaled_mm"),
        ("fp8_rowwise", HOPPER, DENSE | {"width": 120}, "multiples of 16"),
        ("fp8_blockwise", HOPPER, DENSE | {"ffn_width": 352}, "multiples of 128"),
    ],
)
def test_what_a_device_cannot(recipe: str, device: Device, model: Any, says: str) -> None:
    reason = refusal(recipe, run({"linears": recipe}, model), 1, device)
    assert reason is not None
    assert says in reason


def test_what_a_device_can() -> None:
    for recipe, device, model in (
        ("fp8_tensorwise", ADA, DENSE),
        ("fp8_rowwise", HOPPER, MOE),
        ("fp8_tensorwise", HOPPER, MOE),
        ("fp8_blockwise", HOPPER, DENSE),
    ):
        assert refusal(recipe, run({"linears": recipe}, model), 1, device) is None
    alone = run({"linears": "fp8_blockwise", "roles": ["hidden"]}, MOE)
    assert refusal("fp8_blockwise", alone, 1, HOPPER) is None
    wide = run({"linears": "fp8_rowwise"}, dtype="fp32")
    assert "compute_dtype=bf16, not fp32" in str(refusal("fp8_rowwise", wide, 1, HOPPER))
    e5m2 = run({"linears": "fp8_rowwise", "gradients": "e5m2"}, MOE)
    assert "e4m3 alone" in str(refusal("fp8_rowwise", e5m2, 1, HOPPER))
    cut = run({"linears": "fp8_rowwise"}, DENSE | {"ffn_width": 48})
    assert "model.ffn_width over parallel.tp=2" in str(refusal("fp8_rowwise", cut, 2, HOPPER))


def on(device: Device, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> torch.device:
    """Return a device described as ``device``; torch raises for the recipe ``fails``."""
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, _: device))
    monkeypatch.setattr(
        precision, "_failure", lambda recipe, *_: "fails on this device" * (recipe == fails) or None
    )
    return torch.device("cuda")


def test_auto_takes_the_first_that_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run({"linears": "auto"})
    assert choose(config, 1, on(HOPPER, monkeypatch)) == ("fp8_rowwise", "rule", {})
    recipe, by, left_out = choose(config, 1, on(ADA, monkeypatch))
    assert (recipe, by) == ("fp8_tensorwise", "rule")
    assert "capability 9.0" in left_out["fp8_rowwise"]
    recipe, by, left_out = choose(config, 1, on(AMPERE, monkeypatch))
    assert recipe == "compute"
    assert left_out.keys() == {"fp8_rowwise", "fp8_tensorwise"}
    assert choose(config, 1, on(HOPPER, monkeypatch, "fp8_rowwise"))[0] == "fp8_tensorwise"


def test_auto_keeps_what_the_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config, hopper = run({"linears": "auto"}), on(HOPPER, monkeypatch)
    assert choose(config, 1, hopper, "fp8_tensorwise")[:2] == ("fp8_tensorwise", "record")
    assert choose(config, 1, hopper, "compute")[:2] == ("compute", "record")


def test_what_is_named_must_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run({"linears": "fp8_rowwise"})
    with pytest.raises(UserError, match=r"precision\.linears=fp8_rowwise needs a GPU.*A100.*auto"):
        choose(config, 1, on(AMPERE, monkeypatch))
    with pytest.raises(UserError, match="fails on this device; or use"):
        choose(config, 1, on(HOPPER, monkeypatch, "fp8_rowwise"))


def test_a_cpu_emulates_what_is_named_and_auto_saves_it_the_time() -> None:
    cpu = torch.device("cpu")
    assert choose(run({"linears": "fp8_blockwise"}), 1, cpu)[0] == "fp8_blockwise"
    assert choose(run({"linears": "auto"}), 1, cpu)[0] == "compute"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"roles": ["expert_up"]}, r"no weight of a dense model has a role of .*\[expert_up\]"),
        ({"compute_layers": [0, 1]}, "compute_layers names every layer"),
    ],
)
def test_a_recipe_that_no_product_would_use_is_refused(section: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Layout.of(run({"linears": "fp8_rowwise", **section}), 1)
    Layout.of(run({"linears": "fp8_rowwise", "roles": ["expert_up"]}, MOE), 1)
    Layout.of(run({"linears": "fp8_rowwise", "compute_layers": [0]}), 1)
