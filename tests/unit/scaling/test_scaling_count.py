from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from allometry.configs.model import DenseModel
from allometry.scaling.count import (
    DocumentFlops,
    attention_flops,
    count_parameters,
    document_flops,
    flops_per_token,
    layer_flops,
)
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import Role


def dense(**changes: object) -> DenseModel:
    values: dict[str, object] = {
        "vocab_size": 101,
        "width": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_width": 72,
    }
    return DenseModel.model_validate({**values, **changes})


def test_inventory_of_a_block_by_hand() -> None:
    specs = {spec.name: spec for spec in inventory(dense(num_layers=1, qk_norm=True))}
    shapes = {name: spec.shape for name, spec in specs.items()}
    assert shapes == {
        "embedding.weight": (101, 48),
        "blocks.0.attention_norm.weight": (48,),
        "blocks.0.attention.wq.weight": (64, 48),
        "blocks.0.attention.wk.weight": (32, 48),
        "blocks.0.attention.wv.weight": (32, 48),
        "blocks.0.attention.q_norm.weight": (16,),
        "blocks.0.attention.k_norm.weight": (16,),
        "blocks.0.attention.wo.weight": (48, 64),
        "blocks.0.ffn_norm.weight": (48,),
        "blocks.0.ffn.gate.weight": (72, 48),
        "blocks.0.ffn.up.weight": (72, 48),
        "blocks.0.ffn.down.weight": (48, 72),
        "final_norm.weight": (48,),
        "head.weight": (101, 48),
    }
    embedding, head = specs["embedding.weight"], specs["head.weight"]
    assert (embedding.role, embedding.fan_in, embedding.fan_out) == (Role.INPUT, 101, 48)
    assert (head.role, head.fan_in, head.fan_out) == (Role.OUTPUT, 48, 101)
    for name, spec in specs.items():
        assert math.prod(spec.shape) == spec.numel
        if spec.role is Role.HIDDEN:
            assert spec.shape == (spec.fan_out, spec.fan_in), name


def test_count_of_the_25m_model_and_of_a_tied_one() -> None:
    model = DenseModel(vocab_size=8192, width=384, num_layers=8, num_heads=6, ffn_width=1536)
    count = count_parameters(model)
    ends, block = 8192 * 384, 4 * 384**2 + 3 * 384 * 1536
    vectors = (2 * 8 + 1) * 384
    assert count.by_role == {
        "input": ends,
        "hidden": 8 * block,
        "vector": vectors,
        "output": ends,
    }
    assert count.total == 2 * ends + 8 * block + vectors == 25_172_352
    assert count.non_embedding == 8 * block + vectors
    tied = count_parameters(model.model_copy(update={"tied_embeddings": True}))
    assert tied.total == count.total - ends
    assert tied.non_embedding == count.non_embedding
    assert "output" not in tied.by_role


class Twin(nn.Module):
    """Module with the matrix products of the real model, explicit attention, and no other
    operators."""

    def __init__(self, model: DenseModel) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocab_size, model.width)
        queries, keys = model.num_heads * model.head_width, model.kv_heads * model.head_width
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Linear(fan_in, fan_out, bias=False)
                for fan_in, fan_out in (
                    (model.width, queries),
                    (model.width, keys),
                    (model.width, keys),
                    (queries, model.width),
                    (model.width, model.ffn_width),
                    (model.width, model.ffn_width),
                    (model.ffn_width, model.width),
                )
            )
            for _ in range(model.num_layers)
        )
        self.head = nn.Linear(model.width, model.vocab_size, bias=False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x = self.embedding(tokens_BL)
        for wq, wk, wv, wo, gate, up, down in self.blocks:  # type: ignore[misc]
            q, k, v = (self._heads(w(x)) for w in (wq, wk, wv))
            repeat = self.model.num_heads // self.model.kv_heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            scores = (q @ k.transpose(-1, -2)).tril().softmax(-1)
            x = x + wo((scores @ v).transpose(1, 2).flatten(2))
            x = x + down(torch.nn.functional.silu(gate(x)) * up(x))
        return self.head(x).square().sum()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.model.head_width)).transpose(1, 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [1, 8, 33])
def test_flops_equal_torchs_counter(length: int, tied: bool) -> None:
    # torch counts every pair of positions, we count the (L+1)/2 of L pairs left by the causal mask:
    # the two products of activations (bmm) shrink by that factor.
    model = dense(tied_embeddings=tied)
    twin = Twin(model)
    tokens = torch.zeros(2, length, dtype=torch.long)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            total = twin(tokens)
            if backward:
                total.backward()
        by_kernel = counter.get_flop_counts()["Global"]
        attention = by_kernel[torch.ops.aten.bmm]
        causal = attention * (length + 1) / (2 * length)
        counts.append(((counter.get_total_flops() - attention + causal) / tokens.numel(), causal))
    ours = flops_per_token(model, length)
    assert ours.forward == counts[0][0]
    assert ours.total == counts[1][0]
    assert ours.backward == counts[1][0] - counts[0][0]
    assert ours.attention == counts[1][1] / tokens.numel()


@pytest.mark.parametrize("length", [1, 5, 6, 7, 100])
def test_windows_are_counted_pair_by_pair(length: int) -> None:
    window = {"tokens": 6, "global_every": 2}
    model = dense(window=window)
    whole = dense()
    each = 4 * model.num_heads * model.head_width
    pairs = sum(min(i + 1, 6) for i in range(length))
    assert attention_flops(model, length, 6) == each * pairs // length
    assert attention_flops(model, length) * length == each * length * (length + 1) // 2
    flops, layers = flops_per_token(model, length), layer_flops(model, length)
    assert sum(layers) == flops.forward
    assert layers[1] - layers[2] == attention_flops(model, length, 6) - attention_flops(
        model, length
    )
    assert flops.total - flops.attention == (
        flops_per_token(whole, length).total - flops_per_token(whole, length).attention
    )
    of_document = DocumentFlops.of(model)(length, length**2)
    assert abs(of_document - flops.total * length) <= 6 * length, "rounded down for each layer"
    assert (
        DocumentFlops.of(whole)(length, length**2) == flops_per_token(whole, length).total * length
    )


def test_windows_of_several_documents_are_bounded_from_above() -> None:
    model = dense(window={"tokens": 6})
    lengths = (2, 30, 7)
    exact = sum(flops_per_token(model, n).total * n for n in lengths)
    bound = document_flops(model, lengths)
    assert exact <= bound <= 1.02 * exact


def test_attention_is_the_part_that_grows_with_length() -> None:
    model = dense()
    short, long = flops_per_token(model, 1), flops_per_token(model, 1001)
    assert long.total - short.total == long.attention - short.attention
    assert long.attention - short.attention == 3 * 3 * 2 * 64 * 1000
