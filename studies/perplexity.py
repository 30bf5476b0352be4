"""Loss of each document of a store under a run."""

# B = 1 sequence of packed documents, T tokens in it, L tokens in a piece of a document

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE, Batch, PackedDocuments
from allometry.data.reading import same_files
from allometry.data.run_tokenizer import tokenizer_of_run
from allometry.data.select.kept import select_documents
from allometry.data.store import TokenStore
from allometry.data.tokenizer import check_tokenizer, check_vocabulary
from allometry.interop.huggingface.weights import CheckpointWeights, chosen_checkpoint
from allometry.models.build import ComputeDtype, build_model
from allometry.models.head import Losses
from allometry.models.transformer import Transformer
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.stages import place_of
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.state.checkpoint import read_facts, step_of
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.integrity import COMPLETE

AT_ONCE = 8192
"""Tokens per forward pass."""


@dataclass(frozen=True)
class Scorer:
    """A run's full model at a checkpoint, on one device, for losses of documents.

    ``window``: documents are cut into pieces of this many tokens, like the run's own samples.
    ``facts``: training progress stored in the checkpoint.
    """

    model: Transformer
    config: RunConfig
    checkpoint: Path
    device: torch.device
    window: int
    facts: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """Return the scorer's description in the record of its scores (JSON)."""
        content = (self.checkpoint / COMPLETE).read_bytes()
        return {
            "run": str(self.checkpoint.parent.parent),
            "step": step_of(self.checkpoint),
            "checkpoint": hashlib.sha256(content).hexdigest()[:16],
            "window": self.window,
        }


def open_scorer(
    run: Path, step: int | None, device: torch.device, dtype: ComputeDtype = "fp32"
) -> Scorer:
    """Return the model of a run's checkpoint (default: the latest), for scoring.

    Raises UserError: ``run`` is not a run folder, or the checkpoint is missing or damaged. For
    example, ``open_scorer(Path("runs/a"), None, torch.device("cpu"))``.
    """
    folder = RunFolder(run)
    if not folder.config.exists():
        raise UserError(f"{run} has no {folder.config.name}; name the folder of a run")
    path = chosen_checkpoint(folder, step)
    config = place_of(load(folder.config, recorded=True), step_of(path)).config
    weights = CheckpointWeights(path)
    rules = Parameterization.of_run(config)
    model = build_model(config.model, rules, dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
        for name, buffer in model.named_buffers():
            if name in weights.shapes:
                buffer.copy_(weights.read(name))
    data = config.data
    window = data.max_document_tokens if data.kind == "documents" else data.sequence_length
    return Scorer(model.to(device), config, path, device, window, read_facts(path))


def check_store(scorer: Scorer, run: Path, store: TokenStore) -> None:
    """Raise UserError if the store and the run have different tokenizers."""
    check_vocabulary(scorer.config.model.vocab_size, [store])
    store.vocab_size = scorer.config.model.vocab_size
    file = tokenizer_of_run(run, scorer.config.data).file
    if file is not None:
        check_tokenizer(str(file), [store.prefix])


def documents_read(scorer: Scorer, store: TokenStore) -> NDArray[np.bool_]:
    """Return a mask of the documents on which the run was trained, by its checkpoint.

    It contains all documents kept by a source of these token files, once the run has read from it.

    Raises UserError: the scores by which the run selected its documents are missing or differ.
    """
    read = np.zeros(store.num_documents, np.bool_)
    known: dict[str, str] = scorer.facts.get("data", {})
    ledger = scorer.facts.get("reading", {}).get("ledger", {})
    for source in scorer.config.data.sources:
        name = source.name
        here = name in known and same_files(known[name], store.fingerprint)
        if not here or not ledger.get(name, {"tokens": 1})["tokens"]:
            continue
        if source.select is None:
            read[:] = True
            continue
        kept = select_documents(store, source.select, name)
        if known[name] != f"{store.fingerprint}:{kept.fingerprint}":
            raise UserError(
                f"{scorer.checkpoint} was trained on documents chosen by other scores than "
                f"{source.select.scores} holds now; restore these"
            )
        read[kept.documents] = True
    return read


def losses_of_strangers(
    scorers: Sequence[Scorer], store: TokenStore, at_once: int = AT_ONCE
) -> tuple[NDArray[np.float32], float]:
    """Return each document's mean loss under the runs that have not read it, and the seconds.

    As ``document_losses``; also NaN for a document that every run has read.
    """
    sums, counts, seconds = np.zeros(store.num_documents), np.zeros(store.num_documents), 0.0
    for scorer in scorers:
        strange = ~documents_read(scorer, store)
        losses, spent = document_losses(scorer, store, at_once, strange)
        sums[strange] += losses[strange]
        counts[strange] += 1
        seconds += spent
    with np.errstate(invalid="ignore"):
        return (sums / counts).astype(np.float32), seconds


def document_losses(
    scorer: Scorer,
    store: TokenStore,
    at_once: int = AT_ONCE,
    among: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float32], float]:
    """Return the mean loss of each document's tokens after its first, and the time in seconds.

    In nats per token (float32, one per document); NaN for a document with fewer than two tokens or
    not in the mask ``among`` (None: all documents). A document of more than ``scorer.window``
    tokens is cut into pieces, and the tokens of a piece do not attend to the previous piece, as in
    training. For example, ``losses, seconds = document_losses(scorer, TokenStore("data/web"))``.
    """
    sums, counts = np.zeros(store.num_documents), np.zeros(store.num_documents)
    begun = time.perf_counter()
    wanted = store.lengths > 1
    wanted = wanted if among is None else wanted & among
    at_once = max(at_once, scorer.window)
    for batch, documents_T in _batches(store, np.flatnonzero(wanted), scorer.window, at_once):
        nll_T = _losses(scorer, batch)
        counted = batch.targets_BL.reshape(-1) != IGNORE
        number = np.bincount(documents_T[counted], minlength=store.num_documents)
        sums += np.bincount(documents_T[counted], nll_T[counted], store.num_documents)
        counts += number
    with np.errstate(invalid="ignore"):
        return (sums / counts).astype(np.float32), time.perf_counter() - begun


