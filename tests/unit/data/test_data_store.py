import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_random_store, write_store

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 60000]]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write_store(tmp_path / "a", DOCUMENTS)
    return str(tmp_path / "a")


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def test_reads_what_was_written(prefix: str) -> None:
    store = TokenStore(prefix)
    assert (store.num_documents, store.num_tokens, store.dtype) == (4, 9, np.uint16)
    assert store.lengths.tolist() == [3, 0, 1, 5]
    assert store.lengths.dtype == np.int64
    assert [store.read(d).tolist() for d in range(4)] == DOCUMENTS
    assert store.read(3, 1, 4).tolist() == [6, 7, 8]
    assert (store.vocab_bound, store.vocab_bound_origin) == (60001, "scan")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint16"])
def test_megatron_reads_our_files(tmp_path: Path, megatron, dtype: str) -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 200]]
    write_store(tmp_path / "a", documents, dtype)
    dataset = megatron.IndexedDataset(str(tmp_path / "a"))
    assert [dataset[d].tolist() for d in range(3)] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert TokenStore(tmp_path / "a").read(2).tolist() == documents[2]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatron_files_with_several_sequences_in_a_document(
    tmp_path: Path, megatron, dtype: type
) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype)
    builder.add_document(np.arange(10), [4, 0, 6])
    builder.add_document(np.arange(10, 13), [3])
    builder.add_document(np.arange(0), [])
    builder.add_document(np.arange(13, 20), [7])
    builder.finalize(str(tmp_path / "m.idx"))
    store = TokenStore(tmp_path / "m")
    assert store.lengths.tolist() == [10, 3, 0, 7]
    assert store.read(0, 3, 6).tolist() == [3, 4, 5]  # across its sequences
    assert store.read(3).tolist() == list(range(13, 20))


def test_sampled_bound_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allometry.data.store._SCAN_TOKENS", 1000)
    monkeypatch.setattr("allometry.data.store._BLOCK_TOKENS", 10)
    write_random_store(tmp_path / "a", 9000, 500)
    store = TokenStore(tmp_path / "a")
    assert store.vocab_bound_origin == "sample"
    assert 400 < store.vocab_bound <= 500


def _write(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_missing_file(prefix: str) -> None:
    Path(prefix + ".idx").unlink()
    with pytest.raises(UserError, match=r"a\.idx does not exist"):
        TokenStore(prefix)


def test_truncated_tokens(prefix: str) -> None:
    _write(Path(prefix + ".bin"), lambda data: data[:-1])
    with pytest.raises(UserError, match=r"17 bytes, but its index .* says 18"):
        TokenStore(prefix)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"PARQUET" + data[7:], "does not begin with MMIDIDX"),
        (lambda data: b"", "does not begin with MMIDIDX"),
        (lambda data: data[:20], "ends within its header"),
        (lambda data: data[:9] + b"\x02" + data[10:], "has version 2"),
        (lambda data: data[:17] + b"\x07" + data[18:], "dtype code 7"),
        (lambda data: data[:17] + b"\x63" + data[18:], "dtype code 99"),
        (lambda data: data[:-1], "is cut short"),
        (lambda data: data[:34] + b"\xff\xff\xff\xff" + data[38:], "do not follow each other"),
        (lambda data: data[:-8] + b"\x03" + data[-7:], "do not cover its sequences"),
    ],
)
def test_damaged_index(prefix: str, change, says: str) -> None:
    _write(Path(prefix + ".idx"), change)
    with pytest.raises(UserError, match=says):
        TokenStore(prefix)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_empty_store(tmp_path: Path, documents: list[list[int]]) -> None:
    write_store(tmp_path / "a", documents)
    with pytest.raises(UserError, match="holds no documents or no tokens"):
        TokenStore(tmp_path / "a")


def test_negative_ids(tmp_path: Path) -> None:
    write_store(tmp_path / "a", [[1, -2]], "int32")
    with pytest.raises(UserError, match="negative token id -2"):
        _ = TokenStore(tmp_path / "a").vocab_bound


def test_the_room_does_not_import_torch() -> None:
    code = (
        "import sys, pkgutil, allometry.data\n"
        "for m in pkgutil.iter_modules(allometry.data.__path__): "
        "__import__('allometry.data.' + m.name)\n"
        "assert 'allometry.data.stream' in sys.modules\n"
        "print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
