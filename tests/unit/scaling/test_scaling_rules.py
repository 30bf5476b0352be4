"""Every cell of the parameterization tables, written a second time as exponents."""

# m width, l depth, M experts, b batch, each relative to its value at the base

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.support import scaled
from tests.support.scaled import mixture, optimizer, parameterization

from allometry.configs.errors import UserError
from allometry.configs.model import DenseModel
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import Resolved, RunScale
from allometry.scaling.roles import Role

Powers = dict[str, float]

# role: (lr, weight decay or None for 0, epsilon), each as powers of m, l and M.
HIDDEN = ("hidden", "router", "expert_up", "expert_down")
MUP: dict[str, tuple[Powers, Powers | None, Powers]] = {
    "input": ({}, {}, {"m": -1}),
    "vector": ({}, None, {"m": -1}),
    "output": ({}, {}, {"m": -1}),
    **dict.fromkeys(HIDDEN, ({"m": -1}, {"m": 1}, {"m": -1})),
}
COMPLETEP = MUP | dict.fromkeys(HIDDEN, ({"m": -1}, {"m": 1}, {"m": -1, "l": -1}))
MUPP: dict[str, tuple[Powers, Powers | None, Powers]] = {
    "input": ({"l": -0.5}, None, {}),
    "vector": ({"l": -0.5}, None, {}),
    "output": ({"l": -0.5}, None, {}),
    **dict.fromkeys(HIDDEN, ({"l": -0.5, "m": -1}, {}, {})),
}
HYPERP = dict.fromkeys((*HIDDEN, "input", "output", "vector"), ({"l": -0.5}, None, {}))
MSSP: dict[str, tuple[Powers, Powers | None, Powers]] = {
    "input": ({}, {}, {"m": -1}),
    "vector": ({}, None, {"m": -1}),
    "output": ({"m": -1}, {}, {}),
    "hidden": ({"m": -1}, {}, {"m": -1}),
}
MSSP_I = MSSP | dict.fromkeys(HIDDEN, ({"m": -1}, {}, {"m": -1}))
MSSP_II = MSSP | {
    "router": ({"m": -1}, {}, {"M": -1}),
    "expert_up": ({"m": -1}, {}, {"M": -1}),
    "expert_down": ({}, {}, {"m": -1, "M": -1}),
}
MSSP_III = MSSP | {
    "router": ({"m": -1}, {}, {"M": -1}),
    "expert_up": ({"m": -1}, {}, {"m": -1, "M": -1}),
    "expert_down": ({"m": -1}, {}, {"m": -1, "M": -1}),
}
TABLES = {
    "sp": dict.fromkeys(
        (*HIDDEN, "input", "output"),
        ({}, {}, {}),
    )
    | {"vector": ({}, None, {})},
    "mup": MUP,
    "completep": COMPLETEP,
    "mupp": MUPP,
    "hyperp": HYPERP,
    "mssp-I": MSSP_I,
    "mssp-II": MSSP_II,
    "mssp-III": MSSP_III,
}


def value(powers: Powers, **ratios: float) -> float:
    return math.prod(ratios[name] ** power for name, power in powers.items())


def resolved_by_role(rules: Parameterization) -> dict[str, list[Resolved]]:
    found: dict[str, list[Resolved]] = {}
    for spec in inventory(rules.model):
        found.setdefault(spec.role.value, []).append(rules.resolve(spec))
    assert set(found) == {role.value for role in Role}
    return found


def model_for(name: str, m: int, depth: int, experts: int) -> Any:
    """Return the mixture that this parameterization scales."""
    if name == "mssp-II":
        return mixture(m, depth, experts, expert_width=1)
    return mixture(m, depth, experts)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("experts", [1, 4])
