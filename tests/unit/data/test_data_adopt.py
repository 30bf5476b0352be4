"""Shards adopted as one source without a copy: the same documents, checked, safe to repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.configs.data import SequenceData
from allometry.configs.errors import UserError
from allometry.data.adopt import AdoptRequest, adopt
from allometry.data.contents import check_contents
from allometry.data.corpus import held_out
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.data.stream import open_stream
from allometry.data.synthetic import write_store

TEXTS = [
    f"document {k}: " + "the cat sat on the mat and looked at it. " * (k % 7) for k in range(60)
]
FRACTION = 0.3
END = 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of all texts, made in one process."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "web.jsonl").write_text(lines)
    prepare(
        PrepareRequest(
            inputs=(f"web={folder}/web.jsonl",),
            out=str(folder / "store"),
            vocab_size=300,
            validation_fraction=FRACTION,
            processes=1,
        ),
        quiet=True,
    )
    return folder / "store"


def documents(store: TokenStore) -> list[list[int]]:
    return [store.read(number).tolist() for number in range(store.num_documents)]


@pytest.fixture
def shards(prepared: Path, tmp_path: Path) -> Path:
    """Write the same documents in shards, three per split, plus an empty one."""
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        whole = documents(TokenStore(prepared / f"web.{split}"))
        for part, bounds in enumerate(((0, 3), (3, 4), (4, len(whole)))):
            write_store(tmp_path / split / f"0000{part}", whole[slice(*bounds)])
    (tmp_path / "train" / "00003.bin").touch()
    write_store(tmp_path / "train" / "00003", [])
    return tmp_path


def request(folder: Path, prepared: Path, **changes: Any) -> AdoptRequest:
    plain = AdoptRequest(
        shards=(f"web={folder}/train/*.idx",),
        validation=(f"web={folder}/validation",),
        out=str(folder / "store"),
        tokenizer=str(prepared / "tokenizer.json"),
        processes=1,
    )
    return replace(plain, **changes)


def test_adopted_shards_are_the_documents_and_split_of_prepare(
    shards: Path, prepared: Path
) -> None:
    made = adopt(request(shards, prepared), quiet=True)
    splits = made.sources["web"].splits
    assert set(splits) == {"train", "validation"}
    for split, record in splits.items():
        ours, theirs = (
            TokenStore(shards / f"store/web.{split}"),
            TokenStore(prepared / f"web.{split}"),
        )
        assert documents(ours) == documents(theirs)
        assert ours.fingerprint == theirs.fingerprint
        assert ours.vocab_bound_origin == "manifest"
        assert (record.documents, record.tokens) == (theirs.num_documents, theirs.num_tokens)
    assert made.sources["web"].skipped == {"shard without documents": 1}
    assert (
        sum(held_out(text, FRACTION) for text in TEXTS)
        == TokenStore(prepared / "web.validation").num_documents
    )
    assert not list((shards / "store").glob("*.bin")), "a copy"


@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
def test_a_run_reads_the_same_of_shards(shards: Path, prepared: Path, packing: str) -> None:
    adopt(request(shards, prepared), quiet=True)

    def batches(folder: Path) -> list[Any]:
        data = SequenceData.model_validate(
            {
                "sequence_length": 24,
                "packing": packing,
                "tokenizer": str(prepared / "tokenizer.json"),
                "sources": [
                    {
                        "name": "web",
                        "train": str(folder / "web.train"),
                        "validation": str(folder / "web.validation"),
                    }
                ],
            }
        )
        stream = open_stream(data, seed=3)
        check_contents(stream.stores)
        held = [batch.tokens_BL for batch in stream.validation(4)["web"]]
        return [stream.fingerprints(), stream.batch(0, 400).tokens_BL, *held]

    ours, theirs = batches(shards / "store"), batches(prepared)
    assert ours[0] == theirs[0]
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_request_again_does_nothing(shards: Path, prepared: Path) -> None:
    adopt(request(shards, prepared), quiet=True)
    manifest = shards / "store" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    adopt(request(shards, prepared), quiet=True)
    assert manifest.stat().st_mtime_ns == before
    write_store(shards / "train" / "00004", [[5, END]])
    with pytest.raises(UserError, match="was made of shards that have changed since, or others"):
        adopt(request(shards, prepared), quiet=True)
    for ending in (".idx", ".bin"):
        (shards / "train" / f"00004{ending}").unlink()
    with pytest.raises(UserError, match="was made of allow_inner_ends=False, not True"):
        adopt(request(shards, prepared, allow_inner_ends=True), quiet=True)
    with pytest.raises(UserError, match="was prepared with inputs="):
        prepare(
            PrepareRequest(inputs=(f"web={prepared.parent}/web.jsonl",), out=str(shards / "store")),
            quiet=True,
        )


def test_an_interrupted_request_goes_on(
    shards: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import allometry.data.adopt as module

    whole = adopt(request(shards, prepared, out=str(shards / "whole")), quiet=True)
    seen: list[str] = []
    plain = module.examine

    def failing(end: int, ids: int, prefix: Path) -> Any:
        seen.append(f"{prefix.parent.name}/{prefix.name}")
        if len(seen) == 4:
            raise KeyboardInterrupt
        return plain(end, ids, prefix)

    monkeypatch.setattr(module, "examine", failing)
    with pytest.raises(KeyboardInterrupt):
        adopt(request(shards, prepared), quiet=True)
    journal = shards / "store" / ".adopting" / "examined.jsonl"
    journal.write_text(journal.read_text() + '{"shard": "tor')
    assert not (shards / "store" / "manifest.json").exists()
    made = adopt(request(shards, prepared), quiet=True)
    assert seen[:4] == [f"train/0000{k}" for k in range(4)]
    assert seen[4:] == ["train/00003", *(f"validation/0000{k}" for k in range(3))]
    assert made.sources == whole.sources
    for path in (shards / "whole").glob("web.*"):
        assert path.read_bytes() == (shards / "store" / path.name).read_bytes()
    assert not (shards / "store" / ".adopting").exists()


def cut(folder: Path) -> None:
    path = folder / "train" / "00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def unfinished(folder: Path) -> None:
    (folder / "train" / "00007.bin").write_bytes(b"\0\0")


def inner(folder: Path) -> None:
    write_store(folder / "train" / "00005", [[5, END, 5, END], [END, END]])


def endless(folder: Path) -> None:
    write_store(folder / "train" / "00005", [[5, END], [5, 5], []])


def foreign(folder: Path) -> None:
    write_store(folder / "train" / "00005", [[5, 400, END]])


def wide(folder: Path) -> None:
    write_store(folder / "train" / "00005", [[5, END]], dtype="int32")


def hollow(folder: Path) -> None:
    (folder / "train" / "00003.bin").write_bytes(b"\0\0")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, r"00001.bin has \d+ bytes, but its index"),
        (unfinished, r"shard .*00007.bin has no .idx, as of a task that did not finish"),
        (inner, r"<\|endoftext\|> stands inside of documents 2 times, first in .*00005"),
        (endless, r"documents end without <\|endoftext\|> 1 times, first in .*00005"),
        (foreign, r"00005.bin holds the token id 400, but the tokenizer has 300 ids"),
        (wide, "00005 holds int32 and .*00000 uint16"),
        (hollow, "00003.bin has 2 bytes, but its index says that it has no documents"),
    ],
)
def test_wrong_shards_are_refused(
    shards: Path, prepared: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(shards)
    with pytest.raises(UserError, match=says):
        adopt(request(shards, prepared), quiet=True)
    assert not (shards / "store" / "manifest.json").exists()


def test_ends_that_are_wrong_can_be_allowed(shards: Path, prepared: Path) -> None:
    write_store(shards / "train" / "00005", [[5, END, 5, END], [5, 5]])
    asked = request(shards, prepared, allow_inner_ends=True, allow_missing_ends=True)
    made = adopt(asked, quiet=True)
    assert made.request["allow_inner_ends"] is True
    assert documents(TokenStore(shards / "store/web.train"))[-2:] == [[5, END, 5, END], [5, 5]]


def test_patterns_that_name_nothing_are_refused(shards: Path, prepared: Path) -> None:
    for changes, says in (
        ({"shards": (f"web={shards}/none/*.idx",)}, "no shard matches"),
        ({"shards": (f"web={shards}/train/0000",)}, "are named by their indices"),
        ({"shards": ()}, "of which no shards to train on are given"),
        ({"shards": (), "validation": ()}, "no shards are given"),
        ({"validation": (f"web={shards}/train/*1.idx",)}, "is among those to train on and those"),
        ({"shards": (f"web={shards}/train/*3.idx",)}, "none of the shards holds a document"),
        ({"shards": (f"web={shards}/train",) * 2}, "two inputs give the train split"),
    ):
        with pytest.raises(UserError, match=says):
            adopt(request(shards, prepared, **changes), quiet=True)


def test_shards_that_change_afterwards_are_noticed(shards: Path, prepared: Path) -> None:
    adopt(request(shards, prepared), quiet=True)
    path = shards / "train" / "00002.bin"
    before = path.read_bytes()
    path.write_bytes(before[:-2] + b"\1\0")
    with pytest.raises(UserError, match=r"00002.bin does not hold what .*web.train.shards.json"):
        check_contents([TokenStore(shards / "store/web.train")])
    path.write_bytes(before[:-2])
    with pytest.raises(UserError, match=r"shard .*00002.bin has \d+ bytes, but .* recorded"):
        TokenStore(shards / "store/web.train")
    path.unlink()
    with pytest.raises(UserError, match=r"shard .*00002.bin is missing"):
        TokenStore(shards / "store/web.train")
    path.write_bytes(before)
    moved = shards.parent / f"{shards.name}-moved"
    shards.rename(moved)
    assert TokenStore(moved / "store/web.train").read(3).tolist()[-1] == END
