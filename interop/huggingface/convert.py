"""Conversion between run folders and Hugging Face folders.

A target is written as ``TARGET.partial`` and renamed when complete, so a failed conversion leaves
no folder that looks like a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.model import ModelConfig
from allometry.configs.run import RunConfig
from allometry.data.run_tokenizer import (
    RunTokenizer,
    tokenizer_of_run,
)
from allometry.interop.huggingface import compare
from allometry.interop.huggingface.compare import Comparison
from allometry.interop.huggingface.config import Text, attention_scale, choose_family, to_hf
from allometry.interop.huggingface.families import TRAITS, Family
from allometry.interop.huggingface.model import balances_by_bias, open_model
from allometry.interop.huggingface.names import (
    Counterpart,
    Fold,
    check_names,
    counterparts,
    folded,
    folds,
)
from allometry.interop.huggingface.origin import (
    STATES,
    notes,
    states_to_keep,
    write_origin,
)
from allometry.interop.huggingface.texts import (
    unsure,
    write_json,
    write_texts,
)
from allometry.interop.huggingface.weights import (
    CONFIG,
    OPTIMIZER,
    CheckpointWeights,
    chosen_checkpoint,
    value_of,
    write_safetensors,
    write_states,
)
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.stages import place_of
from allometry.trainer.state.checkpoint import step_of
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.identity import Identity
from allometry.trainer.state.initial import initial_facts
from allometry.trainer.state.integrity import seal
from allometry.trainer.state.refused import REFUSED, partial_of

Dtype = Literal["fp32", "bf16"]
_TORCH: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    ``folds``: multipliers that were folded into weights. ``bytes``: size of the weight files.
    ``unknown``: reasons for a missing tokenizer or end-of-document token.
    """

    source: str
    step: int
    target: str
    family: Family
    dtype: Dtype
    tensors: int
    bytes: int
    files: list[str]
    folds: list[str]
    tokenizer: str | None
    end_of_document: str | None
    unknown: list[str]
    check: Comparison | None = None


@dataclass(frozen=True)
class ImportReport:
    """Result of an import; ``parameters``: number of our tensors.

    ``unfolds``: multipliers that were divided out of weights.
    """

    source: str
    target: str
    family: Family
    parameters: int
    unfolds: list[str]
    tokenizer: str | None
    notes: list[str]
    check: Comparison | None = None


