"""Parallel streams (ParScale): equations against a plain twin, and negative controls."""

# P streams, B sequences, L tokens, D width, N query heads, K key/value heads, H head width,
# n tokens of a prefix, V vocabulary

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.configs.model import DenseModel, ModelConfig, MoEModel, StandardParameterization
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.init import initialize
from allometry.models.moe import begin_step, routers
from allometry.models.observe import OUTPUT, SUMS, Observer
from allometry.models.rotary import rotary_angles, rotate
from allometry.models.streams import repeated_documents, with_prefixes
from allometry.models.transformer import Transformer
from allometry.scaling.parameterization import Parameterization

B, L, V, P, n = 2, 16, 61, 3, 5
LENGTHS = [5, 0, 10, 1, 16]
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "width": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_width": 40,
    "rope_theta": 100.0,
}
STREAMS = {"count": P, "prefix_tokens": n, "smoothing": 0.1}
EXPERTS = {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 12}


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    """Return an fp64 model whose biases and prefixes are large enough to matter."""
    rules = Parameterization(StandardParameterization(), config)
    model = build_model(config, rules, "fp64").double()
    initialize(model, rules, seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or ".prefix." in name:
            noise = torch.Generator().manual_seed(len(name) + seed)
            torch.nn.init.normal_(parameter, 0.0, 0.5, noise)
    return model


def small(streams: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    return model_of(DenseModel.model_validate({**SMALL, **changes, "streams": streams}))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(seed))


def documents(lengths: list[int]) -> Documents:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions_BL = torch.cat([torch.arange(m) for m in lengths]).view(B, L)
    return Documents(ends, max(lengths), positions_BL)


def twin(weights: dict[str, Tensor], tokens_BL: Tensor, same_BLL: Tensor, at_BL: Tensor) -> Tensor:
    """Return logits [B, L, V], one stream after the other, with the keys prepended."""
    width, heads, kv_heads, H = 24, 4, 2, 8

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain

    angles = rotary_angles(at_BL, H, 100.0, torch.float64)[:, :, None]
    turn = angles.cos(), angles.sin()
    seen_BLM = torch.cat([torch.ones(B, L, n, dtype=torch.bool), same_BLL], dim=2)
    streams = []
    for p in range(P):
        x = weights["embedding.weight"][tokens_BL]
        for layer in range(2):
            w = {
                name.removeprefix(f"blocks.{layer}."): value
                for name, value in weights.items()
                if name.startswith(f"blocks.{layer}.")
            }
            y = norm(x, w["attention_norm.weight"])
            q, k, v = (
                F.linear(y, w[f"attention.{name}.weight"]).unflatten(2, (-1, H))
                for name in ("wq", "wk", "wv")
            )
            q, k = rotate(q, *turn), rotate(k, *turn)
            pk, pv = (
                w[f"attention.prefix.{name}"].view(kv_heads, P, n, H)[:, p].transpose(0, 1)
                for name in ("keys", "values")
            )
            k, v = (
                torch.cat([own.expand(B, -1, -1, -1), each], 1).repeat_interleave(2, 2)
                for own, each in ((pk, k), (pv, v))
            )
            scores = torch.einsum("blnh,bmnh->bnlm", q, k) / math.sqrt(H)
            scores = scores.masked_fill(~seen_BLM[:, None], float("-inf")).softmax(-1)
            o = torch.einsum("bnlm,bmnh->blnh", scores, v).flatten(2)
            assert o.shape[2] == heads * H
            x = x + F.linear(o, w["attention.wo.weight"])
            y = norm(x, w["ffn_norm.weight"])
            gate, up = (F.linear(y, w[f"ffn.{name}.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w["ffn.down.weight"])
        streams.append(norm(x, weights["final_norm.weight"]))
    mixed = weights["aggregator.mix.bias"].clone()
    for p, x in enumerate(streams):
        mixed = mixed + x @ weights["aggregator.mix.weight"].view(width, width, P)[:, :, p].T
    chosen = F.linear(
        F.silu(mixed), weights["aggregator.choice.weight"], weights["aggregator.choice.bias"]
    ).softmax(-1)
    share = 0.9 * chosen + 0.1 / P
    whole = torch.stack([share[..., p, None] * x for p, x in enumerate(streams)]).sum(0)
    return F.linear(whole, weights["head.weight"])


@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients_equal_a_plain_twins(packed: bool) -> None:
    model, tokens_BL = small(STREAMS), tokens()
    given = documents(LENGTHS) if packed else None
    whole_BLL = torch.ones(L, L, dtype=torch.bool).tril().expand(B, L, L)
    same_BLL = given.mask() if given is not None else whole_BLL
    at_BL = torch.arange(L)[None] if given is None else given.positions_BL
    leaves = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    wanted = twin(leaves, tokens_BL, same_BLL, at_BL)
    got = model(tokens_BL, None, given)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    pull = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got * pull).sum().backward()
    (wanted * pull).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(leaves[name].grad.abs().max())
        assert scale > 0.0, name
        torch.testing.assert_close(
            parameter.grad, leaves[name].grad, rtol=0, atol=1e-12 * max(scale, 1.0), msg=name
        )


def with_values(model: Transformer, values: dict[str, Tensor]) -> Transformer:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])
    return model


def test_equal_prefixes_give_the_output_of_one_stream_whatever_the_aggregator() -> None:
    model, tokens_BL = small(STREAMS), tokens()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, value in values.items():
        if ".prefix." in name:
            each = value.view(2, P, n, 8)
            each[:] = each[:, :1].clone()
    equal = with_values(small(STREAMS), values)(tokens_BL)
    others = dict(values)
    for name in others:
        if name.startswith("aggregator."):
            others[name] = torch.randn_like(others[name])
    again = with_values(small(STREAMS), others)(tokens_BL)
    torch.testing.assert_close(again, equal, rtol=0, atol=1e-12)
    # Different prefixes do depend on the aggregator.
    mixed = {n: values[n] if "aggregator" not in n else others[n] for n in values}
    unequal = {name: p.detach() for name, p in model.named_parameters()}
    mixed |= {name: value for name, value in unequal.items() if ".prefix." in name}
    apart = with_values(small(STREAMS), mixed)(tokens_BL) - model(tokens_BL)
    assert float(apart.detach().abs().max()) > 1e-3


def test_without_prefix_tokens_the_output_is_the_dense_models() -> None:
    plain = small()
    none = small(STREAMS | {"prefix_tokens": 0})
    own = dict(none.named_parameters())
    assert not any(".prefix." in name for name in own)
    for name, parameter in plain.named_parameters():
        own[name].data.copy_(parameter)
    tokens_BL = tokens()
    torch.testing.assert_close(none(tokens_BL), plain(tokens_BL), rtol=0, atol=1e-12)
    # The prefix of a model with one does change it.
    some = small(STREAMS)
    for name, parameter in plain.named_parameters():
        dict(some.named_parameters())[name].data.copy_(parameter)
    apart = (some(tokens_BL) - plain(tokens_BL)).detach()
    assert float(apart.abs().max()) > 1e-3


def test_streams_may_be_permuted_with_their_weights() -> None:
    model, tokens_BL = small(STREAMS), tokens()
    order = torch.tensor([2, 0, 1])
    moved = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().clone()
        if ".prefix." in name:
            value = value.view(2, P, n, 8)[:, order].flatten()
        elif name == "aggregator.mix.weight":
            value = value.view(24, 24, P)[:, :, order].flatten(1)
        elif name.startswith("aggregator.choice."):
            value = value[order]
        moved[name] = value
    wanted = model(tokens_BL)
    got = with_values(small(STREAMS), moved)(tokens_BL)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    moved["aggregator.choice.weight"] = model.aggregator.choice.weight.detach()
    wrong = with_values(small(STREAMS), moved)(tokens_BL)
    assert float((wrong - wanted).abs().max()) > 1e-6


def test_a_smoothing_of_one_is_the_mean_of_the_streams() -> None:
    model = small(STREAMS | {"smoothing": 1.0})
    streams_ZLD = torch.randn(P * B, L, 24, dtype=torch.float64)
    assert model.aggregator is not None
    mean_BLD = streams_ZLD.unflatten(0, (P, B)).mean(0)
    torch.testing.assert_close(model.aggregator(streams_ZLD), mean_BLD, rtol=0, atol=1e-12)


def test_routers_count_a_token_once_for_each_stream() -> None:
    router = {"balance": {"kind": "auxiliary", "coefficient": 0.1}}
    config = {**SMALL, "kind": "moe", "ffn_width": None, "experts": EXPERTS, "router": router}
    model = model_of(MoEModel.model_validate({**config, "streams": STREAMS}))
    begin_step(model, B * L)
    assert all(float(r.tokens) == P * B * L for r in routers(model).values())
    model.train()
    model(tokens(), tokens(1)).total.backward()
    for seen in model.take_statistics().values():
        assert int(seen.tokens) == P * B * L
        assert int(seen.counts_E.sum()) == 2 * P * B * L


@pytest.mark.parametrize("packed", [False, True])
def test_the_observer_leaves_out_the_queries_in_front(packed: bool) -> None:
    """Attention to a prefix is observed for the tokens of all streams, and for nothing else."""
    model, given = small(STREAMS), documents(LENGTHS) if packed else None
    observer = Observer(2, torch.device("cpu"), queries=1000)
    with observer.watching([model]):
        model(tokens(), tokens(1), given)
    sums = dict(zip(SUMS, observer.sums[0].tolist(), strict=True))
    heads, rows = SMALL["num_heads"], P * B * L
    squares = sum(m * (m + 1) // 2 for m in (LENGTHS if packed else [L] * B))
    assert sums["queries"] == heads * rows
    assert sums["pairs"] == heads * P * (squares + n * B * L)
    assert float(observer.output[OUTPUT.index("tokens")]) == B * L


def test_documents_of_all_streams_and_with_prefixes() -> None:
    one = documents(LENGTHS)
    every = repeated_documents(one, 2)
    assert every.cu_lengths.tolist() == [0, 5, 5, 15, 16, 32, 37, 37, 47, 48, 64]
    assert torch.equal(every.positions_BL[B:], one.positions_BL)
    longer, token_T, prefix_X = with_prefixes(one, 2)
    assert longer.cu_lengths.tolist() == [0, 7, 9, 21, 24, 42]
    assert longer.positions_BL[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert token_T[:6].tolist() == [2, 3, 4, 5, 6, 11]
    assert sorted([*token_T.tolist(), *prefix_X.tolist()]) == list(range(42))
    assert longer.counted_BL is not None
    assert not longer.counted_BL[0, prefix_X].any()
    assert longer.counted_BL[0, token_T].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"multi_token": {"depth": 1}},
            "streams={count: 3, ...} with multi_token: blocks of multi-token prediction have no",
        ),
        ({"window": {"tokens": 4}}, "streams={count: 3, ...} with window"),
        ({"streams": {"count": 1}}, "greater than 1"),
    ],
)
def test_configs_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace(".", r"\.")):
        DenseModel.model_validate({**SMALL, "streams": STREAMS, **changes})
