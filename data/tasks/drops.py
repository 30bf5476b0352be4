"""Stages of datatrove that drop documents: near duplicates, and benchmark text.

Near duplicates: MinHash over word 5-grams, 14 bands of 8 hashes (Broder 1997; datatrove's
defaults), in three stages before the shards are written; of each cluster one document is kept.
Benchmark text: a document that has 12 consecutive words of a benchmark is dropped (datatrove's
n-gram filter). Both compare words in lower case without punctuation and accents, with one symbol
for all numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.data.corpora import open_corpus
from allometry.data.corpus import ReadLog
from allometry.data.source_files import with_text
from allometry.data.tasks.plan import Folder
from allometry.data.tasks.steps import Documents, Dropped

WORDS, BUCKETS, HASHES = 5, 14, 8
"""Words of an n-gram, bands, and hashes of a band, of MinHash."""
BENCHMARK_WORDS = 12
DEDUPLICATE, DECONTAMINATE = "deduplicate", "decontaminate"

Stage = tuple[str, list[Any], int]
"""Name of a stage, its pipeline, and its number of tasks."""


def _hashes() -> Any:
    # datatrove's other hash needs xxhash<4.
    from datatrove.utils.hashing import HashConfig

    return HashConfig(hash_fc="sha1")


def _minhash() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    return MinhashConfig(
        n_grams=WORDS, num_buckets=BUCKETS, hashes_per_bucket=HASHES, hash_config=_hashes()
    )


def minhash_stages(folder: Folder, tasks: int) -> list[Stage]:
    """Return the stages that find near duplicates, to run in this order before the last one."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )

    signatures, pairs, removed = (
        str(folder.work / f"minhash/{name}") for name in ("signatures", "pairs", "removed")
    )
    signature = MinhashDedupSignature(signatures, config=_minhash())
    buckets = MinhashDedupBuckets(signatures, pairs, config=_minhash())
    cluster = MinhashDedupCluster(pairs, removed, config=_minhash())
    return [
        ("signatures", [Documents(str(folder.out)), signature], tasks),
        ("buckets", [buckets], BUCKETS),
        ("clusters", [cluster], 1),
    ]


def filters(folder: Folder, drops: Iterable[str], documents: Documents) -> list[Any]:
    """Return the filters between ``documents`` and the shards."""
    made: list[Any] = []
    if DEDUPLICATE in drops:
        from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

        dropped = Dropped("near duplicate of another document", documents)
        removed = str(folder.work / "minhash/removed")
        made.append(MinhashDedupFilter(removed, exclusion_writer=dropped))
    if DECONTAMINATE in drops:
        from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter

        dropped = Dropped(f"has {BENCHMARK_WORDS} words of a benchmark in a row", documents)
        config = NGramsDecontConfig(n_grams=BENCHMARK_WORDS, hash_config=_hashes())
        index = str(folder.work / "benchmarks")
        made.append(NGramsDecontFilter(index, config=config, exclusion_writer=dropped))
    return made


def write_benchmarks(folder: Folder, inputs: Iterable[str], text_key: str) -> str:
    """Write the n-grams of benchmark files for the filter, and return a sentence about them.

    Each text of a file is one benchmark example, such as a question with its answer.

    Raises:
        UserError: an input cannot be read, or none of its texts has ``BENCHMARK_WORDS`` words.
    """
    from datatrove.utils.hashes.sha1 import sha1_hash64
    from datatrove.utils.text import ngrams, simplify_text
    from datatrove.utils.typeshelper import Languages
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    words = load_word_tokenizer(Languages.english)
    log = ReadLog(lambda num_bytes: None)
    hashes: set[int] = set()
    texts = short = 0
    for value in inputs:
        found_any = False
        for document in with_text(open_corpus(value, text_key).documents(log, map), log):
            found = list(ngrams(words.word_tokenize(simplify_text(document.text)), BENCHMARK_WORDS))
            texts, short = texts + 1, short + (not found)
            found_any |= bool(found)
            hashes.update(sha1_hash64(" ".join(one)) for one in found)
        if not found_any:
            raise UserError(
                f"--decontaminate {value} has no text of {BENCHMARK_WORDS} words or more, so that "
                "it would drop nothing; give one with longer texts"
            )
    path = folder.work / "benchmarks/benchmarks.index.hashes"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array(sorted(hashes), "<u8").tofile(path)
    return f"benchmarks: {texts:,} texts, {len(hashes):,} n-grams of {BENCHMARK_WORDS} words" + (
        f"; {short:,} shorter texts cannot be found" if short else ""
    )
