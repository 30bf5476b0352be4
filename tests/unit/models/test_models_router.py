"""The router against plain loops over tokens, and its losses against autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from allometry.configs.model import AuxiliaryBalance, BiasBalance, NoBalance, RouterConfig
from allometry.models.moe import wanted_of
from allometry.models.router import Router, _best, select
from allometry.scaling.inventory import matrix
from allometry.scaling.roles import Role

T, D, E, K = 24, 10, 8, 3
GATES = ["softmax", "softmax_after_topk", "sigmoid", "sqrt"]


def router(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> Router:
    options.setdefault("balance", NoBalance())
    spec = matrix("weight", Role.ROUTER, E, D)
    made = Router(spec, RouterConfig(**options), K).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(torch.randn(E, D, generator=generator, dtype=torch.float64))
    made.tokens.fill_(T)
    return made


def tokens(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def plain(made: Router, x_TD: Tensor) -> list[dict[int, float]]:
    """Return each token's weights by expert, one token and one expert at a
    time, in Python floats."""
    config = made.config
    result = []
    for x in x_TD.tolist():
        logits = [sum(a * b for a, b in zip(x, w, strict=True)) for w in made.weight.tolist()]
        if config.gate == "sigmoid":
            scores = [1 / (1 + math.exp(-z)) for z in logits]
        else:
            scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
        rank = list(scores)
        if isinstance(config.balance, BiasBalance):
            rank = [s + b for s, b in zip(scores, made.bias.tolist(), strict=True)]
        size = E // config.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
        groups.sort(key=lambda group: -sum(sorted(rank[e] for e in group)[-2:]))
        allowed = [e for group in groups[: config.groups_per_token] for e in group]
        chosen = sorted(allowed, key=lambda e: -rank[e])[:K]
        weights = {e: scores[e] for e in chosen}
        if config.normalize or config.gate in ("softmax_after_topk", "sqrt"):
            weights = {e: s / sum(scores[c] for c in chosen) for e, s in weights.items()}
        if config.gate == "sqrt":
            weights = {e: math.sqrt(s) for e, s in weights.items()}
        result.append(weights)
    return result


def assert_equals_plain(made: Router, x_TD: Tensor) -> None:
    gates_Tk, experts_Tk, *_ = made(x_TD)
    for t, expected in enumerate(plain(made, x_TD)):
        assert experts_Tk[t].tolist() == list(expected)
        assert gates_Tk[t].tolist() == pytest.approx(list(expected.values()), rel=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("groups", [(1, None), (4, 2), (2, 1), (8, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_loop_over_tokens(gate, groups, bias):
    """(8, 4): groups of one expert are equivalent to that expert."""
    for normalize in (False, True) if gate in ("softmax", "sigmoid") else (False,):
        made = router(
            gate=gate,
            normalize=normalize,
            num_groups=groups[0],
            groups_per_token=groups[1],
            balance=BiasBalance() if bias else NoBalance(),
        )
        made.bias.copy_(torch.linspace(-0.3, 0.3, E))  # only the bias balance uses it
        assert_equals_plain(made, tokens())


def test_the_bias_selects_and_never_weighs():
    made = router(gate="sigmoid", balance=BiasBalance())
    x_TD = tokens()
    scores_TE = (x_TD @ made.weight.T).sigmoid()
    made.bias[2] = 10.0
    gates_Tk, experts_Tk, statistics, _ = made(x_TD)
    assert (experts_Tk[:, 0] == 2).all()
    assert statistics.counts_E[2] == T
    torch.testing.assert_close(gates_Tk[:, 0], scores_TE[:, 2], rtol=1e-12, atol=0)
    assert not made.bias.requires_grad


def test_a_token_stays_in_its_groups():
    made = router(gate="sigmoid", num_groups=4, groups_per_token=2, balance=BiasBalance())
    # With negative scores a masked expert must still rank below an unmasked one.
    made.bias.fill_(-5.0)
    _, experts_Tk, *_ = made(tokens())
    assert all(len({e // 2 for e in row}) <= 2 for row in experts_Tk.tolist())
    free = router(gate="sigmoid")(tokens()).experts_Tk.tolist()
    assert any(len({e // 2 for e in row}) > 2 for row in free)


@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_number(groups):
    made = router(num_groups=groups, groups_per_token=2 if groups > 1 else None)
    with torch.no_grad():
        made.weight.zero_()
    assert (made(tokens()).experts_Tk == torch.arange(K)).all()


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_the_weights(gate):
    made = router(gate=gate, normalize=gate == "sigmoid")
    mix_Tk = torch.randn(T, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: (
            torch.func.functional_call(made, {"weight": w}, (tokens(),)).gates_Tk * mix_Tk
        ).sum(),
        made.weight.detach().clone().requires_grad_(),
        rtol=1e-6,
    )


def test_types():
    for dtype in (torch.bfloat16, torch.float32):
        found = router(dtype=torch.float32)(tokens(dtype=dtype))
        assert found.gates_Tk.dtype == torch.float32
        assert not any(value.requires_grad for value in found.statistics)
    # In bf16 the logits would be off by a part in 256, and close experts would swap.
    exact = router()(tokens(dtype=torch.bfloat16).double())
    found = router(dtype=torch.float32)(tokens(dtype=torch.bfloat16))
    assert torch.equal(found.experts_Tk, exact.experts_Tk)
    torch.testing.assert_close(found.gates_Tk.double(), exact.gates_Tk, rtol=1e-5, atol=1e-7)


def test_extreme_logits_are_finite():
    for gate, normalize in itertools.product(GATES, (False, True)):
        if normalize and gate in ("sqrt", "softmax_after_topk"):
            continue
        made = router(
            dtype=torch.float32,
            gate=gate,
            normalize=normalize,
            z_loss=1e-3,
            balance=AuxiliaryBalance(coefficient=0.1),
        )
        for value in (500.0, -500.0):  # sigmoids of 0 and 1, softmax of one expert alone
            x_TD = torch.full((T, D), value, requires_grad=True)
            gates_Tk, _, statistics, _ = made(x_TD)
            gates_Tk.sum().backward()
            assert gates_Tk.isfinite().all()
            assert all(v.isfinite().all() for v in statistics)
            assert x_TD.grad.isfinite().all()
            assert made.weight.grad.isfinite().all()


def shares(logits_TE: Tensor, gate: str) -> Tensor:
    if gate != "sigmoid":
        return logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    scores_TE = 1 / (1 + (-logits_TE).exp())
    return scores_TE / scores_TE.sum(1, keepdim=True)


def written_out(made: Router, x_TD: Tensor, mix_Tk: Tensor, scale: float, own_load: bool) -> Tensor:
    """Return the gradient of scale x task + auxiliary loss + z-loss for the full batch."""
    config = made.config
    weight = made.weight.detach().clone().requires_grad_()
    logits_TE = x_TD @ weight.T
    found = made(x_TD)
    scores_TE = shares(logits_TE, config.gate)
    if config.gate == "sigmoid":
        chosen_Tk = logits_TE.sigmoid().gather(1, found.experts_Tk)
    else:
        chosen_Tk = scores_TE.gather(1, found.experts_Tk)
    load_E = made.load
    if own_load:
        load_E = found.statistics.counts_E / (T * K)
    auxiliary = config.balance.coefficient * E * (load_E * scores_TE.mean(0)).sum()
    z_loss = config.z_loss * logits_TE.logsumexp(1).square().mean()
    (scale * (chosen_Tk * mix_Tk).sum() + auxiliary + z_loss).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e3])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_losses_gradient_is_that_of_the_whole_batch(gate, scale, pieces, recompute):
    """For any loss scale and number of micro-batches, also with recomputation."""
    made = router(gate=gate, z_loss=0.03, balance=AuxiliaryBalance(coefficient=0.7))
    made.load.copy_(torch.arange(1.0, E + 1) / torch.arange(1.0, E + 1).sum())
    x_TD, mix_Tk = tokens(), tokens(2)[:, :K]
    for x, mix in zip(x_TD.chunk(pieces), mix_Tk.chunk(pieces), strict=True):
        if recompute:
            x = x.clone().requires_grad_()
            found = checkpoint(made, x, use_reentrant=False)
        else:
            found = made(x)
        (scale * (found.gates_Tk * mix).sum()).backward()
    expected = written_out(made, x_TD, mix_Tk, scale, own_load=False)
    difference = (made.weight.grad - expected).abs().max()
    assert difference < 1e-12 * expected.abs().max()
    wrong = written_out(made, x_TD, mix_Tk, scale, own_load=True)  # the control: other loads
    assert (made.weight.grad - wrong).abs().max() > 1e-3


def test_each_loss_alone_and_none():
    x_TD, none = tokens(), torch.zeros(T, K, dtype=torch.float64)
    for coefficient, z_loss in ((0.5, 0.0), (1e-9, 0.1)):
        made = router(z_loss=z_loss, balance=AuxiliaryBalance(coefficient=coefficient))
        made.load.copy_(torch.arange(E) / 28.0)
        (made(x_TD).gates_Tk * none).sum().backward()
        expected = written_out(made, x_TD, none, 0.0, own_load=False)
        torch.testing.assert_close(made.weight.grad, expected, rtol=1e-9, atol=1e-16)
    for balance in (NoBalance(), BiasBalance()):
        made = router(balance=balance)
        made.tokens.fill_(float("nan"))  # unused then
        (made(x_TD).gates_Tk * none).sum().backward()
        assert not made.weight.grad.any()


def test_a_loss_without_a_steps_size_does_not_look_alive():
    made = router(balance=AuxiliaryBalance(coefficient=0.1))
    made.reset_buffers()
    assert made(tokens()).gates_Tk.isfinite().all()  # evaluation needs no step
    made(tokens()).gates_Tk.sum().backward()
    assert made.weight.grad.isnan().any()


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_statistics(gate):
    made = router(gate=gate)
    x_TD = tokens()
    logits_TE = x_TD @ made.weight.detach().T
    shares_TE = shares(logits_TE, gate)
    _, experts_Tk, seen, _ = made(x_TD)
    assert seen.counts_E.tolist() == [int((experts_Tk == e).sum()) for e in range(E)]
    assert int(seen.tokens) == T
    assert int(seen.counts_E.sum()) == T * K
    torch.testing.assert_close(seen.probabilities_E, shares_TE.sum(0))
    torch.testing.assert_close(seen.entropy, -(shares_TE * shares_TE.log()).sum())
    torch.testing.assert_close(seen.squared_log_z, logits_TE.exp().sum(1).log().square().sum())


def test_no_tokens():
    made = router(z_loss=1e-3, balance=AuxiliaryBalance(coefficient=0.1))
    gates_Tk, experts_Tk, seen, _ = made(tokens()[:0])
    assert gates_Tk.shape == experts_Tk.shape == (0, K)
    assert not any(value.any() for value in seen)
    gates_Tk.sum().backward()
    assert not made.weight.grad.any()


@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_counted_leaves_no_trace(gate):
    """Gradients of both losses and all statistics equal those of the counted tokens alone."""
    options = {"balance": AuxiliaryBalance(coefficient=0.3), "z_loss": 0.1, "gate": gate}
    made, alone = router(**options), router(**options)
    counted_T = torch.arange(T) % 3 > 0
    weights = torch.randn(T, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[~counted_T] = 0.0
    for each in (made, alone):
        each.load.copy_(torch.arange(1.0, E + 1.0) / 36.0)
        each.tokens.fill_(int(counted_T.sum()))
    with_filling, without = made(tokens(), counted_T), alone(tokens()[counted_T])
    (with_filling.gates_Tk * weights).sum().backward()
    (without.gates_Tk * weights[counted_T]).sum().backward()
    torch.testing.assert_close(made.weight.grad, alone.weight.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        with_filling.statistics, without.statistics, rtol=1e-12, atol=1e-12, check_dtype=False
    )
    made.zero_grad()
    (made(tokens()).gates_Tk * weights).sum().backward()
    assert (made.weight.grad - alone.weight.grad).abs().max() > 1e-4


def test_the_best_are_those_of_a_stable_sort():
    """Includes ties, infinities and NaN, which can follow a faulty step."""
    drawn = torch.randint(5, (200, 12), generator=torch.Generator().manual_seed(1)).double()
    drawn[::7, 3:9] = float("-inf")
    drawn[::11, 5] = float("nan")
    for k in (1, 3, 6):
        wanted = drawn.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(_best(drawn, k), wanted)
    assert not torch.equal(_best(drawn, 3), _best(drawn.flip(1), 3))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt"])
def test_compiled_it_is_the_same_without_scatters(gate):
    """The compiled form of selection and weighting is different code, to be a single pass."""
    torch._dynamo.reset()
    balance = BiasBalance(rate=1e-3)
    spec = matrix("router", Role.ROUTER, 12, 8)
    router = Router(spec, RouterConfig(gate=gate, balance=balance), 3)
    router.double()
    with torch.no_grad():
        drawn = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
        router.weight.copy_(drawn)
        router.bias.copy_(torch.linspace(-0.2, 0.2, len(router.bias)))
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = []
    for function in (router, torch.compile(router, backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        gates, experts, statistics, _ = function(given)
        gates.square().sum().backward()
        found.append((gates.detach(), experts, *statistics, given.grad, router.weight.grad))
        router.weight.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [(1, None), (4, 2)])
def test_centered_biases_select_what_others_do(groups):
    """A common shift changes neither the best experts nor the best groups; any other one does."""
    plain = BiasBalance(rate=0.02)
    centered = BiasBalance(rate=0.02, centered=True)
    biases = {one.centered: torch.zeros(E, dtype=torch.float64) for one in (plain, centered)}
    config = RouterConfig(gate="sigmoid", num_groups=groups[0], groups_per_token=groups[1])
    generator = torch.Generator().manual_seed(3)
    moved = 0
    for step in range(40):
        logits_TE = torch.randn(T, E, generator=generator, dtype=torch.float64)
        logits_TE += torch.linspace(0, 3, E) ** 2  # most experts have less than the mean
        scores_TE = logits_TE.sigmoid()
        chosen = {c: select(scores_TE, bias_E, config, K) for c, bias_E in biases.items()}
        assert torch.equal(chosen[True], chosen[False]), step
        alone = select(scores_TE, None, config, K)
        moved += int((alone != chosen[True]).any())
        counts_E = torch.bincount(chosen[True].flatten(), minlength=E)
        for balance in (plain, centered):
            biases[balance.centered] += balance.rate * wanted_of(counts_E, balance)
    assert moved > 10, "biases change what is selected"
    assert biases[True].mean().abs() < 1e-12
    assert biases[False].mean().abs() > 0.01, "others drift"
    apart_E = biases[False] - biases[True]
    torch.testing.assert_close(apart_E, apart_E.mean().expand(E), rtol=0, atol=1e-12)
    one_sided = biases[True].clone()
    one_sided[0] += float(biases[False].mean().abs()) + 0.3  # the negative control
    assert not torch.equal(select(scores_TE, one_sided, config, K), chosen[True])
