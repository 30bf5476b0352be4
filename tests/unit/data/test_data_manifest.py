"""Manifests of older versions, and damaged ones."""

import json
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.data.prepare import PrepareRequest, prepare


@pytest.fixture
def small(tmp_path: Path) -> PrepareRequest:
    (tmp_path / "a.txt").write_text("some words and more words " * 30)
    return PrepareRequest(
        (str(tmp_path / "a.txt"),), str(tmp_path / "out"), vocab_size=300, processes=1
    )


def test_an_older_manifest_answers_the_same_request(small: PrepareRequest) -> None:
    prepare(small, quiet=True)
    path = Path(small.out) / "manifest.json"
    values = json.loads(path.read_text())
    for key in ("separator", "on_bad_line"):
        del values["request"][key]
    for key in ("kinds", "skipped_places", "inexact_cuts"):
        del values["sources"]["a"][key]
    path.write_text(json.dumps(values))
    prepare(small, quiet=True)
    assert json.loads(path.read_text()) == values


def test_a_manifest_that_is_nested_too_deeply(small: PrepareRequest) -> None:
    Path(small.out).mkdir()
    (Path(small.out) / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest .* is damaged"):
        prepare(small, quiet=True)
