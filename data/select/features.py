"""Feature rows of documents from token ids: TF-IDF, hashed pairs, means of static vectors.

Token ids replace words: code and Chinese do not separate words by white space, and ids need no
text. scikit-learn and scipy are imported on use.
"""

# N documents, F features

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.data.order import permutation
from allometry.data.select.text import decoder_of
from allometry.data.store import TokenStore

Ids = NDArray[np.integer[Any]]
Sample = tuple[TokenStore, NDArray[np.int64]]
"""A store and numbers of documents in it."""
BATCH_TOKENS = 1 << 22
"""Number of tokens per batch of documents."""
HASH_BITS = 18
_ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def require(module: str, package: str = "scikit-learn") -> Any:
    """Import a module of the extra ``select``. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {package}, which cannot be imported ({error}); pip install "
            "'allometry[select]'"
        ) from None


class Embedder(Protocol):
    """Embedding of documents as unit vectors, so that products of rows are cosines."""

    def rows(self, documents: Sequence[Ids]) -> Any:
        """Return a matrix (N, F), sparse or dense, with rows of Euclidean norm 1 or 0."""


def counts(documents: Sequence[Ids], width: int) -> Any:
    """Count each id in each document: sparse (N, ``width``), float32.

    For example, ``counts([np.array([1, 1, 0])], 3)`` has the row [1, 2, 0].
    """
    from scipy import sparse

    lengths = np.array([len(one) for one in documents], np.int64)
    ids = np.concatenate([np.zeros(0, np.int64), *documents])
    rows = np.repeat(np.arange(len(documents)), lengths)
    made = sparse.coo_matrix(
        (np.ones(len(ids), np.float32), (rows, ids)), shape=(len(documents), width)
    )
    return made.tocsr()  # sums duplicate entries


def hashed_bigrams(documents: Sequence[Ids]) -> Any:
    """Hash ids and pairs of adjacent ids to 2**18 columns: sparse (N, 2**18), unit rows."""
    preprocessing = require("sklearn.preprocessing")
    hashed = []
    for ids in documents:
        one = (ids.astype(np.uint64) + np.uint64(1)) * _ODD[0]
        two = one[:-1] ^ (one[1:] * _ODD[1])
        both = np.concatenate((one, two * _ODD[0])) >> np.uint64(64 - HASH_BITS)
        hashed.append(both.astype(np.int64))
    made = counts(hashed, 1 << HASH_BITS)
    np.log1p(made.data, out=made.data)
    return preprocessing.normalize(made, copy=False)


class TfIdf:
    """TF-IDF of token ids (1 + log of counts, smoothed idf), with the idf of ``samples``.

    ``samples`` are document numbers of stores; ids are below ``width``.
    """

    def __init__(self, samples: Sequence[Sample], width: int) -> None:
        from scipy import sparse

        text = require("sklearn.feature_extraction.text")
        self._width = width
        self._transformer = text.TfidfTransformer(sublinear_tf=True)
        parts = [stacked(lambda some: counts(some, width), *sample) for sample in samples]
        self._transformer.fit(sparse.vstack(parts, "csr"))

    def rows(self, documents: Sequence[Ids]) -> Any:
        """See ``Embedder``."""
        return self._transformer.transform(counts(documents, self._width)).astype(np.float32)


class Static:
    """Mean of static token vectors of another tokenizer (model2vec, wordllama).

    ``folder`` contains one .safetensors file with one matrix (vocabulary, F), and its
    tokenizer.json.
    """

    def __init__(self, folder: Path, store: TokenStore) -> None:
        from safetensors.numpy import load_file

        from allometry.data.special_tokens import load_tokenizer

        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(
                f"--embedder static:{folder} has {len(files)} .safetensors files; give a folder "
                "with one and its tokenizer.json"
            )
        try:
            matrices = [one for one in load_file(files[0]).values() if one.ndim == 2]
        except Exception as error:  # the library raises its own kinds
            raise UserError(f"{files[0]} cannot be read ({error}); copy it again") from None
        if len(matrices) != 1:
            raise UserError(
                f"{files[0]} holds {len(matrices)} matrices; give one with a vector for each token"
            )
        self._vectors = matrices[0].astype(np.float32)
        self._tokenizer = load_tokenizer(folder)
        decode = decoder_of(store.prefix)
        if decode is None:
            raise UserError(
                f"--embedder static needs the text of {store.prefix}, beside which there is no "
                "manifest.json with its tokenizer; use --embedder tfidf"
            )
        self._decode = decode

    def rows(self, documents: Sequence[Ids]) -> NDArray[np.float32]:
        """See ``Embedder``."""
        made = np.zeros((len(documents), self._vectors.shape[1]), np.float32)
        texts = [self._decode(ids.tolist()) for ids in documents]
        for row, one in zip(
            made, self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids = np.array([number for number in one.ids if number < len(self._vectors)], np.int64)
            if len(ids):
                row[:] = self._vectors[ids].mean(0)
        norms = np.linalg.norm(made, axis=1, keepdims=True)
        made /= np.where(norms > 0.0, norms, 1.0)
        return made


def embedder(kind: str, samples: Sequence[Sample], width: int) -> Embedder:
    """Return the embedder ``kind``: tfidf (fitted to ``samples``), or static:FOLDER.

    The stores of ``samples`` have one tokenizer. For example,
    ``embedder("tfidf", [(store, np.arange(100))], store.vocab_bound)``. Raises UserError for an
    unknown kind.
    """
    name, _, rest = kind.partition(":")
    if name == "tfidf" and not rest:
        return TfIdf(samples, width)
    if name == "static" and rest:
        return Static(Path(rest), samples[0][0])
    raise UserError(f"--embedder={kind} is not known; use tfidf or static:FOLDER")


def read(store: TokenStore, documents: NDArray[np.int64]) -> list[Ids]:
    """Return the token ids of documents, as views of the files."""
    return [store.read(number) for number in documents.tolist()]


def stacked(
    rows: Callable[[Sequence[Ids]], Any], store: TokenStore, documents: NDArray[np.int64]
) -> Any:
    """Compute ``rows`` of documents in ``batches`` and concatenate them."""
    from scipy import sparse

    parts = [rows(read(store, part)) for part in batches(store, documents)]
    return sparse.vstack(parts, "csr") if sparse.issparse(parts[0]) else np.concatenate(parts)


def largest_id(store: TokenStore, documents: NDArray[np.int64]) -> int:
    """Return the largest token id in documents."""
    return max(int(store.read(number).max(initial=0)) for number in documents.tolist())


def batches(store: TokenStore, documents: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Split ``documents`` into parts of about ``BATCH_TOKENS`` tokens."""
    ends = np.cumsum(store.lengths[documents])
    cuts = np.searchsorted(ends, np.arange(BATCH_TOKENS, int(ends[-1]), BATCH_TOKENS))
    yield from (part for part in np.split(documents, np.unique(cuts)) if len(part))


def drawn(store: TokenStore, count: int, seed: int) -> NDArray[np.int64]:
    """Draw ``count`` non-empty documents uniformly, ascending; all if there are fewer.

    The documents depend on the store, ``count`` and ``seed`` alone.
    """
    filled = np.flatnonzero(store.lengths > 0)
    order = permutation(f"sample:{seed}:{store.fingerprint}", len(filled))
    return np.sort(filled[order[:count]])
