"""Hugging Face model as the initial weights of a run: checked against the run, then converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, MoEModel
from allometry.configs.run import RunConfig
from allometry.data.run_tokenizer import tokenizer_that_agrees
from allometry.interop.huggingface import deepseek
from allometry.interop.huggingface.config import attention_scale, differences, from_hf
from allometry.interop.huggingface.families import TRAITS, Family
from allometry.interop.huggingface.names import (
    HEAD,
    Counterpart,
    Fold,
    Source,
    counterparts,
    folds,
    locate,
    unfolded,
)
from allometry.interop.huggingface.origin import kept_origin, read_origin
from allometry.interop.huggingface.weights import (
    CONFIG,
    CheckpointWeights,
    FolderWeights,
    hash_of,
    read_json,
    write_checkpoint,
)
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.state.initial import Imported
from allometry.trainer.state.integrity import Files


@dataclass(frozen=True)
class HFModel:
    """Hugging Face model that matches the model of a run.

    ``wanted``: counterpart of each of our parameters; ``places``: the source found in the folder.
    ``folding``: factors to divide out of the weights. ``said``: content of the origin file of our
    own export, None for other folders. ``ahead``: tensors of multi-token prediction layers, of
    which those in ``left_out`` are not imported.
    """

    source: Path
    family: Family
    weights: FolderWeights
    wanted: tuple[Counterpart, ...]
    places: Mapping[str, Source]
    folding: tuple[Fold, ...]
    tokenizer: Path | None
    said: dict[str, Any] | None
    ahead: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of multi-token prediction layers without a counterpart in the run's model."""
        used = {name for source in self.places.values() for name in source.names}
        used |= {name for counterpart in self.wanted for name in counterpart.copies}
        return tuple(name for name in self.ahead if name not in used)

    def write(self, shards: Path, states: CheckpointWeights | None = None) -> Files:
        """Write checkpoint shards, one parameter at a time; return sizes and checksums."""
        by_name = {counterpart.spec.name: counterpart for counterpart in self.wanted}
        return write_checkpoint(
            shards,
            {name: counterpart.spec.shape for name, counterpart in by_name.items()},
            lambda name: unfolded(
                name, by_name[name].join(self.places[name], self.weights.read), self.folding
            ),
            states,
        )

    def origin(self) -> dict[str, Any]:
        """Return the origin of the weights for run.json (JSON)."""
        kept = kept_origin(self.source, self.family, self.said)
        left_out = {"left_out": self.left_out_lines()} if self.left_out else {}
        return {**kept, "hash": hash_of(self.source), **left_out}

    def left_out_lines(self) -> list[str]:
        """Return a line about the tensors that are not imported, if there are any."""
        if not self.left_out:
            return []
        return [
            f"multi-token prediction: {len(self.left_out)} tensors of layers after the model's own "
            f"are left out ({self.left_out[0]} the first)"
        ]


def open_model(source: Path, config: RunConfig) -> HFModel:
    """Open the Hugging Face model in ``source`` as the initial weights of the run ``config``.

    Raises:
        UserError: a key of the model differs from the run's, a tensor has no counterpart, or the
            tokenizer is not the tokenizer of the run's data.
    """
    said = read_json(source / CONFIG)
    family, theirs = from_hf(said, str(source / CONFIG))
    _check_agreement(config, theirs, source)
    wanted = counterparts(config.model, family)
    weights = FolderWeights(source)
    tied = config.model.tied_embeddings
    ahead = deepseek.beyond(said, weights.shapes) if TRAITS[family].latent else ()
    # Without multi-token prediction in the run its layers are left out, all of them.
    left_out = () if config.model.num_depths else ahead
    places = locate(wanted, weights.shapes, str(source), tied=tied, left_out=left_out)
    _check_copies(wanted, weights)
    _check_biases(config.model, wanted, places, weights)
    if config.model.tied_embeddings and HEAD in weights.shapes:
        _check_tied(weights, wanted[0].written[0])
    return HFModel(
        source=source,
        family=family,
        weights=weights,
        wanted=wanted,
        places=places,
        folding=folds(
            config.model,
            Parameterization.of_run(config).forward,
            attention_scale(said, config.model, family),
        ),
        tokenizer=tokenizer_that_agrees(config.data, source),
        said=read_origin(source),
        ahead=ahead,
    )


def import_model(source: Path, config: RunConfig, shards: Path) -> Imported:
    """Write a model's weights as checkpoint shards; this is the ``Importer`` of ``train``."""
    model = open_model(source, config)
    return Imported(model.write(shards), model.origin(), model.tokenizer)


def read_model(hf_folder: str | Path) -> tuple[Family, ModelConfig]:
    """Return the family and our ``model`` section of the model in a Hugging Face folder."""
    path = Path(hf_folder) / CONFIG
    return from_hf(read_json(path), str(path))


def _check_agreement(config: RunConfig, theirs: ModelConfig, source: Path) -> None:
    """Raise UserError unless the run's initial model equals the Hugging Face model ``theirs``."""
    different = differences(config.of_stages()[0].model, theirs)  # the import is for stage 0
    if different:
        listed = ", ".join(f"model.{key}={ours!r} (there {o!r})" for key, ours, o in different)
        raise UserError(
            f"the configuration describes another model than {source}: {listed}; set these keys "
            f"to the values there (allometry convert {source} --print-model prints them all)"
        )


def balances_by_bias(model: ModelConfig) -> bool:
    """Return True if the model's routers select experts with a bias."""
    return isinstance(model, MoEModel) and model.router.balance.kind == "bias"


def _check_copies(wanted: Sequence[Counterpart], weights: FolderWeights) -> None:
    """Raise UserError for a copy of the embedding or of the head with other values."""
    for counterpart in wanted:
        original = counterpart.written[0]
        for name in counterpart.copies:
            if name in weights.shapes and not torch.equal(
                weights.read(name), weights.read(original)
            ):
                raise UserError(
                    f"{weights.folder}: {name} differs from {original}, and our multi-token "
                    "prediction shares it; leave model.multi_token out to import the main model"
                )


def _check_biases(
    model: ModelConfig,
    wanted: Sequence[Counterpart],
    places: Mapping[str, Source],
    weights: FolderWeights,
) -> None:
    """Raise UserError for a nonzero router bias that the run's router would ignore."""
    for counterpart in wanted if not balances_by_bias(model) else ():
        source = places[counterpart.spec.name]
        if counterpart.buffer and counterpart.join(source, weights.read).any():
            raise UserError(
                f"{weights.folder}: {source.names[0]} is not zero, and only "
                "model.router.balance={kind: bias} chooses experts with it; set that"
            )


def _check_tied(folder: FolderWeights, embedding: str) -> None:
    """Raise UserError if a folder ties head and embedding but stores different tensors."""
    if not torch.equal(folder.read(HEAD), folder.read(embedding)):
        raise UserError(
            f"{folder.folder}: config.json ties embedding and head, but {HEAD} differs from "
            f"{embedding}; set tie_word_embeddings to false there if both are meant"
        )
