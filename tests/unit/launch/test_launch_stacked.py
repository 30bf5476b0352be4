"""The command ``allometry transfer --engine stacked``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.command import Report
from allometry.launch.studies.commands import Transfer
from allometry.launch.studies.transfer import swept
from asked import about, small_transfer

Make = Callable[..., RunConfig]
MUP = ("parameterization={kind: mup, base_width: 16, embedding_std: 1.0}",)


def facts_of(report: Report) -> Any:
    """Return the facts printed by --json."""
    return json.loads(json.dumps(report.facts))


def test_transfer_by_stacked_runs_reports_the_same(tiny: Make, tmp_path: Path) -> None:
    def report(engine: str) -> Any:
        request = small_transfer(tmp_path / f"{engine}.jsonl", seeds=2, engine=engine)
        return facts_of(swept(about(tiny(*MUP), request)))

    stacked, plain = report("stacked"), report("processes")
    assert (stacked.pop("engine"), plain.pop("engine")) == ("stacked", "processes")
    assert [size["log2_lrs"] for size in stacked["sizes"]] == [
        size["log2_lrs"] for size in plain["sizes"]
    ]
    for one, other in zip(stacked["sizes"], plain["sizes"], strict=True):
        assert one["mean_losses"][:3] == pytest.approx(other["mean_losses"][:3], abs=1e-3)
    kept, same = ((tmp_path / f"{e}.jsonl").read_text() for e in ("stacked", "processes"))
    assert kept.splitlines()[0] == same.splitlines()[0], "trials of either may be joined"
    assert len(kept.splitlines()) == len(same.splitlines())


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ((), {"engine": "fast"}, "--engine=fast is not known; use processes or stacked"),
        ((), {"device": "tpu"}, "--device=tpu is not known; use cpu or cuda"),
        ((), {"device": "cuda"}, "--device is of stacked runs.*use --engine stacked"),
        ((), {"runs_at_once": 4}, "--runs-at-once is of stacked runs"),
        (
            ("optimizer={kind: lion, lr: 0.01}",),
            {"engine": "stacked"},
            "optimizer.kind=lion has no stacked form; use --engine processes",
        ),
        (
            ("model.dropout=0.1",),
            {"engine": "stacked"},
            "model.dropout=0.1 draws numbers run by run",
        ),
    ],
)
def test_engines_of_transfer_that_cannot_be(
    tiny: Make, tmp_path: Path, config: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    request = Transfer(config="", sizes="16,32", trials=tmp_path / "t.jsonl", **options)
    with pytest.raises(UserError, match=said):
        swept(about(tiny(*MUP, *config), request))
    assert not (tmp_path / "t.jsonl").exists()
