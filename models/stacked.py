"""Several models of one shape with different parameters, computed as one model with a run axis.

``torch.func.vmap`` batches each product with a weight. Operators without weights, or without a
batching rule, handle the run axis explicitly: attention adds sequences, experts become R x E
experts that receive only the tokens of their run, and on a CPU the loss loops over runs, so that
the logits of one run stay in the cache.
"""

# R runs, B sequences, L tokens, T = B*L, D width, V vocabulary, N heads, H head width, E experts,
# k experts that a token visits, F hidden width of an expert

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from allometry.configs.model import BiasBalance
from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.models.fp8 import Quantised
from allometry.models.grouped import grouped_linear
from allometry.models.head import Losses
from allometry.models.latent import LatentAttention
from allometry.models.layers import gated
from allometry.models.loss import linear_cross_entropy, reference_cross_entropy
from allometry.models.moe import Experts, loads_of, routers, wanted_of
from allometry.models.router import Router, join_balance
from allometry.models.transformer import Attention, Transformer
from allometry.models.visits import gather_rows, sort_by_expert, spread_rows


class StackedModel:
    """``runs`` copies of ``model`` (without dropout), each with its own parameters.

    ``parameters`` by name are leaves [M, rows, columns] on ``device`` in the model's type: M = R
    for matrices (vectors are matrices of one row), R x E for experts, ordered by run. ``buffers``
    are the routers' buffers, [R, E]. ``model`` is the template; some of its functions are replaced.
    For example, ``StackedModel(model, runs=8, device=torch.device("cuda"))``.
    """

    def __init__(self, model: Transformer, runs: int, device: torch.device) -> None:
        self.model, self.runs = model, runs
        for module in model.modules():
            if isinstance(module, Attention | LatentAttention):
                module.core = _attend
            elif isinstance(module, Experts):
                module.forward = partial(_experts, module)  # type: ignore[method-assign]
            elif isinstance(module, Router):
                module.join_balance = _Balance.apply
        assert model.head is not None
        model.head.cross_entropy = full_logits if device.type == "cuda" else run_by_run
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self.parameters = {
            name: p.new_empty(
                runs * (len(p) if p.dim() == 3 else 1),
                *(p.shape[-2:] if p.dim() > 1 else (1, *p.shape)),
                device=device,
            ).requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        self.buffers: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}  # buffers with one value for all runs
        for name, buffer in model.named_buffers():
            if name.endswith(".tokens"):
                self._shared[name] = buffer.to(device)
            else:
                self.buffers[name] = buffer.to(device).expand(runs, -1).clone()

    def begin_step(self, tokens: int) -> None:
        """Set the routers' ``tokens`` to the number of tokens in a step of one run."""
        for buffer in self._shared.values():
            buffer.fill_(tokens * self.model.num_streams)

    @torch.no_grad()
    def set_loads(self, counts: Mapping[int, Tensor]) -> None:
        """Set the routers' loads as ``moe.set_loads``, from the visits [R, E] of each run."""
        for layer in routers(self.model):
            self.buffers[self._buffer(layer, "load")].copy_(loads_of(counts[layer]))

    @torch.no_grad()
    def end_step(self, counts: Mapping[int, Tensor]) -> None:
        """Update loads and biases as ``moe.end_step``, from the visits [R, E] of each run."""
        self.set_loads(counts)
        for layer, router in routers(self.model).items():
            balance = router.config.balance
            if isinstance(balance, BiasBalance) and router.weight.requires_grad:
                bias = self.buffers[self._buffer(layer, "bias")]
                bias.add_(wanted_of(counts[layer], balance).to(bias.dtype), alpha=balance.rate)

    @staticmethod
    def _buffer(layer: int, name: str) -> str:
        return f"blocks.{layer}.ffn.router.{name}"

    @torch.no_grad()
    def fill(self, run: int, values: nn.Module) -> None:
        """Copy the parameters of a module of the same shape to run number ``run``."""
        for name, parameter in values.named_parameters():
            self.values(run)[name].copy_(parameter)

    def values(self, run: int) -> dict[str, Tensor]:
        """Return views of one run's parameters, in the shapes of the template."""
        return {name: stack.detach()[run] for name, stack in self._views().items()}

    def losses(self, tokens_RBL: Tensor, targets_RBL: Tensor) -> tuple[Losses, dict[int, Tensor]]:
        """Return losses and visits: ``total`` [R], ``nll_BL`` [R, B, L], and [R, E] by layer.

        Call backward once, on all runs together. Visits are collected only with gradients enabled.
        """
        made: tuple[Losses, dict[int, Tensor]] = vmap(self._one)(
            self._views() | self.buffers, tokens_RBL, targets_RBL
        )
        return made

    @torch.no_grad()
    def visits(self, tokens_RBL: Tensor) -> dict[int, Tensor]:
        """Return the visits [R, E] to each layer's experts, running only the blocks."""
        blocks = partial(self._one, targets_BL=None, blocks_only=True)
        seen: dict[int, Tensor] = vmap(blocks)(self._views() | self.buffers, tokens_RBL)[1]
        return seen

    def _one(
        self,
        tensors: dict[str, Tensor],
        tokens_BL: Tensor,
        targets_BL: Tensor | None,
        **how: bool,
    ) -> tuple[Losses, dict[int, Tensor]]:
        inputs = (tokens_BL, targets_BL)
        made: Losses = functional_call(self.model, tensors | self._shared, inputs, how)
        return made, {n: seen.counts_E for n, seen in self.model.take_statistics().items()}

    def _views(self) -> dict[str, Tensor]:
        return {
            name: stack.view(self.runs, *self._shapes[name])
            for name, stack in self.parameters.items()
        }