def test_rates_decay_and_epsilon(name: str, m: int, depth: int, experts: int) -> None:
    if name == "mssp-I" and experts > 1:
        with pytest.raises(UserError, match=r"num_experts=16 differs from .*base_experts=4"):
            Parameterization(parameterization(name), mixture(m, depth, experts))
        return
    if name.startswith("mssp"):
        depth = 1  # its depth rules equal CompleteP's and have a separate test
    kind = "muonh" if name == "hyperp" else "adamw"
    model = model_for(name, m, depth, experts)
    rules = Parameterization(parameterization(name), model, optimizer(kind))
    for role, kin in resolved_by_role(rules).items():
        lr, decay, epsilon = TABLES[name][role]
        ratios = {"m": m, "l": depth, "M": experts}
        for got in kin:
            assert got.lr == pytest.approx(value(lr, **ratios), rel=1e-12)
            # CompleteP's vectors inside and outside blocks have a separate test.
            if (name, role) != ("completep", "vector"):
                assert got.eps == pytest.approx(value(epsilon, **ratios), rel=1e-12)
            expected = 0.0 if decay is None else value(decay, **ratios)
            assert got.weight_decay == pytest.approx(expected, rel=1e-12)
            assert got.forgetting == 1.0


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("experts", [1, 4])
def test_initial_values(name: str, m: int, experts: int) -> None:
    if name == "mssp-I":
        experts = 1
    model = model_for(name, m, 1, experts)
    rules = Parameterization(parameterization(name, embedding_std=0.3), model)
    for spec in inventory(model):
        got = rules.resolve(spec)
        kind, std = "normal", spec.fan_in**-0.5
        match spec.role:
            case Role.VECTOR:
                kind, std = "ones", 0.0
            case Role.INPUT:
                std = 0.3
            case Role.OUTPUT if name.startswith("mssp"):
                kind, std = "zeros", 0.0
            case Role.OUTPUT if name == "hyperp":
                std = 0.64 / scaled.WIDTH**0.5
            case Role.OUTPUT if name != "sp":
                std = scaled.WIDTH**-0.5
            case Role.ROUTER if name == "mssp-I":
                kind, std = "zeros", 0.0
            case Role.EXPERT_DOWN if name == "mssp-II":
                std = experts**0.5 * scaled.EXPERT_WIDTH**-0.5
            case _ if name == "hyperp":
                kind, std = "uniform", (3 * spec.fan_in) ** -0.5
        assert got.init_kind == kind, spec
        assert got.init_std == pytest.approx(std, rel=1e-12), spec
        alike = name == "mssp-III" and spec.role in (Role.EXPERT_UP, Role.EXPERT_DOWN)
        assert got.alike == alike


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 4])
def test_forward_multipliers(m: int, depth: int) -> None:
    layers = scaled.LAYERS * depth
    expected = {
        # residual, output, experts
        "sp": (1.0, 1.0, 1.0),
        "mup": (1.0, 1 / m, 1.0),
        "completep": (1 / depth, 1 / m, 1.0),
        "mupp": ((2 * layers) ** -0.5, 1 / m, 1.0),
        "hyperp": ((2 * layers) ** -0.5, 1.0, 1.0),
        "mssp-II": (1.0, 1.0, 1 / 4),
        "mssp-III": (1.0, 1.0, 1 / 4),
    }
    for name, (residual, output, experts) in expected.items():
        number = 4 if name.startswith("mssp") else 1
        forward = Parameterization(
            parameterization(name), model_for(name, m, depth, number)
        ).forward
        assert forward.embedding == 1.0
        assert forward.residual == pytest.approx(residual, rel=1e-12)
        assert forward.output == pytest.approx(output, rel=1e-12)
        assert forward.experts == pytest.approx(experts, rel=1e-12)
        assert forward.attention == pytest.approx(0.25, rel=1e-12)
    regime = Parameterization(parameterization("mssp-I"), mixture(m, depth)).forward
    assert regime.experts == 1.0
    divided = parameterization("hyperp", output_multiplier="1/m")
    assert Parameterization(divided, mixture(m)).forward.output == pytest.approx(1 / m, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "sp"])
def test_scores_of_wider_heads(name: str) -> None:
    model = mixture(1).model_copy(update={"head_dim": 64})
    forward = Parameterization(parameterization(name), model).forward
    assert forward.attention == pytest.approx(16**0.5 / 64, rel=1e-12)


