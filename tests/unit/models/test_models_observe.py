"""Statistics of the observer against their definitions."""

# B sequences, L tokens, D width, N heads, Q queries

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.models.build import build_model
from allometry.models.documents import Documents, causal_mask
from allometry.models.init import initialize
from allometry.models.observe import MAXIMA, SUMS, Observer
from allometry.models.transformer import Transformer, call_block
from allometry.scaling.parameterization import Parameterization

B, L, D, V, N, H = 2, 12, 48, 31, 4, 8


def small(**changes: Any) -> Transformer:
    described = DenseModel.model_validate(
        {
            "vocab_size": V,
            "width": D,
            "num_layers": 2,
            "num_heads": N,
            "num_kv_heads": 2,
            "head_dim": H,
            "ffn_width": 40,
            **changes,
        }
    )
    rules = Parameterization(StandardParameterization(), described)
    model = build_model(described, rules, "fp64")
    initialize(model, rules, seed=0)
    return model.double().eval()


def packed() -> Documents:
    """Return documents of 5 and 7 tokens, then one of 12; the last two tokens do not count."""
    positions = torch.cat([torch.arange(5), torch.arange(7), torch.arange(12)]).view(B, L)
    counted = torch.ones(B, L, dtype=torch.bool)
    counted[1, -2:] = False
    return Documents(torch.tensor([0, 5, 12, 24], dtype=torch.int32), 12, positions, counted)


def tokens() -> Tensor:
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def observed(model: Transformer, documents: Documents | None, queries: int = 99) -> Observer:
    observer = Observer(2, torch.device("cpu"), queries=queries)
    with observer.watching([model]):
        model(tokens(), tokens(), documents)
    return observer


def seen(observer: Observer, layer: int) -> dict[str, float]:
    found = dict(zip(SUMS, observer.sums[layer].tolist(), strict=True))
    return found | dict(zip(MAXIMA, observer.maxima[layer].tolist(), strict=True))


@torch.no_grad()
def logits(model: Transformer, layer: int, documents: Documents | None) -> Tensor:
    """Return the attention logits [B, N, L, L] of a layer from q and k, -inf if masked."""
    kept: list[Tensor] = []
    attention = model.blocks[str(layer)].attention
    core = attention.core

    def catch(
        q: Tensor, k: Tensor, v: Tensor, documents: Any, scale: float, *, window: int | None
    ) -> Tensor:
        k_wide = k.repeat_interleave(N // k.shape[2], 2)
        kept.append(scale * torch.einsum("blnh,bmnh->bnlm", q, k_wide))
        return core(q, k, v, documents, scale, window=window)

    attention.core = catch
    model(tokens(), tokens(), documents)
    attention.core = core
    window, cpu = attention.window, torch.device("cpu")
    mask = causal_mask(L, cpu, window) if documents is None else documents.mask(window)
    return kept[0].masked_fill(~(mask if mask.dim() == 2 else mask[:, None]), float("-inf"))


@pytest.mark.parametrize("documents", [None, packed()], ids=["sequences", "documents"])
@pytest.mark.parametrize("queries", [99, 5])
@pytest.mark.parametrize("window", [None, {"tokens": 4}], ids=["all", "window"])
def test_attention(
    documents: Documents | None, queries: int, window: dict[str, int] | None
) -> None:
    model = small(window=window)
    found = seen(observed(model, documents, queries), 1)
    apart = -(-L // queries)
    place = torch.arange((L - 1) % apart, L, apart)
    assert place[-1] == L - 1
    counted = torch.ones(B, L, dtype=torch.bool) if documents is None else documents.counted_BL
    assert counted is not None
    s_BNQL = logits(model, 1, documents)[:, :, place]
    rows = s_BNQL.transpose(1, 2)[counted[:, place]]  # counted queries, N, L
    wanted = {
        "queries": rows.shape[0] * N,
        "pairs": int(rows.isfinite().sum()),
        "squared_attention_log_z": float(rows.logsumexp(2).square().sum()),
        "attention_logits": float(rows[rows.isfinite()].sum()),
        "attention_logit": float(rows.max()),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-10), name


@torch.no_grad()
@pytest.mark.parametrize("norms", ["before", "after"])
def test_branches_and_stream(norms: str) -> None:
    model = small(norms=norms)
    model.blocks["0"].residual_scale = 0.25
    documents = packed()
    kept: dict[str, Tensor] = {}
    block = model.blocks["0"]
    handles = [
        block.attention_post_norm.register_forward_hook(lambda m, i, y: kept.update(attention=y)),
        block.ffn_post_norm.register_forward_hook(lambda m, i, y: kept.update(ffn=y)),
        block.register_forward_hook(lambda m, i, y: kept.update(stream=y[0])),
    ]
    # A token with one large entry: (|x| - mean)/sigma of 48 numbers is at most 6.9.
    block.ffn.down.weight.zero_()
    block.ffn.down.weight[7] = 100.0
    found = seen(observed(model, documents), 0)
    for handle in handles:
        handle.remove()
    counted = documents.counted_BL
    for name in ("attention", "ffn"):
        y = 0.25 * kept[name][counted]
        away = (y - y.mean(1, keepdim=True)).abs()
        outliers = away > 5.0 * y.std(1, correction=0, keepdim=True)
        assert found[f"{name}_squares"] == pytest.approx(float(y.square().sum()), rel=1e-10)
        assert found[f"{name}_outliers"] == int(outliers.sum())
    assert found["ffn_outliers"] == int(counted.sum()), "one in each token"
    stream = kept["stream"][counted]
    assert found["elements"] == stream.numel()
    assert found["magnitudes"] == pytest.approx(float(stream.abs().sum()), rel=1e-10)
    assert found["activation"] == float(stream.abs().max())


@torch.no_grad()
def test_output_log_z() -> None:
    model, documents = small(), packed()
    log_z = model(tokens(), None, documents).logsumexp(2)[documents.counted_BL]
    total, squares, number = observed(model, documents).output.tolist()
    assert number == len(log_z)
    assert total == pytest.approx(float(log_z.sum()), rel=1e-10)
    assert squares == pytest.approx(float(log_z.square().sum()), rel=1e-10)


def test_nothing_is_left_behind() -> None:
    model = small()
    cores = [block.attention.core for block in model.blocks.values()]
    before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    observed(model, None)
    assert cores == [block.attention.core for block in model.blocks.values()]
    assert before == {name: len(m._forward_hooks) for name, m in model.named_modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.call_block is call_block


def test_compiled_blocks_are_not_compiled_again() -> None:
    model = small().float()
    model.compute_dtype = torch.float32
    assert model.embedding is not None
    model.embedding.dtype = torch.float32
    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    for block in model.blocks.values():
        block.compile(backend=counting)
    for _ in range(2):
        model(tokens(), tokens()).total.backward()
    compiled = len(calls)
    assert compiled
    observer = observed(model, None)
    assert seen(observer, 1)["queries"] == B * L * N
    for _ in range(2):
        model(tokens(), tokens()).total.backward()
    assert len(calls) == compiled
