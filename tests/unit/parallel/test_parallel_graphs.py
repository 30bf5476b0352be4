"""Micro-batches as graphs, with a tape of operators instead of CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.parallel import apply
from allometry.parallel.execution import Accumulation
from allometry.parallel.graphs import EAGER_STEPS, GraphChoice, choose_graphs
from allometry.trainer import train as training
from allometry.trainer.record import facts
from allometry.trainer.train import train
from run_folders import events, rows
from small_experts import experts_model
from tape import capture_on_tape

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
FIXED = "data.packing=concatenated"
FP8 = {"saved_activations": "fp8", "linears": "fp8_rowwise"}
KINDS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "experts": (f"model={json.dumps(experts_model())}",),
    "one micro-batch": ("batch.micro_batch_sequences=8",),
    "checkpointed": ("training.activation_checkpointing=full",),
    "muonh": ("optimizer.kind=muonh",),
    "bf16": ("training.compute_dtype=bf16", "model.tied_embeddings=true"),
    "fp8": ("training.compute_dtype=bf16", f"precision={json.dumps(FP8)}"),
    "fp8 experts": (f"model={json.dumps(experts_model())}", f"precision={json.dumps(FP8)}"),
}


def trained(config: RunConfig) -> list[dict[str, Any]]:
    train(config, device=CPU, callbacks=[])
    kept = ("step", "loss", "grad_norm", "router/entropy", "router/max_vio")
    return [{k: row.get(k) for k in kept} for row in rows(Path(config.run.folder))]


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> list[Accumulation]:
    """Let runs on a CPU record graphs; return the executions that do."""
    made: list[Accumulation] = []
    begin = Accumulation.__init__

    def init(self: Accumulation, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(apply, "choose_graphs", lambda *_: GraphChoice(True, None))
    monkeypatch.setattr(apply, "CudaCapture", lambda: capture_on_tape)
    monkeypatch.setattr(Accumulation, "__init__", init)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_graphs_has_the_bits_of_one_without(
    tiny: Make, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    settings = (FIXED, *KINDS[kind], "training.total_steps=8", "evaluation.every_steps=6")
    wanted = trained(tiny(*settings, folder=tmp_path / "without"))
    made = request.getfixturevalue("on_tape")
    assert trained(tiny(*settings, folder=tmp_path / "with")) == wanted
    (execution,) = made
    graphs = execution._graphs
    assert graphs is not None
    assert graphs.recorded == (1 if kind == "one micro-batch" else 2)
    assert graphs.failure is None


def test_a_graph_that_keeps_its_first_input_is_told_apart(
    tiny: Make, tmp_path: Path, on_tape: list[Accumulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tape misses values created in Python, as CUDA graphs do."""
    settings = (FIXED, "training.total_steps=8")
    wanted = trained(tiny(*settings, folder=tmp_path / "right"))
    monkeypatch.setattr(Tensor, "copy_", keeping_inputs(Tensor.copy_))
    wrong = trained(tiny(*settings, folder=tmp_path / "wrong"))
    assert wrong[:EAGER_STEPS] == wanted[:EAGER_STEPS]
    assert wrong[-1] != wanted[-1]


def keeping_inputs(copy: Any) -> Any:
    def copied(here: Tensor, new: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ours = here.dtype == torch.int64 and here.dim() == 2
        return here if ours else copy(here, new, *args, **kwargs)

    return copied


def test_what_cannot_be_recorded_runs_without_or_is_refused(
    tiny: Make, tmp_path: Path, on_tape: list[Accumulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(function: Callable[[], None]) -> Callable[[], None]:
        def reads() -> None:
            function()
            torch.ones(()).item()

        return capture_on_tape(reads)

    monkeypatch.setattr(apply, "CudaCapture", lambda: reading)
    settings = (FIXED, *KINDS["experts"], "training.total_steps=6")
    found = trained(tiny(*settings, folder=tmp_path / "auto"))
    failed = on_tape[-1]._graphs
    assert failed is not None
    assert failed.failure == "operation not permitted when stream is capturing"
    (event,) = [e for e in events(tmp_path / "auto") if e["event"].startswith("cuda_graphs")]
    assert (event["event"], event["step"]) == ("cuda_graphs_failed", EAGER_STEPS + 1)
    monkeypatch.setattr(apply, "choose_graphs", lambda *_: GraphChoice(False, "off"))
    assert trained(tiny(*settings, folder=tmp_path / "off")) == found
    for module in (apply, training, facts):
        monkeypatch.setattr(module, "choose_graphs", lambda *_: GraphChoice(True, None))
    refused = tiny(*settings, "training.cuda_graphs=on", folder=tmp_path / "on")
    with pytest.raises(UserError, match="cuda_graphs=on: a micro-batch cannot be recorded"):
        trained(refused)


def mesh(device: str = "cuda", **sizes: int) -> Any:
    axes = {name: SimpleNamespace(size=sizes.get(name, 1)) for name in ("pp", "tp", "ep", "hdp")}
    return SimpleNamespace(device=torch.device(device), **axes)


@pytest.mark.parametrize(
    ("settings", "where", "reason"),
    [
        ((FIXED,), mesh("cpu"), "the run is on cpu"),
        ((), mesh(), "data.packing=per_document"),
        ((FIXED,), mesh(tp=2), "tp=2"),
        ((FIXED,), mesh(hdp=4), "hdp=4"),
        ((FIXED, "parallel.zero.stage=3"), mesh(), "parallel.zero.stage=3"),
        ((FIXED, "model.dropout=0.1"), mesh(), "model.dropout=0.1"),
        (
            (FIXED, "model.num_layers=4", "training.activation_offload=0.5"),
            mesh(),
            "training.activation_offload=0.5 copies",
        ),
        ((FIXED,), mesh(), None),
    ],
)
def test_where_graphs_can_be(
    tiny: Make, settings: tuple[str, ...], where: Any, reason: str | None
) -> None:
    auto = choose_graphs(tiny(*settings), where)
    assert auto.used == (reason is None)
    assert reason is None or reason in (auto.reason or "")
    off = choose_graphs(tiny(*settings, "training.cuda_graphs=off"), where)
    assert off == GraphChoice(False, "training.cuda_graphs is off")
    on = tiny(*settings, "training.cuda_graphs=on")
    if reason is None:
        assert choose_graphs(on, where).used
    else:
        with pytest.raises(UserError, match=f"training.cuda_graphs=on cannot be: .*{reason}"):
            choose_graphs(on, where)


def test_the_record_says_why_there_are_none(tiny: Make) -> None:
    config = tiny(FIXED, "training.total_steps=6")
    trained(config)
    record = json.loads((Path(config.run.folder) / "run.json").read_text())
    assert record["layout"]["cuda_graphs"] == {
        "used": False,
        "reason": "the run is on cpu, which has none",
    }
