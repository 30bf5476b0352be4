"""Token files changed after preparation, and token ids without an embedding."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from allometry.configs.errors import RankError, UserError
from allometry.configs.run import RunConfig
from allometry.data.contents import SAMPLE_BYTES, check_contents, sampled_sha256
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_random_store, write_store
from allometry.trainer.train import train

Make = Callable[..., RunConfig]


def recorded(folder: Path, *, sampled: bool = True) -> TokenStore:
    """Return a store of 3 MB with a manifest."""
    write_random_store(folder / "x", 1_500_000, 1000)
    files = {}
    for path in (folder / "x.bin", folder / "x.idx"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        files[path.name] |= {"sampled_sha256": sampled_sha256(path)} if sampled else {}
    split = {"documents": 1, "tokens": 1, "bytes": 1, "largest_id": 999, "files": files}
    source = {"input": "x", "input_sha256": "", "skipped": {}, "splits": {"train": split}}
    tokenizer = {"file": "t", "sha256": "", "vocab_size": 1000}
    tokenizer |= {"end_of_document": "e", "end_of_document_id": 0}
    manifest = {"kind": "allometry.tokens", "version": 1, "dtype": "uint16"}
    manifest |= {"tokenizer": tokenizer, "sources": {"x": source}, "request": {}, "versions": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenStore(folder / "x")


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("at", [0, 5 * SAMPLE_BYTES - 1, -1])
def test_another_content_of_the_same_size(tmp_path: Path, sampled: bool, at: int) -> None:
    store = recorded(tmp_path, sampled=sampled)
    check_contents([store])
    content = bytearray((tmp_path / "x.bin").read_bytes())
    where = slice(at, at + 1 or None) if at in (0, -1) else slice(at, at + len(content) // 15)
    content[where] = bytes(byte ^ 1 for byte in content[where])
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.bin does not hold what .*manifest\.json recorded"):
        check_contents([store])


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    write_store(tmp_path / "x", [[1, 2, 9], [3, -4, 5]], "int32")
    store = TokenStore(tmp_path / "x")
    store.vocab_size = 9
    assert store.read(0, 0, 2).tolist() == [1, 2]
    out = np.empty(2, np.int64)
    for document, wrong in ((0, 9), (1, -4)):
        with pytest.raises(RankError, match=f"holds the token id {wrong}, .*vocab_size=9"):
            store.read(document)
        with pytest.raises(RankError, match=f"token id {wrong}"):
            store.read_into(np.array([document]), np.array([1]), np.array([2]), out)


def test_an_id_that_no_sample_saw(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large store without a manifest, training ends with a sentence, not an IndexError."""
    monkeypatch.setattr("allometry.data.store._SCAN_TOKENS", 1000)
    monkeypatch.setattr("allometry.data.store._SAMPLE_BLOCKS", 1)
    monkeypatch.setattr("allometry.data.store._BLOCK_TOKENS", 1000)
    documents = [np.arange(1, 60) for _ in range(100)]
    documents[70] = np.full(59, 77)
    write_store(tmp_path / "wrong", documents)
    config = tiny(f"data.sources=[{{name: wrong, train: {tmp_path}/wrong}}]")
    with pytest.raises(UserError, match=r"wrong\.bin holds the token id 77, .*vocab_size=64"):
        train(config, device=torch.device("cpu"))
