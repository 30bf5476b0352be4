"""Adoption of datatrove's shards: the same documents and split as ``prepare``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allometry.data.adopt import AdoptRequest, adopt
from allometry.data.corpus import held_out
from allometry.data.encode import train_tokenizer
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore

pytest.importorskip("datatrove", reason="datatrove[io] with xxhash<4 is not installed")
pytest.importorskip("orjson", reason="datatrove[io] is not installed")
TEXTS = [f"document {k}: " + "the cat sat on the mat and looked. " * (k % 7) for k in range(60)]
FRACTION = 0.3


@pytest.mark.slow
def test_adopted_shards_of_datatrove_are_those_of_prepare(tmp_path: Path) -> None:
    """Four tasks read three files, so the fourth task writes an empty shard."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    (tmp_path / "in").mkdir()
    for part in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[20 * part : 20 * part + 20])
        (tmp_path / "in" / f"{part}.jsonl").write_text("".join(lines))
    tokenizer = str(tmp_path / "tokenizer.json")
    train_tokenizer(TEXTS, 300).save(tokenizer)
    for split, wanted in (("train", False), ("validation", True)):
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(str(tmp_path / "in")),
                LambdaFilter(lambda one, wanted=wanted: held_out(one.text, FRACTION) == wanted),
                MegatronDocumentTokenizer(
                    str(tmp_path / split),
                    tokenizer_name_or_path=tokenizer,
                    eos_token="<|endoftext|>",
                ),
            ],
            tasks=4,
            workers=1,
            logging_dir=str(tmp_path / "log" / split),
        ).run()
    made = adopt(
        AdoptRequest(
            shards=(f"web={tmp_path}/train",),
            validation=(f"web={tmp_path}/validation",),
            out=str(tmp_path / "store"),
            tokenizer=tokenizer,
            processes=1,
        ),
        quiet=True,
    )
    assert made.sources["web"].skipped == {"shard without documents": 2}
    prepare(
        PrepareRequest(
            inputs=(f"web={tmp_path}/in",),
            out=str(tmp_path / "one"),
            tokenizer=tokenizer,
            validation_fraction=FRACTION,
            processes=1,
        ),
        quiet=True,
    )
    for split in ("train", "validation"):
        ours, theirs = (TokenStore(tmp_path / f"{name}/web.{split}") for name in ("store", "one"))
        assert ours.fingerprint == theirs.fingerprint
        assert ours.num_documents == theirs.num_documents > 0
        for number in range(ours.num_documents):
            assert ours.read(number).tolist() == theirs.read(number).tolist()
