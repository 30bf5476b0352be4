"""Permute tokens into rows sorted by expert, and combine the experts' rows per token again.

A visit is one (token, expert) assignment. No kernel here uses atomic additions, so equal inputs
give bitwise equal outputs.
"""

# T tokens, k experts that a token visits, S = T*k rows, E experts, D width

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sorting(NamedTuple):
    """Permutation that sorts the visits of tokens to experts by expert.

    ``token_S``: token of each sorted row. ``row_Tk``: sorted row of each visit. ``counts_E``:
    number of rows of each expert. For example, ``experts_Tk`` [[1, 0], [1, 2]] gives ``token_S``
    [0, 0, 1, 1], ``row_Tk`` [[1, 0], [2, 3]] and ``counts_E`` [1, 2, 1].
    """

    token_S: Tensor
    row_Tk: Tensor
    counts_E: Tensor


def sort_by_expert(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Sort visits by expert; the visits of one expert stay in token order.

    The k experts of a token must be distinct. The CPU does not wait for the device.
    """
    if experts_Tk.device.type == "cpu":  # on a CPU, sorting small integers is faster than a scan
        return sorted_by_sort(experts_Tk, num_experts)
    return sorted_by_counting(experts_Tk, num_experts)


def sorted_by_counting(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Return ``sort_by_expert`` computed by one prefix sum over an assignment table [E, T].

    The table has a 1 where a token visits an expert. Read row by row, its visits are in sorted
    order, so the sorted row of a visit is the number of visits before that visit. One scan reads
    E*T numbers once; a sort reads and writes all S rows several times.
    """
    T, k = experts_Tk.shape
    visited_ET = torch.zeros(num_experts, T, dtype=torch.int32, device=experts_Tk.device)
    visited_ET = visited_ET.scatter(0, experts_Tk.t(), 1)
    # Flattened, because a GPU scans one long row faster than many short rows.
    upto_ET = visited_ET.flatten().cumsum(0, dtype=torch.int32)
    tokens_T = torch.arange(T, device=experts_Tk.device)
    row_Tk = upto_ET[experts_Tk * T + tokens_T[:, None]].long() - 1
    token_S = torch.empty(T * k, dtype=torch.int64, device=experts_Tk.device)
    token_S = token_S.scatter(0, row_Tk.flatten(), tokens_T[:, None].expand(T, k).flatten())
    return Sorting(token_S, row_Tk, counts_E=visited_ET.sum(1))


def sorted_by_sort(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Return ``sort_by_expert`` by a stable sort of all visits: the reference implementation."""
    chosen_S = experts_Tk.flatten()
    sorted_S, order_S = chosen_S.sort(stable=True)
    visits_S = torch.arange(chosen_S.shape[0], device=chosen_S.device)
    row_S = torch.empty_like(order_S).scatter(0, order_S, visits_S)
    ends_E = torch.searchsorted(
        sorted_S, torch.arange(num_experts, device=chosen_S.device), right=True
    )
    return Sorting(
        token_S=order_S // experts_Tk.shape[1],
        row_Tk=row_S.view(experts_Tk.shape),
        counts_E=ends_E.diff(prepend=ends_E.new_zeros(1)),
    )


def spread_rows(x_TD: Tensor, sorting: Sorting) -> Tensor:
    """Return [S, D]: the input of each sorted row, copied from its token."""
    x_SD: Tensor = _Spread.apply(x_TD, sorting.token_S, sorting.row_Tk)
    return x_SD


def gather_rows(y_SD: Tensor, gates_Tk: Tensor, sorting: Sorting) -> Tensor:
    """Return [T, D] in y's type: the gate-weighted sum of each token's rows, summed in fp32."""
    y_TD: Tensor = _Gather.apply(y_SD, gates_Tk, sorting.token_S, sorting.row_Tk)
    return y_TD


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Spread(torch.autograd.Function):
    """Indexing with a gather as its backward; autograd's own backward is an atomic scatter."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_S: Tensor, row_Tk: Tensor) -> Tensor:
        ctx.save_for_backward(row_Tk)
        return x_TD[token_S]

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (row_Tk,) = ctx.saved_tensors
        # One visit at a time: all k together would need k times the tokens in fp32.
        grad_TD = grad_SD[row_Tk[:, 0]].to(_wide(grad_SD.dtype))
        for visit in range(1, row_Tk.shape[1]):
            grad_TD = grad_TD + grad_SD[row_Tk[:, visit]]
        return grad_TD.to(grad_SD.dtype), None, None


class _Gather(torch.autograd.Function):
    """Weighted sum over visits; keeps the sorted rows once, in their own type, for backward."""

    @staticmethod
    def forward(
        ctx: Any, y_SD: Tensor, gates_Tk: Tensor, token_S: Tensor, row_Tk: Tensor
    ) -> Tensor:
        # Saved in the compute type, never in FP8: with a sharded F the rows are partial sums.
        ctx.save_for_backward(y_SD, gates_Tk, token_S, row_Tk)
        y_TD = y_SD[row_Tk[:, 0]].to(_wide(y_SD.dtype)) * gates_Tk[:, :1]
        for visit in range(1, row_Tk.shape[1]):
            y_TD = y_TD + y_SD[row_Tk[:, visit]] * gates_Tk[:, visit : visit + 1]
        return y_TD.to(y_SD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_SD, gates_Tk, token_S, row_Tk = ctx.saved_tensors
        gates_S = gates_Tk.flatten()
        gates_S = torch.empty_like(gates_S).scatter(0, row_Tk.flatten(), gates_S)
        grad_SD = (grad_TD[token_S] * gates_S[:, None]).to(y_SD.dtype)
        wide = _wide(y_SD.dtype)
        grad_gates = [
            (y_SD[row_Tk[:, visit]].to(wide) * grad_TD).sum(1) for visit in range(row_Tk.shape[1])
        ]
        return grad_SD, torch.stack(grad_gates, dim=1).to(gates_Tk.dtype), None, None