@torch.no_grad()
def _losses(scorer: Scorer, batch: Batch) -> NDArray[np.float64]:
    moved = DeviceBatch.of(batch, scorer.device, 0)
    losses = scorer.model(moved.tokens_BL, moved.targets_BL, moved.documents)
    assert isinstance(losses, Losses)
    return losses.nll_BL.reshape(-1).double().cpu().numpy()


def _batches(
    store: TokenStore, documents: NDArray[np.int64], window: int, at_once: int
) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
    """Yield pieces of documents packed into one sequence, and the document of each token [T]."""
    pieces: list[tuple[int, int, int]] = []
    held = 0
    for document in documents.tolist():
        length = int(store.lengths[document])
        for start in range(0, length - 1, window):  # a single last token has no target
            size = min(window, length - start)
            if held + size > at_once:
                yield _packed(store, pieces)
                pieces, held = [], 0
            pieces.append((document, start, size))
            held += size
    if pieces:
        yield _packed(store, pieces)


def _packed(
    store: TokenStore, pieces: list[tuple[int, int, int]]
) -> tuple[Batch, NDArray[np.int64]]:
    lengths = np.array([size for _, _, size in pieces], np.int64)
    tokens, targets = np.empty(lengths.sum(), np.int64), np.empty(lengths.sum(), np.int64)
    at = 0
    for document, start, size in pieces:
        stop = min(start + size + 1, int(store.lengths[document]))
        read = store.read(document, start, stop)
        tokens[at : at + size] = read[:size]
        targets[at : at + size] = IGNORE
        targets[at : at + len(read) - 1] = read[1:]
        at += size
    shape = (1, at)
    packed = PackedDocuments.of_lengths(lengths, shape)
    batch = Batch(tokens.reshape(shape), targets.reshape(shape), np.zeros(1, np.int64), packed)
    return batch, np.repeat(np.array([document for document, _, _ in pieces]), lengths)
