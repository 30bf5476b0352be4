import hashlib
import json
import multiprocessing
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from allometry.configs.data import SequenceData
from allometry.configs.errors import UserError
from allometry.data import prepare as room
from allometry.data.corpus import text_digest
from allometry.data.encode import END_OF_DOCUMENT, train_tokenizer
from allometry.data.lock import locked
from allometry.data.manifest import manifest_of, read_manifest
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.data.stream import Stream
from allometry.data.tokenizer import check_tokenizer, check_vocabulary


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeé大 ", k=rng.randint(1, 6))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 200))) for _ in range(400)]
    texts[7] = f"spells {END_OF_DOCUMENT} out"
    texts[11] = " \n"
    with (folder / "web.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "book.txt").write_text("A book about scaling. " * 40, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def request_(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareRequest:
    return PrepareRequest(
        (f"web={corpus / 'web.jsonl'}", str(corpus / "book.txt")),
        str(tmp_path_factory.mktemp("prepared") / "out"),
        vocab_size=400,
        validation_fraction=0.1,
        processes=1,
    )


@pytest.fixture(scope="module")
def prepared(request_: PrepareRequest) -> Path:
    prepare(request_, quiet=True)
    return Path(request_.out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def decoded(prefix: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(prefix.parent / "tokenizer.json"))
    store = TokenStore(prefix)
    documents = [store.read(d).tolist() for d in range(store.num_documents)]
    assert all(document[-1] == 0 and 0 not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in documents]


def texts_of(corpus: Path) -> list[str]:
    lines = (corpus / "web.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for line in lines if (text := json.loads(line)["text"]).strip()]


def test_every_document_comes_back(corpus: Path, prepared: Path) -> None:
    train, held_out = decoded(prepared / "web.train"), decoded(prepared / "web.validation")
    below = round(0.1 * 2**64)
    texts = texts_of(corpus)
    assert held_out == [t for t in texts if int(text_digest(t)[:16], 16) < below]
    assert train == [t for t in texts if int(text_digest(t)[:16], 16) >= below]
    assert 20 < len(held_out) < 70
    assert decoded(prepared / "book.train") == [(corpus / "book.txt").read_text()]


def test_manifest_tells_what_is_there(corpus: Path, prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert manifest is not None
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.end_of_document == END_OF_DOCUMENT
    web, book = manifest.sources["web"], manifest.sources["book"]
    assert set(book.splits) == {"train"}  # one document cannot be in both
    assert not (prepared / "book.validation.bin").exists()
    sizes = 0
    for split, record in web.splits.items():
        store = TokenStore(prepared / f"web.{split}")
        assert (record.documents, record.tokens) == (store.num_documents, store.num_tokens)
        assert record.largest_id == store._tokens.tokens(0).max()
        for name, file in record.files.items():
            data = (prepared / name).read_bytes()
            assert file.bytes == len(data)
            assert file.sha256 == hashlib.sha256(data).hexdigest()
        sizes += record.bytes
    assert (web.kinds, book.kinds) == ({"JSON Lines": 1}, {"text": 1})
    assert (web.skipped, book.skipped) == ({"text is blank": 1}, {})
    assert web.skipped_places == {"text is blank": [f"{corpus / 'web.jsonl'}:12"]}
    assert sizes == sum(len(text.encode()) for text in texts_of(corpus))
    assert TokenStore(prepared / "web.train").vocab_bound == manifest.tokenizer.vocab_size == 400
    assert TokenStore(prepared / "web.train").vocab_bound_origin == "manifest"


def test_it_trains(prepared: Path) -> None:
    data = SequenceData.model_validate(
        {
            "sequence_length": 64,
            "tokenizer": str(prepared / "tokenizer.json"),
            "sources": [
                {
                    "name": "web",
                    "train": str(prepared / "web.train"),
                    "validation": str(prepared / "web.validation"),
                }
            ],
        }
    )
    stream = Stream(data, 0)
    check_vocabulary(400, stream.stores)
    assert stream.batch(0, 4).num_targets > 200
    assert len(stream.validation(3)["web"]) == 3
    files = stream.describe()["sources"]["web"]["train"]["files_sha256"]
    assert set(files) == {"web.train.bin", "web.train.idx"}


def test_files_do_not_depend_on_processes(
    request_: PrepareRequest, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allometry.data.encode._CHUNK_CHARACTERS", 5000)
    prepare(replace(request_, out=str(tmp_path / "out"), processes=3), quiet=True)
    assert contents(tmp_path / "out") == contents(prepared)
    assert multiprocessing.active_children() == []


def test_again_is_nothing_to_do(request_: PrepareRequest, prepared: Path, capfd: Any) -> None:
    def changed() -> dict[str, int]:
        return {name: (prepared / name).stat().st_mtime_ns for name in contents(prepared)}

    before = changed()
    again = prepare(replace(request_, processes=2))
    assert "already prepared from the same inputs; nothing to do" in capfd.readouterr().err
    assert again == read_manifest(prepared)
    assert changed() == before


def test_what_is_named_and_would_be_found_is_the_same(
    request_: PrepareRequest, prepared: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(prepared)
    for same in ({"end_of_document": END_OF_DOCUMENT}, {"on_bad_line": "skip"}):
        assert prepare(replace(request_, **same), quiet=True) == manifest
    tokenizer = str(prepared / "tokenizer.json")
    found = replace(request_, vocab_size=None, tokenizer=tokenizer, out=str(tmp_path / "found"))
    named = replace(found, end_of_document=END_OF_DOCUMENT, out=str(tmp_path / "named"))
    for first, then in ((found, named), (named, found)):
        manifest = prepare(first, quiet=True)
        assert prepare(replace(then, out=first.out), quiet=True) == manifest
    with pytest.raises(UserError, match=r"=<x> is a token of no tokenizer .*give --tokenizer"):
        replace(request_, end_of_document="<x>")
    (prepared / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    with pytest.raises(UserError, match="eos_token of"):
        prepare(found, quiet=True)  # now detection would choose another
    (prepared / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": 300}, "was prepared with tokenizer="),
        ({"validation_fraction": 0.2}, r"with validation_fraction=0.1, not 0.2; choose another"),
        ({"inputs": ("builtin:python-code",)}, "was prepared with inputs="),
        ({"max_documents": 3}, "was prepared with max_documents=None, not 3"),
    ],
)
def test_another_request_is_refused(
    request_: PrepareRequest, prepared: Path, change: dict[str, Any], says: str
) -> None:
    before = contents(prepared)
    with pytest.raises(UserError, match=says):
        prepare(replace(request_, **change), quiet=True)
    assert contents(prepared) == before


@pytest.fixture
def small(tmp_path: Path) -> PrepareRequest:
    (tmp_path / "a.txt").write_text("some words and more words " * 30)
    return PrepareRequest(
        (str(tmp_path / "a.txt"),), str(tmp_path / "out"), vocab_size=300, processes=1
    )


def test_changed_input_is_refused(small: PrepareRequest, tmp_path: Path) -> None:
    prepare(replace(small, validation_fraction=0.0), quiet=True)
    (tmp_path / "a.txt").write_text("other words")
    with pytest.raises(UserError, match=r"a\.txt has changed since"):
        prepare(replace(small, validation_fraction=0.0), quiet=True)


def test_damaged_output_is_told(small: PrepareRequest) -> None:
    prepare(small, quiet=True)
    out = Path(small.out)
    data = (out / "a.train.bin").read_bytes()
    (out / "a.train.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match=rf"has {len(data) - 2} bytes, but .* recorded {len(data)}"):
        prepare(small, quiet=True)
    (out / "manifest.json").write_text('{"kind": "allometry.tokens"}')
    with pytest.raises(UserError, match=r"manifest .* is damaged"):
        prepare(small, quiet=True)


def test_interrupted_preparation_leaves_nothing(
    small: PrepareRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("allometry.data.source_files.encode_chunk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(small, quiet=True)
    assert contents(Path(small.out)) == {}

    with monkeypatch.context() as patch:  # killed between two renames: no cleanup
        renamed: list[Path] = []
        rename = room.os.replace

        def stop_after_two(source: Path, target: Path) -> None:
            if len(renamed) == 2:
                raise KeyboardInterrupt
            renamed.append(target)
            rename(source, target)

        patch.setattr(room.os, "replace", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            prepare(small, quiet=True)
    assert renamed
    assert read_manifest(Path(small.out)) is None
    manifest = prepare(small, quiet=True)
    assert read_manifest(Path(small.out)) == manifest
    assert not (Path(small.out) / ".partial").exists()


def test_files_of_others_are_not_overwritten(small: PrepareRequest) -> None:
    Path(small.out).mkdir()
    (Path(small.out) / "a.train.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds a\.train\.bin, but no manifest"):
        prepare(small, quiet=True)
    assert contents(Path(small.out)) == {"a.train.bin": b"precious"}


def test_two_at_once(small: PrepareRequest) -> None:
    Path(small.out).mkdir()
    with (
        locked(Path(small.out)),
        pytest.raises(UserError, match="another `allometry prepare` is writing"),
    ):
        prepare(small, quiet=True)


def test_out_that_cannot_be_written(small: PrepareRequest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write token files into"):
        prepare(replace(small, out=str(tmp_path / "file" / "out")), quiet=True)


def test_limits(request_: PrepareRequest, corpus: Path, tmp_path: Path) -> None:
    few = replace(request_, inputs=request_.inputs[:1], validation_fraction=0.0, max_documents=5)
    prepare(replace(few, out=str(tmp_path / "five")), quiet=True)
    texts = texts_of(corpus)
    assert decoded(tmp_path / "five" / "web.train") == texts[:5]
    limit = sum(len(text.encode()) for text in texts[:3])
    bounded = replace(few, max_documents=None, max_bytes=limit)
    prepare(replace(bounded, out=str(tmp_path / "bytes")), quiet=True)
    assert decoded(tmp_path / "bytes" / "web.train") == texts[:3]


def _tokenizer(path: Path, *ends: str) -> str:
    tokenizer = train_tokenizer(["some words and more"], 280)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = []
    values["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    path.write_text(json.dumps(values))
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(list(ends))
    tokenizer.save(str(path))
    return str(path)


def test_given_tokenizer(small: PrepareRequest, tmp_path: Path) -> None:
    path = _tokenizer(tmp_path / "given.json", "</s>", "<pad>")
    given = replace(small, tokenizer=path, vocab_size=None)
    manifest = prepare(given, quiet=True)
    end = Tokenizer.from_file(path).token_to_id("</s>")
    assert (manifest.tokenizer.end_of_document, manifest.tokenizer.end_of_document_id) == (
        "</s>",
        end,
    )
    document = TokenStore(Path(small.out) / "a.train").read(0).tolist()
    assert document[-1] == end
    text = Tokenizer.from_file(path).decode(document[:-1])
    assert text == (tmp_path / "a.txt").read_text()  # not truncated to the tokenizer's three tokens
    check_tokenizer(path, [str(Path(small.out) / "a.train")])


def test_end_of_document_must_be_known(small: PrepareRequest, tmp_path: Path) -> None:
    none = replace(small, tokenizer=_tokenizer(tmp_path / "n.json", "<pad>"), vocab_size=None)
    with pytest.raises(UserError, match=r"n\.json has no special tokens .*<pad>.*name one"):
        prepare(none, quiet=True)
    path = _tokenizer(tmp_path / "two.json", "</s>", "<eos>")
    two = replace(none, tokenizer=path)
    with pytest.raises(UserError, match="several special tokens"):
        prepare(two, quiet=True)
    with pytest.raises(UserError, match="--end-of-document='<x>' is not a token of"):
        prepare(replace(two, end_of_document="<x>"), quiet=True)
    chosen = prepare(replace(two, end_of_document="<eos>"), quiet=True)
    assert chosen.tokenizer.end_of_document == "<eos>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    other = prepare(replace(two, out=str(tmp_path / "other")), quiet=True)
    assert other.tokenizer.end_of_document == "</s>"


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "does not exist"), ("{", "is not JSON"), ("{}", "has no 'model'"),
     ('{"model": {}}', "cannot be loaded")],
)  # fmt: skip
def test_bad_tokenizers(small: PrepareRequest, tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=says):
        prepare(replace(small, tokenizer=str(tmp_path / "t.json"), vocab_size=None), quiet=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": ()}, "inputs is empty"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"tokenizer": "t.json"}, "give one of them"),
        ({"on_bad_line": "warn"}, "on_bad_line=warn must be stop or skip"),
        ({"max_bad_lines": -1}, "max_bad_lines=-1"),
        ({"separator": ""}, "separator is empty"),
    ],
)
def test_bad_requests(small: PrepareRequest, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(small, **change)


def test_bad_vocabulary_and_empty_corpora(small: PrepareRequest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        prepare(replace(small, vocab_size=256), quiet=True)
    with pytest.raises(UserError, match="two inputs give the source 'a'"):
        prepare(replace(small, inputs=small.inputs * 2), quiet=True)
    (tmp_path / "empty.txt").write_text("\n")
    empty = replace(small, inputs=(str(tmp_path / "empty.txt"),))
    with pytest.raises(UserError, match=r"source empty .* has no documents to train on"):
        prepare(empty, quiet=True)
    assert contents(Path(small.out)) == {}


def test_tokenizer_that_does_not_match(prepared: Path, tmp_path: Path, caplog: Any) -> None:
    path = _tokenizer(tmp_path / "other.json", "</s>")
    prefix = str(prepared / "web.train")
    with pytest.raises(UserError, match="were made with another tokenizer") as error:
        check_tokenizer(path, [prefix])
    assert prefix in str(error.value)
    assert path in str(error.value)
    same = tmp_path / "same.json"  # equal content, formatted differently
    same.write_text(json.dumps(json.loads((prepared / "tokenizer.json").read_text()), indent=1))
    check_tokenizer(str(same), [prefix])
    check_tokenizer(None, [prefix])
    for ending in (".bin", ".idx"):
        (tmp_path / f"foreign{ending}").write_bytes(Path(prefix + ending).read_bytes())
    assert manifest_of(str(tmp_path / "foreign")) is None
    check_tokenizer(path, [str(tmp_path / "foreign")])
    assert "is not known" in caplog.text


def test_sources_of_two_tokenizers_do_not_mix(small: PrepareRequest, prepared: Path) -> None:
    prepare(small, quiet=True)
    with pytest.raises(UserError, match="were made with another tokenizer"):
        check_tokenizer(None, [str(prepared / "web.train"), str(Path(small.out) / "a.train")])


def test_vocabulary_too_small(prepared: Path) -> None:
    store = TokenStore(prepared / "web.train")
    check_vocabulary(400, [store])
    with pytest.raises(UserError, match=r"model\.vocab_size=399 is too small .* 400 rows"):
        check_vocabulary(399, [store])
