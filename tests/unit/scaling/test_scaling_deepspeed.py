"""The deepspeed engine's config, and refusals before the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.deepspeed import settings
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan

Make = Callable[..., RunConfig]
NVME = {"optimizer_states": {"nvme": "swap"}}


def made(tiny: Make, *more: str, stage: int = 3, **zero: Any) -> RunConfig:
    described = {"engine": "deepspeed", "stage": stage, **zero}
    return tiny(f"parallel.zero={json.dumps(described)}", *more)


@pytest.mark.parametrize(
    ("zero", "more", "ranks", "said"),
    [
        ({}, ("parallel.tp=2",), 2, r"^parallel.tp=2 with parallel.zero.engine=deepspeed"),
        ({}, ("parallel.pp=2",), 2, "^parallel.pp=2 "),
        ({"replicas": 2}, (), 4, "^parallel.zero.replicas=2 "),
        ({"regather": "step"}, (), 2, "^parallel.zero.regather=step "),
        ({}, ("optimizer.kind=muon",), 2, "^optimizer.kind=muon "),
        ({}, ('optimizer.states={"kind": "fp8"}',), 2, "^optimizer.states.kind=fp8 "),
        ({}, ("training.compile=true",), 2, "^training.compile=true "),
        ({}, ("kernels.adamw=apex",), 2, "^kernels.adamw=apex "),
        ({"optimizer_states": {"device": 0.5}}, (), 2, "optimizer_states.device=0.5 "),
        ({"optimizer_states": {"nvme": "x", "cpu": 0.5}}, (), 2, "optimizer_states.cpu=0.5 "),
        (
            {"optimizer_states": {"master_weights": True}},
            ("training.compute_dtype=bf16",),
            *(2, "optimizer_states.master_weights=true "),
        ),
        ({"optimizer_states": {"gradients": True}}, (), 2, "optimizer_states.gradients=true "),
        ({}, ("model.multi_token={depth: 2}",), 2, "^model.multi_token.depth=2 "),
        ({}, ("precision.linears=fp8_tensorwise", "precision.gather=fp8"), 2, "gather=fp8 "),
        ({}, ("training.activation_offload=0.5", "model.num_layers=4"), 2, "_offload=0.5 "),
        (
            {},
            (
                *("data.kind=documents", "data.max_document_tokens=56"),
                *("batch.micro_batch_sequences=1", "parallel.context.min_chunk_tokens=4"),
                *("parallel.context.capacity_tokens=40", "parallel.context.offload=selective"),
                "model.num_layers=4",
            ),
            *(2, "^parallel.context.offload=selective "),
        ),
        # DeepSpeed silently accepts these two and keeps the states in memory.
        ({"stage": 2, **NVME}, (), 2, "optimizer_states.nvme=swap .* stage 3 alone"),
        ({"stage": 1, **NVME}, (), 2, "optimizer_states.nvme=swap .* stage 3 alone"),
    ],
)
def test_what_only_the_other_engine_can_names_it(
    tiny: Make, zero: dict[str, Any], more: tuple[str, ...], ranks: int, said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        Layout.of(made(tiny, *more, **zero), ranks)
    assert str(error.value).endswith("; use parallel.zero.engine: fsdp2")
    fsdp2 = {**zero, "engine": "fsdp2"}
    if "deepspeed" not in said:
        Layout.of(made(tiny, *more, **fsdp2), ranks)


def test_experts_on_other_ranks_are_refused(tiny: Make) -> None:
    mixture = {
        "kind": "moe",
        "vocab_size": 64,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 16},
        "router": {"gate": "softmax"},
    }
    config = made(tiny, f"model={json.dumps(mixture)}", "parallel.ep=2")
    with pytest.raises(UserError, match=r"^parallel.ep=2 .*use parallel.zero.engine: fsdp2$"):
        Layout.of(config, 2)


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 0}, "engine=deepspeed needs sharding"),
        ({"engine": "fsdp2", "deepspeed_extra": {"aio": {}}}, "deepspeed_extra has no effect"),
        ({"engine": "fsdp2", "offload": "nvme"}, "offload=nvme keeps parameters on NVMe"),
        ({"offload": "nvme"}, "offload=nvme needs a folder"),
    ],
)
def test_contradictions_are_said_where_they_are_written(
    tiny: Make, zero: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        made(tiny, **{"stage": 3, **zero})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"gradient_clipping": 2.0}, "gradient_clipping is set by training.clip_grad_norm"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is set by parallel.zero"),
        ({"bf16": {"enabled": True}}, "bf16 is set by training.compute_dtype"),
        ({"prescale_gradients": True}, "prescale_gradients is not one of the keys"),
        ({"zero_optimization": {"sub_group_sizes": 1}}, "sub_group_sizes is not one of the keys"),
        ({"zero_optimization": 3}, "zero_optimization=3 must be a section"),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "offload_optimizer.ratio is not one",
        ),
    ],
)
def test_extra_keys_that_conflict_are_refused(tiny: Make, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^parallel.zero.deepspeed_extra.*{said}"):
        Layout.of(made(tiny, deepspeed_extra=extra), 2)


def test_what_deepspeed_is_told(tiny: Make) -> None:
    config = made(tiny, "training.clip_grad_norm=0.5", bucket_mib=2, stage=2, offload="cpu")
    told = settings(config, 2)
    assert told["gradient_clipping"] == 0.5
    assert told["gradient_allreduce_op"] == "sum"
    assert told["zero_optimization"]["reduce_bucket_size"] == 1 << 19
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in told["zero_optimization"]
    assert not {"bf16", "fp16"} & told.keys()
    third = settings(made(tiny, offload="cpu"), 2, cuda=True)
    assert "gradient_allreduce_op" not in third  # refused at stage 3
    assert third["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_extra_keys_lie_over_ours(tiny: Make) -> None:
    extra = {
        "aio": {"queue_depth": 32},
        "zero_optimization": {"overlap_comm": True, "offload_optimizer": {"buffer_count": 6}},
    }
    config = made(tiny, deepspeed_extra=extra, **NVME)
    told = settings(config, 2, swap="/there")
    assert told["aio"] == {"queue_depth": 32}
    assert told["zero_optimization"]["overlap_comm"] is True
    assert told["zero_optimization"]["offload_optimizer"] == {
        "device": "nvme",
        "nvme_path": "/there",
        "pin_memory": False,
        "buffer_count": 6,
    }
    assert told["zero_optimization"]["sub_group_size"] == 64 * 2**20 // 8


def test_parameters_on_nvme_have_buffers_and_are_not_read_ahead(tiny: Make) -> None:
    told = settings(made(tiny, offload="nvme", **NVME), 2, swap="/there")["zero_optimization"]
    assert told["stage3_prefetch_bucket_size"] == 0
    # 9 matrices and norms in a block, 11 with those of queries and keys; twice as many buffers.
    assert told["offload_param"]["buffer_count"] == 22
    assert told["offload_param"]["buffer_size"] % 2**18 == 0


def test_transfers_that_overlap_need_more_buffers(tiny: Make) -> None:
    def with_buffers(**offload: Any) -> RunConfig:
        extra = {"zero_optimization": {"offload_optimizer": offload}}
        return made(tiny, deepspeed_extra=extra, **NVME)

    told = settings(with_buffers(pipeline_read=True), 1)["zero_optimization"]
    assert told["offload_optimizer"]["buffer_count"] == 12
    Layout.of(with_buffers(pipeline_read=True), 1)
    for offload, least in (
        ({"pipeline_write": True, "buffer_count": 5}, 8),
        ({"buffer_count": 3}, 4),
    ):
        with pytest.raises(UserError, match=rf"buffer_count=\d .*needs {least} buffers"):
            Layout.of(with_buffers(**offload), 1)


def test_groups_too_small_for_the_disk_are_refused(tiny: Make) -> None:
    small = {"optimizer_states": {"nvme": "swap", "bucket_mib": 1}}
    with pytest.raises(UserError, match=r"bucket_mib=1.0 .*never writes .* 1 MiB"):
        Layout.of(made(tiny, **small), 1)


def test_run_folders_of_before_the_engines_are_read(tiny: Make) -> None:
    config = tiny('parallel.zero={"kind": "fsdp2", "stage": 2}')
    assert (config.parallel.zero.engine, config.parallel.zero.stage) == ("fsdp2", 2)
    with pytest.raises(UserError, match="kind"):
        tiny('parallel.zero={"kind": "deepspeed", "stage": 2}')


def test_what_knows_the_other_engine_alone_says_so(tiny: Make, tmp_path: Path) -> None:
    from allometry.studies.certificate.verify import verify
    from allometry.studies.rehearse import rehearse

    said = r"^parallel.zero.engine=deepspeed: .*add parallel.zero.engine=fsdp2$"
    with pytest.raises(UserError, match=said):
        rehearse(made(tiny), 2)
    with pytest.raises(UserError, match=said):
        verify(made(tiny), ["hdp=2,zero.stage=3"], tmp_path / "certificate.json")


def test_the_estimate_is_of_this_engine(tiny: Make) -> None:
    """Includes DeepSpeed's bucket and masters; excludes memory on the host."""

    def estimate(stage: int, **more: Any) -> Any:
        return RunPlan.of(made(tiny, stage=stage, **more), 2).memory

    plain = RunPlan.of(tiny(), 2).memory
    for stage in (1, 2, 3):
        found = estimate(stage)
        kinds = found.peak.kinds
        assert kinds["reduction bucket"] == 256 << 20
        assert kinds["master weights"] == plain.parameters // 2
        assert kinds["optimizer states"] == pytest.approx(plain.optimizer_states / 2, abs=8)
        assert ("gathered parameters" in kinds) == (stage == 3)
        away = estimate(stage, offload="cpu", bucket_mib=1).peak.kinds
        assert away["reduction bucket"] == 1 << 20
        assert not {"optimizer states", "master weights"} & away.keys()
        assert ("parameters" in away) == (stage < 3)
    extra = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 500}}
    kinds = estimate(3, deepspeed_extra=extra).peak.kinds
    assert (kinds["reduction bucket"], kinds["gathered parameters"]) == (4000, 2000)
    extra = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}
    assert estimate(2, deepspeed_extra=extra).peak.kinds["reduction bucket"] == 8000
