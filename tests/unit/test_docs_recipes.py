"""The code of docs/extending.md works as described."""

import re
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch

from allometry.configs import model as model_configs
from allometry.configs import optimization
from allometry.interop.huggingface import families
from allometry.laws.observations import Observations
from allometry.models import attention
from allometry.optim.optimizer import RuleOptimizer
from allometry.scaling import attention as backends
from allometry.scaling import update_rules
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterizations import mup
from allometry.scaling.roles import Role
from allometry.trainer.record import columns

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def blocks(title: str) -> list[str]:
    """Return the Python code of a section."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [dedent(found) for found in re.findall(r"(?ms)^ *```python\n(.*?)^ *```", section)]


def run(code: str, module: ModuleType | None, **more: Any) -> dict[str, Any]:
    """Return the names after running ``code`` with a module's names."""
    names = {**(vars(module) if module else {}), "__name__": __name__, **more}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return names


def value(code: str, module: ModuleType) -> Any:
    """Return the value of a table entry."""
    return run(f"made = (\n{code})", module)["made"]


def test_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    section, row, function = blocks("An optimizer")
    config = run(section, optimization)["Signum"](lr=0.1)
    (rule,) = value(row, update_rules)
    module = ModuleType("allometry.optim.signum")
    vars(module).update(run(function, None))
    monkeypatch.setitem(sys.modules, "allometry.optim.signum", module)
    monkeypatch.setitem(update_rules.UPDATE_RULES, rule.name, rule)  # type: ignore[arg-type]
    assert rule.name == config.kind
    assert all(key in type(config).model_fields for key in rule.settings)

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    group = {"params": [weight], "param_names": ["w"], "specs": [None], "rule": "signum"}
    step = RuleOptimizer([{**group, "lr": 0.1, "momentum": 0.5, "weight_decay": 0.5}])
    weight.grad = torch.tensor([0.5, -4.0, 0.0])
    step.step()
    expected = torch.tensor([1.0, -2.0, 3.0]) * 0.95 - 0.1 * torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(weight.detach(), expected)


def test_law() -> None:
    (code,) = blocks("A law")
    (form,) = run(code, None)["FORMS"]
    values = {"E": 1.5, "A": 400.0, "B": 300.0, "alpha": 0.5}
    rows = Observations({"N": np.array([1e4, 1e6]), "D": np.array([1e6, 1e4])}, ("a", "b"))
    got = form.predict(values, form.prepare(rows))
    assert got == pytest.approx([1.5 + 4.0 + 0.3, 1.5 + 0.4 + 3.0])


def test_attention_back_end() -> None:
    row, function = blocks("An attention back end")
    (backend,) = value(row, backends)
    more = {
        "SDPBackend": torch.nn.attention.SDPBackend,
        "sdpa_kernel": torch.nn.attention.sdpa_kernel,
    }
    math = run(function, attention, **more)["_math"]
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 7, n, 4, generator=made).double() for n in (4, 2, 2))
    assert torch.allclose(math(q, k, v, None, 0.3), attention.attend(q, k, v, None, 0.3, "flash"))
    call = backends.AttentionCall("cpu", "fp32", packed=False, length=7, compiled=False)
    assert backend.able(call)
    assert not backend.able(call._replace(packed=True))


def test_metric() -> None:
    (column,) = value(blocks("A metric")[0], columns)
    outcome = type("Outcome", (), {"sums_2S": torch.tensor([[3.0, 4.0], [10.0, 20.0]])})
    assert column.made(type("Finished", (), {"outcome": outcome})) == 30


def test_parameterization() -> None:
    section, subclass = blocks("A parameterization")
    config = run(section, model_configs)["FlatEmbedding"](base_width=8)
    more = {"FlatEmbedding": type(config)}
    table = run(subclass, mup, **more)["FlatEmbeddingMultipliers"]
    model = model_configs.DenseModel(
        vocab_size=16, width=16, num_layers=1, num_heads=2, ffn_width=16
    )
    rates = {s.role: table(config, model, None, None).resolve(s).lr for s in inventory(model)}
    assert rates == {Role.INPUT: 0.1, Role.HIDDEN: 0.5, Role.OUTPUT: 1.0, Role.VECTOR: 1.0}


def test_family() -> None:
    (entry,) = blocks("A Hugging Face family")
    made = run(f"made = {{{entry}}}", families)["made"]
    assert isinstance(made["ministral"], families.Traits)
    assert "ministral" not in get_args(families.Family)
