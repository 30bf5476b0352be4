"""Parallel streams (ParScale): published counts and law, FLOPs, starts, memory, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextCosts
from allometry.configs.model import DenseModel, StandardParameterization
from allometry.configs.run import RunConfig
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.forms.parallel_scaling import ParallelScaling
from allometry.laws.observations import Observations
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.scaling.count import count_parameters, document_flops, flops_per_token, layer_flops
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.inventory import inventory, stream_names
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import Role
from allometry.scaling.search.case import left_out

# arXiv 2505.10475, parametric_fit.py of github.com/QwenLM/ParScale: parameters without embeddings
# of 6 sizes (columns) with P = 1, 2, 4 and 8 streams (rows).
WIDTHS = (896, 1024, 1280, 1536, 2048, 2560)
FFN_WIDTHS = (4864, 5504, 6912, 8320, 11008, 13824)
COUNTS = {
    1: (535813376, 693753856, 1088376320, 1571472384, 2774773760, 4353203200),
    2: (538195842, 696738818, 1092762882, 1577522690, 2784937986, 4368529922),
    4: (540577412, 699722756, 1097148164, 1583571460, 2795100164, 4383854084),
    8: (545340552, 705690632, 1105918728, 1595669000, 2815424520, 4414502408),
}
PILE = (
    (2.1113, 2.0671, 2.0027, 1.9539, 1.8876, 1.8451),
    (2.0772, 2.0363, 1.973, 1.9266, 1.861, 1.8137),
    (2.0544, 2.0128, 1.9509, 1.904, 1.8394, 1.7938),
    (2.0364, 1.9933, 1.9318, 1.8856, 1.8218, 1.7772),
)
STACK = (
    (1.1722, 1.1496, 1.1131, 1.0817, 1.0451, 1.0213),
    (1.1507, 1.1262, 1.094, 1.0623, 1.0244, 1.0025),
    (1.1354, 1.1124, 1.0808, 1.049, 1.0126, 0.9906),
    (1.1231, 1.0997, 1.0688, 1.0383, 1.0016, 0.9794),
)
SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "width": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_width": 72,
}
STREAMS = {"count": 3, "prefix_tokens": 5}


def published(size: int, count: int) -> DenseModel:
    """Return a model of the paper: Qwen2.5's blocks, 36 layers, 16 heads, two of them for keys."""
    return DenseModel(
        vocab_size=151936,
        width=WIDTHS[size],
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        ffn_width=FFN_WIDTHS[size],
        qkv_bias=True,
        tied_embeddings=True,
        streams={"count": count} if count > 1 else None,  # type: ignore[arg-type]
    )


def small(streams: dict[str, Any] | None = None) -> DenseModel:
    return DenseModel.model_validate({**SMALL, "streams": streams})


@pytest.mark.parametrize("count", COUNTS)
def test_all_published_counts(count: int) -> None:
    found = [count_parameters(published(size, count)).non_embedding for size in range(6)]
    assert tuple(found) == COUNTS[count]


@pytest.mark.parametrize(
    ("losses", "k", "E"),
    [
        (PILE, 0.3344, 1.2886),
        pytest.param(STACK, 0.3935, 0.6912, marks=pytest.mark.slow),
    ],
)
def test_the_law_refits_the_published_table(losses: Any, k: float, E: float) -> None:
    rows = [(COUNTS[p][i], p, losses[r][i]) for r, p in enumerate(COUNTS) for i in range(6)]
    n, streams, loss = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    observations = Observations.of({"N": n, "streams": streams, "loss": loss})
    found = fit(ParallelScaling(), observations, FitOptions())
    assert found.values["k"] == pytest.approx(k, rel=0.02)
    assert found.values["E"] == pytest.approx(E, rel=0.02)


def test_flops_are_those_of_the_model_that_runs() -> None:
    model, length, sequences = small(STREAMS), 12, 2
    rules = Parameterization(StandardParameterization(), model)
    built = build_model(model, rules, "fp32")
    initialize(built, rules, 0)
    tokens_BL = torch.zeros(sequences, length, dtype=torch.int64)
    for block in built.blocks.values():  # written-out attention, whose products are counted
        core = block.attention.core
        block.attention.core = lambda *a, core=core, **k: core(*a, "reference", **k)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(tokens_BL)
    longer = length + STREAMS["prefix_tokens"]
    each = 2 * SMALL["num_heads"] * 2 * SMALL["head_dim"] * SMALL["num_layers"]
    square = STREAMS["count"] * each * longer * longer / length  # with hidden and added queries
    counted = flops_per_token(model, length)
    products = counted.forward - counted.attention // 3
    assert counter.get_total_flops() / (sequences * length) == pytest.approx(products + square)
    keys = (length + 1) / 2 + STREAMS["prefix_tokens"]
    assert counted.attention // 3 == STREAMS["count"] * each * keys


def test_flops_of_layers_documents_and_units_agree() -> None:
    model = small(STREAMS)
    assert sum(layer_flops(model, 40)) == flops_per_token(model, 40).forward
    lengths = (1, 2, 40)
    wanted = sum(n * flops_per_token(model, n).total for n in lengths)
    assert document_flops(model, lengths) == wanted
    fast = ContextCosts(bandwidth_gb_per_s=1e9)
    seconds = CostModel.of(model, fast).unit(lengths)
    assert seconds * fast.tflops * 1e12 == pytest.approx(wanted, rel=1e-12)
    D, P, n, V = 48, 3, 5, 101
    trunk = flops_per_token(small(), 40).forward - 2 * V * D
    attention = 4 * SMALL["num_heads"] * SMALL["head_dim"] * n * SMALL["num_layers"]
    by_hand = P * (trunk + attention) + 2 * P * (D * D + D) + 2 * V * D
    assert flops_per_token(model, 40).forward == by_hand


def test_roles_and_starts() -> None:
    specs = {s.name: s for s in inventory(small(STREAMS)) if s.name in stream_names(small(STREAMS))}
    assert {name: s.role for name, s in specs.items() if "blocks" not in name} == {
        "aggregator.mix.weight": Role.HIDDEN,
        "aggregator.mix.bias": Role.VECTOR,
        "aggregator.choice.weight": Role.ROUTER,
        "aggregator.choice.bias": Role.VECTOR,
    }
    rules = Parameterization(StandardParameterization(), small(STREAMS))
    keys = rules.resolve(specs["blocks.1.attention.prefix.keys"])
    assert (keys.init_kind, keys.init_std, keys.weight_decay) == ("normal", 0.02, 0.0)
    assert rules.resolve(specs["aggregator.mix.bias"]).init_kind == "zeros"
    assert not stream_names(small())


def config_of(parallel: dict[str, Any] | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "parallel": parallel or {},
            "run": {"folder": "none"},
            "model": {**SMALL, "kind": "dense", "streams": STREAMS},
            "data": {"sequence_length": 16, "sources": [{"name": "none", "train": "none"}]},
            "batch": {"sequences": 4, "micro_batch_sequences": 2},
            "training": {"total_steps": 3},
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
        }
    )


def test_the_planner_says_that_streams_have_no_term() -> None:
    assert "model.streams.count=3: the step is timed as of one stream" in left_out(config_of())


def test_the_deepspeed_engine_is_refused() -> None:
    parallel = {"zero": {"engine": "deepspeed", "stage": 1}}
    with pytest.raises(UserError, match=r"model\.streams\.count=3 with parallel\.zero\.engine"):
        Layout.of(config_of(parallel), 1)
