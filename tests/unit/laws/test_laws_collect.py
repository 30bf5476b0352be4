from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.laws.collect import expand, from_runs
from allometry.laws.derive import HELD_OUT, derive, mark_held_out
from allometry.scaling.count import count_parameters, flops_per_token
from allometry.trainer.train import train
from fake_runs import chinchilla, fake_run

LAST = 40


def edit_record(folder: Path, change: dict[str, object]) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_run_is_a_row_of_what_it_recorded(tmp_path: Path) -> None:
    config = fake_run(tmp_path / "one", "run.seed=7")
    found = from_runs([tmp_path / "one"])
    width, layers = config.model.width, config.model.num_layers
    hidden = layers * (4 * width**2 + 3 * width * 2 * width)
    norms = (2 * layers + 1) * width
    ends = 64 * width
    tokens = LAST * 8 * 32
    expected = {
        "N": hidden + norms,
        "N_total": hidden + norms + 2 * ends,
        "D": tokens,
        "M": tokens / (hidden + norms),
        "B": 8 * 32,
        "S": LAST,
        "lr": 1e-2,
        "seed": 7,
        "width": width,
        "layers": layers,
        "experts": 1,
        "experts_per_token": 1,
        "r/web": 0.75,
        "r/code": 0.25,
        "U/web": 5000,  # all of its store, read more than once
        "U/code": tokens / 4,
        "U": 5000 + tokens / 4,
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], [value], err_msg=name)
    loss = chinchilla(hidden + norms, np.array([tokens]))
    np.testing.assert_allclose(found["loss"], loss + 0.75 * 0.1 - 0.25 * 0.3, rtol=1e-14)
    np.testing.assert_allclose(found["validation/code"], loss - 0.3, rtol=1e-14)
    assert "0.75 web, 0.25 code" in found.conventions["loss"]
    attention = layers * 2 * width * (32 + 1)
    flops = 3 * (2 * (hidden + ends) + attention)
    np.testing.assert_array_equal(found["C"], [flops * tokens])


def test_a_mixture_of_experts_says_what_laws_of_it_need(tmp_path: Path) -> None:
    experts = "{kind: swiglu, num_experts: 8, experts_per_token: 2, width: 16}"
    moe = "model={kind: moe, vocab_size: 64, width: 32, num_layers: 2, num_heads: 4, "
    fake_run(tmp_path / "moe", moe + f"experts: {experts}}}")
    found = from_runs([tmp_path / "moe"])
    expected = {"experts": 8, "experts_per_token": 2, "expert_width": 16}
    assert {name: found[name][0] for name in expected} == expected
    inactive = 2 * (8 - 2) * 3 * 32 * 16
    assert found["N_total"] - found["N_active"] == inactive
    fake_run(tmp_path / "dense")
    both = from_runs([tmp_path])
    np.testing.assert_array_equal(both["experts"], [1, 8])
    assert "expert_width" not in both.columns


