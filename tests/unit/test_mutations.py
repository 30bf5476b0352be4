"""Faults planted by ``tests/support/mutations``: found by operators, and matching the sources."""

from __future__ import annotations

import ast
from pathlib import Path

from mutations.choose import sampled, written
from mutations.covering import COVERING, hot_files, stages_of
from mutations.operators import apply, changed_line, faults_of

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''
LIMIT = 3


def mean(mesh, x_TD, scale, count: int = 1):
    """Words of 1 + 1."""
    assert x_TD.dim() == 2, "two"
    total = (x_TD * scale).sum(1).double()
    mesh.all_reduce_sum(total, "hdp")
    total /= max(count, 1)
    if not count:
        raise ValueError(f"{count + 1}")
    return -total.clamp(min=0.5)
'''


def test_each_operator_finds_its_places() -> None:
    lines = {(f.operator, changed_line(SOURCE, f)[2]) for f in faults_of(SOURCE)}
    assert lines == {
        ("arithmetic", "total = (x_TD / scale).sum(1).double()"),
        ("scale dropped", "total = (x_TD).sum(1).double()"),
        ("taken for another", "total = (x_TD * scale).mean(1).double()"),
        ("taken for another", "total = (x_TD * scale).sum(1).bfloat16()"),
        ("wrong axis", "total = (x_TD * scale).sum(0).double()"),
        ("off by one", "total = (x_TD * scale).sum(2).double()"),
        ("update dropped", "pass"),
        ("collective dropped", "total"),
        ("arithmetic", "total *= max(count, 1)"),
        ("taken for another", "total /= min(count, 1)"),
        ("off by one", "total /= max(count, 2)"),
        ("condition negated", "if (not (not count)):"),
        ("sign dropped", "return total.clamp(min=0.5)"),
        ("call dropped", "return -(total)"),
        ("constant doubled", "return -total.clamp(min=1.0)"),
    }
    assert sum(fault.new == "pass" for fault in faults_of(SOURCE)) == 2  # collective and division


def test_faults_of_the_hot_path_are_python_and_have_tests() -> None:
    mutants = sampled(ROOT, 300, seed=1)
    assert len({mutant.key for mutant in mutants}) == 300
    assert len({mutant.file for mutant in mutants}) > 60
    for mutant in mutants:
        ast.parse(mutant.text)
        assert mutant.before != mutant.after
    for file in hot_files(ROOT):
        assert stages_of(ROOT, file), file
        text = (ROOT / file).read_text(encoding="utf-8")
        for fault in faults_of(text)[:3]:
            assert apply(text, fault) != text


def test_faults_written_by_hand_fit_the_sources() -> None:
    mutants, stale = written(ROOT)
    assert not stale
    assert len({mutant.key for mutant in mutants}) == len(mutants)


def test_every_pattern_of_tests_fits_some() -> None:
    stages = {stage for _, stages in COVERING for stage in stages}
    for stage in stages:
        for pattern in stage.files:
            assert list(ROOT.glob(pattern)), pattern
    for file, _ in COVERING:
        assert list(ROOT.glob(file)), file
