"""Compare predicted and measured peak memory of a training step for many layouts.

    python benchmarks/memory.py [--only WORD] [--layers] [--json FILE [--resume]]

Every case takes two real steps on random tokens, on one to four CPU processes of this machine, and
tracks every tensor from allocation to release (``allometry memory --probe``). The prediction is the
output of ``allometry memory --device cpu``, which is computed without torch. The bytes that a layer
saves for backward, by operation, are given in units of U = tokens x width x 2, as in the COAT paper
(arXiv 2410.19313, table 1: 22.66 U in bf16).

Each case is compared with memory limits at several shares of its measured peak: it is predicted to
fit if prediction plus reserve is within the limit. ``--resume`` measures what FILE lacks.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.launch.text import size, table
from allometry.scaling.saved import OPERATIONS, Block, Kernels, norm
from allometry.studies.memory.probe import Measured, predicted
from allometry.studies.memory.ranks import measure_all

DENSE: dict[str, Any] = {
    "kind": "dense",
    "vocab_size": 2048,
    "width": 192,
    "num_layers": 4,
    "num_heads": 6,
    "num_kv_heads": 2,
    "ffn_width": 512,
}
MOE: dict[str, Any] = {
    **{key: value for key, value in DENSE.items() if key != "ffn_width"},
    "kind": "moe",
    "experts": {"kind": "swiglu", "num_experts": 8, "experts_per_token": 2, "width": 256},
    "router": {"balance": {"kind": "auxiliary", "coefficient": 0.01}, "z_loss": 1e-3},
}
SHARED = {"experts": MOE["experts"] | {"num_shared_experts": 1}}
LATENT = {"experts": MOE["experts"] | {"kind": "latent", "latent_width": 96}}
AFTER = {"norms": "after", "qk_norm": True, "qk_norm_over": "width", "qkv_bias": True}
BOTH = {"norms": "both", "activation": "gelu_tanh", "qk_norm": True}
MLA = {"q_lora_rank": 96, "kv_lora_rank": 64, "v_head_dim": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}  # fmt: skip
LATENTS = {"num_kv_heads": None, "latent_attention": MLA}
FEW = {"data.sequence_length": 64, "batch.micro_batch_sequences": 1, "batch.sequences": 2}
MUONH = {"optimizer.kind": "muonh", "optimizer.weight_decay": 0.0}


@dataclass(frozen=True)
class Case:
    """Run to measure: a model, its ranks and overrides of the common settings, by key."""

    name: str
    model: dict[str, Any]
    ranks: int
    changes: dict[str, Any]

    def config(self) -> RunConfig:
        """Return the complete config of the run."""
        tree: dict[str, Any] = {
            "run": {"folder": "none"},
            "model": self.model,
            "data": {"sequence_length": 256, "sources": [{"name": "random", "train": "none"}]},
            "batch": {"sequences": 16, "micro_batch_sequences": 4},
            "training": {"total_steps": 2, "compute_dtype": "bf16", "compile": False},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "constant"},
            "parallel": {},
        }
        for key, value in self.changes.items():
            *sections, last = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return RunConfig.model_validate(tree)


def cases() -> list[Case]:
    """Return all cases."""
    found = []

    def add(kind: str, model: dict[str, Any], what: str, ranks: int = 1, **changes: Any) -> None:
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        found.append(Case(f"{kind}, {what}", model, ranks, keys))

    for kind, model in (("dense", DENSE), ("moe", MOE)):
        add(kind, model, "bf16")
        add(kind, model, "fp32", training__compute_dtype="fp32")
        add(kind, model, "whole documents packed", data__packing="per_document")
        add(kind, model, "one micro-batch", batch__sequences=4)
        add(kind, model, "full", training__activation_checkpointing="full")
        add(kind, model, "selective", training__activation_checkpointing="selective")
        add(kind, model | {"tied_embeddings": True}, "tied")
        add(kind, model | {"qk_norm": True}, "qk_norm")
        add(kind, model | AFTER, "norms after")
        add(kind, model | BOTH, "norms on both sides")
        add(kind, model | AFTER, "norms after, tp2", 2, parallel__tp=2)
        add(kind, model | {"qkv_bias": True}, "biases")
        add(kind, model | {"window": {"tokens": 64, "global_every": 2}}, "windows")
        add(kind, model | LATENTS, "latent attention")
        add(kind, model | LATENTS, "latent attention, tp2", 2, parallel__tp=2)
        add(kind, model, "few tokens", **FEW)
        add(kind, model | {"tied_embeddings": True}, "tied, few tokens", **FEW)
        add(kind, model, "MuonH", **MUONH)
        add(kind, model, "MuonH, few tokens", **MUONH, **FEW)
        for stage in range(4):
            add(kind, model, f"hdp2 ZeRO {stage}", 2, parallel__zero={"stage": stage})
        add(kind, model, "hdp2 ZeRO 1, few tokens", 2, parallel__zero={"stage": 1}, **FEW)
        add(kind, model, "hdp2 ZeRO 3, few tokens", 2, parallel__zero={"stage": 3}, **FEW)
        add(kind, model, "hdp2, few tokens", 2, **FEW)
        add(kind, model, "tp2", 2, parallel__tp=2)
        add(kind, model, "tp2, selective", 2, parallel__tp=2, **SELECTIVE)
        add(kind, model, "pp2 1F1B", 2, parallel__pp=2)
        add(kind, model, "tp2 x hdp2 ZeRO 2", 4, parallel__tp=2, parallel__zero={"stage": 2})
        add_precision(partial(add, kind, model))
    gather = {"linears": "fp8_tensorwise", "gather": "fp8"}
    for stage in (1, 3):
        zero = {"stage": stage}
        add("dense", DENSE, f"hdp2 ZeRO {stage}, gather FP8", 2, parallel__zero=zero,
            precision=gather)  # fmt: skip
        add("dense", DENSE, f"hdp2 ZeRO {stage}, gather FP8, few tokens", 2, parallel__zero=zero,
            precision=gather, **FEW)  # fmt: skip
    gpipe = {"schedule": "gpipe"}
    add("dense", DENSE, "pp2 GPipe", 2, parallel__pp=2, parallel__pipeline=gpipe)
    add("dense", DENSE | {"tied_embeddings": True}, "pp2 tied", 2, parallel__pp=2)
    add_wide(add)
    add("moe", MOE | SHARED, "shared expert")
    add("moe", MOE | LATENT, "latent")
    add("moe", MOE, "ep2", 2, parallel__ep=2)
    add("moe", MOE, "ep2, saved FP8", 2, parallel__ep=2, precision__saved_activations="fp8")
    add("moe", MOE | SHARED, "shared expert, saved FP8", precision__saved_activations="fp8")
    add("moe", MOE | LATENT, "latent, saved FP8", precision__saved_activations="fp8")
    add("moe", MOE, "ep2 ZeRO 3", 2, parallel__ep=2, parallel__zero={"stage": 3})
    add("moe", MOE | SHARED, "ep2 x tp2", 4, parallel__ep=2, parallel__tp=2)
    add("moe", MOE, "ep2 x tp2, experts whole", 4, parallel__ep=2, parallel__tp=2,
        parallel__expert_tp=1)  # fmt: skip
    return found


def add_precision(add: Callable[..., None]) -> None:
    """Add cases with FP8 and with offloaded states, for one kind of model."""
    saved = {"precision__saved_activations": "fp8"}
    full = {"training__activation_checkpointing": "full"}
    add("saved FP8", **saved)
    add("saved FP8, fp32", **saved, training__compute_dtype="fp32")
    add("saved FP8, few tokens", **saved, **FEW)
    add("saved FP8, full", **saved, **full)
    add("saved FP8, selective", **saved, **SELECTIVE)
    for recipe in ("fp8_tensorwise", "fp8_rowwise", "fp8_blockwise"):
        linears = {"precision__linears": recipe}
        add(recipe, **linears)
        add(f"{recipe}, saved FP8", **linears, **saved)
    add("fp8_rowwise, few tokens", precision__linears="fp8_rowwise", **FEW)
    add("fp8_rowwise, selective", precision__linears="fp8_rowwise", **SELECTIVE)
    add("FP8 states", optimizer__states=FP8_STATES)
    add("FP8 states, few tokens", optimizer__states=FP8_STATES, **FEW)
    add("FP8 states, MuonH, few tokens", optimizer__states=FP8_STATES, **MUONH, **FEW)
    add("states in a file, few tokens", parallel__zero={"optimizer_states": TIERS}, **FEW)
    add("hdp2 ZeRO 2, saved FP8", 2, parallel__zero={"stage": 2}, **saved)
    add("hdp2 ZeRO 3, FP8 states", 2, parallel__zero={"stage": 3}, optimizer__states=FP8_STATES)
    kept = {"stage": 3, "regather": "step"}
    add("hdp2 ZeRO 3 regather step, few tokens", 2, parallel__zero=kept, **FEW)
    add("tp2, saved FP8", 2, parallel__tp=2, **saved)
    add("tp2, fp8_rowwise, saved FP8", 2, parallel__tp=2, precision__linears="fp8_rowwise", **saved)
    add("pp2, saved FP8", 2, parallel__pp=2, **saved)
    everything = {"precision__linears": "fp8_rowwise", "optimizer__states": FP8_STATES, **saved}
    shape: dict[str, Any] = {"parallel__tp": 2, "parallel__zero": {"stage": 2}}
    add("tp2 x hdp2 ZeRO 2, all FP8", 4, **shape, **everything)


def add_wide(add: Callable[..., None]) -> None:
    """Add cases whose peak is inside a block, where FP8 affects most of the step."""
    dense = DENSE | {"ffn_width": 2048, "vocab_size": 256}
    moe = MOE | {"experts": MOE["experts"] | {"width": 1024}, "vocab_size": 256}
    saved = {"saved_activations": "fp8"}
    add("dense", dense, "wide feed-forward")
    for kind, model in (("dense", dense), ("moe", moe)):
        add(kind, model, "wide feed-forward, saved FP8", precision=saved)
        add(kind, model | LATENTS, "latent attention, saved FP8", precision=saved)
        for recipe in ("fp8_rowwise", "fp8_blockwise"):
            linears: dict[str, Any] = {"linears": recipe}
            add(kind, model, f"wide feed-forward, {recipe}", precision=linears)
            add(kind, model, f"wide feed-forward, {recipe}, saved FP8", precision=linears | saved)


LIMITS = (0.8, 0.9, 0.95, 1.05, 1.1, 1.25)
"""Memory limits compared with each case, as shares of its measured peak."""
RESERVES = (0.0, 0.02, 0.05)
AT_ONCE = 8
"""Number of cases that the same processes run before FILE is written."""
SELECTIVE = {"training__activation_checkpointing": "selective"}
FP8_STATES = {"kind": "fp8"}
TIERS = {"nvme": tempfile.gettempdir(), "cpu": 0.0, "bucket_mib": 1.0}


@dataclass(frozen=True)
class Result:
    """Peak of a case's fullest rank: predicted and measured bytes, where, and kinds of tensors."""

    name: str
    ranks: int
    predicted: int
    measured: int
    allocated: int | None
    predicted_at: str
    measured_at: str
    predicted_kinds: dict[str, int]
    measured_kinds: dict[str, int]

    @property
    def error(self) -> float:
        """Return (predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def result_of(case: Case, found: Sequence[Measured]) -> Result:
    """Return the peak of the case's fullest rank together with its prediction."""
    fullest = max(found, key=lambda one: one.bytes)
    estimate = predicted(case.config(), case.ranks, "cpu", fullest.rank)
    return Result(
        name=case.name,
        ranks=case.ranks,
        predicted=estimate.total,
        measured=fullest.bytes,
        allocated=fullest.allocated,
        predicted_at=estimate.peak.name,
        measured_at=fullest.peak.moment,
        predicted_kinds=dict(estimate.peak.kinds),
        measured_kinds=fullest.peak.kinds,
    )


