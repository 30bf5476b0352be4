"""``allometry select``: inspect and import scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allometry.data.select.scores import read_scores
from allometry.data.store import TokenStore
from shell import Shell
from stores import write_two_sources


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_two_sources(tmp_path) / "code"


def test_scores_made_elsewhere_are_imported_and_shown(shell: Shell, store: Path) -> None:
    numbers = store.parent / "mine.txt"
    values = [*map(float, range(39)), float("nan")]
    numbers.write_text("\n".join(map(str, values)))
    done = shell.json("select", "import", store, numbers, "--scorer", "mine", "--with", "model=x")
    assert done["settings"] == {"imported": "mine.txt", "model": "x"}
    kept = read_scores(done["scores"], TokenStore(store))
    np.testing.assert_array_equal(kept.values, np.array(values, np.float32))
    facts = shell.json("select", "show", store, done["scores"], "--keep", 0.5, "--side", "bottom")
    lengths = TokenStore(store).lengths[:39]
    assert facts["unscored"] == 1
    assert facts["select"]["kept_tokens"] == pytest.approx(lengths.sum() / 2, abs=23)
    assert facts["select"]["kept_scores"][0] == 0.0
    assert facts["quantiles"]["1.0"] == 38.0
    text = shell("select", "show", store, done["scores"], "--keep", 0.5, "--side", "bottom")
    assert f"select: {{scores: {done['scores']}, keep: 0.5, side: bottom}}" in text
    assert "scores of mine: imported mine.txt, model x" in text
    binary = store.parent / "mine.npy"
    np.save(binary, np.array(values))
    again = shell.json("select", "import", store, binary, "--scorer", "mine", "--with", "model=x")
    assert again["sha256"] == done["sha256"]


def test_what_cannot_be_shown_is_a_sentence(shell: Shell, store: Path) -> None:
    numbers = store.parent / "mine.txt"
    numbers.write_text("\n".join(map(str, range(40))))
    scores = store.parent / "code.mine.scores.npy"
    said = shell.refusal("select", "show", store, scores)
    assert "code.mine.scores.json, the record of these scores, does not exist" in said
    shell("select", "import", store, numbers, "--scorer", "mine")
    for arguments, words in (
        ((store, scores, "--keep", 0.5), "--keep and --side belong together"),
        ((store, scores, "--keep", 1.5, "--side", "top"), "--keep=1.5 must be a share"),
        ((store, scores, "--keep", 0.5, "--side", "left"), "--side=left is not known"),
        ((store.with_name("prose"), scores), "are of other documents than token files"),
        ((store, store.parent / "code.idx"), "whose files end in .scores.npy"),
    ):
        assert words in shell.refusal("select", "show", *arguments)
    for text, words in (("1\n2\n", "have 2 values"), ("1\nx\n", "cannot be read as a row")):
        numbers.write_text(text)
        assert words in shell.refusal("select", "import", store, numbers, "--scorer", "mine")
    assert "is not KEY=VALUE" in shell.refusal(
        "select", "import", store, numbers, "--scorer", "mine", "--with", "x"
    )
