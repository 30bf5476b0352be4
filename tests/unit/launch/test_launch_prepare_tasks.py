"""Options of ``allometry prepare --engine``."""

from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.data.tasks.executors import Engine
from allometry.launch.runs import prepare as room
from allometry.launch.runs.commands import Prepare


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": 2}, "--tasks (2) is for preparation in tasks; add --engine datatrove:local"),
        ({"deduplicate": True}, "--deduplicate (True) is for preparation in tasks"),
        ({"decontaminate": ("a.jsonl",)}, "--decontaminate (('a.jsonl',)) is for"),
        ({"engine": "spark"}, "engine=spark must be one of datatrove:local, datatrove:slurm"),
        ({"engine": "local"}, "engine=local must be one of datatrove:local, datatrove:slurm"),
        ({"engine": "datatrove:local", "sbatch": ("time=1",)}, "--sbatch time=1 is of --engine"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        room.prepared(Prepare(inputs=(str(tmp_path),), out=tmp_path / "out", **options))
    assert says in str(refused.value)


def test_the_engine_has_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def submit(request: Any, engine: Engine, quiet: bool) -> Any:
        seen.append(engine)
        return room.Submitted(("7", "8"), 3)

    monkeypatch.setattr(room, "prepare_in_tasks", submit)
    options = {"tasks": 3, "workers": 2, "sbatch": ("partition=cpu", "time=1:00")}
    report = room.prepared(
        Prepare(inputs=("in",), out=tmp_path, engine="datatrove:slurm", deduplicate=True, **options)
    )
    assert seen == [Engine("slurm", **options, deduplicate=True)]
    assert seen[0].sbatch_options() == {"partition": "cpu", "time": "1:00"}
    assert report.text.startswith("submitted 3 tasks as Slurm jobs 7, 8; the last job writes")
    assert report.facts == {"jobs": ("7", "8"), "tasks": 3, "out": str(tmp_path)}
