"""Router of a mixture of experts: expert selection, gate weights, load balancing, statistics."""

# T tokens, D width, E experts, k experts that a token visits, G groups, e = E/G experts of a group

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.configs.model import AuxiliaryBalance, BiasBalance, RouterConfig
from allometry.models.fp8 import Quantised
from allometry.models.parameters import OwnsParameters, local_weight
from allometry.models.products import saved_linear
from allometry.models.quantiser import save
from allometry.scaling.roles import ParamSpec

_LEAST_WEIGHT = 1e-30  # added under the root of gate "sqrt", whose slope at zero is infinite


class RouterStatistics(NamedTuple):
    """Router statistics, summed over tokens, without gradient.

    ``counts_E``: visits to each expert (their sum is k x tokens). ``probabilities_E``: normalised
    scores of all experts. ``entropy``: entropy of each token's normalised scores, in nats.
    ``squared_log_z``: logsumexp(logits)**2. ``tokens``: number of tokens.
    """

    counts_E: Tensor
    probabilities_E: Tensor
    entropy: Tensor
    squared_log_z: Tensor
    tokens: Tensor


class Routing(NamedTuple):
    """Experts of each token ``experts_Tk``, best first, their weights ``gates_Tk``, statistics.

    ``gates_Tk`` is fp32 or wider. ``kept``: the router's input in FP8 if saved so for backward.
    """

    gates_Tk: Tensor
    experts_Tk: Tensor
    statistics: RouterStatistics
    kept: Quantised | None = None