@dataclass(frozen=True)
class Decisions:
    """Counts of right and wrong decisions whether cases fit a limit, with this reserve."""

    reserve: float
    decisions: int
    refused_what_fits: int
    let_in_what_does_not: int

    @classmethod
    def of(cls, results: Sequence[Result], reserve: float) -> Decisions:
        """Count the decisions over ``LIMITS``."""
        refused = let_in = 0
        for result in results:
            for share in LIMITS:
                limit = share * result.measured
                said, fits = result.predicted * (1 + reserve) <= limit, result.measured <= limit
                refused += fits and not said
                let_in += said and not fits
        return cls(reserve, len(results) * len(LIMITS), refused, let_in)

    @property
    def right(self) -> float:
        """Return the share of right decisions."""
        return 1 - (self.refused_what_fits + self.let_in_what_does_not) / self.decisions


def layer_table(
    preset: str, saved: Literal["compute", "fp8"], tokens: int = 256
) -> dict[str, dict[str, float]]:
    """Return the bytes that a preset's layer saves by operation, in U, on a CPU and on CUDA.

    Measured on two layers with few tokens on this CPU in bf16, where norms are not fused; the
    values for CUDA come from ``scaling/saved.py``.
    """
    small = [
        "data={kind: sequences, sequence_length: 64, packing: concatenated, "
        "sources: [{name: random, train: none}]}",
        *("model.num_layers=2", "model.vocab_size=512", "training.compute_dtype=bf16"),
        *("training.compile=false", "training.total_tokens=null", "training.total_steps=2"),
        f"batch={{sequences: {tokens // 64}, micro_batch_sequences: {tokens // 64}}}",
        "parallel={}",
        f"precision={{saved_activations: {saved}}}",
    ]
    config = load(f"preset:{preset}", small)
    model = config.model
    unit = tokens * model.width * 2
    (measured,) = measure_all([(config, 1)])[0]
    heads = 4 * model.num_heads
    said = {}
    for device, fused in (("cuda", True), ("cpu", False)):
        kernels = Kernels(2, fused, heads, config.precision)
        said[device] = Block(model, 1, kernels).saved(tokens, "none")
    final = norm(model.width, kernels)  # unfused, for a CPU
    rows = {
        operation: {
            "measured on CPU": (measured.saved.get(operation, 0) - tokens * final[operation])
            / 2
            / unit,
            "table, CPU": said["cpu"][operation] / unit,
            "table, CUDA": said["cuda"][operation] / unit,
        }
        for operation in OPERATIONS
    }
    rows["all"] = {name: sum(row[name] for row in rows.values()) for name in rows["norms"]}
    return rows