def _attend(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    *,
    window: int | None = None,
) -> Tensor:
    assert documents is None
    o_BLNH: Tensor = _Attend.apply(q_BLNH, k_BLKH, v_BLKH, scale, window)
    return o_BLNH


class _Rule(torch.autograd.Function):
    """Autograd function that is only called through its ``vmap`` rule."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: autograd differentiates the operators inside the rule."""


class _Attend(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        """Attend with the sequences of all runs as one batch."""
        *qkv, scale, window = inputs
        q, k, v = (x.flatten(0, 1) for x in _leading(qkv, in_dims))
        o_BLNH = attend(q, k, v, None, scale, window=window)
        return o_BLNH.unflatten(0, (info.batch_size, -1)), 0


def _experts(
    experts: Experts,
    x_TD: Tensor,
    gates_Tk: Tensor,
    experts_Tk: Tensor,
    beside: Callable[[], Tensor] | None = None,
    kept: Quantised | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output of ``Experts.forward``."""
    assert kept is None
    weights = experts.gate, experts.up, experts.down
    y_TD: Tensor = _Experts.apply(x_TD, gates_Tk, experts_Tk, *weights, experts.activation)
    return y_TD, None if beside is None else beside()


class _Experts(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        """Compute the experts of all runs as one layer of R x E experts."""
        *tensors, activation = inputs
        x_RTD, gates_RTk, experts_RTk, *weights = _leading(tensors, in_dims)
        num_experts = weights[0].shape[1]
        first_R = torch.arange(info.batch_size, device=x_RTD.device) * num_experts
        visits = (experts_RTk + first_R[:, None, None]).flatten(0, 1)
        sorting = sort_by_expert(visits, info.batch_size * num_experts)
        gate, up, down = (weight.flatten(0, 1) for weight in weights)
        x_SD = spread_rows(x_RTD.flatten(0, 1), sorting)
        rows = sorting.counts_E
        gate_up = grouped_linear(x_SD, gate, rows), grouped_linear(x_SD, up, rows)
        h_SF = gated(gate_up, activation)
        y_TD = gather_rows(grouped_linear(h_SF, down, rows), gates_RTk.flatten(0, 1), sorting)
        return y_TD.view(x_RTD.shape), 0


class _Balance(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        """Add the balance gradient run by run; all runs have the same number of tokens per step."""
        logits, load, tokens, *how = inputs
        logits_RTE, load_RE = _leading([logits, load], in_dims)
        made = [
            join_balance(logits_TE, load_E, tokens, *how)
            for logits_TE, load_E in zip(logits_RTE.unbind(), load_RE.unbind(), strict=True)
        ]
        return torch.stack(made), 0


class _CrossEntropy(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        """Compute the loss of one run at a time."""
        *tensors, logit_scale, z_loss = inputs
        made = [
            linear_cross_entropy(*run, logit_scale=logit_scale, z_loss=z_loss)
            for run in zip(*(x.unbind() for x in _leading(tensors, in_dims)), strict=True)
        ]
        totals, nlls = zip(*made, strict=True)
        return (torch.stack(totals), torch.stack(nlls)), (0, 0)


def _leading(tensors: list[Tensor], in_dims: Any) -> list[Tensor]:
    """Return the tensors with the run axis first; every tensor must have one."""
    return [x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=False)]


def run_by_run(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    logit_scale: float,
    z_loss: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return ``linear_cross_entropy`` run by run, so that a run's logits stay in a CPU's cache."""
    made: tuple[Tensor, Tensor] = _CrossEntropy.apply(
        x_TD, weight_VD, targets_T, logit_scale, z_loss
    )
    return made


def full_logits(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    logit_scale: float,
    z_loss: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss of all runs at once from full logits: few large kernels, more memory."""
    return reference_cross_entropy(
        x_TD, weight_VD, targets_T, logit_scale=logit_scale, z_loss=z_loss
    )