def test_hyperp_at_its_published_ends() -> None:
    """From L = 8 and T = 10.4e9 to L = 24 and T = 194.67e9: .57735 x .39163 (arXiv 2603.28743)."""
    model = DenseModel(
        vocab_size=32000, width=3072, num_layers=24, num_heads=48, head_dim=128, ffn_width=12288
    )
    config = parameterization(
        "hyperp", base_width=1024, base_layers=8, base_tokens=10.4e9, base_batch_tokens=2**21
    )
    scale = RunScale(batch_tokens=2**21, total_tokens=int(194.67e9))
    rules = Parameterization(config, model, optimizer("muonh"), scale)
    for spec in inventory(model):
        assert rules.resolve(spec).lr == pytest.approx(0.57735 * 0.39163, rel=2e-5)
    only = config.model_copy(update={"data_exponent_scope": "hidden"})
    rules = Parameterization(only, model, optimizer("muonh"), scale)
    for spec in inventory(model):
        hidden = 0.39163 if spec.role is Role.HIDDEN else 1.0
        assert rules.resolve(spec).lr == pytest.approx(0.57735 * hidden, rel=2e-5)
    larger = RunScale(batch_tokens=2**23, total_tokens=int(10.4e9))
    rules = Parameterization(config, model, optimizer("muonh"), larger)
    assert rules.resolve(inventory(model)[0]).lr == pytest.approx(2 * 3**-0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "lr", "decay", "eps", "forgetting"),
    [("sqrt", 2, 1, 1, 1), ("sde", 2, 1, 0.5, 4), ("sdew", 1, 2, 0.5, 2)],
)
def test_mupp_batch_rules(
    rule: str, lr: float, decay: float, eps: float, forgetting: float
) -> None:
    config = parameterization("mupp", base_batch_tokens=1000, batch_rule=rule)
    rules = Parameterization(config, mixture(), optimizer(), RunScale(4000, 1))
    got = resolved_by_role(rules)["hidden"][0]
    assert (got.lr, got.weight_decay, got.eps, got.forgetting) == (lr, decay, eps, forgetting)
    if rule == "sde":
        with pytest.raises(UserError, match="leaves no second moment"):
            Parameterization(config, mixture(), optimizer(), RunScale(20_000, 1))
        Parameterization(config, mixture(), None, RunScale(20_000, 1))  # without a known beta2


@pytest.mark.parametrize("m", [1, 2, 4])
def test_heads_as_asked(m: int) -> None:
    base = scaled.WIDTH**-0.5
    for name, changes, expected in (
        ("mup", {"zero_head": True}, ("zeros", 0.0)),
        ("completep", {"zero_head": True}, ("zeros", 0.0)),
        ("mupp", {"zero_head": True}, ("zeros", 0.0)),
        ("mssp-III", {"zero_head": False}, ("normal", base / m)),
        ("hyperp", {"head_std": 0.02}, ("normal", 0.02)),
    ):
        rules = Parameterization(parameterization(name, **changes), mixture(m))
        got = resolved_by_role(rules)["output"][0]
        assert got.init_kind == expected[0]
        assert got.init_std == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_depth_of_mixtures_is_that_of_completep(alpha: float) -> None:
    config = parameterization("mssp-III", base_layers=scaled.LAYERS, depth_alpha=alpha)
    deep = Parameterization(config, mixture(2, 4, 2))
    flat = Parameterization(parameterization("mssp-III"), mixture(2, 4, 2))
    assert deep.forward.residual == 4**-alpha
    for spec in inventory(deep.model):
        got, plain = deep.resolve(spec), flat.resolve(spec)
        inside = spec.name.startswith("blocks.")
        assert got.lr == pytest.approx(plain.lr * (4 ** (alpha - 1) if inside else 1))
        assert got.eps == pytest.approx(plain.eps * (4**-alpha if inside else 1))


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_completep_is_what_its_authors_run(m: int, alpha: float) -> None:
    """EleutherAI/nanoGPT-mup, ``configure_optimizers``, branch completep: lr_scale, eps, decay."""
    model, depth = mixture(m, 4), 4
    rules = Parameterization(parameterization("completep", depth_alpha=alpha), model)
    for spec in inventory(model):
        got = rules.resolve(spec)
        depth_lr, width_lr = depth ** (alpha - 1), 1 / m
        outer_eps, inner_eps = 1 / m, 1 / m * depth**-alpha
        if spec.name in ("embedding.weight", "head.weight"):
            expected = (1.0, outer_eps, 1.0)
        elif spec.name == "final_norm.weight":
            expected = (1.0, outer_eps, 0.0)
        elif spec.role is Role.VECTOR:
            expected = (depth_lr, inner_eps, 0.0)
        else:
            expected = (width_lr * depth_lr, inner_eps, 1 / width_lr)
        assert (got.lr, got.eps, got.weight_decay) == pytest.approx(expected, rel=1e-12)
    assert rules.forward.residual == depth**-alpha


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize(
    ("adjust", "hidden", "router"),
    [("none", 0, -0.5), ("original", 0, -0.5), ("match_rms_adamw", -0.5, -1)],
)
def test_muon_keeps_the_spectral_norm_of_updates(
    m: int, adjust: str, hidden: float, router: float
) -> None:
    rules = Parameterization(parameterization("mup"), mixture(m), optimizer("muon", adjust=adjust))
    for role, kin in resolved_by_role(rules).items():
        power = {"router": router, "input": 0, "output": 0, "vector": 0}.get(role, hidden)
        for got in kin:
            assert got.lr == pytest.approx(m**power, rel=1e-12)
            if role in HIDDEN:
                assert got.lr * got.weight_decay == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "hyperp"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_lion_follows_the_columns_of_adam(name: str, m: int) -> None:
    """An update of signs has elements as large as Adam's, at every size."""
    experts = 1 if name == "mssp-I" else 4
    model = model_for(name, m, 1, experts)
    lion, adam = (
        Parameterization(parameterization(name), model, optimizer(kind))
        for kind in ("lion", "adamw")
    )
    for spec in inventory(model):
        ours, theirs = lion.resolve(spec), adam.resolve(spec)
        assert (ours.lr, ours.weight_decay) == (theirs.lr, theirs.weight_decay)
        assert (ours.rule, ours.sphere) == ("lion", False)


