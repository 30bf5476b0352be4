"""Moving tokens to the experts that they visit, as rows sorted by expert, and back.

Nothing here adds with atomics: the same input gives the same bits.
"""

# T tokens, k experts that a token visits, S = T*k rows, E experts, D width

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sorting(NamedTuple):
    """Where the visits of tokens to experts go when they are sorted by expert.

    ``token_S``: the token of each sorted row. ``row_Tk``: the sorted row of each visit.
    ``counts_E``: rows of each expert.
    """

    token_S: Tensor
    row_Tk: Tensor
    counts_E: Tensor


def sort_by_expert(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Sort visits by expert; those to one expert stay in the order of tokens.

    The experts of a token are different ones. Nothing waits for the device.
    """
    if experts_Tk.device.type == "cpu":  # whose sort of small numbers is faster than counting
        return sorted_by_sort(experts_Tk, num_experts)
    return sorted_by_counting(experts_Tk, num_experts)


def sorted_by_counting(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Return ``sort_by_expert`` from one running sum over a table [E, T] of who visits whom.

    Read row by row, the visits in the table come in their sorted order already: a visit's place is
    the number of visits up to it. One scan of E*T numbers, where a sort reads and writes all S rows
    several times.
    """
    T, k = experts_Tk.shape
    visited_ET = torch.zeros(num_experts, T, dtype=torch.int32, device=experts_Tk.device)
    visited_ET = visited_ET.scatter(0, experts_Tk.t(), 1)
    # Flat, as a GPU's scan of one row is faster than its scans of many.
    upto_ET = visited_ET.flatten().cumsum(0, dtype=torch.int32)
    tokens_T = torch.arange(T, device=experts_Tk.device)
    row_Tk = upto_ET[experts_Tk * T + tokens_T[:, None]].long() - 1
    token_S = torch.empty(T * k, dtype=torch.int64, device=experts_Tk.device)
    token_S = token_S.scatter(0, row_Tk.flatten(), tokens_T[:, None].expand(T, k).flatten())
    return Sorting(token_S, row_Tk, counts_E=visited_ET.sum(1))


def sorted_by_sort(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Return ``sort_by_expert`` by a stable sort of all visits: its plain twin."""
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
    """Return [S, D]: the token of each sorted row."""
    x_SD: Tensor = _Spread.apply(x_TD, sorting.token_S, sorting.row_Tk)
    return x_SD


def gather_rows(y_SD: Tensor, gates_Tk: Tensor, sorting: Sorting) -> Tensor:
    """Return [T, D] in y's type: the sum of each token's rows times its gates, added in fp32."""
    y_TD: Tensor = _Gather.apply(y_SD, gates_Tk, sorting.token_S, sorting.row_Tk)
    return y_TD


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Spread(torch.autograd.Function):
    """Indexing whose gradient reads rows; autograd's own would scatter them with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_S: Tensor, row_Tk: Tensor) -> Tensor:
        ctx.save_for_backward(row_Tk)
        return x_TD[token_S]

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (row_Tk,) = ctx.saved_tensors
        # A visit at a time: all at once would hold k times the tokens in fp32.
        grad_TD = grad_SD[row_Tk[:, 0]].to(_wide(grad_SD.dtype))
        for visit in range(1, row_Tk.shape[1]):
            grad_TD = grad_TD + grad_SD[row_Tk[:, visit]]
        return grad_TD.to(grad_SD.dtype), None, None


class _Gather(torch.autograd.Function):
    """The weighted sum over visits, keeping the sorted rows only once and not widened."""

    @staticmethod
    def forward(
        ctx: Any, y_SD: Tensor, gates_Tk: Tensor, token_S: Tensor, row_Tk: Tensor
    ) -> Tensor:
        # In the compute type always: where a layout cuts experts, rows are summands of each rank.
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
