"""Bad steps in one process: the rule, state after a skipped step, limits, going back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.bad_steps import BadSteps
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.laws.curves import curves_from_runs
from allometry.optim.build import take_step
from allometry.optim.optimizer import RuleOptimizer
from allometry.trainer.bad_steps import NORMAL, Judge, spike_limits
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.rewinds import rewinds, with_passed
from checkpoint_bits import bits
from faulty_steps import launch_with_faults
from rule_groups import SHAPES, give, group, weights
from run_folders import events, rows
from thinned import thinned

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
SPIKE = 1e6


@pytest.mark.parametrize("count", [8, 9])
def test_limits_are_those_of_plain_statistics(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    window_2W = torch.rand(2, count, generator=generator, dtype=torch.float64)
    window_2W[0, 3] = 50.0  # which a median ignores
    for kind in ("mad", "sigma"):
        config = BadSteps.model_validate(
            {"spikes": kind, "deviations": 3, "window_steps": count, "most_in_window": 5}
        )
        wanted = []
        for values in window_2W.tolist():
            center = statistics.median(values)
            spread = NORMAL * statistics.median([abs(value - center) for value in values])
            if kind == "sigma":
                center, spread = statistics.mean(values), statistics.stdev(values)
            wanted.append(center + 3 * spread)
        assert spike_limits(window_2W, config).tolist() == pytest.approx(wanted, rel=1e-12)
        part_2W = window_2W.clone()
        part_2W[:, 0] = math.nan
        assert spike_limits(part_2W, config).tolist() == [math.inf] * 2


def test_bad_steps_leave_no_trace_in_the_window() -> None:
    policy = BadSteps(window_steps=8, most_in_window=5)
    numbers = [(2.0 + 0.01 * n, 1.0 + 0.1 * (n % 3)) for n in range(12)]
    bad = {3: (math.nan, 1.0), 5: (2.0, math.inf), 9: (2.0, 9.0), 10: (9.0, 1.0)}
    judge, other = Judge(policy, CPU), Judge(policy, CPU)

    def verdict(by: Judge, pair: tuple[float, float]) -> float:
        return float(by(*torch.tensor(pair, dtype=torch.float64))[0])

    for number, pair in enumerate(numbers):
        if number in bad:
            assert verdict(judge, bad[number]) == 1.0
        assert verdict(judge, pair) == verdict(other, pair) == 0.0
        if number == 8:  # like a resume
            judge = Judge(policy, CPU, json.loads(json.dumps(judge.facts())))
    assert judge.facts() == other.facts()
    assert len(judge.facts()["accepted"]["loss"]) == 8
    assert verdict(Judge(policy, CPU), bad[10]) == 0.0, "nothing is a spike without a window"


@pytest.mark.parametrize("kind", ["adamw", "muonh"])
def test_a_rejected_update_changes_no_bit(kind: str) -> None:
    parameters = weights(SHAPES)
    groups = [group(kind, parameters, peak_lr=0.02)]
    optimizer = torch.optim.AdamW(groups, fused=True) if kind == "adamw" else RuleOptimizer(groups)

    def state() -> list[Tensor]:
        states = [optimizer.state[p] for p in parameters.values()]
        held = [tensor for one in states for _, tensor in sorted(one.items())]
        return [tensor.detach().clone() for tensor in (*parameters.values(), *held)]

    for step, bad in enumerate((0.0, 1.0, 0.0)):
        give(parameters, step, math.nan if bad else 1.0)
        before = state()
        take_step(optimizer, 1.0, 1.0, is_bad=lambda _, bad=bad: torch.tensor(bad))  # type: ignore[misc]
        same = [one.equal(other) for one, other in zip(before, state(), strict=step > 0)]
        assert all(same) if bad else not any(same[: len(parameters)])


def test_without_the_section_a_run_ends_as_ever(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"step 4: the loss is .* gradient norm nan"):
        launch_with_faults(tiny(), {4: math.nan})


def test_too_many_bad_steps_end_the_run(tiny: Make, tmp_path: Path) -> None:
    policy = "training.bad_steps={window_steps: 8, most_in_row: 2, most_in_window: 3}"
    with pytest.raises(UserError, match=r"step 6: .*norm nan, .*3 bad steps in a row .*step-5 is"):
        launch_with_faults(
            tiny(policy, folder=tmp_path / "row"), dict.fromkeys((4, 5, 6), math.nan)
        )
    spikes = dict.fromkeys((10, 12, 14, 16), SPIKE)
    with pytest.raises(UserError, match=r"step 16: 4 bad steps within 8 \(training\.bad_steps\."):
        launch_with_faults(tiny(policy, folder=tmp_path / "window"), spikes)
    assert len([row for row in rows(tmp_path / "window") if "skipped" in row]) == 3


def test_a_spike_is_skipped_and_left_out_of_laws(tiny: Make, tmp_path: Path) -> None:
    policy = "training.bad_steps={window_steps: 8, most_in_window: 5}"
    keep = ("evaluation.every_steps=6", "schedule.decay_fraction=0.5")
    skipped = tiny(policy, *keep, folder=tmp_path / "skipped")
    launch_with_faults(skipped, {12: SPIKE}, 14)
    taken = tiny(*keep, folder=tmp_path / "taken")
    launch_with_faults(taken, {12: SPIKE}, 14)
    ours, theirs = (bits(config, 14) for config in (skipped, taken))
    assert any(not ours[name].equal(theirs[name]) for name in ours), "the skip matters"
    found = rows(tmp_path / "skipped")
    row = found[11]
    assert (row["skipped"], row["lr"], row["s1"]) == (1, 0.0, found[10]["s1"])
    assert not {"loss", "grad_norm", "loss/up", "tokens_per_s"} & row.keys()
    assert {"validation/up", "tokens/up", "time_s"} <= row.keys()
    assert row["flops"] > found[10]["flops"]
    assert found[12]["s1"] == found[10]["s1"] + found[12]["lr"]
    event = next(one for one in events(tmp_path / "skipped") if one["event"] == "bad_step")
    assert event["grad_norm"] > event["grad_norm_limit"] > 0.0
    curve = curves_from_runs([tmp_path / "skipped"], bins=None)
    assert 12 not in curve["step"]
    assert curve.curves["skipped"].rates[11] == 0.0


KINDS = {
    "tiers": ("parallel.zero={stage: 1, optimizer_states: {device: 0.0, bucket_mib: 0.01}}",),
    "delayed": ("parallel.zero={stage: 0, optimizer_states: {update: delayed}}",),
    "fp8": ("optimizer={kind: adamw, lr: 1e-2, states: {kind: fp8, rounding: stochastic}}",),
    "apollo": ("optimizer={kind: apollo, lr: 2e-3, refresh_steps: 3}",),
    "documents": (
        *("data.kind=documents", "data.max_document_tokens=32"),
        *("batch.micro_batch_sequences=1", "model.dropout=0.1"),
    ),
}


@pytest.mark.parametrize("kind", thinned({"delayed"}, list(KINDS)))
def test_other_states_and_data_keep_their_bits(tiny: Make, tmp_path: Path, kind: str) -> None:
    faults = {4: math.nan, 12: SPIKE}
    common = (*KINDS[kind], "training.bad_steps={window_steps: 8, most_in_window: 5}")
    told = tiny(*common, "training.skip_steps=[4, 12]", folder=tmp_path / "told")
    launch_with_faults(told, {}, 14)
    bad = tiny(*common, folder=tmp_path / "bad")
    for stop in (4, 13, 14):
        launch_with_faults(bad, faults, stop)
    wanted, found = bits(told, 14), bits(bad, 14)
    assert wanted.keys() == found.keys()
    assert not [name for name, tensor in wanted.items() if not tensor.equal(found[name])]
    assert len([row for row in rows(tmp_path / "bad") if "skipped" in row]) == 2


REWIND = (
    "training.bad_steps={window_steps: 8, most_in_window: 4, rewind: {after_spikes: 2, "
    "skip_batches: 4}}"
)
KEPT = "checkpoint.keep_last=9"


def test_a_run_goes_back_and_passes_batches_over(tiny: Make, tmp_path: Path) -> None:
    near = f"checkpoint.local={{folder: {tmp_path}, every_steps: 4}}"  # a copy of step 12
    back = tiny(REWIND, KEPT, near, folder=tmp_path / "back")
    launch_with_faults(back, _Once({12: SPIKE, 13: math.nan}))
    by_hand = tiny(REWIND, KEPT, folder=tmp_path / "hand")
    launch_with_faults(by_hand, {}, 10)
    entry = {"step": 10, "samples": 32, "bad_steps": [12, 13]}
    (tmp_path / "hand" / "rewinds.json").write_text(json.dumps({"rewinds": [entry]}))
    for stop in (11, 16, None):  # killed after the next step, and after the next checkpoint
        launch_with_faults(by_hand, {}, stop)
    plain = tiny(KEPT, folder=tmp_path / "plain")
    launch_with_faults(plain, {})
    assert json.loads((tmp_path / "back" / "rewinds.json").read_text()) == {"rewinds": [entry]}
    final = [bits(config, 20) for config in (back, by_hand, plain)]
    assert not [name for name, tensor in final[0].items() if not tensor.equal(final[1][name])]
    assert any(not tensor.equal(final[2][name]) for name, tensor in final[0].items())
    found, others = (rows(tmp_path / name) for name in ("back", "hand"))
    assert [row["step"] for row in found] == list(range(1, 21))
    keys = ("loss", "lr", "s1", "tokens", "tokens/up", "epochs/up", "unique_tokens/up")
    assert [[row[key] for key in keys] for row in found] == [
        [row[key] for key in keys] for row in others
    ]
    assert found[-1]["tokens"] == 20 * 8 * 32, "what was passed over was not read"
    kinds = [event["event"] for event in events(tmp_path / "back")]
    assert [kinds.count(kind) for kind in ("bad_step", "going_back", "passed_over")] == [2, 1, 1]
    changes = json.loads(
        (tmp_path / "back" / "checkpoints" / "step-20" / "trainer.json").read_text()
    )["reading"]["mixture"]
    assert [change.get("passed", 0) for change in changes] == [0, 32]


def test_going_back_by_hand_forgets_what_was_passed_over_later(tiny: Make, tmp_path: Path) -> None:
    back = tiny(REWIND, KEPT, folder=tmp_path / "back")
    launch_with_faults(back, _Once({12: SPIKE, 13: SPIKE}))
    again = tiny(REWIND, KEPT, "run.resume=step-5", folder=tmp_path / "back")
    launch_with_faults(again, {})
    plain = tiny(KEPT, folder=tmp_path / "plain")
    launch_with_faults(plain, {})
    assert [row["loss"] for row in rows(tmp_path / "back")] == [
        row["loss"] for row in rows(tmp_path / "plain")
    ]


def test_nothing_to_go_back_to(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"steps 2, 3 were bad.* no checkpoint before step 2"):
        launch_with_faults(tiny(REWIND), dict.fromkeys((2, 3), math.nan))


@pytest.mark.slow
def test_a_run_goes_back_so_often_and_no_more(tiny: Make, tmp_path: Path) -> None:
    policy = REWIND.replace("skip_batches: 4", "skip_batches: 1, most: 2")
    faults = dict.fromkeys(range(12, 21), SPIKE)
    with pytest.raises(UserError, match="5 bad steps"):
        launch_with_faults(tiny(policy, KEPT), faults)
    found = json.loads((tmp_path / "run" / "rewinds.json").read_text())["rewinds"]
    assert [(one["step"], one["samples"]) for one in found] == [(10, 24), (10, 24)]


@pytest.mark.parametrize(
    ("before", "after", "stop", "said"),
    [
        ("[4]", "[]", 6, "step 4 is not among them now"),
        ("[]", "[[3, 5]]", 6, "step 3 is among them now"),
        ("[4]", "[4, [8, 9]]", 6, None),
    ],
)
def test_steps_that_were_taken_cannot_be_passed_over_later(
    tiny: Make, before: str, after: str, stop: int, said: str | None
) -> None:
    launch_with_faults(tiny(f"training.skip_steps={before}"), {}, stop)
    changed = tiny(f"training.skip_steps={after}", "training.bad_steps={}")
    if said is None:
        launch_with_faults(changed, {}, 10)
        assert [row["step"] for row in rows(Path(changed.run.folder)) if "skipped" in row] == [
            *(4, 8, 9)
        ]
    else:
        with pytest.raises(UserError, match=said):
            launch_with_faults(changed, {})


ENTRY = '{"step": 5, "samples": 8, "bad_steps": [7]}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"rewinds": 5}', '{"rewinds": [5]}', '{"rewinds": [{"step": 5}]}'),
        *(
            ENTRY.replace(*change).join(['{"rewinds": [', "]}"])
            for change in (("8", "-8"), ("5", "NaN"))
        ),
    ],
)
def test_damage_to_what_was_passed_over_is_a_sentence(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    assert rewinds(folder) == []
    folder.rewinds.write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*rewinds\.json cannot be read \([^\n]*$") as said:
        rewinds(folder)
    assert len(str(said.value)) < 600
    folder.rewinds.write_text(f'{{"rewinds": [{ENTRY}]}}')
    assert with_passed(folder, {"step": 5})["pass_over"] == 8
    assert with_passed(folder, {"step": 6})["pass_over"] == 0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("bad_steps={window_steps: 8}", "most_in_window=10 never ends a run"),
        ("bad_steps={rewind: {after_spikes: 12, skip_batches: 1}}", "after_spikes=12 never comes"),
        ("bad_steps={spikes: iqr}", "mad"),
        ("skip_steps=[[5, 4]]", "ends before it begins"),
        ("skip_steps=[0]", "greater than 0"),
    ],
)
def test_what_cannot_be_is_said(tiny: Make, section: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny(f"training.{section}")


class _Once(dict[int, float]):
    """Faults of steps that occur once, for batches that are skipped afterwards."""

    def get(self, step: int, default: Any = None) -> Any:
        return self.pop(step, default)
