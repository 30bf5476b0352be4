"""Multi-token prediction against its plain twin; the main model's gradients do not change."""

# B sequences, L tokens, D width, V vocabulary

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.model import DenseModel, ModelConfig, MoEModel, StandardParameterization
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.init import initialize
from allometry.models.loss import IGNORE
from allometry.models.multi_token import ahead_of
from allometry.models.transformer import Transformer
from allometry.scaling.count import count_parameters, flops_per_token, layer_flops
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization

L, V = 16, 61
LENGTHS = [5, 1, 10, 2, 14]
SIZES = {
    "vocab_size": V,
    "width": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "ffn_width": 40,
}
EXPERTS = {
    "kind": "moe",
    "first_dense_layers": 1,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 12},
    "router": {"balance": {"kind": "bias"}},
}


def made(
    depth: int = 1, weight: float | None = 0.3, **more: Any
) -> tuple[ModelConfig, Transformer]:
    options = SIZES | {"z_loss": 1e-2} | more
    if weight is not None:
        options["multi_token"] = {"depth": depth, "weight": weight}
    kind = MoEModel if options.get("kind") == "moe" else DenseModel
    config = kind.model_validate(options)
    rules = Parameterization(StandardParameterization(), config)
    model = build_model(config, rules, "fp64").double()
    initialize(model, rules, seed=0)
    return config, model


def inputs() -> tuple[Tensor, Tensor, Documents]:
    stream = torch.randint(V, (2, L), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, L)
    targets_T = stream.flatten().roll(-1)
    targets_T[ends[1:].long() - 1] = IGNORE
    return stream, targets_T.view(2, L), Documents(ends, max(LENGTHS), positions_BL)


def counts(targets_BL: Tensor, documents: Documents, depth: int) -> Tensor:
    return (ahead_of(targets_BL, documents, depth) != IGNORE).flatten(1).sum(1)


def plain(model: Transformer, config: ModelConfig, weight: float, depth: int) -> Tensor:
    """The loss of each document by slices: one document at a time, full logits."""
    tokens_BL, _, documents = inputs()
    tokens_T = tokens_BL.flatten()
    sums = torch.zeros(depth + 1, dtype=torch.float64)
    numbers = torch.zeros(depth + 1, dtype=torch.float64)
    for start, stop in pairwise(documents.cu_lengths.tolist()):
        t_N = tokens_T[start:stop]
        N = stop - start
        alone = Documents(torch.tensor([0, N]).int(), N, torch.arange(N)[None])
        geometry = model._geometry(t_N[None], alone)
        x = model.embedding(t_N[None]) * model.embedding_scale
        for layer in range(config.num_layers):
            x, _ = model.blocks[str(layer)](x, geometry)
        h = model.final_norm(x)
        heads = [h]
        for k in range(1, depth + 1):
            ahead = torch.cat([t_N[k:], torch.zeros(min(k, N), dtype=torch.int64)])
            parts = model.mtp[str(k - 1)]
            embedded = parts.embedding_norm(model.embedding(ahead[None]) * model.embedding_scale)
            joined = torch.cat([embedded, parts.hidden_norm(h)], -1) @ parts.projection.weight.T
            h, _ = model.blocks[str(config.num_layers + k - 1)](joined, geometry)
            heads.append(parts.final_norm(h))
        for k, read in enumerate(heads):
            if k + 1 >= N:
                continue
            table = model.embedding.weight if config.tied_embeddings else model.head.weight
            logits = (read[0, : N - k - 1] @ table.T) * model.head.scale
            log_z = logits.logsumexp(-1)
            nll = log_z - logits.gather(1, t_N[k + 1 :, None])[:, 0]
            sums[k] = sums[k] + nll.sum()
            numbers[k] += N - k - 1
            if k == 0:
                sums[0] = sums[0] + config.z_loss * log_z.square().sum()
    return sums[0] + weight / depth * sum(
        sums[k] * numbers[0] / numbers[k] for k in range(1, depth + 1)
    )


