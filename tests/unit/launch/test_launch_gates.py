"""The commands suggest, coordcheck and transfer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.cli import app
from allometry.launch.command import Report
from allometry.launch.studies.commands import CoordCheck, Suggest, Transfer
from allometry.launch.studies.coordcheck import checked
from allometry.launch.studies.suggest import suggested
from allometry.launch.studies.transfer import swept
from asked import about, small_transfer

Make = Callable[..., RunConfig]
MUP = ("parameterization={kind: mup, base_width: 16, embedding_std: 1.0}",)


def facts_of(report: Report) -> Any:
    """Return the facts printed by --json."""
    return json.loads(json.dumps(report.facts))


def cli(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.output


def test_suggest_prints_a_table_and_json() -> None:
    code, text = cli("suggest", "preset:dense_1b", "--params", "1e9", "--tokens", "1e11")
    assert code == 0
    assert "step-law  " in text
    assert "0.00163" in text
    assert "1,107,715" in text
    code, text = cli("suggest", "preset:dense_1b", "--params", "1e9", "--tokens", "1e11", "--json")
    facts = json.loads(text)
    assert code == 0
    assert facts["target"]["parameters"] == 10**9
    by_law = {one["law"]: one for one in facts["suggestions"]}
    assert by_law["step-law"]["lr"] == pytest.approx(1.632499e-3, rel=1e-6)
    assert by_law["ling"]["refused"]
    assert facts["base"]["width"] <= 512


@pytest.mark.parametrize("preset", ["demo", "dense_1b", "moe_demo"])
def test_suggest_fits_a_terminal(preset: str) -> None:
    lines = suggested(Suggest(config=f"preset:{preset}")).text.splitlines()
    assert max(map(len, lines)) <= 100
    said = " ".join(line.strip() for line in lines)
    assert "schedule: cosine to 1e-5 after 2,000 steps of warm-up" in said
    assert "multi-step: 31.6 % of the peak after 80 %" in said or preset == "moe_demo"


def test_suggest_says_where_a_model_is_small_already() -> None:
    said = suggested(Suggest(config="preset:demo")).text.replace("\n ", "")
    assert "model.width=192 (3,147,712 parameters active) is small already" in said
    assert "base_width is" not in said
    large = suggested(Suggest(config="preset:dense_1b")).text
    assert "small already" not in large
    assert "to tune small: model.width=512 " in large


@pytest.mark.parametrize("flag", ["--params", "--tokens", "--loss"])
def test_suggest_refuses_what_is_not_finite(flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag}=inf is not finite; give a number"):
        cli("suggest", "preset:demo", flag, "inf")


def test_suggest_says_what_lies_outside_and_what_disagrees() -> None:
    text = suggested(Suggest(config="preset:demo")).text
    assert "step-law*" in text
    assert "below the smallest behind the law" in text
    far = suggested(Suggest(config="preset:dense_1b", tokens=1e13)).text
    assert "octaves apart" in far


def test_coordcheck_passes_mup_and_fails_sp(tiny: Make, tmp_path: Path) -> None:
    request = CoordCheck(
        config="",
        widths="16,32,64",
        lr=2.0**-6,
        seeds=2,
        length=32,
        processes=1,
        out=tmp_path / "c.png",
    )
    report = checked(about(tiny(*MUP), request))
    passed, facts = report.passed, facts_of(report)
    assert passed == (not facts["axes"][0]["failures"]) == facts["passed"]
    assert (tmp_path / "c.png").stat().st_size > 0
    wide = facts["axes"][0]["slopes"]
    sp = "parameterization={kind: sp, embedding_std: 1.0}"
    report = checked(about(tiny(sp), request))
    text, passed = report.text, report.passed
    assert not passed
    assert "FAILED: blocks.1 moves as width^+" in text
    assert "NOT passed" in text
    narrow = facts_of(checked(about(tiny(sp), request)))["axes"][0]["slopes"]
    assert narrow["blocks.1"] > wide["blocks.1"] + 0.2


def test_coordcheck_checks_the_axes_that_are_asked_for(tiny: Make, tmp_path: Path) -> None:
    request = CoordCheck(
        config="",
        depths="1,2",
        seeds=1,
        steps=1,
        length=16,
        processes=1,
        out=tmp_path / "c.png",
        block_bound=9.0,
        logit_bound=9.0,
    )
    report = checked(about(tiny(*MUP), request))
    text, passed = report.text, report.passed
    assert passed
    assert "depth" in text
    assert "width" not in text
    with pytest.raises(UserError, match=r"--depths=2: give two or more"):
        checked(about(tiny(), CoordCheck(config="", depths="2")))
    with pytest.raises(UserError, match="no experts to vary"):
        checked(about(tiny(), CoordCheck(config="", experts="2,4")))


def test_transfer_reports_and_goes_on_from_its_file(tiny: Make, tmp_path: Path) -> None:
    request = small_transfer(tmp_path / "trials.jsonl", seeds=1)
    config = tiny(*MUP)
    report = swept(about(config, request))
    passed, facts = report.passed, facts_of(report)
    assert facts["passed"] == passed
    assert [size["size"] for size in facts["sizes"]] == [16, 32]
    assert (tmp_path / "t.png").stat().st_size > 0
    written = (tmp_path / "trials.jsonl").read_text()
    assert facts_of(swept(about(config, request))) == facts
    assert (tmp_path / "trials.jsonl").read_text() == written, "nothing was run twice"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"axis": "horizon", "sizes": "1,4"},
            "--sizes=1 is too short .* warm-up of 0; choose 2 or",
        ),
        (
            {"axis": "horizon", "sizes": "4,9", "warmup_steps": 3},
            "--sizes=4 is too short for a sweep, whose runs end 2 steps or more after their "
            "warm-up of 3; choose 5 or more",
        ),
        ({"sizes": "16,32", "steps": 4, "warmup_steps": 3}, "--steps=4 is too short .* choose 5"),
    ],
)
def test_runs_of_a_sweep_that_are_too_short(
    tiny: Make, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    request = Transfer(config="", length=8, trials=tmp_path / "t.jsonl", **options)
    with pytest.raises(UserError, match=said):
        swept(about(tiny(*MUP), request))
    assert not (tmp_path / "t.jsonl").exists()


def test_transfer_writes_nothing_before_its_sizes_are_checked(tiny: Make, tmp_path: Path) -> None:
    request = Transfer(config="", sizes="16,33", steps=2, length=8, trials=tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="33"):
        swept(about(tiny(), request))
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"octaves": float("nan")}, "--step=0.5 must be above 0 and at most --octaves=nan"),
        ({"octaves": float("inf")}, "--octaves=inf goes beyond"),
        ({"octaves": 2000.0}, "--octaves=2000 goes beyond"),
        ({"step": float("nan")}, "--step=nan must be above 0"),
        ({"step": 0.0}, "--step=0 must be above 0"),
        ({"step": 1e-5}, "--step=1e-05 makes 200,001 rates of each size"),
        ({"bound": float("nan")}, "--bound=nan is no number of octaves"),
        ({"bound": float("inf")}, "--bound=inf is no number of octaves"),
        ({"regret_bound": float("nan")}, "--regret-bound=nan is no percentage"),
    ],
)
def test_numbers_of_transfer_that_are_none(
    tiny: Make, options: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        swept(about(tiny(), Transfer(config="", **options)))


@pytest.mark.parametrize("lr", ["-1", "0", "nan", "inf"])
def test_rates_of_coordcheck_that_are_none(tiny: Make, lr: str, tmp_path: Path) -> None:
    tiny()
    with pytest.raises(UserError, match=f"--lr={lr} must be a number above 0"):
        cli("coordcheck", tmp_path / "tiny.yaml", "--lr", lr, "--out", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_bounds_of_coordcheck_that_are_none(tiny: Make) -> None:
    for name in ("block_bound", "logit_bound"):
        request = CoordCheck(config="", **{name: float("nan")})
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}=nan is no slope"):
            checked(about(tiny(), request))


def test_mistakes_are_said_in_one_sentence(tiny: Make) -> None:
    with pytest.raises(UserError, match="--axis=hight is not known; use one of width, depth"):
        swept(about(tiny(), Transfer(config="", axis="hight")))
    with pytest.raises(UserError, match="--step=2 must be above 0 and at most --octaves=1"):
        swept(about(tiny(), Transfer(config="", step=2.0, steps=2, sizes="16,32", length=8)))
    with pytest.raises(UserError, match="would be read more than once"):
        swept(about(tiny(), Transfer(config="", steps=10**5, sizes="16,32")))
    with pytest.raises(UserError, match="a figure is written as"):
        checked(about(tiny(), CoordCheck(config="", out=Path("a.txt"))))


MIXED = "{kind: moe, vocab_size: %d, width: 32, num_layers: 1, num_heads: 4, qk_norm: true, %s}"
ONE = "experts: {kind: swiglu, num_experts: 4, experts_per_token: 1, width: 16}"
EXPERTS = f"{ONE}, router: {{gate: sigmoid}}"


@pytest.mark.parametrize(
    ("axis", "sizes", "seen"),
    [
        ("width", "16,32", [16, 32]),
        ("depth", "1,2", [1, 2]),
        ("width-and-depth", "32,64", [32, 64]),
        ("experts", "1,4", [1, 4]),
        ("regime-ii", "4,8", [4, 8]),
        ("regime-iii", "4,8", [4, 8]),
        ("horizon", "3,6", [3, 6]),
        ("batch", "1,2", [1, 2]),
    ],
)
def test_transfer_over_each_axis(
    tiny: Make, tmp_path: Path, axis: str, sizes: str, seen: list[int]
) -> None:
    vocab = tiny().model.vocab_size
    code, text = cli(
        *("transfer", tmp_path / "tiny.yaml", "--axis", axis, "--sizes", sizes, "--seeds", "1"),
        *("--steps", "4", "--sequences", "2", "--length", "8", "--step", "1", "--processes", "1"),
        *("--regret-bound", "99", "--out", tmp_path / "t.png", "--json"),
        *(*MUP, f"model={MIXED % (vocab, EXPERTS)}"),
    )
    facts = json.loads(text)
    assert code == (0 if facts["passed"] else 1)
    assert facts["axis"] == axis
    assert [size["size"] for size in facts["sizes"]] == seen
    losses = [size["mean_losses"] for size in facts["sizes"]]
    assert losses[0] != losses[1], "the axis changes something"


def test_transfer_names_what_a_regime_holds_fixed(tiny: Make, tmp_path: Path) -> None:
    model = MIXED % (tiny().model.vocab_size, EXPERTS)
    mssp = "{kind: mssp, regime: II, base_width: 32, base_experts: 4, base_experts_per_token: 1, "
    config = tiny(f"model={model}", f"parameterization={mssp}base_expert_width: 16}}")
    request = Transfer(config="", axis="regime-iii", sizes="4,8", steps=2, length=8, processes=1)
    with pytest.raises(UserError, match=r"experts.width=32 differs .* regime II of mssp"):
        swept(about(config, request))
    with pytest.raises(UserError, match="no experts to vary; choose another axis"):
        swept(about(tiny(), Transfer(config="", axis="regime-ii")))
    with pytest.raises(UserError, match=r"num_experts=4 to 6; choose multiples of 4"):
        swept(about(config, Transfer(config="", axis="regime-ii", sizes="4,6", length=8)))


@pytest.mark.parametrize("regime", ["I", "II", "III"])
def test_gates_grow_a_family_as_its_regime_does(tiny: Make, tmp_path: Path, regime: str) -> None:
    """Default axes: widths in regime I, experts with all dependent sizes in II and III."""
    model = MIXED % (tiny().model.vocab_size, EXPERTS)
    base = "base_width: 32, base_experts: 4, base_experts_per_token: 1, base_expert_width: 16"
    config = tiny(f"model={model}", f"parameterization={{kind: mssp, regime: {regime}, {base}}}")
    grows = {"I": "width", "II": "regime-ii", "III": "regime-iii"}[regime]
    check = CoordCheck(config="",
        seeds=1, steps=2, length=8, sequences=2, processes=1,
        block_bound=9.0, logit_bound=9.0, out=tmp_path / "check.png",
    )  # fmt: skip
    (axis,) = facts_of(checked(about(config, check)))["axes"]
    assert axis["axis"] == grows
    sizes = sorted({movement["size"] for movement in axis["movements"]})
    assert sizes == ([8, 16, 32] if regime == "I" else [4, 8, 16])
    if regime != "I":
        asked = replace(check, experts="4,8")
        (axis,) = facts_of(checked(about(config, asked)))["axes"]
        assert axis["axis"] == grows
    sweep = Transfer(config="",
        sizes="16,32" if regime == "I" else "4,8", seeds=1, steps=2, length=8, sequences=2,
        regret_bound=99.0, processes=1, out=tmp_path / "sweep.png",
    )  # fmt: skip
    assert facts_of(swept(about(config, sweep)))["axis"] == grows


@pytest.mark.parametrize(
    ("optimizer", "sequences"),
    [
        ("{kind: muonh, lr: 0.03}", 16),  # 4 x 32 tokens for the width of 32, in sequences of 8
        ("{kind: muonh, lr: 0.03, step_norm: spectral}", 4),
    ],
)
def test_batches_of_steps_of_a_fixed_norm_are_as_wide_as_the_model(
    tiny: Make, tmp_path: Path, optimizer: str, sequences: int
) -> None:
    hyperp = "{kind: hyperp, base_width: 16, base_layers: 1, embedding_std: 0.5}"
    config = tiny(f"parameterization={hyperp}", f"optimizer={optimizer}")
    request = CoordCheck(
        config="", widths="16,32", seeds=1, steps=1, length=8, processes=1, out=tmp_path / "c.png"
    )
    facts = facts_of(checked(about(config, request)))
    assert (facts["sequences"], facts["length"]) == (sequences, 8)
    asked = replace(request, sequences=2)
    text = checked(about(config, asked)).text
    assert "1 step of 2 x 8 tokens at 0.03" in text
