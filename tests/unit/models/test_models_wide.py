"""Values kept in fp32 with bf16 activations: attention scores and their log-sum-exp."""

import math

import pytest
import torch

from allometry.models.attention import attend
from allometry.models.attention_packed import packed_attention
from allometry.models.documents import Documents

BF16 = torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "blocked", "packed"])
def test_scores_are_not_rounded_to_bf16(backend: str) -> None:
    """Scores of 256 and 257: bf16 cannot represent 257, and would give two equal keys."""
    query, keys = torch.tensor([16.0, 1.0]), torch.tensor([[16.0, 0.0], [16.0, 1.0]])
    q_BLNH = query.expand(1, 2, 1, 2).to(BF16)
    k_BLKH = keys.view(1, 2, 1, 2).to(BF16)
    v_BLKH = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).view(1, 2, 1, 2).to(BF16)
    documents = Documents(torch.tensor([0, 2], dtype=torch.int32), 2, torch.arange(2)[None])
    o_BLNH = attend(
        q_BLNH, k_BLKH, v_BLKH, None if backend == "blocked" else documents, 1.0, backend
    )
    assert o_BLNH.dtype == BF16
    assert float(o_BLNH[0, 1, 0, 0]) == pytest.approx(1 / (1 + math.exp(-1)), abs=2**-8)


def test_log_sum_exp_of_packed_documents_is_wide() -> None:
    cuts = torch.tensor([0, 3, 8], dtype=torch.int32)
    q_TNH = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))
    for dtype, wide in ((BF16, torch.float32), (torch.float64, torch.float64)):
        q = q_TNH.to(dtype)
        _, lse_NT = packed_attention(q, q, q, cuts, 0.4)
        assert lse_NT.dtype == wide
        first = 0.4 * q.double().square().sum(2).T  # a token that attends only to itself
        for token in (0, 3):
            error = (lse_NT[:, token].double() - first[:, token]).abs().max()
            assert error < (1e-4 if dtype is BF16 else 1e-12)