def measured_in(path: Path | None) -> list[Result]:
    """Return the results stored in a file; an empty list without a file."""
    if path is None or not path.exists():
        return []
    names = {field.name for field in fields(Result)}
    return [
        Result(**{key: value for key, value in case.items() if key in names})
        for case in json.loads(path.read_text())["cases"]
    ]


def write(path: Path, layers: dict[str, Any], results: Sequence[Result]) -> None:
    """Write all results so far."""
    facts = {"torch": torch.__version__, "machine": platform.processor(), "layers_in_u": layers}
    facts["cases"] = [{**asdict(result), "error": result.error} for result in results]
    facts["limits"] = list(LIMITS)
    facts["decisions"] = [
        {**asdict(one), "right": one.right} for one in (Decisions.of(results, r) for r in RESERVES)
    ]
    path.write_text(json.dumps(facts, indent=1) + "\n")


def show(results: Sequence[Result]) -> None:
    """Print errors and decisions."""
    head = ["case", "ranks", "predicted", "measured", "error", "predicted at", "measured at"]
    body = [
        [
            *(r.name, str(r.ranks), size(r.predicted), size(r.measured), f"{r.error:+.1%}"),
            *(r.predicted_at, r.measured_at),
        ]
        for r in results
    ]
    print(table([head, *body], right=(1, 2, 3, 4)))
    errors = [abs(result.error) for result in results]
    print(f"median {statistics.median(errors):.1%}, worst {max(errors):.1%} of {len(errors)}")
    for one in (Decisions.of(results, reserve) for reserve in RESERVES):
        print(
            f"reserve {one.reserve:.0%}: {one.right:.1%} of {one.decisions} decisions right, "
            f"{one.refused_what_fits} refused what fits, "
            f"{one.let_in_what_does_not} let in what does not"
        )