def export_hf(
    run_folder: str | Path,
    out: str | Path,
    step: int | None = None,
    family: str | None = None,
    dtype: Dtype = "fp32",
    *,
    tokenizer: str | None = None,
    end_of_document: str | None = None,
    optimizer_state: bool = False,
    check: bool = False,
    main_model: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write a checkpoint of a run (default: the latest) as a Hugging Face folder ``out``.

    Multipliers that the family lacks are folded into weights. ``tokenizer`` and ``end_of_document``
    supply values missing in the run folder. ``optimizer_state`` also writes the optimizer states.
    ``main_model`` leaves multi-token prediction out. ``check`` compares both models, with
    transformers, before the rename. Raises UserError, before any file is written, for features that
    the family does not support. For example, ``export_hf("runs/a", "hf/a", step=100)``.
    """
    if check:
        compare.require_transformers()
    folder, config, path = _run(run_folder, step)
    chosen = choose_family(config.model, family)
    folding = _folding(config, chosen)
    model = config.model.model_copy(update={"multi_token": None}) if main_model else config.model
    wanted, weights = counterparts(model, chosen), CheckpointWeights(path)
    _check_tensors(config.model, chosen, weights, path)
    states = _optimizer_states(path) if optimizer_state else None
    text = tokenizer_of_run(folder.path, config.data)
    text = text.told(tokenizer, end_of_document, model.vocab_size)
    longest, torch_dtype = config.data.sequence_length, _TORCH[dtype]
    name, end_id = str(torch_dtype).removeprefix("torch."), text.end[1] if text.end else None
    with new_folder(out) as (final, partial):
        parts = [_part(counterpart, weights, folding, torch_dtype) for counterpart in wanted]
        files = write_safetensors(partial, parts, shard_bytes)
        write_json(partial / CONFIG, to_hf(model, chosen, name, Text(longest, end_id)))
        write_texts(partial, text, longest)
        write_origin(partial, folder, config, path)
        if states is not None:
            write_states(partial / STATES, states)
        return ExportReport(
            source=str(folder.path),
            step=step_of(path),
            target=str(final),
            family=chosen,
            dtype=dtype,
            tensors=sum(len(counterpart.written) for counterpart in wanted),
            bytes=sum((partial / file).stat().st_size for file in files),
            files=files,
            folds=[fold.describe() for fold in folding],
            tokenizer=str(text.file) if text.file else None,
            end_of_document=text.end[0] if text.end else None,
            unknown=list(text.unknown),
            check=compare.compare(config, weights, partial, wanted, folding, torch_dtype)
            if check
            else None,
        )


def _folding(config: RunConfig, family: Family) -> tuple[Fold, ...]:
    theirs = attention_scale({}, config.model, family)
    return folds(config.model, Parameterization.of_run(config).forward, theirs)


def _run(run_folder: str | Path, step: int | None) -> tuple[RunFolder, RunConfig, Path]:
    """Return the run folder, the config of the checkpoint's stage, and the checkpoint's path."""
    folder = RunFolder(run_folder)
    if not folder.config.exists():
        raise UserError(f"{folder.path} has no {folder.config.name}; name the folder of a run")
    path = chosen_checkpoint(folder, step)
    return folder, place_of(load(folder.config), step_of(path)).config, path


def _check_tensors(
    model: ModelConfig, family: Family, weights: CheckpointWeights, path: Path
) -> None:
    """Raise UserError for tensors not in the model, and nonzero biases the family does not read."""
    biases = check_names(model, weights.shapes, str(path))
    if TRAITS[family].latent and balances_by_bias(model):
        return
    for name in biases:
        if weights.read(name).any():
            raise UserError(
                f"{path}: {name} is not zero, and models of the family have no bias in their "
                "routers, or model.router.balance.kind is not bias; nothing was written"
            )


def _optimizer_states(path: Path) -> CheckpointWeights:
    """Return the optimizer states in a checkpoint. Raises UserError if the checkpoint has none."""
    states = CheckpointWeights(path, OPTIMIZER)
    if not states.shapes:
        raise UserError(f"--optimizer-state: {path} holds none; leave the option out")
    return states


def import_hf(
    hf_folder: str | Path,
    config: RunConfig,
    out: str | Path,
    *,
    optimizer_state: bool = False,
    check: bool = False,
) -> ImportReport:
    """Write a run folder ``out`` with the weights of a Hugging Face folder as step 0.

    ``config``: the run to be trained; its model must equal the model of the folder. Multipliers of
    its parameterization in the forward pass are divided out of the weights. ``optimizer_state``
    also imports the optimizer states of a folder that was exported with them. Raises UserError with
    each differing key, each tensor without counterpart, and a tokenizer other than the run's.
    """
    if check:
        compare.require_transformers()
    model = open_model(Path(hf_folder), config)
    source, origin = model.source, model.said
    states = states_to_keep(source, origin, config) if optimizer_state else None
    config = _placed(config, out, source)
    with new_folder(out) as (final, partial):
        step = RunFolder(partial).checkpoints / "step-0"
        step.mkdir(parents=True)
        files = model.write(step, states)
        keep = ("weights",) if states is None else ("weights", "optimizer")
        facts = initial_facts(config, keep, model.origin())
        seal(step, 0, files, facts, run=Identity.new().run)
        RunTokenizer(model.tokenizer).keep(partial)
        write_atomically(RunFolder(partial).config, dump(config))
        write_atomically(RunFolder(partial).latest, step.name + "\n")
        return ImportReport(
            source=str(source),
            target=str(final),
            family=model.family,
            parameters=len(model.wanted),
            unfolds=[fold.describe() for fold in model.folding],
            tokenizer=str(model.tokenizer) if model.tokenizer else None,
            notes=[
                *notes(origin, config),
                *unsure(config, source, model.tokenizer),
                *model.left_out_lines(),
            ],
            check=compare.compare(
                *(config.of_stages()[0], CheckpointWeights(step)),
                *(source, model.wanted, model.folding),
                torch.float32,
                imported=True,
            )
            if check
            else None,
        )


def _placed(config: RunConfig, out: str | Path, source: Path) -> RunConfig:
    """Return the config for the new run folder, without parent and initial weights."""
    initial = config.run.initial
    if initial is not None and (
        initial.hf is None or Path(initial.hf).resolve() != source.resolve()
    ):
        named = f"hf={initial.hf}" if initial.hf is not None else f"folder={initial.folder}"
        raise UserError(
            f"run.initial.{named} is what the run is to begin with, and not {source}; leave "
            "run.initial out, or train the run without converting anything"
        )
    update = {"folder": str(out), "resume": "auto", "parent": None, "initial": None}
    return config.model_copy(update={"run": config.run.model_copy(update=update)})


@contextmanager
def new_folder(out: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield (final path, folder to write); rename the folder at the end, remove it on failure."""
    final = Path(os.path.abspath(out))
    refused = final / REFUSED
    if final.exists() and (not final.is_dir() or set(final.iterdir()) - {refused}):
        raise UserError(f"--out={out} exists and is not empty; choose another folder or remove it")
    partial = partial_of(final)
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{partial} is there, from a command that runs or was interrupted; remove it or "
            "choose another --out"
        ) from None
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror})") from None
    try:
        yield final, partial
        refused.unlink(missing_ok=True)
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"--out={out} cannot be written ({error}); nothing is left of it") from None


def _part(
    counterpart: Counterpart,
    weights: CheckpointWeights,
    folding: tuple[Fold, ...],
    dtype: torch.dtype,
) -> tuple[list[tuple[str, int]], Callable[[], dict[str, Tensor]]]:
    """Return a part for ``write_safetensors``: names and sizes, and a function for the tensors."""
    name = counterpart.spec.name
    stored = counterpart.stored_as(dtype)
    nbytes = counterpart.spec.numel * stored.itemsize // len(counterpart.sources[0].names)
    return (
        [(written, nbytes) for written in counterpart.written],
        lambda: counterpart.split(folded(name, value_of(weights, counterpart), folding), dtype),
    )
