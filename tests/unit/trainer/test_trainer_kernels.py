"""Kernels of a launch: selected by name, by rule, by measurement, or from the record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fake_apex
from allometry.configs.errors import UserError
from allometry.configs.kernels import KernelsConfig
from allometry.configs.run import RunConfig
from allometry.data.stream import open_stream
from allometry.models.attention import RUN
from allometry.scaling.attention import BACKENDS, AttentionCall, refusal, worth_measuring
from allometry.scaling.kernels import apex_folder, apex_refusal, quantise_refusal
from allometry.scaling.plan import RunPlan
from allometry.trainer.kernels import Choice, Kernels, _decide, settle
from allometry.trainer.measure import AttentionShape, Outcome, time_attention
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
NAMES = ("one", "two", "three")


def measured(**times: Outcome) -> Callable[[Sequence[str]], dict[str, Outcome]]:
    return lambda names: {name: times[name] for name in names}


def fine(name: str) -> None:
    return None


class TestSettle:
    def test_the_fastest_is_taken(self) -> None:
        choice = settle("norm", "auto", NAMES, fine, measured(one=2.0, two=1.0, three=1.5))
        assert (choice.name, choice.by) == ("two", "measured")
        assert choice.milliseconds == {"one": 2.0, "two": 1.0, "three": 1.5}

    def test_a_preferred_one_is_not_given_up_for_noise(self) -> None:
        choose = lambda one: settle("norm", "auto", NAMES[:2], fine, measured(one=one, two=1.0))  # noqa: E731
        assert choose(1.02).name == "one"
        assert choose(1.04).name == "two"

    def test_without_the_clock_it_is_the_first_that_runs(self) -> None:
        choose = settle(
            "norm", "auto", NAMES, fine, measured(one="a", two=9.0, three=1.0), by_clock=False
        )
        assert (choose.name, choose.by, choose.left_out) == ("two", "rule", {"one": "a"})

    def test_what_fails_is_left_out_and_said(self) -> None:
        choice = settle("norm", "auto", NAMES, fine, measured(one="fails", two=3.0, three="slow"))
        assert choice.name == "two"
        assert choice.left_out == {"one": "fails", "three": "slow"}
        with pytest.raises(UserError, match="none that runs on this device: one a; two b"):
            settle("norm", "auto", NAMES[:2], fine, measured(one="a", two="b"))

    def test_without_a_measurement_the_first_is_taken(self) -> None:
        assert settle("norm", "auto", NAMES, fine, None, "three") == Choice("one", "rule")
        alone = settle("norm", "auto", ("one",), fine, measured())
        assert alone == Choice("one", "rule"), "nothing to compare with"

    def test_a_named_one_must_do(self) -> None:
        assert settle("norm", "three", NAMES, fine, measured(three=9.0)).by == "named"
        with pytest.raises(UserError, match=r"kernels\.norm=two is not for this; use one, or"):
            settle("norm", "two", NAMES, lambda _: "is not for this; use one", None)
        with pytest.raises(UserError, match=r"norm=two fails here; use kernels\.norm: auto"):
            settle("norm", "two", NAMES, fine, measured(two="fails here"))

    def test_the_record_is_kept_whatever_is_faster(self) -> None:
        times = measured(one=1.0, two=1.0, three=5.0)
        assert settle("norm", "auto", NAMES, fine, times, "three").name == "three"
        assert settle("norm", "two", NAMES, fine, times, "three").name == "two"

    def test_a_record_that_cannot_be_kept_is_said(self) -> None:
        gone = settle(
            "norm", "auto", NAMES[:2], lambda _: "is absent", measured(one=1.0, two=2.0), "three"
        )
        assert (gone.name, gone.left_out) == ("one", {"three": "is absent"})
        torch_now = Choice("torch", "rule")
        kernels = Kernels(gone, torch_now, torch_now, torch_now, deterministic=False)
        before = {key: {"name": "three"} for key in ("attention", "norm")}
        found = list(kernels.changes(before | {"deterministic": True}))
        assert [each["kernel"] for each in found] == ["attention", "norm", "training.deterministic"]
        assert found[0]["reason"] == "is absent"
        assert list(kernels.changes({})) == [], "a record from before kernels were kept"


CUDA = AttentionCall("cuda", "bf16", packed=True, length=4096, compiled=True, head_width=128)


def test_names_of_the_section_are_those_of_the_table() -> None:
    schema = KernelsConfig.model_json_schema()["properties"]["attention"]["enum"]
    assert set(schema) == {"auto", *(backend.name for backend in BACKENDS)}


def test_what_is_worth_measuring() -> None:
    everything = {None, "flash_attn", "flash_attn_interface"}.__contains__
    torch_alone = {None}.__contains__
    whole = CUDA._replace(packed=False)
    assert worth_measuring(CUDA, everything) == ("flash3", "flash2", "varlen", "cudnn", "flex")
    assert worth_measuring(CUDA, torch_alone) == ("varlen", "cudnn", "flex")
    assert worth_measuring(whole, torch_alone) == ("flash", "cudnn")
    exact = CUDA._replace(deterministic=True)
    assert worth_measuring(exact, torch_alone) == ("varlen", "flex")
    assert worth_measuring(CUDA._replace(dtype="fp32"), everything) == ("masked",)
    assert worth_measuring(CUDA._replace(head_width=160), torch_alone) == ("varlen", "flex")


def test_refusals_name_the_fix() -> None:
    nothing = {None}.__contains__
    assert "install it (" in str(refusal("flash3", CUDA, nothing))
    assert "not on cpu" in str(refusal("varlen", CUDA._replace(device="cpu"), nothing))
    exact = str(refusal("cudnn", CUDA._replace(deterministic=True), nothing))
    assert "training.deterministic: false" in exact
    assert "heads of 100" in str(refusal("cudnn", CUDA._replace(head_width=100), nothing))
    assert "not packed documents" in str(refusal("flash", CUDA, nothing))
    assert refusal("varlen", CUDA, nothing) is None


SHAPE = AttentionShape(2, 64, 4, 2, 16, torch.float32, (40, 24, 1, 63), compiled=False)


def test_attention_is_timed_and_checked() -> None:
    def wrong(*args):
        return 1.2 * RUN["packed"](*args)

    def broken(*args):
        raise RuntimeError("no kernel image\nfor this device")

    run = {**RUN, "varlen": wrong, "cudnn": broken}
    names = ["packed", "varlen", "cudnn", "masked"]
    state = torch.get_rng_state()
    found = time_attention(names, SHAPE, torch.device("cpu"), run)
    assert torch.equal(state, torch.get_rng_state()), "no trace in the run's generator"
    assert all(isinstance(found[name], float) and found[name] > 0 for name in ("packed", "masked"))
    assert "gives other numbers" in found["varlen"]
    assert found["cudnn"] == "fails here (RuntimeError: no kernel image)"


def recorded(config: RunConfig) -> dict:
    return json.loads((Path(config.run.folder) / "run.json").read_text())


def test_a_cpu_follows_the_rule_and_the_record_says_which(tiny: Make, tmp_path: Path) -> None:
    plain, named = tiny("training.total_steps=4"), None
    train(plain, callbacks=[])
    kernels = recorded(plain)["kernels"]
    assert kernels["attention"] == {
        "name": "packed", "by": "rule", "milliseconds": {}, "left_out": {},
    }  # fmt: skip
    assert (kernels["norm"]["name"], kernels["adamw"]["name"]) == ("torch", "torch")
    named = tiny("training.total_steps=4", "kernels.attention=reference", folder=tmp_path / "named")
    train(named, callbacks=[])
    assert recorded(named)["launches"][0]["kernels"]["attention"]["by"] == "named"
    losses = [[row["loss"] for row in rows(Path(c.run.folder))] for c in (plain, named)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != losses[1], "another kernel ran"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "kernels.attention=flash2",
            "runs on cuda, not on cpu; use blocked, packed, masked, reference, or",
        ),
        ("kernels.attention=varlen", "runs on cuda, not on cpu"),
        ("kernels.attention=flash", "not packed documents in fp32"),
        ("kernels.norm=apex", "needs NVIDIA's apex"),
        ("kernels.adamw=apex", "needs NVIDIA's apex"),
        ("kernels.quantize=triton", "has nothing to round"),
    ],
)
def test_a_name_that_cannot_be_used_ends_the_launch(tiny: Make, asked: str, said: str) -> None:
    config = tiny(asked)
    with pytest.raises(UserError, match=said) as caught:
        train(config, callbacks=[])
    assert str(caught.value).startswith(asked)
    assert not rows_of(config), "nothing was trained"


def test_what_rounds_to_fp8() -> None:
    assert quantise_refusal("cuda", compiled=False, rounds=True) is None
    for refused, said in (
        ({"device": "cpu"}, "runs on cuda, not on cpu"),
        ({"compiled": True}, "fuses the same passes; set training.compile: false"),
        ({"rounds": False}, "has nothing to round"),
    ):
        reason = quantise_refusal(
            **{"device": "cuda", "compiled": False, "rounds": True, **refused}
        )
        assert said in str(reason)


def rows_of(config: RunConfig) -> list:
    path = Path(config.run.folder) / "metrics.jsonl"
    return rows(path.parent) if path.exists() else []


def test_a_resume_with_another_kernel_says_so(tiny: Make) -> None:
    train(tiny(), callbacks=[], stop_at_step=5)
    train(tiny("kernels.attention=masked"), callbacks=[], stop_at_step=10)
    train(tiny("kernels.attention=masked"), callbacks=[], stop_at_step=15)
    said = [e for e in events(Path(tiny().run.folder)) if e["event"] == "kernels_changed"]
    assert [(e["step"], e["kernel"], e["before"], e["now"]) for e in said] == [
        (5, "attention", "packed", "masked")
    ]


class TestDeterministic:
    def test_on_a_cpu_nothing_changes_but_the_record(self, tiny: Make, tmp_path: Path) -> None:
        settings = ("training.total_steps=6", "model.dropout=0.1")
        losses = []
        for exact in ("false", "true"):
            config = tiny(*settings, f"training.deterministic={exact}", folder=tmp_path / exact)
            train(config, callbacks=[])
            losses.append([row["loss"] for row in rows(Path(config.run.folder))])
            assert recorded(config)["kernels"]["deterministic"] == (exact == "true")
            assert not torch.are_deterministic_algorithms_enabled()
        assert losses[0] == losses[1]

    def test_it_holds_meanwhile(self, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        run = RUN["packed"]
        monkeypatch.setitem(
            RUN,
            "packed",
            lambda *a: seen.append(torch.are_deterministic_algorithms_enabled()) or run(*a),
        )
        train(tiny("training.total_steps=4", "training.deterministic=true"), callbacks=[])
        assert seen
        assert all(seen)

    def test_a_change_at_a_resume_is_said(self, tiny: Make) -> None:
        train(tiny(), callbacks=[], stop_at_step=5)
        config = tiny("training.deterministic=true")
        train(config, callbacks=[], stop_at_step=10)
        said = [e for e in events(Path(config.run.folder)) if e["event"] == "kernels_changed"]
        assert [(e["kernel"], e["before"], e["now"]) for e in said] == [
            ("training.deterministic", False, True)
        ]

    def test_a_workspace_that_cannot_repeat_is_refused(
        self, tiny: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment"):
            train(tiny("training.deterministic=true"), callbacks=[])


class TestApex:
    def test_who_is_nvidias(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert apex_folder() is None
        (tmp_path / "other" / "apex").mkdir(parents=True)
        (tmp_path / "other" / "apex" / "__init__.py").touch()
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / "other"))
            assert apex_folder() is None
            assert "is another one" in str(apex_refusal("cuda", compiled=False))
        with monkeypatch.context() as patch:
            fake_apex.install(patch, tmp_path / "nvidia")
            assert apex_folder() == tmp_path / "nvidia" / "apex"
            assert apex_refusal("cuda", compiled=False) is None
            assert "training.compile: false" in str(apex_refusal("cuda", compiled=True))
            assert "not on cpu" in str(apex_refusal("cpu", compiled=False))

    @pytest.mark.parametrize("optimizer", ["adamw", "adamh"])
    def test_a_run_by_apex_is_one_by_torch(
        self, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
    ) -> None:
        """Forward, backward, step and resume through apex's calls, computed by torch."""
        settings = ("training.total_steps=8", f"optimizer.kind={optimizer}", "optimizer.lr=1e-2")
        plain = tiny(*settings, folder=tmp_path / "torch")
        train(plain, callbacks=[])
        calls = fake_apex.install(monkeypatch, tmp_path)
        monkeypatch.setattr("allometry.trainer.measure.ADAMW_ELEMENTS", (64, 2))
        monkeypatch.setattr("allometry.trainer.kernels.apex_refusal", lambda *_, **__: None)
        apex = ("kernels.norm=apex", "kernels.adamw=apex")
        config = tiny(*settings, *apex, folder=tmp_path / "apex")
        train(config, callbacks=[], stop_at_step=3)
        train(config, callbacks=[])
        for name in ("norm", "adamw"):
            choice = recorded(config)["kernels"][name]
            assert (choice["name"], choice["by"]) == ("apex", "named")
            assert math.isfinite(choice["milliseconds"]["apex"])
        assert calls["norm"] > 8 * 4 * 5, "each norm of each micro-batch"
        assert calls["adam"] == calls["applier"] >= 8
        losses = [[row["loss"] for row in rows(Path(c.run.folder))] for c in (plain, config)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[1][-1] < losses[1][0]


class TestOnAGpu:
    """Calls to a GPU, with a substitute device and a simulated clock."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list:
        seen = []

        def time(names, shape, device):
            seen.append((tuple(names), shape))
            return {name: {"varlen": 2.0, "flex": 1.0}.get(name, 3.0) for name in names}

        monkeypatch.setattr("allometry.trainer.kernels.time_attention", time)
        return seen

    def decide(self, config: RunConfig, before: dict, step: int = 0) -> Kernels:
        mesh: Any = SimpleNamespace(
            device=SimpleNamespace(type="cuda"), tp=SimpleNamespace(size=2), is_main=True
        )
        start: Any = SimpleNamespace(step=step)
        stream = open_stream(config.data, config.run.seed)
        return _decide(config, RunPlan.of(config, 1), stream, start, mesh, before)

    def test_the_documents_of_the_next_micro_batch_are_measured(self, tiny: Make, asked) -> None:
        config = tiny("training.compute_dtype=bf16")
        kernels = self.decide(config, {}, step=3)
        assert (kernels.attention.name, kernels.core) == ("flex", "flex")
        ((names, shape),) = asked
        assert names == ("varlen", "cudnn", "flex")
        assert (shape.sequences, shape.length, shape.heads, shape.kv_heads) == (2, 32, 2, 1)
        stream = open_stream(config.data, config.run.seed)
        packed = stream.batch(3 * 8, 2).documents
        assert packed is not None
        assert shape.documents == tuple(packed.lengths.tolist())
        assert sum(shape.documents) == 64

    def test_whole_documents_fill_a_micro_batch(self, tiny: Make, asked) -> None:
        config = tiny(
            *("training.compute_dtype=bf16", "data.kind=documents", "data.max_document_tokens=56"),
            *("batch.micro_batch_sequences=1", "parallel.context.capacity_tokens=64"),
        )
        self.decide(config, {})
        ((_, shape),) = asked
        assert (shape.sequences, shape.length, sum(shape.documents)) == (1, 64, 64)

    def test_whole_sequences(self, tiny: Make, asked) -> None:
        config = tiny("training.compute_dtype=bf16", "data.packing=concatenated")
        assert self.decide(config, {}).attention.name == "flash"
        assert asked[0][0] == ("flash", "cudnn")
        assert asked[0][1].documents is None

    def test_a_record_is_kept_or_said_to_be_gone(self, tiny: Make, asked) -> None:
        config = tiny("training.compute_dtype=bf16")
        before = {"attention": {"name": "cudnn"}}
        assert self.decide(config, before).attention.name == "cudnn"
        exact = tiny("training.compute_dtype=bf16", "training.deterministic=true")
        now = self.decide(exact, before)
        assert now.attention.name == "varlen", "the first, as nothing is to hang on a clock"
        (change,) = now.changes(before)
        assert "the same bits twice" in change["reason"]

    @pytest.mark.parametrize(("apex_ms", "taken"), [(0.5, "apex"), (0.99, "torch"), (2.0, "torch")])
    def test_apex_is_taken_where_it_is_faster(
        self,
        tiny: Make,
        asked,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        apex_ms: float,
        taken: str,
    ) -> None:
        fake_apex.install(monkeypatch, tmp_path)
        for kind in ("norms", "adamw"):
            monkeypatch.setattr(
                f"allometry.trainer.kernels.time_{kind}",
                lambda names, *_: {name: {"apex": apex_ms}.get(name, 1.0) for name in names},
            )
        kernels = self.decide(tiny(), {})
        assert (kernels.norm.name, kernels.adamw.name) == (taken, taken)
        compiled = self.decide(tiny("training.compile=true"), {"norm": {"name": "apex"}})
        assert (compiled.norm.name, compiled.adamw.name) == ("torch", taken)
        assert "cannot be compiled" in compiled.norm.left_out["apex"]


def test_a_launch_that_is_refused_leaves_no_folder(tiny: Make, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with pytest.raises(UserError, match="flash3"):
        train(tiny("kernels.attention=flash3", folder=folder), device=torch.device("cpu"))
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="flash3"):
        train(tiny("kernels.attention=flash3", folder=folder), device=torch.device("cpu"))
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]
