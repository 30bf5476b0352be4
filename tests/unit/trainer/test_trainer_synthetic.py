"""Tags of model-generated text: sums by kind, advice, and children of held-out parents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import Table, parquet

from allometry.configs.data import SequenceData
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.corpora import open_corpus
from allometry.data.corpus import ReadLog, held_out, held_out_below, is_held_out
from allometry.data.prepare import PrepareRequest, prepare
from allometry.launch.report.mixture import ledger
from allometry.launch.runs.dry_run import planned
from allometry.trainer.synthetic import leak
from allometry.trainer.train import train
from report_sections import inputs
from run_folders import rows

Make = Callable[..., RunConfig]
FRACTION = 0.25
PARENTS = [f"parent {number} speaks of {number * number}" for number in range(80)]
CHILDREN = [
    {"text": f"said anew, way {way}: {text}", "meta": {"parent": text, "id": number}}
    for way in range(3)
    for number, text in enumerate(PARENTS)
]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def split_of(path: Path, key: str | None) -> dict[str, bool]:
    """Return whether each document of a file belongs to the held-out split."""
    below = held_out_below(FRACTION)
    corpus = open_corpus(str(path), "text", split=key)
    return {
        document.text: is_held_out(document.group, below)
        for document in corpus.documents(ReadLog(lambda count: None), map)
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_child_of_a_held_out_parent_is_trained_on(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"children.{kind}"
    if kind == "jsonl":
        lines(path, CHILDREN)
    else:
        parquet.write_table(Table.from_pylist(CHILDREN), path)
    found = split_of(path, "meta.parent")
    assert len(found) == len(CHILDREN)
    for child in CHILDREN:
        assert found[child["text"]] == held_out(child["meta"]["parent"], FRACTION)
    without = split_of(path, None)
    assert any(
        not without[child["text"]] and held_out(child["meta"]["parent"], FRACTION)
        for child in CHILDREN
    ), "by their own text, children of held-out parents are trained on"
    by_id = split_of(path, "meta.id")
    for child in CHILDREN:
        assert by_id[child["text"]] == held_out(str(child["meta"]["id"]), FRACTION)


def test_records_without_the_key_are_refused(tmp_path: Path) -> None:
    for record, says in (
        ({"text": "a", "parent": None}, "line 1 has nothing under 'parent', so that its split"),
        ({"text": "a", "parent": ""}, "line 1 has nothing under 'parent', so that its split"),
        ({"text": "a"}, "line 1 has no 'parent' .*name the field with --split-key"),
        ({"text": "a", "parent": [1]}, "line 1 has no text under 'parent' but list"),
        ({"text": "a", "parent": True}, "line 1 has no text under 'parent' but bool"),
    ):
        path = lines(tmp_path / "wrong.jsonl", [record])
        with pytest.raises(UserError, match=says):
            split_of(path, "parent")
    parquet.write_table(Table.from_pylist([{"text": "a"}]), tmp_path / "wrong.parquet")
    with pytest.raises(UserError, match=r"has no 'parent' \(it has: text\)"):
        split_of(tmp_path / "wrong.parquet", "parent")
    (tmp_path / "plain.txt").write_text("text")
    for name in (str(tmp_path / "plain.txt"), "builtin:python-code"):
        with pytest.raises(UserError, match=r"--split-key=parent names a field, but .* has none"):
            open_corpus(name, "text", split="parent")


def described(**child: Any) -> dict[str, Any]:
    sources = [{"name": "web", "train": "web"}, {"name": "said", "train": "said", **child}]
    return {"sequence_length": 8, "sources": sources}


@pytest.mark.parametrize(
    ("child", "says"),
    [
        ({"kind": "rephrased", "validation": "held"}, "held-out text is natural"),
        ({"parent": "web"}, "parent=web is of what was rephrased, but kind=natural"),
        ({"kind": "generated", "parent": "web"}, "but kind=generated"),
        ({"kind": "rephrased", "parent": "wob"}, "parent=wob, which is none of them; name a natu"),
        ({"kind": "rephrased", "parent": "said"}, "which is rephrased or generated"),
        ({"kind": "human"}, "kind"),
    ],
)
def test_tags_that_contradict_are_refused(child: dict[str, Any], says: str) -> None:
    SequenceData.model_validate(described(kind="rephrased", parent="web"))
    with pytest.raises(ValueError, match=says):
        SequenceData.model_validate(described(**child))


def sources(store: Path, *tags: tuple[float, str, str | None]) -> str:
    listed = [
        {
            "name": name,
            "train": str(store / f"{name}.train"),
            "validation": str(store / f"{name}.validation") if kind == "natural" else None,
            "weight": weight,
            "kind": kind,
            "parent": parent,
        }
        for name, (weight, kind, parent) in zip(("up", "down"), tags, strict=True)
    ]
    return f"data.sources={json.dumps(listed)}"


def advice(config: RunConfig) -> dict[str, str]:
    found: dict[str, str] = planned(config, 1).facts["data"]["advice"]
    return {rule: text for rule, text in found.items() if "repeat" not in rule}


def test_a_run_counts_by_kind(tiny: Make, tiny_store: Path, tmp_path: Path) -> None:
    few = ("training.total_steps=4", "schedule={kind: constant}")
    tags = sources(tiny_store, (1.0, "natural", None), (3.0, "rephrased", "up"))
    config = tiny(*few, tags, folder=tmp_path / "run")
    said = advice(config)
    assert "75% of the tokens are rephrased" in said["much_is_rephrased"]
    assert "how both were split is not known" in said["held_out_parents"]
    train(config, device=torch.device("cpu"), callbacks=[])
    folder = Path(config.run.folder)
    last = rows(folder)[-1]
    assert last["kind_tokens/natural"] == last["tokens/up"]
    assert last["kind_tokens/rephrased"] == last["tokens/down"] == 3 * last["tokens/up"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert {"much_is_rephrased", "held_out_parents"} <= {one.get("rule") for one in events}
    by_source, by_kind = ledger(inputs(folder)).tables
    assert [row[2] for row in by_source.rows] == ["natural", "rephrased from up"]
    assert [row[1::2] for row in by_kind.rows] == [("natural", "25.0%"), ("rephrased", "75.0%")]
    third = sources(tiny_store, (2.0, "natural", None), (1.0, "rephrased", None))
    assert not advice(tiny(*few, third, folder=tmp_path / "third"))
    alone = sources(tiny_store, (0.0, "natural", None), (1.0, "generated", None))
    assert set(advice(tiny(*few, alone, folder=tmp_path / "alone"))) == {"no_natural_text"}


def test_how_children_were_split_is_looked_up(tiny: Make, tmp_path: Path) -> None:
    lines(tmp_path / "parents.jsonl", [{"text": text} for text in PARENTS])
    lines(tmp_path / "children.jsonl", CHILDREN)

    def made(name: str, key: str | None, fraction: float) -> Path:
        folder = tmp_path / f"{name}-{key}-{fraction}"
        prepare(
            PrepareRequest(
                inputs=(f"{name}={tmp_path}/{name}.jsonl",),
                out=str(folder),
                vocab_size=300,
                validation_fraction=fraction,
                split_key=key,
                processes=1,
            ),
            quiet=True,
        )
        return folder

    parents = made("parents", None, FRACTION)

    def why(key: str | None, fraction: float) -> str | None:
        folder = made("children", key, fraction)
        listed = [
            {
                "name": "parents",
                "train": f"{parents}/parents.train",
                "validation": f"{parents}/parents.validation",
            },
            {
                "name": "children",
                "train": f"{folder}/children.train",
                "kind": "rephrased",
                "parent": "parents",
            },
        ]
        return leak(tiny(f"data.sources={json.dumps(listed)}"), "children")

    assert why("meta.parent", FRACTION) is None
    assert why(None, FRACTION) == "its own text decided what was held out"
    assert why("meta.parent", 0.1) == "0.1 of it were held out and 0.25 of its parent"
    with pytest.raises(UserError, match=r"was prepared with split_key=None, not meta\.parent"):
        prepare(
            PrepareRequest(
                inputs=(f"children={tmp_path}/children.jsonl",),
                out=str(tmp_path / f"children-None-{FRACTION}"),
                vocab_size=300,
                validation_fraction=FRACTION,
                split_key="meta.parent",
            ),
            quiet=True,
        )
