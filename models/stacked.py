"""Models of one shape and different parameters as one model with a leading run axis.

``torch.func.vmap`` turns each product with a weight into a batched one. What has no weights, or no
rule for batches, takes runs in its own way: attention as more sequences, the loss run by run on a
CPU, where a run's logits stay in the cache.
"""

# R runs, B sequences, L tokens, T = B*L, D width, V vocabulary, N heads, H head width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.models.head import Losses
from allometry.models.loss import linear_cross_entropy, reference_cross_entropy
from allometry.models.transformer import Attention, Transformer


class StackedModel:
    """``runs`` copies of a dense ``model`` without dropout, each with parameters of its own.

    ``parameters`` by name, leaves [M, rows, columns] on ``device`` in the model's type: M = R for
    matrices (vectors are matrices of one row), R x E for experts, run after run. ``model`` is the
    template, whose attention and loss are replaced.
    """

    def __init__(self, model: Transformer, runs: int, device: torch.device) -> None:
        self.model, self.runs = model, runs
        for module in model.modules():
            if isinstance(module, Attention):
                module.core = _attend
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

    @torch.no_grad()
    def fill(self, run: int, values: nn.Module) -> None:
        """Copy the parameters of a module of the same shape to one run."""
        for name, parameter in values.named_parameters():
            self.values(run)[name].copy_(parameter)

    def values(self, run: int) -> dict[str, Tensor]:
        """Return views of one run's parameters, in their own shapes."""
        return {name: stack.detach()[run] for name, stack in self._views().items()}

    def losses(self, tokens_RBL: Tensor, targets_RBL: Tensor) -> Losses:
        """Return ``total`` [R] and ``nll_BL`` [R, B, L], to be differentiated once, together."""
        made: Losses = vmap(self._one)(self._views(), tokens_RBL, targets_RBL)
        return made

    def _one(self, parameters: dict[str, Tensor], tokens_BL: Tensor, targets_BL: Tensor) -> Losses:
        made: Losses = functional_call(self.model, parameters, (tokens_BL, targets_BL))
        return made

    def _views(self) -> dict[str, Tensor]:
        return {
            name: stack.view(self.runs, *self._shapes[name])
            for name, stack in self.parameters.items()
        }


def _attend(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is None
    o_BLNH: Tensor = _Attend.apply(q_BLNH, k_BLKH, v_BLKH, scale)
    return o_BLNH


class _Rule(torch.autograd.Function):
    """A function that only ``vmap`` calls, by its rule."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: autograd differentiates what the rule calls."""


class _Attend(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        """Attend in all runs' sequences."""
        *qkv, scale = inputs
        q, k, v = (x.flatten(0, 1) for x in _leading(qkv, in_dims))
        return attend(q, k, v, None, scale).unflatten(0, (info.batch_size, -1)), 0


class _CrossEntropy(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        """Take one run after the other."""
        *tensors, logit_scale, z_loss = inputs
        made = [
            linear_cross_entropy(*run, logit_scale=logit_scale, z_loss=z_loss)
            for run in zip(*(x.unbind() for x in _leading(tensors, in_dims)), strict=True)
        ]
        totals, nlls = zip(*made, strict=True)
        return (torch.stack(totals), torch.stack(nlls)), (0, 0)


def _leading(tensors: list[Tensor], in_dims: Any) -> list[Tensor]:
    """Return tensors with the runs first; each has them."""
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
    """Return ``linear_cross_entropy`` of each run in turn, whose logits stay in a CPU's cache."""
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
    """Return the same of all runs at once, whose logits are there together: few large kernels."""
    return reference_cross_entropy(
        x_TD, weight_VD, targets_T, logit_scale=logit_scale, z_loss=z_loss
    )
