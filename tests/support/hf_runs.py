"""Runs whose model is a transformers model, and the logits of both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from allometry.configs.loader import dump, validate
from allometry.configs.run import RunConfig
from allometry.configs.source import Tree
from allometry.interop.huggingface.model import balances_by_bias, read_model
from allometry.interop.huggingface.weights import CheckpointWeights, write_checkpoint
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.integrity import seal

Make = Callable[..., RunConfig]
TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))


def config_for(tiny: Make, folder: Path, *overrides: str) -> RunConfig:
    """Return the config of a run of three steps that trains the model in ``folder``."""
    values = tiny("training.total_steps=3", "schedule.warmup_steps=0", *overrides).model_dump(
        mode="json"
    )
    values["model"] = read_model(folder)[1].model_dump(mode="json")
    return validate(Tree(values))


def our_model(config: RunConfig, step: Path) -> torch.nn.Module:
    rules = Parameterization(config.parameterization, config.model)
    model = build_model(config.model, rules, "fp32").eval()
    weights = CheckpointWeights(step)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in weights.shapes:
                tensor.copy_(weights.read(name))
    return model


@torch.no_grad()
def our_logits(config: RunConfig, step: Path) -> Tensor:
    logits_BLV = our_model(config, step)(TOKENS)
    assert isinstance(logits_BLV, Tensor)
    return logits_BLV


def random_run(config: RunConfig, *steps: int) -> Path:
    """Write a run folder with checkpoints of equal random weights, norms and biases included."""
    rules = Parameterization(config.parameterization, config.model)
    model = build_model(config.model, rules, "fp32")
    initialize(model, rules, seed=5)
    generator = torch.Generator().manual_seed(9)
    state = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        state[name] = parameter.detach() + (0.3 * noise if parameter.dim() == 1 else 0)
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            noise = torch.randn(buffer.shape, generator=generator)
            state[name] = (
                0.2 * noise if balances_by_bias(config.model) else torch.zeros_like(buffer)
            )
    folder = RunFolder(config.run.folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for step in steps or (4,):
        path = folder.checkpoints / f"step-{step}"
        path.mkdir(parents=True)
        facts = {"step": step, "position_sequences": 8 * step, "flops": 0, "areas": {}}
        seal(path, step, write_checkpoint(path, shapes, state.__getitem__), facts)
    folder.config.write_text(dump(config))
    folder.latest.write_text(path.name + "\n")
    return folder.path


def largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
