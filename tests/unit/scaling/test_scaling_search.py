"""A run's row of the cost model: every key that affects time is used or listed."""

from __future__ import annotations

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from allometry.scaling.layout import Layout
from allometry.scaling.planner.cases import COLUMNS
from allometry.scaling.planner.cost import step_time
from allometry.scaling.search.case import Case, attention_backend
from allometry.scaling.search.columns import KERNEL_RATES, columns_of_documents

H100 = load_hardware("h100")


def run(*overrides: str, preset: str = "dense_7b") -> RunConfig:
    return load(f"preset:{preset}", list(overrides))


def test_a_run_becomes_a_row_that_the_cost_model_takes() -> None:
    asked = ("parallel.tp=8", "parallel.pp=2", "parallel.zero.stage=1", "batch.ramp=null")
    found = Case.of(run(*asked), H100, world_size=64, name="h100")
    assert set(found.row) <= {*COLUMNS, "hardware", "precision", "recompute", "schedule"}
    cases = found.cases(H100)
    assert cases.gpus.tolist() == [64]
    assert cases.step_tokens.tolist() == [1024 * 4096]
    assert (found.row["dp"], found.row["zero"], found.row["chunks"]) == (4, 1, 1)
    assert step_time(cases).seconds[0] > 0
    assert found.memory.total > 2**30


def test_experts_and_documents_become_rows() -> None:
    moe = Case.of(run("parallel.ep=4", preset="moe_1b_a200m"), H100, world_size=8, name="h100")
    assert (moe.row["ep"], moe.row["experts"] > 0) == (4, True)
    step_time(moe.cases(H100))
    documents = run(preset="documents_demo")
    found = Case.of(documents, H100, world_size=4, name="h100")
    tokens = found.row["micro_batch"] * found.row["sequence"] / found.row["cp"]
    assert tokens == documents.parallel.context.capacity_tokens
    assert found.cases(H100).gpus.tolist() == [4]
    assert any("documents" in phrase for phrase in found.left_out)
    short = run("data.max_document_tokens=512", preset="documents_demo")
    alone = Case.of(short, H100, world_size=1, name="h100").cases(H100)
    assert alone.step_tokens.tolist() == [short.batch.sequences * short.data.sequence_length]


def test_stage_3_that_keeps_what_it_gathered_sends_as_stage_2() -> None:
    three = ("parallel.zero.stage=3", "batch.ramp=null")
    freed, kept = (
        Case.of(run(*three, f"parallel.zero.regather={way}"), H100, world_size=32)
        for way in ("micro_batch", "step")
    )
    assert (freed.row["zero"], kept.row["zero"]) == (3, 2)
    assert freed.memory.total < kept.memory.total


PLAIN = (
    *("batch.ramp=null", "data.packing=concatenated", "parallel.tp=2", "parallel.zero.stage=1"),
    *("training.compile=false", "training.compute_dtype=bf16"),
)


@pytest.mark.parametrize(
    ("asked", "term"),
    [
        (["parallel.zero.offload=cpu"], "states on the host"),
        (["parallel.zero.optimizer_states={device: 0.25}"], "states on the host"),
        (["parallel.zero.optimizer_states={cpu: 0.25, nvme: /disk}"], "states on the host"),
        (["training.activation_offload=0.5"], "activations on the host"),
        (["precision.saved_activations=fp8"], "activations in FP8"),
        (["precision.linears=fp8_rowwise"], "FP8 casts"),
        (["parallel.zero.replicas=2"], "data parallel"),
        (["parallel.tp_overlap=chunked"], "tensor parallel"),
        (["optimizer.states={kind: fp8}"], "optimizer"),
        (["training.activation_checkpointing=selective"], "element-wise"),
    ],
)
def test_every_technique_has_a_term(asked: list[str], term: str) -> None:
    slow = H100.model_copy(
        update={"host": H100.host.model_copy(update={"bandwidth": 1e9, "disk_bandwidth": 1e9})}
    )
    before, after = (
        Case.of(run(*PLAIN, *more), slow, world_size=32, name="h100") for more in ([], asked)
    )
    assert not before.left_out
    assert not after.left_out
    found = [step_time(case.cases(slow)).terms[term][0] for case in (before, after)]
    faster = term in ("tensor parallel", "optimizer")
    assert found[1] < found[0] if faster else found[1] > found[0]


def test_what_has_no_term_is_named() -> None:
    config = run(*PLAIN, "optimizer.kind=lion")
    assert Case.of(config, H100, world_size=32).left_out == ("optimizer.kind=lion",)


def test_documents_are_timed_by_their_own_plan() -> None:
    config = run(preset="documents_demo")
    layout = Layout.of(config, 4)
    most = config.parallel.context.capacity_tokens
    short, mixed = (
        columns_of_documents(config, layout, lengths)
        for lengths in ([most // 4] * 32, [2 * most] + [most // 4] * 24)
    )
    assert short["attended"] == most // 4 < mixed["attended"]
    assert mixed["document_stretch"] >= 1
    assert short["document_stretch"] == pytest.approx(1, abs=0.02)


def test_a_precision_without_a_rate_is_refused() -> None:
    case = Case.of(run("training.compute_dtype=fp64"), H100, world_size=32)
    with pytest.raises(UserError, match="precision='fp64' is not known"):
        case.cases(H100)
    fp8 = run("precision.linears=fp8_rowwise", "training.compute_dtype=bf16")
    a100 = load_hardware("a100")
    with pytest.raises(UserError, match="precision='fp8' is not known"):
        Case.of(fp8, a100, world_size=32).cases(a100)
    auto = run("precision.linears=auto", "training.compute_dtype=bf16")
    assert Case.of(auto, a100, world_size=32).row["precision"] == "bf16"
    assert Case.of(auto, H100, world_size=32).row["precision"] == "fp8"


def test_attention_of_a_cpu_has_the_rate_that_was_measured_there() -> None:
    """``doctor --measure`` times the CPU's own kernel; a GPU's rate is that of
    its fastest kernel."""
    config = load("preset:demo", ["data.packing=concatenated"])
    case = Case.of(config, H100, world_size=1, name="h100", device="cpu")
    assert attention_backend(config, "cpu") in KERNEL_RATES
    assert case.row["attention_rate"] == 1
