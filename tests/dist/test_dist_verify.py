"""The certificate: its comparisons, its refusals, and a check that it can fail."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.execution import ParallelConfig
from allometry.configs.layouts import parse_parallel
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import open_stream
from allometry.launch.studies.commands import Verify
from allometry.launch.studies.verify import verified
from allometry.studies.certificate.rank import TOLERANCE
from allometry.studies.certificate.small import small_run
from allometry.studies.certificate.verify import Certificate, LayoutResult, verify
from asked import about

Make = Callable[..., RunConfig]
MOE = {
    "kind": "moe",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 24},
    "router": {"gate": "softmax_after_topk"},
}
GOOD = LayoutResult(
    layout="tp=2",
    world_size=2,
    steps={
        dtype: {kind: {"worst": bound / 2, "where": "a"} for kind, bound in bounds.items()}
        for dtype, bounds in TOLERANCE.items()
    },
    loss=1e-7,
    resume_bit_exact=True,
    export_equal=True,
)


def with_error(dtype: str, kind: str, error: float) -> dict[str, Any]:
    """Return compared quantities with one error that is too large."""
    row = GOOD.steps[dtype] | {kind: {"worst": error, "where": "a"}}
    return GOOD.steps | {dtype: row}


def test_a_layout_of_experts_is_certified(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "certificate.json"
    report = verified(
        about(
            tiny(f"model={json.dumps(MOE)}"),
            Verify(config="", layout=("ep=2,zero.stage=1", "pp=2"), out=out),
        )
    )
    text, passed = report.text, report.passed
    assert passed, text
    assert "all agree" in text
    written = json.loads(out.read_text())
    assert written["passed"]
    assert len(written["config_sha256"]) == 64
    for layout in written["layouts"]:
        for kind in ("sums", "gradients", "grad_norm", "routing", "routers"):
            assert layout["steps"]["fp64"][kind]["worst"] < 1e-10, kind
        assert layout["steps"]["fp64"]["parameters"]["worst"] < 1e-8
        for kind in ("sums", "gradients", "grad_norm", "routing"):
            assert layout["steps"]["fp32"][kind]["worst"] < 1e-5, kind
        assert layout["resume_bit_exact"]
        assert layout["export_equal"]
        assert layout["loss"] < 1e-5
    assert not Path(tiny().run.folder).exists()


def test_layouts_of_whole_documents_are_certified(tiny: Make, tmp_path: Path) -> None:
    config = tiny(
        "data.kind=documents",
        "data.max_document_tokens=128",
        "batch.micro_batch_sequences=1",
        "parallel.context.capacity_tokens=64",
        "parallel.context.min_chunk_tokens=8",
    )
    layouts = ("hdp=2", "pp=2,hdp=2")
    report = verified(
        about(config, Verify(config="", layout=layouts, out=tmp_path / "certificate.json"))
    )
    text, passed = report.text, report.passed
    assert passed, text


@pytest.mark.parametrize("seed", range(4))
def test_every_step_of_a_certificate_begins_a_document(
    seed: int, tiny: Make, tmp_path: Path
) -> None:
    sources = [
        {"name": name, "train": name, "weight": weight}
        for name, weight in zip("abc", (3, 2, 1), strict=True)
    ]
    config = tiny(
        "data.kind=documents",
        "data.max_document_tokens=512",
        f"data.sources={json.dumps(sources)}",
        "batch.micro_batch_sequences=1",
        "batch.sequences=64",
        "parallel.context.capacity_tokens=512",
        f"run.seed={seed}",
    )
    small = small_run(config, tmp_path)
    stream = open_stream(small.data, seed)
    assert isinstance(stream, DocumentStream)
    counts = [
        len(stream.pieces(step * small.batch.sequences, small.batch.sequences)) for step in range(4)
    ]
    assert min(counts) > 0, counts


@pytest.mark.parametrize(
    "broken",
    [
        *(
            replace(GOOD, steps=with_error(dtype, kind, error))
            for dtype, bounds in TOLERANCE.items()
            for kind, bound in bounds.items()
            for error in (2 * bound, float("nan"))
        ),
        replace(GOOD, loss=1e-3),
        replace(GOOD, resume_bit_exact=False),
        replace(GOOD, export_equal=False),
    ],
)
def test_a_difference_fails(broken: LayoutResult) -> None:
    assert GOOD.passed
    assert Certificate("", (GOOD,), {}).passed
    assert not broken.passed
    assert not Certificate("", (GOOD, broken), {}).passed
    assert not Certificate("", (), {}).passed


def test_layouts_that_cannot_be(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=3 must divide .*; use 1 or 2"):
        verify(tiny(), ["tp=3"], tmp_path / "c.json")
    with pytest.raises(UserError, match=r"parallel\.ep=2 needs experts"):
        verify(tiny(), ["ep=2"], tmp_path / "c.json")
    with pytest.raises(ConfigError, match="expected key=value"):
        verify(tiny(), ["tp2"], tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_a_layout_in_words() -> None:
    base = ParallelConfig(timeout_s=77, tp=4)
    parallel = parse_parallel("pp=2, hdp=2,zero.stage=1,pipeline.schedule=gpipe", base)
    assert (parallel.pp, parallel.hdp, parallel.tp, parallel.zero.stage) == (2, 2, 1, 1)
    assert (parallel.pipeline.schedule, parallel.timeout_s) == ("gpipe", 77)
    assert parse_parallel("ep=4", base).hdp == 4
    assert parse_parallel("ep=2,zero.stage=2,zero.replicas=2", base).hdp == 4
    with pytest.raises(ConfigError, match="stage"):
        parse_parallel("zero.stage=9", base)
