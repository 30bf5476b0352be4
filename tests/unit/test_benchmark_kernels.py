"""The table of a step's kernels: classification of names, and the rehearsal on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "kernels.py"
SPEC = importlib.util.spec_from_file_location("benchmark_kernels", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
kernels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kernels)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("void multi_tensor_apply_kernel<CopyFunctor<float, BFloat16>>", "casts"),
        ("void multi_tensor_apply_kernel<LpNormFunctor<float>>", "optimizer"),
        ("triton_poi_fused__to_copy_t_3", "casts"),
        ("triton_red_fused__fused_rms_norm_add_2", "elementwise and norms"),
        ("triton_poi_fused_mul_silu_5", "elementwise and norms"),
        ("_whole", "softmax of the head"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("something else", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kernels.kind_of(name) == kind


def test_shares_add_up_to_the_wall_clock() -> None:
    found = kernels.shares([("aten::mm", 0.5), ("nvjet_x", 0.1), ("_whole", 0.2)], wall=1.0)
    assert found == pytest.approx({"products": 0.6, "softmax of the head": 0.2, "idle": 0.2})


@pytest.mark.slow
def test_rehearsal() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| products |" in done.stdout