class Router(OwnsParameters):
    """Token-choice router (arXiv 1701.06538): each token visits the k experts with the best scores.

    Scores are the softmax or the sigmoid of the logits, computed in fp32 (fp64 if x is fp64).
    Experts are selected by score, plus ``bias`` with a bias balance (arXiv 2408.15664); the gate
    weights never include the bias. Of equal scores the expert with the lower number is selected.

    The balance loss does not depend on the split of a batch into micro-batches or ranks. It is
    coefficient x E x sum_e f_e P_e: P_e is the mean of the normalised scores over all ``tokens`` of
    the step, f_e = ``load`` the fractions of visits in the previous step (uniform at first) or, if
    ``balance.loads`` selects the current step, in this step; the trainer then calls ``set_loads``
    (``models/moe.py``) before the first micro-batch with gradients. The gradients of the balance
    loss and of the z-loss (coefficient x mean of logsumexp(logits)**2) are added to the gradient of
    the logits, once for each backward pass and independent of the scale of the loss.

    ``saves``: keep the input for backward in FP8; the logits use the exact input. ``begin_step``
    and ``end_step`` of ``models/moe.py`` update the buffers. ``tokens`` is NaN until ``begin_step``
    sets it, so that a missing call gives NaN gradients.
    """

    weight: nn.Parameter
    load: Tensor
    bias: Tensor
    tokens: Tensor

    def __init__(self, spec: ParamSpec, config: RouterConfig, experts_per_token: int) -> None:
        super().__init__()
        self.config, self.saves, self.fused = config, False, False
        self.join_balance: Callable[..., Tensor] = join_balance  # ``StackedModel`` replaces this
        self.num_experts, self.experts_per_token = spec.fan_out, experts_per_token
        self.own("weight", spec)
        self.register_buffer("load", torch.empty(self.num_experts, dtype=torch.float32))
        self.register_buffer("bias", torch.empty(self.num_experts, dtype=torch.float32))
        self.register_buffer("tokens", torch.empty((), dtype=torch.float64), persistent=False)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Set the buffers to their values before the first step."""
        self.load.fill_(1.0 / self.num_experts)
        self.bias.zero_()
        self.tokens.fill_(float("nan"))

    def forward(self, x_TD: Tensor, counted_T: Tensor | None = None) -> Routing:
        """Return the routing of ``x_TD``.

        Tokens that are False in ``counted_T`` (bool; None: all True) are routed as well, but are
        excluded from the statistics and the balance gradients; ``tokens`` must exclude them too.
        """
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight = local_weight(self.weight)
        kept = None
        if self.saves and torch.is_grad_enabled():
            with torch.no_grad():
                kept = save(x_TD, fused=self.fused)
            logits_TE = saved_linear(x_TD.to(wide), weight, kept)
        else:
            logits_TE = F.linear(x_TD.to(wide), weight.to(wide))
        logits_TE = self._with_balance(logits_TE, counted_T)
        scores_TE = scores(logits_TE, self.config)
        bias = self.bias if isinstance(self.config.balance, BiasBalance) else None
        with torch.no_grad():
            experts_Tk = select(scores_TE, bias, self.config, self.experts_per_token)
        gates_Tk = gates(logits_TE, scores_TE, experts_Tk, self.config)
        statistics = observe(logits_TE, experts_Tk, self.config, counted_T)
        return Routing(gates_Tk, experts_Tk, statistics, kept)

    def _with_balance(self, logits_TE: Tensor, counted_T: Tensor | None) -> Tensor:
        balance, z_loss = self.config.balance, self.config.z_loss
        coefficient = balance.coefficient if isinstance(balance, AuxiliaryBalance) else 0.0
        if not coefficient and not z_loss:
            return logits_TE
        sigmoid = self.config.gate == "sigmoid"
        return self.join_balance(
            logits_TE, self.load, self.tokens, counted_T, coefficient, z_loss, sigmoid
        )


def scores(logits_TE: Tensor, config: RouterConfig) -> Tensor:
    """Return the score of each expert in [0, 1]."""
    return logits_TE.sigmoid() if config.gate == "sigmoid" else logits_TE.softmax(1)


def select(scores_TE: Tensor, bias_E: Tensor | None, config: RouterConfig, k: int) -> Tensor:
    """Return the ``k`` best experts of each token [T, k], best first.

    With ``groups_per_token`` only experts of the best groups are eligible; the score of a group is
    the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437).
    """
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    if config.groups_per_token not in (None, config.num_groups):
        T, E = scores_TE.shape
        scores_TGe = scores_TE.view(T, config.num_groups, -1)
        pair = min(2, scores_TGe.shape[2])
        groups_TG = scores_TGe.topk(pair, dim=2).values.sum(2)
        best_Tg = _best(groups_TG, config.groups_per_token)
        open_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter(1, best_Tg, True)
        scores_TE = scores_TGe.masked_fill(~open_TG[:, :, None], float("-inf")).view(T, E)
    return _best(scores_TE, k)


def _best(scores_TE: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` largest [T, k]; of equals the first, as in a stable sort."""
    # Not topk: its choice among equals depends on the device. Not a sort of all E either: argmax
    # takes the first of equals on every device, and compiled, the loop is one pass over a row.
    # ``vmap`` has no rule for scatter_ and uses the branch of compiled code.
    compiled = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    numbers_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    left_TE, chosen = scores_TE if compiled else scores_TE.clone(), []
    for visit in range(k):
        chosen.append(left_TE.argmax(1, keepdim=True))
        if visit == k - 1:
            break
        if compiled:
            left_TE = left_TE.where(numbers_E != chosen[-1], float("-inf"))
        else:
            left_TE.scatter_(1, chosen[-1], float("-inf"))
    return torch.cat(chosen, dim=1)


def _chosen(x_TE: Tensor, experts_Tk: Tensor) -> Tensor:
    """Return [T, k]: the chosen columns of each row."""
    if not torch.compiler.is_compiling():
        return x_TE.gather(1, experts_Tk)
    # As sums they fuse with the pass that computes x, and the gradient is not a scatter.
    numbers_E = torch.arange(x_TE.shape[1], device=x_TE.device)
    places = experts_Tk.split(1, dim=1)
    return torch.stack([x_TE.where(numbers_E == place, 0.0).sum(1) for place in places], dim=1)


