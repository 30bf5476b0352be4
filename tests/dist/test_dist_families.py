"""Options of model families in parallel layouts: one process's gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.layout import Layout
from allometry.studies.certificate.rank import TOLERANCE
from test_dist_layouts import DENSE, EXPERT_LAYOUTS, LAYOUTS, MOE, errors, run, zero
from thinned import thinned

RunRanks = Callable[..., list[Any]]

LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_length": 8}
AFTER = {
    "qk_norm_over": "width",
    "norms": "after",
    "qkv_bias": True,
    "rope_scaling": LLAMA3,
    "window": {"tokens": 5},
}
BOTH = {
    "norms": "both",
    "activation": "gelu_tanh",
    "embedding_scale": 3.5,
    "window": {"tokens": 5, "global_every": 2, "rope_theta": 100.0},
}
PARTIAL = {"rope_fraction": 2 / 3}  # 4 components of 6
MODELS = {
    "after": DENSE | AFTER,
    "both": DENSE | BOTH | PARTIAL,
    "experts": MOE | BOTH | PARTIAL | {"qk_norm_over": "width", "qkv_bias": True},
}
PLAIN = DENSE | {"qk_norm": False}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 8}
FAMILIES = {
    "llama3": PLAIN | {"rope_scaling": LLAMA3},
    "mistral": PLAIN | {"window": {"tokens": 5}},
    "qwen2": PLAIN | {"qkv_bias": True},
    "qwen3": DENSE,
    "olmo2": DENSE | {"qk_norm_over": "width", "norms": "after"},
    "olmo3": DENSE
    | {"qk_norm_over": "width", "norms": "after", "rope_scaling": YARN}
    | {"window": {"tokens": 5, "global_every": 2, "rope_theta": 10_000.0}},
    "gemma3_text": DENSE | BOTH | {"tied_embeddings": True},
    "mixtral": MOE
    | {"qk_norm": False, "first_dense_layers": 0, "ffn_width": None}
    | {"experts": MOE["experts"] | {"num_shared_experts": 0}}
    | {"router": MOE["router"] | {"gate": "softmax_after_topk"}},
    "qwen3_moe": MOE
    | {"experts": MOE["experts"] | {"num_shared_experts": 0}}
    | {"router": MOE["router"] | {"gate": "softmax", "normalize": True}},
}
"""Options of each family listed in docs/families.md, at the size of these tests."""
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    name: LAYOUTS[name]
    for name in (
        *("tp2", "pp2-hdp2", "hdp2", "hdp2-zero1", "hdp2-zero2", "hdp2-zero3"),
        *("hdp2-tp2-zero2", "pp2-tp2", "tp2-full", "chunked-tp2-selective", "chunked-pp2-tp2-zbv"),
    )
} | {"pp2": (2, {"pp": 2}), "tp2-zero3": (4, {"tp": 2, **zero(3)})}
EXPERTS = ("ep2", "ep2-tp2-zero3", "ep2-pp2", "hdp4-ep2-zero2", "whole-tp2")


def check(run_ranks: RunRanks, world_size: int, model: dict[str, Any], **settings: Any) -> None:
    """Compare the layout's steps with one process: gradients to 1e-12."""
    config = run(model, "fp64", **settings)
    for rank, worst in enumerate(run_ranks(errors, world_size, model, config, timeout_s=120.0)):
        for kind, tolerance in (TOLERANCE["fp64"] | {"gradients": 1e-12}).items():
            assert worst[kind][1] <= tolerance, (rank, kind, worst)


@pytest.mark.parametrize(
    ("model", "layout"),
    thinned(
        {
            ("after", "tp2"),
            ("both", "pp2"),
            ("after", "hdp2-zero3"),
            ("both", "hdp2-tp2-zero2"),
            ("after", "chunked-pp2-tp2-zbv"),
        },
        ("after", "both"),
        tuple(PLACES),
    ),
)
def test_gradients_of_dense_families(run_ranks: RunRanks, model: str, layout: str) -> None:
    world_size, settings = PLACES[layout]
    check(run_ranks, world_size, MODELS[model], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "hdp2-zero3", "hdp2-tp2-zero2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_in_four_layouts(run_ranks: RunRanks, family: str, layout: str) -> None:
    world_size, settings = PLACES[layout]
    check(run_ranks, world_size, FAMILIES[family], **settings)


@pytest.mark.parametrize(
    "layout",
    [
        *("ep2", "ep2-tp2-zero3"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in EXPERTS[2:]),
    ],
)
def test_gradients_of_families_with_experts(run_ranks: RunRanks, layout: str) -> None:
    world_size, settings = EXPERT_LAYOUTS[layout]
    check(run_ranks, world_size, MODELS["experts"], **settings)


def test_windows_of_documents_that_ranks_share_are_refused() -> None:
    plain = run(DENSE | AFTER, "fp64").model_dump()
    data = {"kind": "documents", "max_document_tokens": 16, "sequence_length": 16}
    data["sources"] = plain["data"]["sources"]

    def config(window: int) -> RunConfig:
        model = plain["model"] | {"window": {"tokens": window}}
        return RunConfig.model_validate(plain | {"data": data, "model": model})

    with pytest.raises(UserError, match=r"model\.window\.tokens=15 is shorter than data\.max_doc"):
        Layout.of(config(15), 2)
    Layout.of(config(16), 2)
    Layout.of(config(15), 1)


def test_what_a_layout_cannot_keep_in_fp8_is_refused() -> None:
    config = run(MODELS["after"], "bf16", tp=2)
    saved = config.precision.model_copy(update={"saved_activations": "fp8"})
    with pytest.raises(UserError, match=r"qk_norm_over=width parts over parallel\.tp=2"):
        Layout.of(config.model_copy(update={"precision": saved}), 2)
