"""A run folder is complete: a copy elsewhere, without its data, exports the same files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.synthetic import write_random_store
from allometry.interop.huggingface.convert import export_hf, import_hf
from allometry.launch.runs.commands import Convert
from allometry.launch.runs.convert import converted
from allometry.trainer.train import train

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
WORDS = {"<unk>": 0, "</s>": 1, "<eot>": 2} | {f"w{n}": n for n in range(3, 60)}
SOURCE = {"name": "a", "train": "tokens/a.train"}


def write_tokenizer(folder: Path, **beside: Any) -> Path:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<eot>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if beside:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder / "tokenizer.json"


def trained(tiny: Make, **data: Any) -> Path:
    """Return a run of one step in ``work/runs/one``, with ``work`` as the working directory."""
    text = json.dumps([SOURCE]).replace('"', "")
    more = [f"data.{key}={value}" for key, value in data.items()]
    length = ["training.total_steps=2", "schedule.warmup_steps=0"]
    config = tiny(*length, f"data.sources={text}", "run.folder=runs/one", *more)
    train(config, device=CPU, callbacks=[], stop_at_step=1)
    return Path("runs/one")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def prepared(work: Path, end: str | None = None) -> None:
    (work / "a.jsonl").write_text('{"text": "w3 w4 w5 w6 w7 w8 w9"}\n' * 40)
    tokenizer = write_tokenizer(work / "tok", eos_token="</s>", chat_template="kept")
    request = PrepareRequest(
        ("a=a.jsonl",),
        "tokens",
        tokenizer=str(tokenizer),
        validation_fraction=0.0,
        end_of_document=end,
        processes=1,
    )
    prepare(request, quiet=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("named", [True, False], ids=["named", "only in the manifest"])
def test_a_moved_run_exports_alike(
    named: bool, work: Path, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(work, end="<eot>")
    run = trained(tiny, **({"tokenizer": "tok/tokenizer.json"} if named else {}))
    export_hf(run, "hf")
    shutil.copytree(run, tmp_path / "elsewhere")
    shutil.rmtree(work / "tok")
    shutil.rmtree(work / "tokens")
    other = tmp_path / "empty"
    other.mkdir()
    monkeypatch.chdir(other)
    report = export_hf(tmp_path / "elsewhere", "hf")
    assert files(other / "hf") == files(work / "hf")
    assert (report.unknown, report.end_of_document) == ([], "<eot>")
    exported = {
        name: json.loads((other / "hf" / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config", "tokenizer")
    }
    assert exported["config"]["eos_token_id"] == exported["generation_config"]["eos_token_id"] == 2
    assert exported["tokenizer_config"] == {"eos_token": "<eot>", "chat_template": "kept"}
    assert exported["tokenizer"]["model"]["vocab"] == WORDS


def test_a_folder_keeps_what_a_later_launch_no_longer_finds(work: Path, tiny: Make) -> None:
    prepared(work)
    run = trained(tiny)
    first = json.loads((run / "run.json").read_text())["tokenizer"]
    assert (first["file"], first["end_of_document"]) == ("tokenizer.json", "</s>")
    assert (first["end_of_document_id"], first["unknown"]) == (1, [])
    (work / "tokens" / "manifest.json").unlink()
    train(load(run / "config.yaml"), device=CPU, callbacks=[])
    content = json.loads((run / "run.json").read_text())
    assert len(content["launches"]) == 2
    assert content["tokenizer"] == first


def test_a_tokenizer_that_was_changed_in_the_folder_is_not_used(work: Path, tiny: Make) -> None:
    prepared(work)
    run = trained(tiny, tokenizer="tok/tokenizer.json")
    values = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(values | {"normalizer": {"type": "Lowercase"}}))
    assert export_hf(run, "found").tokenizer == "tok/tokenizer.json"
    shutil.rmtree(work / "tok")
    assert export_hf(run, "beside").tokenizer == "tokens/tokenizer.json"
    shutil.rmtree(work / "tokens")
    report = export_hf(run, "none")
    assert report.tokenizer is None
    (why,) = report.unknown
    assert "runs/one/tokenizer.json is not the one that run.json records" in why
    assert report.end_of_document == "</s>"


def test_what_is_unknown_is_said_and_can_be_told(work: Path, tiny: Make) -> None:
    (work / "tokens").mkdir()
    write_random_store("tokens/a.train", 4000, 60)
    run = trained(tiny)
    record = json.loads((run / "run.json").read_text())["tokenizer"]
    assert record["end_of_document"] is None
    assert len(record["unknown"]) == 2
    said = converted(Convert(source=run, out=Path("hf")))
    assert "tokenizer: not known, as data.tokenizer names none" in said.text
    assert "give it with --tokenizer" in said.text
    assert "end of documents: not known, as there is no tokens/manifest.json; give it with --e" in (
        said.text
    )
    assert len(said.facts["unknown"]) == 2
    assert not (work / "hf" / "tokenizer.json").exists()

    path = write_tokenizer(work / "tok")
    told = converted(Convert(source=run, out=Path("b"), tokenizer=path, end_of_document="</s>"))
    assert "not known" not in told.text
    assert json.loads((work / "b" / "config.json").read_text())["eos_token_id"] == 1
    assert json.loads((work / "b" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    with pytest.raises(UserError, match=r"--end-of-document=</s> needs .* with --tokenizer"):
        converted(Convert(source=run, out=Path("c"), end_of_document="</s>"))
    with pytest.raises(UserError, match="--end-of-document=x is not a token of"):
        converted(Convert(source=run, out=Path("c"), tokenizer=path, end_of_document="x"))
    large = Tokenizer(models.WordLevel(WORDS | {"more": 64}, unk_token="<unk>"))
    large.save("large.json")
    with pytest.raises(UserError, match=r"--tokenizer=large.json has 65 ids, but model\.vocab_si"):
        converted(Convert(source=run, out=Path("c"), tokenizer=Path("large.json")))


def test_an_import_says_whether_data_and_model_agree(work: Path, tiny: Make) -> None:
    prepared(work)
    run = trained(tiny)
    export_hf(run, "hf")
    config = load(run / "config.yaml")
    assert len(import_hf("hf", config, "same").notes) == 1  # its origin
    values = json.loads((work / "hf" / "config.json").read_text())
    (work / "hf" / "config.json").write_text(json.dumps(values | {"eos_token_id": [2, 5]}))
    notes = import_hf("hf", config, "other").notes
    assert notes[1].startswith("end of documents: the data have </s> (1), the model's config.json")
    other = json.loads((work / "hf" / "tokenizer.json").read_text())
    other["pre_tokenizer"] = None
    whole = (work / "hf" / "tokenizer.json").read_text()
    (work / "hf" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"tokens/tokenizer.json is another .*pre_tokenizer"):
        import_hf("hf", config, "no")  # found next to the token files without being named
    (work / "hf" / "tokenizer.json").write_text(whole)
    (work / "tokens" / "manifest.json").unlink()
    notes = import_hf("hf", config, "unknown").notes
    assert notes[1].startswith("tokenizer: whether the data were made with the model's is not kn")


def test_what_is_known_is_not_told_otherwise(work: Path, tiny: Make) -> None:
    prepared(work)
    run = trained(tiny)
    with pytest.raises(
        UserError, match=r"is not the token that ends the documents of the run, </s"
    ):
        converted(Convert(source=run, out=Path("c"), end_of_document="<eot>"))
    other = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    other.save("other.json")
    with pytest.raises(UserError, match=r"is another tokenizer than the run's, .*differs"):
        converted(Convert(source=run, out=Path("c"), tokenizer=Path("other.json")))
    assert not (work / "c").exists()
