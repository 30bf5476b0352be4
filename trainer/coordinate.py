"""The coordinate check: how far activations move in a few steps must not depend on width."""

# B sequences, L tokens, V vocabulary; h_t a block's output after t steps

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.models.transformer import Transformer
from allometry.optim.build import build_optimizer
from allometry.scaling.parameterization import Parameterization

LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Movement:
    """rms(h_t − h_0) of one run: ``rms["blocks.0"]`` ... and ``rms["logits"]``; ``losses`` in
    nats per token, before each step and after the last."""

    width: int
    seed: int
    rms: dict[str, float]
    losses: tuple[float, ...]


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """Return the same model at another width, everything in proportion, head width unchanged.

    Raises:
        UserError: the heads or the feed-forward cannot be scaled to whole numbers.
    """
    sizes = {
        "width": model.width,
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads,
        "ffn_width": model.ffn_width,
    }
    for key, size in sizes.items():
        scaled, rest = divmod(size * width, model.width)
        if rest or not scaled:
            raise UserError(
                f"model.{key}={size} cannot be scaled from width={model.width} to width={width}; "
                "choose widths in whole proportion to the model's heads and ffn_width"
            )
        sizes[key] = scaled
    return model.model_copy(update={**sizes, "head_dim": model.head_width})


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateCheck:
    """Trains a model at several widths on one batch and measures what moves
    (arXiv 2203.03466, appendix D.1).

    The batch is ``tokens_BL`` [B, L+1], used in each of ``steps`` steps at the constant learning
    rate of ``optimizer``, in fp32. Zeros in the head and in the queries (``zero_head``,
    ``zero_queries``) take away the part of the initial function that legitimately shrinks as
    1/√width, so that a few steps show the asymptotic slope.
    """

    model: ModelConfig
    parameterization: ParameterizationConfig
    optimizer: OptimizerConfig
    tokens_BL: Tensor
    steps: int = 5
    zero_head: bool = True
    zero_queries: bool = True

    def movement(self, width: int, seed: int) -> Movement:
        """Train one model and return how far its block outputs and logits have moved."""
        description = at_width(self.model, width)
        rules = Parameterization(self.parameterization, description)
        model = build_model(description, rules, "fp32")
        initialize(model, rules, seed)
        self._set_zeros(model)
        optimizer = build_optimizer(
            model.named_parameters(), parameter_specs(model), rules, self.optimizer
        )
        inputs_BL, targets_BL = self.tokens_BL[:, :-1], self.tokens_BL[:, 1:].contiguous()
        start = activations(model, inputs_BL)
        losses = []
        for _ in range(self.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = model(inputs_BL, targets_BL).total / targets_BL.numel()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            losses.append(float(model(inputs_BL, targets_BL).total) / targets_BL.numel())
        end = activations(model, inputs_BL)
        rms = {name: float((end[name] - start[name]).square().mean().sqrt()) for name in start}
        return Movement(width=width, seed=seed, rms=rms, losses=tuple(losses))

    def run(self, widths: Iterable[int], seeds: Iterable[int]) -> list[Movement]:
        """Return the movement at each width with each seed."""
        seeds = tuple(seeds)
        return [self.movement(width, seed) for width in widths for seed in seeds]

    @torch.no_grad()
    def _set_zeros(self, model: Transformer) -> None:
        for name, parameter in model.named_parameters():
            is_head = name == "head.weight"
            is_query = name.endswith(".attention.wq.weight")
            if (is_head and self.zero_head) or (is_query and self.zero_queries):
                parameter.zero_()


@torch.no_grad()
def activations(model: Transformer, tokens_BL: Tensor) -> dict[str, Tensor]:
    """Return each block's output ("blocks.0", ...) and the logits ("logits") in float64."""
    kept: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda _module, _args, output, name=f"blocks.{index}": kept.update(
                {name: output[0].double()}
            )
        )
        for index, block in model.blocks.items()
    ]
    try:
        kept[LOGITS] = model(tokens_BL).double()
    finally:
        for handle in handles:
            handle.remove()
    return kept


def slopes(movements: Iterable[Movement]) -> dict[str, float]:
    """Return the exponent of width in each movement: d log2(rms) / d log2(width), all seeds."""
    movements = list(movements)
    widths = np.log2([movement.width for movement in movements])
    assert len(set(widths)) > 1, "a slope needs at least two widths"
    return {
        name: float(
            np.polyfit(widths, np.log2([movement.rms[name] for movement in movements]), 1)[0]
        )
        for name in movements[0].rms
    }


def failures(
    measured: Mapping[str, float], *, block_bound: float = 0.1, logit_bound: float = 0.2
) -> list[str]:
    """Return a sentence for each slope that is not flat; none: the check is passed."""
    found = []
    for name, slope in measured.items():
        bound = logit_bound if name == LOGITS else block_bound
        if not abs(slope) <= bound:
            found.append(f"{name} moves as width^{slope:+.2f}, outside ±{bound:g}")
    return found