@pytest.mark.parametrize(
    ("depth", "more"),
    [
        (1, {}),
        (2, {"tied_embeddings": True, "embedding_scale": 3.0, "rope_fraction": 2 / 3}),
        (1, EXPERTS),
    ],
    ids=["one", "two-tied", "experts"],
)
def test_equals_the_twin(depth: int, more: dict[str, Any]) -> None:
    config, model = made(depth, **more)
    tokens_BL, targets_BL, documents = inputs()
    for router in (m for m in model.modules() if hasattr(m, "reset_buffers")):
        router.tokens.fill_(tokens_BL.numel())
    model.mtp.set_targets(counts(targets_BL, documents, depth))
    expected = plain(model, config, 0.3, depth)
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    losses = model(tokens_BL, targets_BL, documents)
    losses.total.backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        gap = (p.grad - wanted[name]).abs().max() / wanted[name].abs().max()
        assert gap < 1e-11, name
    seen = model.mtp.take()
    assert seen[:, 1].tolist() == counts(targets_BL, documents, depth)[1:].tolist()
    assert not model.mtp.take().any()


def test_weight_zero_leaves_the_main_gradients_to_the_bit() -> None:
    (_, without), (_, model) = made(weight=None), made(2, 0.0)
    tokens_BL, targets_BL, documents = inputs()
    model.mtp.set_targets(counts(targets_BL, documents, 2))
    for one in (without, model):
        one(tokens_BL, targets_BL, documents).total.backward()
    theirs = dict(model.named_parameters())
    for name, p in without.named_parameters():
        assert torch.equal(p.grad, theirs[name].grad), name
    _, other = made(2, 0.1)
    other.mtp.set_targets(counts(targets_BL, documents, 2))
    losses = other(tokens_BL, targets_BL, documents)
    losses.total.backward()
    assert torch.equal(losses.nll_BL, without(tokens_BL, targets_BL, documents).nll_BL)
    assert not torch.equal(other.embedding.weight.grad, without.embedding.weight.grad)


def test_documents_end_what_is_ahead() -> None:
    """A document of k + 1 tokens has no target of depth k, and a row's end is one too."""
    _, targets_BL, documents = inputs()
    ahead_MBL = ahead_of(targets_BL, documents, 3)
    assert torch.equal(ahead_MBL[0], targets_BL)
    numbers = [int((one != IGNORE).sum()) for one in ahead_MBL]
    assert numbers == [sum(max(n - k - 1, 0) for n in LENGTHS) for k in range(4)]
    rows = torch.arange(1, 2 * L + 1).view(2, L)
    assert ahead_of(rows, None, 1)[1, 0].tolist() == [*range(2, L + 1), IGNORE]


def test_what_is_predicted_is_not_seen() -> None:
    """Depth 1 at i reads tokens up to i + 1; it does not read token i + 2, its target."""
    _, model = made(1, 0.3)
    tokens_BL = torch.randint(V, (1, L + 2), generator=torch.Generator().manual_seed(2))
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for place in (None, 9, 8):  # of the token that is another one
        t = tokens_BL.clone()
        if place is not None:
            t[0, place] = (t[0, place] + 1) % V
        model.mtp.set_targets(torch.ones(2))
        model(t[:, :L], t[:, 1 : L + 1])
    i = 7  # its target of depth 1 is token 9, its input token 8
    assert torch.equal(seen[1][1, i], seen[0][1, i])
    assert not torch.equal(seen[2][1, i], seen[0][1, i])
    assert not torch.equal(seen[1][1, i + 1], seen[0][1, i + 1])


def test_an_evaluation_runs_without_it() -> None:
    _, model = made(1, 0.3)
    tokens_BL, targets_BL, documents = inputs()
    with torch.no_grad():
        losses = model(tokens_BL, targets_BL, documents)
    assert torch.isfinite(losses.total)
    trained = model(tokens_BL, targets_BL, documents).total
    assert torch.isnan(trained), "targets of the step were never set"
    assert model(tokens_BL, None, documents).shape == (2, L, V)


def test_counts_leave_it_out_and_operations_do_not() -> None:
    (plain_config, _), (config, model) = made(weight=None), made(2)
    assert count_parameters(config) == count_parameters(plain_config)
    assert [name for name, _ in model.named_parameters()] == [s.name for s in inventory(config)]
    D, F = 24, 40
    block = 2 * D * D + 2 * D * 12 + 3 * D * F
    own = sum(p.numel() for p in model.parameters()) - count_parameters(config).total
    assert own == 2 * (block + 2 * D * D + 2 * D + 3 * D)
    more = flops_per_token(config, L).forward - flops_per_token(plain_config, L).forward
    assert more == 2 * (2 * block + 4 * D * D + 2 * D * (L + 1) + 2 * V * D)
    assert sum(layer_flops(config, L)) == flops_per_token(config, L).forward