def test_a_run_that_was_trained_is_a_row_like_the_others(tiny: Callable[..., RunConfig]) -> None:
    config = tiny(
        "training.total_steps=8", "record.every_steps=4", "data.packing=concatenated"
    )  # so that FLOPs are those of full sequences
    train(config)
    found = from_runs([config.run.folder])
    parameters = count_parameters(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    assert found["N"][0] == parameters.non_embedding
    assert found["D"][0] == 8 * 8 * 32
    assert found["C"][0] == found["D"][0] * flops.total
    assert found["loss"][0] == pytest.approx(
        0.7 * found["validation/up"][0] + 0.3 * found["validation/down"][0]
    )
    fake = fake_run(Path(config.run.folder).parent / "fake")
    assert fake.model.kind == "dense"
    made = from_runs([Path(config.run.folder).parent / "fake"])
    kinds = {name.partition("/")[0] for name in found.columns}
    assert kinds == {name.partition("/")[0] for name in made.columns}


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_by_the_convention_asked_for(tmp_path: Path, tied: bool) -> None:
    fake_run(tmp_path / "a", f"model.tied_embeddings={str(tied).lower()}")
    counts = {
        name: from_runs([tmp_path / "a"], count=name)["N"][0]
        for name in ("non_embedding", "with_head", "total")
    }
    ends = 64 * 32
    assert counts["with_head"] == counts["non_embedding"] + ends
    assert counts["total"] == counts["with_head"] + (0 if tied else ends)


def test_losses_are_those_asked_for(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    N = from_runs([tmp_path / "a"])["N"][0]
    law = chinchilla(N, 256.0 * np.arange(1, LAST + 1))
    for loss, last, expected in (
        ("train", 0.1, law[-4:].mean()),
        ("train", 1.0, law.mean()),
        ("train/web", 0.025, law[-1]),
        ("validation/web", 0.1, law[-1] + 0.1),
    ):
        found = from_runs([tmp_path / "a"], loss=loss, last=last)["loss"]
        np.testing.assert_allclose(found, [expected], rtol=1e-12)


def test_a_source_without_held_out_tokens_is_left_out_of_the_mean_and_it_says_so(
    tmp_path: Path,
) -> None:
    fake_run(tmp_path / "a", held_out=("web",))
    found = from_runs([tmp_path / "a"])
    np.testing.assert_allclose(found["loss"], found["validation/web"])
    assert "weighted by shares: 1 web" in found.conventions["loss"]
    assert "validation/code" not in found.columns


def test_seeds_of_one_cell_are_one_group(tmp_path: Path) -> None:
    for seed in (0, 1):
        for steps in (20, 40):
            fake_run(
                tmp_path / f"w32-{steps}-{seed}",
                f"run.seed={seed}",
                f"training.total_steps={steps}",
                "batch.micro_batch_sequences=4",
            )
    fake_run(tmp_path / "w64", width=64)
    fake_run(tmp_path / "w64-other-rate", "optimizer.lr=0.02", width=64)
    cells = from_runs([tmp_path]).groups
    assert cells == (
        *["N=20.6k D=5.12k"] * 2,
        *["N=20.6k D=10.2k"] * 2,
        "N=82.2k D=10.2k",
        "N=82.2k D=10.2k #2",
    )
    assert from_runs([tmp_path], group_by="model").groups == (*["N=20.6k"] * 4, *["N=82.2k"] * 2)
    assert from_runs([tmp_path], group_by="run").groups[:2] == ("w32-20-0", "w32-20-1")


def test_folders_of_runs_stand_for_their_runs(tmp_path: Path) -> None:
    fake_run(tmp_path / "ladder/runs/b")
    fake_run(tmp_path / "ladder/runs/a")
    (tmp_path / "ladder/runs/notes").mkdir()
    runs = [tmp_path / "ladder/runs/a", tmp_path / "ladder/runs/b"]
    assert expand([tmp_path / "ladder"]) == runs
    assert expand([tmp_path / "ladder/runs"]) == runs
    assert expand(runs[::-1]) == runs[::-1]
    with pytest.raises(UserError, match=r"a is given twice"):
        expand([tmp_path / "ladder", tmp_path / "ladder/runs/../runs/a"])
    with pytest.raises(UserError, match=r"notes holds no config.yaml and no run folder"):
        expand([tmp_path / "ladder/runs/notes"])
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        expand([tmp_path / "nowhere"])


def test_a_run_that_has_not_finished_is_named_or_left_out_aloud(tmp_path: Path) -> None:
    fake_run(tmp_path / "done")
    fake_run(tmp_path / "half", stop=20)
    fake_run(tmp_path / "broken", ending="not_finite")
    fake_run(tmp_path / "empty")
    (tmp_path / "empty/metrics.jsonl").unlink()
    for name, words in (
        ("half", r"half is at step 20 of 40.*--unfinished skip"),
        ("broken", r"broken ended at step 40 as its loss was not finite"),
        ("empty", "holds no rows yet"),
    ):
        with pytest.raises(UserError, match=words):
            from_runs([tmp_path / "done", tmp_path / name])
    found = from_runs([tmp_path], unfinished="skip")
    assert len(found) == 1
    left_out = found.conventions["left out"]
    assert all(f"/{name}" in left_out for name in ("half", "broken", "empty"))
    with pytest.raises(UserError, match=r"none of the runs has finished: .*half"):
        from_runs([tmp_path / "half"], unfinished="skip")


def test_a_run_that_was_extended_is_not_finished_before_its_new_end(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    path = tmp_path / "a/metrics.jsonl"
    row = json.loads(path.read_text().splitlines()[-1]) | {"step": 41}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="is at step 41"):
        from_runs([tmp_path / "a"])


@pytest.mark.parametrize(
    ("overrides", "more", "loss", "words"),
    [
        ([], {"tokenizer": "bbbb"}, "train/web", "differ in tokenizers .aaaa and bbbb"),
        (["data.sequence_length=16"], {}, "train", r"differ in data\.sequence_length .32 and 16"),
        (["data.sources.0.weight=0.5"], {}, "train", r"other mixtures.*--loss train/NAME"),
        (["data.sources.0.weight=0.5"], {}, "validation", "differ in shares of their sources"),
        ([], {"held_out": ("web",)}, "validation", "differ in held-out tokens"),
        (["evaluation.sequences_per_source=8"], {}, "validation/web", "sequences_per_source"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(
    tmp_path: Path, overrides: list[str], more: dict[str, object], loss: str, words: str
) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", *overrides, **more)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        from_runs([tmp_path], loss=loss)


def test_mixtures_are_compared_by_one_source_and_a_source_that_a_run_lacks_has_no_share(
    tmp_path: Path,
) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", "data.sources.0.weight=0.25")
    found = from_runs([tmp_path], loss="validation/web")
    np.testing.assert_array_equal(found["r/web"], [0.75, 0.5])
    np.testing.assert_allclose(found["loss"], found["validation/web"])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("perplexity", "--loss=perplexity is no loss of a run; use validation, train"),
        ("train/", "is no loss of a run"),
        ("train/books", r"has no row with loss/books.*validation/web"),
    ],
)
def test_a_loss_that_is_not_there_is_said(tmp_path: Path, loss: str, words: str) -> None:
    fake_run(tmp_path / "a")
    with pytest.raises(UserError, match=words):
        from_runs([tmp_path / "a"], loss=loss)


def test_a_record_that_says_too_little_is_refused(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    edit_record(tmp_path / "a", {"plan": {"total_steps": LAST}})
    with pytest.raises(UserError, match=r"run\.json has no plan\.parameters"):
        from_runs([tmp_path / "a"])


def test_no_held_out_tokens_at_all_asks_for_another_loss(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", held_out=())
    with pytest.raises(UserError, match=r"no row with validation/ .*choose another --loss"):
        from_runs([tmp_path / "a"])
    with pytest.raises(UserError, match=r"--last=0 is not a share"):
        from_runs([tmp_path / "a"], loss="train", last=0)


def test_runs_are_mapped_and_chosen_like_tables(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", "run.seed=1", width=64)
    runs = from_runs([tmp_path])
    found = derive(runs, mapping={"r": "r/web", "C": "6*N*D"}, where=["width > 40"], group="seed")
    np.testing.assert_array_equal(found["C"], 6 * found["N"] * found["D"])
    np.testing.assert_array_equal(found["r"], [0.75])
    assert found.groups == ("1",)
    assert found.conventions["C"] == "6*N*D"
    assert derive(runs, where=["group == 'N=82.2k D=10.2k'"])["width"].tolist() == [64]
    for where, words in (
        ("width > 99", "no row of the runs is left by --where 'width > 99'"),
        ("depth > 1", r"no column of the runs is called 'depth'"),
    ):
        with pytest.raises(UserError, match=words):
            derive(runs, where=[where])


def test_rows_to_hold_out_are_marked(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", width=64)
    runs = from_runs([tmp_path])
    np.testing.assert_array_equal(mark_held_out(runs, "width == 64")[HELD_OUT], [0, 1])
    with pytest.raises(UserError, match=r"--hold-out 'width > 1' holds for all of 2 rows"):
        mark_held_out(runs, "width > 1")
    with pytest.raises(UserError, match=r"--hold-out 'width' is not one comparison"):
        mark_held_out(runs, "width")
