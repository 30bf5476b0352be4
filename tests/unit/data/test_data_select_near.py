"""Scores by nearness: BETR's ranks and classifier, prototypes, near duplicates, their commands."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.data.encode import train_tokenizer
from allometry.data.select.betr import Target, best_ranks, betr, equal_examples, read_target
from allometry.data.select.features import TfIdf, embedder, hashed_bigrams, require
from allometry.data.select.kept import kept_documents
from allometry.data.select.prototypes import prototypes
from allometry.data.select.scores import read_scores
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_store
from shell import Shell

pytest.importorskip("sklearn", reason="the extra 'select' is not installed")
COUNT, EVERY = 400, 10


def near(rng: np.random.Generator, length: int = 60) -> NDArray[np.int64]:
    return rng.integers(150, 350, length)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Return a store with a tenth near the target; one is empty; 40 is 20 with one id changed."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 200, 60) if k % EVERY else near(rng) for k in range(COUNT)]
    documents[40] = documents[20].copy()
    documents[40][7] = 3
    documents[5] = documents[5][:0]
    write_store(tmp_path / "pool", documents)
    rng = np.random.default_rng(1)
    write_store(tmp_path / "examples", [near(rng, 50) for _ in range(10)])
    return TokenStore(tmp_path / "pool")


def plain_places(documents: NDArray[Any], examples: NDArray[Any]) -> list[int]:
    """Return the places by their definition, one pair at a time."""
    keys = []
    for j in range(len(documents)):
        ranks, cosines = [], []
        for example in examples:
            mine = float(example @ documents[j])
            better = sum(float(example @ other) > mine for other in documents)
            ties = sum(float(example @ documents[k]) == mine for k in range(j))
            ranks.append(better + ties)
            cosines.append(mine)
        keys.append((min(ranks), -max(cosines), j))
    places = [0] * len(keys)
    for place, (_, _, j) in enumerate(sorted(keys)):
        places[j] = place
    return places


def test_places_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(2)
    documents, examples = (rng.integers(-3, 4, (count, 4)).astype(np.float32) for count in (30, 70))
    for few in (examples[:1], examples[:5], examples):
        assert best_ranks(documents, few).tolist() == plain_places(documents, few)


def test_documents_near_the_target_score_highest(store: TokenStore) -> None:
    target = read_target(str(Path(store.prefix).parent / "examples"), ("text",), None)
    found = betr(store, [target], sample=100)
    is_near = np.arange(COUNT) % EVERY == 0
    assert found.examples == 10
    assert len(found.sampled) == 100
    assert found.near.sum() == 10
    assert is_near[found.sampled][found.near].mean() >= 0.8
    assert np.isnan(found.scores).nonzero()[0].tolist() == [5]
    best = np.argsort(-np.nan_to_num(found.scores, nan=-np.inf))[: COUNT // EVERY]
    assert is_near[best].mean() >= 0.95
    again = betr(store, [target], sample=100)
    assert again.weights_sha256 == found.weights_sha256
    np.testing.assert_array_equal(again.scores, found.scores)
    other = betr(store, [target], sample=100, seed=1)
    assert other.sampled.tolist() != found.sampled.tolist()


def test_each_target_gives_as_many_examples() -> None:
    one = Target("one", [np.array([1, k]) for k in range(9)])
    two = Target("two", [np.array([2, k]) for k in range(3)])
    first = [int(ids[0]) for ids in equal_examples([one, two], seed=0)]
    assert first == [1, 1, 1, 2, 2, 2]


def test_prototypes_are_clusters_and_duplicates_have_no_score(store: TokenStore) -> None:
    found = prototypes(store, 2)
    assert np.isnan(found.scores).nonzero()[0].tolist() == [5, 40]
    assert found.duplicates == 1
    assert found.clusters[5] == -1
    is_near = np.arange(COUNT) % EVERY == 0
    label = np.bincount(found.clusters[is_near]).argmax()
    filled = found.clusters >= 0
    assert ((found.clusters == label) == is_near)[filled].mean() > 0.95
    kept = prototypes(store, 2, duplicates_from=None)
    assert kept.duplicates == 0
    assert np.isnan(kept.scores).sum() == 1


def test_rows_are_unit_vectors(tmp_path: Path) -> None:
    documents = [np.array([1, 2, 2]), np.array([2, 1, 2]), np.array([], np.int64)]
    write_store(tmp_path / "few", documents)
    bags = TfIdf([(TokenStore(tmp_path / "few"), np.arange(3))], 5).rows(documents)
    pairs = hashed_bigrams(documents)
    for rows in (bags, pairs):
        norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1))).ravel()
        np.testing.assert_allclose(norms, [1, 1, 0], atol=1e-6)
    assert abs(bags[0] - bags[1]).sum() == 0.0, "TF-IDF sees no order"
    assert abs(pairs[0] - pairs[1]).sum() > 0.1, "pairs do"


def test_what_cannot_be_scored_is_a_sentence(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = Target("few", [np.array([1])])
    with pytest.raises(UserError, match=r"10 documents with a share of 0\.1 near the target"):
        betr(store, [few], sample=10)
    with pytest.raises(UserError, match="--embedder=bert is not known; use tfidf or static:FOLDER"):
        embedder("bert", [(store, np.arange(2))], 1)
    with pytest.raises(UserError, match=r"has 0 \.safetensors files"):
        embedder(f"static:{tmp_path}", [(store, np.arange(2))], 1)
    with pytest.raises(UserError, match="--k=300 clusters of 399 documents have fewer than two"):
        prototypes(store, 300)
    for text, says in (
        ('{"question": "a"}', "line 1 has no example under question, answer"),
        ("[]", "line 1 has no example under"),
        ("{", "line 1 has no example under"),
        ("", "holds no example"),
    ):
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(UserError, match=says):
            read_target(str(tmp_path / "t.jsonl"), ("question", "answer"), lambda text: [1])
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        read_target(str(tmp_path / "none.jsonl"), ("text",), None)
    (tmp_path / "t.jsonl").write_text('{"q": "a", "a": "b", "s": null}\n\n{"q": "c", "a": "d"}\n')
    with pytest.raises(UserError, match="line 3 has no example under q, a, s"):
        read_target(str(tmp_path / "t.jsonl"), ("q", "a", "s"), lambda text: list(text.encode()))
    found = read_target(str(tmp_path / "t.jsonl"), ("q", "a"), lambda text: list(text.encode()))
    assert [bytes(ids.tolist()).decode() for ids in found.examples] == ["a\nb", "c\nd"]
    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("sklearn", "sklearn.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=r"needs scikit-learn, .*; pip install 'allometry\[select\]'"
    ):
        require("sklearn.cluster")


def test_the_commands_write_scores(
    store: TokenStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shell = Shell(capsys)
    examples = tmp_path / "examples"
    more = ("--target", examples, "--sample", 100, "--keep", 0.1)
    done = shell.json("select", "betr", store.prefix, *more)
    assert done["settings"]["examples"] == 10
    assert done["select"]["side"] == "top"
    values = read_scores(done["scores"], store).values
    _, kept = kept_documents(values, store.lengths, 0.1, "top")
    assert (kept % EVERY == 0).mean() >= 0.9
    done = shell.json("select", "prototypes", store.prefix, "--k", 2)
    assert done["settings"]["duplicates"] == 1
    assert done["unscored"] == 2
    for arguments, says in (
        (("betr", store.prefix), "--target names nothing"),
        (("betr", store.prefix, "--target", examples, "--top", 2), "--top=2 must be a share"),
        (("betr", store.prefix, "--target", tmp_path / "t.jsonl"), "cannot be read"),
        (("prototypes", store.prefix, "--k", 2, "--keep", 0.5), "--keep and --side belong"),
    ):
        assert says in shell.refusal("select", *arguments)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "words"}))
    refused = shell.refusal("select", "betr", store.prefix, "--target", tmp_path / "t.jsonl")
    assert "examples in JSON Lines need the tokenizer" in refused


def test_static_vectors_are_the_mean_of_their_rows(tmp_path: Path) -> None:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    from allometry.data.select.features import Static

    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vectors = np.array([[0, 0], [3, 0], [0, 4]], np.float32)
    save_file({"embedding": vectors}, tmp_path / "model.safetensors")
    static = Static.__new__(Static)
    static._vectors, static._tokenizer = vectors, tokenizer
    static._decode = lambda ids: " ".join("ab"[number] for number in ids)
    rows = static.rows([np.array([0, 0]), np.array([0, 1]), np.array([], np.int64)])
    np.testing.assert_allclose(rows, [[1, 0], [0.6, 0.8], [0, 0]], atol=1e-6)


@pytest.mark.slow
def test_hard_examples_win_where_data_abound_and_easy_ones_where_scarce() -> None:
    """A perceptron of 50 weights, 40 % kept by margin: the crossing of 2206.14486, figure 1."""
    from sklearn.svm import LinearSVC

    wanted = {0.5: (0.425, 0.236, 0.321), 8: (0.024, 0.031, 0.059)}
    width, keep = 50, 0.4
    for per_weight, (hard, easy, random) in wanted.items():
        errors: dict[str, list[float]] = {"hard": [], "easy": [], "random": []}
        for seed in range(20):
            rng = np.random.default_rng(seed)
            teacher = rng.normal(size=width)
            points = rng.normal(size=(round(per_weight * width / keep), width))
            margins = points @ teacher
            scores = np.abs(margins).astype(np.float32)
            ones = np.ones(len(points), np.int64)
            luck = rng.random(len(points)).astype(np.float32)
            for name, by, side in (
                ("hard", scores, "bottom"),
                ("easy", scores, "top"),
                ("random", luck, "top"),
            ):
                _, kept = kept_documents(by, ones, keep, side)
                labels = np.sign(margins[kept])
                if len(set(labels)) < 2:
                    continue
                model = LinearSVC(C=1e3, fit_intercept=False, max_iter=20_000)
                weights = model.fit(points[kept], labels).coef_.ravel()
                cosine = weights @ teacher / np.linalg.norm(weights) / np.linalg.norm(teacher)
                errors[name].append(float(np.arccos(cosine) / np.pi))
        found = {name: np.mean(values) for name, values in errors.items()}
        for name, value in (("hard", hard), ("easy", easy), ("random", random)):
            assert found[name] == pytest.approx(value, rel=0.15), (per_weight, name, found)


@pytest.mark.slow
def test_pieces_of_a_package_are_found_in_the_standard_library(tmp_path: Path) -> None:
    """40 of a package's pieces of 2,000 characters are the target, a quarter is the sample."""
    from sklearn.metrics import roc_auc_score

    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    pieces, packages = [], []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not left_out & set(parts):
            text = path.read_bytes().decode("utf-8", "replace")
            cut = [text[at : at + 2000] for at in range(0, len(text), 2000)]
            kept = [one for one in cut if len(one) >= 200]
            pieces += kept
            packages += [parts[0]] * len(kept)
    tokenizer = train_tokenizer(pieces[::10], 4096)
    ids = [np.array(one.ids) for one in tokenizer.encode_batch_fast(pieces)]
    for package in ("asyncio", "email"):
        of = np.flatnonzero(np.array(packages) == package)
        chosen = np.random.default_rng(0).choice(of, 40, replace=False)
        rest = np.setdiff1d(np.arange(len(ids)), chosen)
        write_store(tmp_path / package, [ids[number] for number in rest])
        store, wanted = TokenStore(tmp_path / package), np.array(packages)[rest] == package
        target = Target(package, [ids[number] for number in chosen])
        found = betr(store, [target], sample=len(ids) // 4)
        sampled = wanted[found.sampled]
        assert sampled[found.near].mean() > 6 * sampled.mean()
        assert sampled[found.near].sum() >= 0.85 * sampled.sum()
        others = np.setdiff1d(np.arange(len(rest)), found.sampled)
        assert roc_auc_score(wanted[others], found.scores[others]) > 0.93