def test_batch_rules_of_second_moments_need_one() -> None:
    for rule in ("sde", "sdew"):
        config = parameterization("mupp", base_batch_tokens=1000, batch_rule=rule)
        with pytest.raises(UserError, match=f"batch_rule={rule} .*optimizer.kind=lion has none"):
            Parameterization(config, mixture(), optimizer("lion"), RunScale(4000, 1))
    config = parameterization("mupp", base_batch_tokens=1000)
    rules = Parameterization(config, mixture(), optimizer("lion"), RunScale(4000, 1))
    assert {rules.resolve(spec).lr for spec in inventory(rules.model)} == {2.0}


@pytest.mark.parametrize("m", [1, 2, 4])
def test_sgd_sai_follows_the_sgd_columns_less_its_own_factor(m: int) -> None:
    rules = Parameterization(parameterization("mup"), mixture(m), optimizer("sgd_sai"))
    # SGD's column, and the factor of the number of elements of a matrix.
    columns = {"input": (m, m), "vector": (m, m), "output": (m, m), "router": (1 / m, m)}
    for role, kin in resolved_by_role(rules).items():
        sgd, elements = columns.get(role, (1, m * m))
        for got in kin:
            assert got.lr == pytest.approx(sgd / elements**0.5, rel=1e-12)


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("M", [1, 4])
def test_sgd_sai_in_mixtures(m: int, M: int) -> None:
    common = {"input": (m, m), "vector": (m, m), "output": (1 / m, m), "hidden": (1, m * m)}
    columns: dict[str, dict[str, tuple[float, float]]] = {
        "mssp-I": {"router": (1 / m, m), "expert_up": (1, m * m), "expert_down": (1, m * m)},
        "mssp-II": {
            "router": (M / m, m * M),
            "expert_up": (M / m, m),
            "expert_down": (M * m, m),
        },
        "mssp-III": {
            "router": (1, m * M),
            "expert_up": (M, m * m),
            "expert_down": (M, m * m),
        },
    }
    for name, table in columns.items():
        if name == "mssp-I" and M > 1:
            continue
        rules = Parameterization(
            parameterization(name), model_for(name, m, 1, M), optimizer("sgd_sai")
        )
        for role, kin in resolved_by_role(rules).items():
            sgd, elements = (common | table)[role]
            for got in kin:
                assert got.rule == "sgd_sai"
                assert got.lr == pytest.approx(sgd / elements**0.5, rel=1e-12)


@pytest.mark.parametrize("name", ["mup", "completep", "mupp"])
@pytest.mark.parametrize(
    ("rule", "power"), [("coupled", 0.0), ("mup", 1.0), ("sqrt", 0.5), ("independent", None)]
)
def test_weight_decay_rules(name: str, rule: str, power: float | None) -> None:
    config = parameterization(name, weight_decay_rule=rule)
    rules = Parameterization(config, mixture(4, 4), optimizer())
    assert rules.decay_is_independent == (rule == "independent")
    for role, kin in resolved_by_role(rules).items():
        for got in kin:
            if role == "vector" or (name == "mupp" and role in ("input", "output")):
                assert got.weight_decay == 0.0
            elif power is None:
                assert got.weight_decay == pytest.approx(1 / got.lr, rel=1e-12)
            else:
                expected = 4**power if role in HIDDEN else 1.0
                assert got.weight_decay == pytest.approx(expected, rel=1e-12)