def main() -> None:
    """Run the cases and print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--layers", action="store_true", help="bytes of a layer by operation alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json has")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kept = asked.json if asked.resume else None
    results = measured_in(kept)
    layers = json.loads(kept.read_text())["layers_in_u"] if kept and kept.exists() else {}
    if not layers:
        layers = {
            f"{preset}, {saved}": layer_table(preset, saved)
            for preset in ("dense_1b", "moe_1b_a200m")
            for saved in ("compute", "fp8")
        }
    for what, rows in layers.items():
        head = [what, *rows["all"]]
        body = [[name, *(f"{n:.2f}" for n in row.values())] for name, row in rows.items()]
        print(table([head, *body], right=(1, 2, 3)), flush=True)
    done = {result.name for result in results}
    chosen = [case for case in cases() if asked.only in case.name and case.name not in done]
    for begin in range(0, 0 if asked.layers else len(chosen), AT_ONCE):
        batch = chosen[begin : begin + AT_ONCE]
        found = measure_all([(case.config(), case.ranks) for case in batch])
        results += [result_of(case, one) for case, one in zip(batch, found, strict=True)]
        if asked.json:
            write(asked.json, layers, results)
        print(f"{len(results)} cases", flush=True)
    order = [case.name for case in cases()]
    results.sort(key=lambda one: order.index(one.name))
    if asked.json:
        write(asked.json, layers, results)
    if results:
        show(results)


if __name__ == "__main__":
    main()