def gates(logits_TE: Tensor, scores_TE: Tensor, experts_Tk: Tensor, config: RouterConfig) -> Tensor:
    """Return the gate weights [T, k] of the chosen experts, without ``scale``."""
    if config.gate in ("softmax", "sigmoid") and not config.normalize:
        return _chosen(scores_TE, experts_Tk)
    shares_Tk = shares(_chosen(logits_TE, experts_Tk), config.gate == "sigmoid")
    return (shares_Tk + _LEAST_WEIGHT).sqrt() if config.gate == "sqrt" else shares_Tk


def shares(logits_TE: Tensor, sigmoid: bool) -> Tensor:
    """Return the scores divided by their sum over experts."""
    # A softmax of log-scores avoids a division by a sum of zeros.
    return (F.logsigmoid(logits_TE) if sigmoid else logits_TE).softmax(1)


@torch.no_grad()
def observe(
    logits_TE: Tensor, experts_Tk: Tensor, config: RouterConfig, counted_T: Tensor | None = None
) -> RouterStatistics:
    """Return the statistics of these tokens, or only of the tokens True in ``counted_T``."""
    shares_TE = shares(logits_TE, config.gate == "sigmoid")
    numbers_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    for place in experts_Tk.split(1, dim=1):
        chosen_TE = chosen_TE | (numbers_E == place)
    log_z_T = logits_TE.logsumexp(1)
    tokens = torch.full((), logits_TE.shape[0], dtype=torch.int64, device=logits_TE.device)
    if counted_T is not None:
        chosen_TE, shares_TE = chosen_TE & counted_T[:, None], shares_TE * counted_T[:, None]
        log_z_T, tokens = log_z_T * counted_T, counted_T.sum()
    return RouterStatistics(
        counts_E=chosen_TE.sum(0),
        probabilities_E=shares_TE.sum(0),
        entropy=torch.special.entr(shares_TE).sum(),
        squared_log_z=log_z_T.square().sum(),
        tokens=tokens,
    )


class _BalanceGradient(torch.autograd.Function):
    """Identity on logits; backward adds the gradients of the balance loss and the z-loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        load_E: Tensor,
        tokens: Tensor,
        counted_T: Tensor | None,
        coefficient: float,
        z_loss: float,
        sigmoid: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits_TE, load_E, tokens, counted_T)
        ctx.coefficient, ctx.z_loss, ctx.sigmoid = coefficient, z_loss, sigmoid
        return logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, load_E, tokens, counted_T = ctx.saved_tensors
        each = (1.0 / tokens).to(logits_TE.dtype)
        if counted_T is not None:
            each = counted_T[:, None] * each
        if ctx.coefficient:
            shares_TE = shares(logits_TE, ctx.sigmoid)
            push_E = ctx.coefficient * load_E.shape[0] * load_E.to(logits_TE.dtype)
            mean_T1 = (shares_TE * push_E).sum(1, keepdim=True)
            pull_TE = each * shares_TE * (push_E - mean_T1)
            # p = s / sum(s), so dp_j/dl_i = p_j (1[i=j] - p_i) s'_i/s_i; s'_i/s_i is 1 for the
            # exponential and 1 - s_i for the sigmoid.
            grad_TE = grad_TE + (pull_TE * (-logits_TE).sigmoid() if ctx.sigmoid else pull_TE)
        if ctx.z_loss:
            log_z_T1 = logits_TE.logsumexp(1, keepdim=True)
            grad_TE = grad_TE + each * 2.0 * ctx.z_loss * log_z_T1 * (logits_TE - log_z_T1).exp()
        return grad_TE, None, None, None, None, None, None


join_balance: Callable[..., Tensor] = _BalanceGradient.apply
"""Return the logits with the gradients of the balance loss and the z-loss added in backward."""
