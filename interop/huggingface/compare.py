"""Checks of a conversion: equal logits in transformers, and every tensor equal bit for bit."""

# B sequences, L tokens in a sequence, V vocabulary

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.model import ParameterizationConfig, StandardParameterization
from allometry.configs.run import RunConfig
from allometry.interop.huggingface import deepseek
from allometry.interop.huggingface.names import Counterpart, Fold, Read, folded, locate, unfolded
from allometry.interop.huggingface.weights import (
    CONFIG,
    CheckpointWeights,
    FolderWeights,
    read_json,
    value_of,
)
from allometry.models.build import build_model
from allometry.models.transformer import Transformer
from allometry.scaling.parameterization import Parameterization

TOLERANCE = 1e-4
SEQUENCES, LONGEST, SEED = 2, 64, 0


@dataclass(frozen=True)
class Comparison:
    """Difference between both models, in fp32 on the same random tokens, and of their tensors.

    ``max_difference``: largest difference of logits; ``relative``: divided by the largest logit of
    the Hugging Face model. ``tensors``: number of our parameters, all found bit for bit in the
    folder (else ``compare`` raises). ``rounding``: change of the run's logits by storing weights in
    half precision, relative to the largest logit; None for fp32.
    """

    max_difference: float
    relative: float
    tensors: int
    rounding: float | None = None


def require_transformers() -> None:
    """Raise UserError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "--check loads the model with transformers, which is not installed; pip install "
            "'allometry[hf]' or leave --check out"
        )


def compare(
    config: RunConfig,
    weights: CheckpointWeights,
    folder: Path,
    wanted: Collection[Counterpart],
    folding: Sequence[Fold],
    dtype: torch.dtype,
    *,
    imported: bool = False,
) -> Comparison:
    """Compare the model of our checkpoint with the model in a Hugging Face folder.

    ``dtype``: type of the exported weights; fp32 for an import (``imported``), which divided
    ``folding`` out of the weights where an export multiplies. Raises UserError if a
    tensor differs in a bit or logits differ by more than ``TOLERANCE`` times the largest logit.
    """
    stored = FolderWeights(folder)  # the same reader as in an import
    tied = config.model.tied_embeddings
    # Tensors of multi-token prediction, which transformers does not load.
    ahead = deepseek.beyond(read_json(folder / CONFIG), stored.shapes)
    places = locate(wanted, stored.shapes, str(folder), tied=tied, left_out=ahead)
    for counterpart in wanted:
        name = counterpart.spec.name
        there = counterpart.join(places[name], stored.read)
        expected = value_of(weights, counterpart)
        if imported:
            there = unfolded(name, there, folding)
        else:
            expected = counterpart.kept(folded(name, expected, folding), dtype)
        if not torch.equal(there, expected):
            raise UserError(
                f"--check: {name} came back changed from {', '.join(places[name].names[:1])}; "
                "nothing was written: please report it"
            )
    vocabulary, length = config.model.vocab_size, min(config.data.sequence_length, LONGEST)
    generator = torch.Generator().manual_seed(SEED)
    tokens_BL = torch.randint(vocabulary, (SEQUENCES, length), generator=generator)
    theirs_BLV = _their_logits(folder, tokens_BL, ahead)
    mine_BLV = _our_logits(config, config.parameterization, weights.read, weights.shapes, tokens_BL)
    scale = max(theirs_BLV.abs().max().item(), torch.finfo(torch.float32).tiny)
    rounding = None
    if dtype != torch.float32:
        # To test only the conversion, both sides use the same rounded weights.
        rounding = (mine_BLV - theirs_BLV).abs().max().item() / scale
        by_name = {counterpart.spec.name: counterpart for counterpart in wanted}

        def kept(name: str) -> Tensor:
            if name not in by_name:  # a router's buffer
                return weights.read(name)
            tensor = value_of(weights, by_name[name])
            return by_name[name].kept(folded(name, tensor, folding), dtype)

        mine_BLV = _our_logits(config, StandardParameterization(), kept, weights.shapes, tokens_BL)
    difference = (mine_BLV - theirs_BLV).abs().max().item()
    if not difference / scale <= TOLERANCE:  # also True for NaN
        raise UserError(
            f"--check: logits differ by {difference:.3g}, which is {difference / scale:.3g} of the "
            f"largest logit and more than {TOLERANCE:g}; nothing was written: please report it"
        )
    return Comparison(difference, difference / scale, len(wanted), rounding)


@torch.no_grad()
def _our_logits(
    config: RunConfig,
    parameterization: ParameterizationConfig,
    read: Read,
    buffers: Collection[str],
    tokens_BL: Tensor,
) -> Tensor:
    """Return fp32 logits [B, L, V] of our model with the weights of ``read``."""
    rules = Parameterization(parameterization, config.model)
    model: Transformer = build_model(config.model, rules, "fp32").eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(read(name))
    logits_BLV = model(tokens_BL)
    assert isinstance(logits_BLV, Tensor)
    return logits_BLV


@torch.no_grad()
def _their_logits(folder: Path, tokens_BL: Tensor, ahead: Collection[str]) -> Tensor:
    """Return fp32 logits [B, L, V] of the model that transformers loads from the folder."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder),
        output_loading_info=True,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, loading = loaded
    layers = set(map(_layer, ahead))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # transformers would only warn and initialise missing weights randomly.
        # transformers may have fused the experts, so layers are compared instead of names.
        found = sorted(name for name in map(str, loading[problem]) if _layer(name) not in layers)
        if found:
            raise UserError(
                f"--check: transformers reports {problem} {found[:3]} "
                f"in {folder}; nothing was written: please report it"
            )
    logits: Tensor = model.eval().float()(input_ids=tokens_BL).logits
    return logits


def _layer(name: str) -> str:
    """Return the module of a layer's tensor, "model.layers.N"; other names keep three parts."""
    return ".".join(name.split(".")[:3])
