"""Mixtures of experts against the formulas, and their steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.configs.model import MoEModel
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.init import initialize
from allometry.models.loss import IGNORE
from allometry.models.moe import (
    MoEBlock,
    MoEFeedForward,
    balance_record,
    begin_step,
    end_step,
    routers,
)
from allometry.models.router import RouterStatistics
from allometry.models.transformer import Block, Part
from allometry.scaling.inventory import inventory
from mixtures import FORMS, B, E, K, L, assert_same, described, small, sp, tokens, train


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_of_the_inventory_and_blocks_of_their_kind(form):
    config = described(form, qk_norm=True)
    with torch.device("meta"):
        model = build_model(config, sp(config), "bf16")
    specs = [spec.name for spec in inventory(config)]
    assert specs == [name for name, _ in model.named_parameters()]
    kinds = [type(block) for block in model.blocks.values()]
    assert kinds == [Block, MoEBlock, MoEBlock]
    assert sorted(set(model.state_dict()) - set(specs)) == [
        f"blocks.{layer}.ffn.router.{name}" for layer in (1, 2) for name in ("bias", "load")
    ]


def test_buffers_survive_the_meta_device():
    config = described()
    with torch.device("meta"):
        model = build_model(config, sp(config), "fp32")
    model.to_empty(device="cpu")
    for router in routers(model).values():
        router.load.fill_(7.0)
        router.bias.fill_(7.0)
    initialize(model, sp(config), seed=0)
    for router in routers(model).values():
        assert router.load.tolist() == [1 / E] * E
        assert not router.bias.any()
        assert router.tokens.isnan()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_experts_start_different_and_with_their_own_fan_in():
    experts = small("latent").blocks["1"].ffn.experts
    for weight, fan_in in ((experts.gate, 8), (experts.up, 8), (experts.down, 16)):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.15)
        assert (weight[0] - weight[1]).abs().max() > 0.1


def plain(ffn: MoEFeedForward, config: MoEModel, x_BLD: Tensor) -> Tensor:
    """Compute the mixture from its weights: one token and one expert at a time."""

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        z = gate @ x
        return down @ (z / (1 + (-z).exp()) * (up @ x))

    at, router = dict(ffn.named_parameters()), config.router
    rows = []
    for x in x_BLD.flatten(0, 1):
        logits = at["router.weight"] @ x
        scores = logits.sigmoid() if router.gate == "sigmoid" else logits.softmax(0)
        chosen = scores.topk(K).indices
        weights = scores[chosen]
        if router.normalize or router.gate == "sqrt":
            weights = weights / weights.sum()
        if router.gate == "sqrt":
            weights = weights.sqrt()
        inner = at["latent_down.weight"] @ x if "latent_down.weight" in at else x
        routed = sum(
            w * swiglu(inner, *(at[f"experts.{name}"][e] for name in ("gate", "up", "down")))
            for w, e in zip(weights, chosen, strict=True)
        )
        if "latent_norm.weight" in at:
            mean = routed.square().mean() + config.norm_eps
            routed = routed / mean.sqrt() * at["latent_norm.weight"]
        if "latent_up.weight" in at:
            routed = at["latent_up.weight"] @ routed
        y = router.scale * routed
        if "shared.gate.weight" in at:
            shared = swiglu(x, *(at[f"shared.{name}.weight"] for name in ("gate", "up", "down")))
            y = math.sqrt(0.5) * (y + shared) if router.gate == "sqrt" else y + shared
        rows.append(y)
    return torch.stack(rows).view(x_BLD.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
def test_equals_the_formulas(form, dtype, tolerance):
    """Output and every gradient, in fp32 against the formulas in fp64."""
    without_balance = {**FORMS[form].get("router", {}), "z_loss": 0, "balance": {"kind": "none"}}
    config = described(form, router=without_balance)
    found, expected = (
        small(form, kind, router=without_balance).blocks["1"].ffn for kind in (dtype, "fp64")
    )
    x_BLD, mix_BLD = (
        torch.randn(B, L, 24, generator=torch.Generator().manual_seed(seed)).double()
        for seed in (0, 1)
    )
    results = []
    for ffn, x, twin in (
        (found, x_BLD.to(found.router.weight.dtype), False),
        (expected, x_BLD, True),
    ):
        x = x.clone().requires_grad_()
        y = plain(ffn, config, x) if twin else ffn(x)[0]
        assert y.dtype == x.dtype
        (y * mix_BLD).sum().backward()
        grads = {name: parameter.grad for name, parameter in ffn.named_parameters()}
        results.append({"y": y.detach(), "x": x.grad, **grads})
    assert_same(results[1], {n: g.double() for n, g in results[0].items()}, tolerance)
    if form == "sqrt":  # the control: the same weights with another gate give another function
        other = config.model_copy(
            update={"router": config.router.model_copy(update={"gate": "softmax"})}
        )
        assert (plain(expected, other, x_BLD) - results[1]["y"]).abs().max() > 0.1


def test_experts_without_tokens_get_zero_gradients():
    model = small(dtype="fp32")
    ffn = model.blocks["1"].ffn
    with torch.no_grad():
        ffn.router.weight[2:] = 0.0
        ffn.router.weight[:2] = 10.0
    for x_BLD in (torch.rand(B, L, 24), torch.rand(B, L, 24)[:0]):
        ffn.zero_grad()
        y_BLD, seen = ffn(x_BLD)
        y_BLD.sum().backward()
        for name, parameter in ffn.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert not ffn.experts.up.grad[2:].any()
        assert ffn.experts.up.grad[:2].any() == bool(len(x_BLD))
        assert seen.counts_E[2:].sum() == 0


def test_an_uninitialised_model_does_not_look_alive():
    config = described()
    assert build_model(config, sp(config), "fp32")(tokens()).isnan().all()


def test_types_in_bf16():
    model, exact = small("sqrt", "bf16"), small("sqrt")
    grads = train(model)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    assert (model(tokens()) - exact(tokens())).abs().max() < 0.2


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_change_nothing(form):
    """Includes router losses, which every form except latent has."""
    whole, cut = small(form), small(form)
    assert_same(train(whole), train(cut, pieces=2), 1e-10)
    if form != "latent":
        begin_step(cut, B * L // 2)  # the control: a wrong step size changes the result
        other = train(cut, pieces=2)
        name = "blocks.1.ffn.router.weight"
        assert (other[name] - train(whole)[name]).abs().max() > 1e-6
    seen, again = whole.take_statistics(), cut.take_statistics()
    assert not whole.take_statistics()
    assert seen.keys() == again.keys() == {1, 2}


def test_statistics_are_counted_once_and_in_training_only():
    model = small("sqrt")
    train(model)
    whole = model.take_statistics()
    assert [int(seen.tokens) for seen in whole.values()] == [B * L, B * L]
    assert all(int(seen.counts_E.sum()) == B * L * K for seen in whole.values())
    train(model, pieces=2)
    for layer, seen in model.take_statistics().items():
        for one, other in zip(seen, whole[layer], strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    with torch.no_grad():
        model(tokens())
    model.eval()
    model(tokens())
    assert not model.take_statistics()


def test_a_part_has_its_layers_routers():
    config = described()
    part = build_model(config, sp(config), "fp32", Part(range(2, 3), first=False, last=True))
    initialize(part, sp(config), seed=0)
    begin_step(part, 5)
    assert {layer: float(router.tokens) for layer, router in routers(part).items()} == {2: 5.0}
    part(tokens(), tokens(1), None, torch.randn(B, L, 24)).total.backward()
    assert part.take_statistics().keys() == {2}


def test_the_end_of_a_step_moves_load_and_bias():
    model = small("latent")
    counts = torch.tensor([3.0, 9.0, 6.0, 6.0])
    for _ in range(2):
        end_step(model, {1: counts, 2: counts.flip(0)})
    first, second = routers(model).values()
    assert first.load.tolist() == pytest.approx([1 / 8, 3 / 8, 1 / 4, 1 / 4])
    assert first.bias.tolist() == pytest.approx([2e-3, -2e-3, 0, 0])
    assert second.bias.tolist() == pytest.approx([0, 0, -2e-3, 2e-3])
    other = small("sqrt")
    end_step(other, {1: counts, 2: counts})
    assert not any(router.bias.any() for router in routers(other).values())
    with pytest.raises(AssertionError):
        end_step(model, {1: counts})


@pytest.mark.parametrize("kind", ["bias", "auxiliary"])
def test_balance_evens_out_the_load(kind):
    """From a router that prefers two experts; the gradient comes from its losses only."""
    balance = {"rate": 0.02} if kind == "bias" else {"coefficient": 3.0}
    changes = {"router": {"gate": "sigmoid", "balance": {"kind": kind, **balance}}}
    config, model = described(**changes), small(dtype="fp32", **changes)
    router = routers(model)[1]
    x_TD = 1.0 + torch.randn(64, 24, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        router.weight[:2] += 0.1
    history = []
    for _ in range(80):
        begin_step(model, len(x_TD))
        router.zero_grad()
        found = router(x_TD)
        (0.0 * found.gates_Tk.sum()).backward()
        end_step(model, {1: found.statistics.counts_E, 2: torch.ones(E)})
        history.append(balance_record(found.statistics, config)["max_vio"])
        with torch.no_grad():
            router.weight -= 0.1 * router.weight.grad
    assert history[0] > 0.6
    assert sum(history[-10:]) / 10 < 0.4 * history[0]


def test_record():
    statistics = RouterStatistics(
        counts_E=torch.tensor([2, 6, 4, 4]),
        probabilities_E=torch.tensor([1.0, 3.0, 2.0, 2.0]),
        entropy=torch.tensor(8.0),
        squared_log_z=torch.tensor(4.0),
        tokens=torch.tensor(8),
    )
    balance = 4 * (2 * 1 + 6 * 3 + 4 * 2 + 4 * 2) / 16 / 8
    config = described(
        router={"z_loss": 0.1, "balance": {"kind": "auxiliary", "coefficient": 0.01}}
    )
    record = balance_record(statistics, config)
    assert record.pop("load") == [1 / 8, 3 / 8, 1 / 4, 1 / 4]
    assert record == pytest.approx(
        {
            "max_vio": 0.5,
            "entropy": 1.0,
            "squared_log_z": 0.5,
            "balance": balance,
            "auxiliary_loss": 0.01 * balance,
            "z_loss": 0.05,
        }
    )
    assert "auxiliary_loss" not in balance_record(statistics, described("latent"))


def test_routers_do_not_see_filling():
    """A padded sequence has the same gradients and statistics as the sequence itself."""
    changes = {
        "router": {"balance": {"kind": "auxiliary", "coefficient": 0.3}, "z_loss": 0.1},
        "z_loss": 0.0,
    }
    filled, alone = small(**changes), small(**changes)
    whole, targets = tokens(), tokens(seed=5)
    positions = torch.arange(L).expand(B, L)
    keeps = torch.zeros(B, L, dtype=torch.bool)
    cuts = [0]
    for row in range(B):  # different numbers of tokens; the padding is its own document
        kept = L - 1 - row
        keeps[row, :kept] = True
        cuts += [row * L + kept, (row + 1) * L]
    for model in (filled, alone):
        begin_step(model, int(keeps.sum()))
        for router in routers(model).values():
            router.load.copy_(torch.arange(1.0, E + 1.0) / (E * (E + 1) / 2))
    documents = Documents(torch.tensor(cuts, dtype=torch.int32), L, positions, counted_BL=keeps)
    filled(whole, targets.masked_fill(~keeps, IGNORE), documents).total.backward()
    for row, kept in enumerate(keeps.sum(1).tolist()):
        alone(whole[row : row + 1, :kept], targets[row : row + 1, :kept]).total.backward()
    for one, other in zip(filled.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    found, expected = filled.take_statistics(), alone.take_statistics()
    assert found.keys() == expected.keys() == {1, 2}
    for layer in found:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-12, atol=1e-12)


def test_silu_is_the_activation():
    x = torch.randn(3, 24)
    experts = small(dtype="fp32").blocks["1"].ffn.experts
    y = experts.compute(x, torch.tensor([3, 0, 0, 0]))
    hidden = F.silu(x @ experts.gate[0].T) * (x @ experts.up[0].T)
    torch.testing.assert_close(y, hidden @ experts.down[0].T)
