"""Attention within packed documents by torch's flex_attention (arXiv 2412.05496).

The mask is two numbers for each token and, for each block of queries, a list of blocks of keys.
Only this list grows with L squared, at 4 (L / 128)^2 bytes for a sequence.
"""

# B sequences, L tokens in a sequence, N query heads, K key/value heads, H head width,
# R blocks of a sequence

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from allometry.models.documents import Documents

BLOCK = 128


def flex(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return causal attention within each document [B, L, N, H], over the last ``window`` keys.

    Outside of compiled code the kernel is compiled on CUDA. On a CPU, where torch has no backward
    for the compiled kernel, flex_attention's eager code computes all scores.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    compiled = torch.compiler.is_compiling() or q.device.type != "cuda"
    run = flex_attention if compiled else _compiled()
    if documents is None:
        positions_BL = torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
    else:
        positions_BL = documents.positions_BL
    mask = document_mask(positions_BL, window)
    grouped = q.shape[1] > k.shape[1]
    return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def document_mask(positions_BL: Tensor, window: int | None = None) -> BlockMask:
    """Return the causal mask within documents, from each token's position in its document.

    A block of queries attends to its own block of keys and the blocks back to the first key of its
    first token (the start of the document or of the window). Earlier blocks whose keys are all
    visible, also to the last token, are full blocks: the kernel applies no mask to full blocks.
    """
    L = positions_BL.shape[1]
    R = -(-L // BLOCK)
    token_L = torch.arange(L, device=positions_BL.device)
    start_BL = token_L - positions_BL
    if window is not None:
        start_BL = torch.maximum(start_BL, token_L - window + 1)
    first_R = torch.arange(R, device=positions_BL.device) * BLOCK
    last_R = (first_R + BLOCK - 1).clamp(max=L - 1)
    block_R = torch.arange(R, device=positions_BL.device)
    from_BR = start_BL[:, first_R] // BLOCK
    whole_BR = torch.minimum((start_BL[:, last_R] + BLOCK - 1) // BLOCK, block_R)
    # Block i of queries sees block j of keys in part for j in [from, whole) and j = i, else fully.
    whole_BRR = (block_R >= whole_BR[..., None]) & (block_R < block_R[:, None])
    part_BRR = (block_R >= from_BR[..., None]) & (block_R < whole_BR[..., None])
    part_BRR = part_BRR | (block_R == block_R[:, None])

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= start_BL[b, q])

    return BlockMask.from_kv_blocks(
        *_listed(part_BRR),
        *_listed(whole_BRR),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(L, L),
    )


def _listed(mask_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks [B, 1, R] and their indices, in front of [B, 1, R, R]."""
    number_BR = mask_BRR.sum(dim=-1, dtype=torch.int32)
    index_BRR = mask_BRR.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return number_BR[:, None], index_BRR.to(torch.int32)[:, None].contiguous()
