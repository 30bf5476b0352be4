"""Columns of many configurations: model, layout, batch and hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allometry.configs import execution
from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig
from allometry.scaling.planner.constants import Floats

SCHEDULES = (*execution.SCHEDULES, "interleaved", "zb_h1", "zb_h2", "zbv")
"""Schedules of a run, and further published ones: ``pipeline.bubble``."""
RECOMPUTE = ("none", "selective", "full")
COLUMNS = {
    **dict.fromkeys(("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab"), None),
    **{"gated": 1, "tied": 0, "experts": 0, "top_k": 0, "expert_ffn": 0, "shared_experts": 0},
    **{"dense_layers": 0, "q_rank": 0, "kv_rank": 0},
    **dict.fromkeys(("sequence", "micro_batch", "global_batch"), None),
    **{"tp": 1, "pp": 1, "chunks": 1, "cp": 1, "ep": 1, "dp": 1, "zero": 1},
    **{"sequence_parallel": 1, "flash": 1, "attention_rate": 1, "eager": 0, "grouped": 1},
    **{"even_stages": 0, "overlap": 1, "replicas": 1, "gather_bytes": 2, "reduce_bytes": 4},
    **{"tensor_chunks": 1, "deduplicated": 1, "attended": 0, "document_stretch": 1},
    **{"narrow_share": 1, "quantize_bytes": 0, "saved_fp8": 0, "state_bytes": 8},
    **{"states_host": 0, "states_disk": 0, "host_update": 0, "activations_host": 0},
    **{"kept_bytes": 0, "repeats": 0, "reduces": 0},
    **{"experts_beside": 0, "nodes_of_token": 0},
}
"""Columns of a configuration with their defaults; None: required.

``repeats``, ``reduces``: shares of element-wise work repeated in backward, and of micro-batches
before the last that reduce gradients. ``attention_rate``: rate of the kernel relative to the card's
best. ``eager``: kernels are launched one by one from Python. ``grouped``: one launch computes the
products of all experts. ``replicas``: number of complete copies in a sharded ``dp``.
``gather_bytes``, ``reduce_bytes``: bytes of a parameter and of a gradient in messages.
``tensor_chunks``: chunks of a product that overlap with messages of tensor parallelism.
``deduplicated``: a token is sent to each node once instead of once for each of its experts.
``attended``: tokens read by a token's attention; 0: the sequence. ``document_stretch``:
``scaling.hdp.stretch``. ``narrow_share``: share of the blocks' products in ``precision``, for fp8
and fp4. ``experts_beside``: share of a micro-batch's computation that overlaps with the all-to-all
of another one, as in DualPipe. ``nodes_of_token``: maximum number of nodes with experts of one
token; 0: unlimited. ``quantize_bytes``: bytes moved by casts for each element of a narrow product,
in addition to the products' rate (``operators.QUANTIZE_BYTES``). ``saved_fp8``: activations are
saved in FP8. ``state_bytes``: bytes of optimizer states per parameter. ``states_host``,
``states_disk``: shares of states in host memory and on disk between steps. ``host_update``: the
host's CPUs run the optimizer step. ``activations_host``: share of layers whose ``kept_bytes`` per
token are offloaded to the host.
"""
LEAST = {
    **dict.fromkeys(("gated", "zero", "ffn", "sequence_parallel", "flash", "overlap"), 0),
    **{"grouped": 0, "attention_rate": 0.01, "deduplicated": 0, "document_stretch": 0.01},
    **{"gather_bytes": 0.1, "reduce_bytes": 0.1, "narrow_share": 0, "state_bytes": 0},
}
"""Minimum values of columns, if not 1, or 0 for a default of 0."""
SHARES = (
    *("narrow_share", "repeats", "reduces", "states_host", "states_disk", "activations_host"),
    "experts_beside",
)


@dataclass(frozen=True)
class Cases:
    """C configurations. ``n[NAME]`` is a column of ``COLUMNS``, (C,), ``hw[NAME]`` of the hardware.

    ``dp``: ranks with the same parameters and other data; the ranks of ``ep`` are among them.
    """

    n: dict[str, Floats]
    hw: dict[str, Floats]
    hardware: Floats
    generation: Floats
    precision: Floats
    recompute: Floats
    schedule: Floats

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], hardware: Mapping[str, HardwareConfig]) -> Cases:
        """Build cases from rows of ``COLUMNS`` and of further keys.

        These are ``hardware`` (required), ``precision``, ``recompute`` and ``schedule``. Raises
        UserError for a missing or unknown value, or a precision for which a card has no rate.
        """
        for index, row in enumerate(rows):
            _check(index, row, hardware)
        columns = {
            key: np.array([row.get(key, default) for row in rows], dtype=float)
            for key, default in COLUMNS.items()
        }
        cards = [hardware[row["hardware"]] for row in rows]
        precision = np.array([row.get("precision", "bf16") for row in rows])
        return cls(
            n=columns,
            hw=_hardware_columns(cards, precision, _ranks_of_a_node(columns, cards)),
            hardware=np.array([row["hardware"] for row in rows]),
            generation=np.array([card.generation for card in cards]),
            precision=precision,
            recompute=np.array([row.get("recompute", "none") for row in rows]),
            schedule=np.array([row.get("schedule", "1f1b") for row in rows]),
        )

    def __len__(self) -> int:
        return len(self.precision)

    def take(self, chosen: Floats) -> Cases:
        """Return the configurations selected by indices or by a mask."""
        return Cases(
            {key: column[chosen] for key, column in self.n.items()},
            {key: column[chosen] for key, column in self.hw.items()},
            *(self.hardware[chosen], self.generation[chosen], self.precision[chosen]),
            *(self.recompute[chosen], self.schedule[chosen]),
        )

    @property
    def kinds(self) -> list[tuple[str, str, str]]:
        """Card, class of precision and class of model by configuration: key of calibration data."""
        wide = np.where(np.isin(self.precision, ("fp16", "bf16")), "16 bit", self.precision)
        model = np.where(self.n["experts"] > 0, "experts", "dense")
        return list(zip(self.hardware.tolist(), wide.tolist(), model.tolist(), strict=True))

    @property
    def gpus(self) -> Floats:
        """Number of GPUs of each layout."""
        return self.n["tp"] * self.n["pp"] * self.n["cp"] * self.n["dp"]

    @property
    def micro_batches(self) -> Floats:
        """Micro-batches of a pipeline per step."""
        return np.asarray(self.n["global_batch"] / (self.n["micro_batch"] * self.n["dp"]))

    @property
    def step_tokens(self) -> Floats:
        """Tokens per step."""
        return self.n["global_batch"] * self.n["sequence"]


def _check(index: int, row: Mapping[str, Any], hardware: Mapping[str, HardwareConfig]) -> None:
    place = f"configuration {index}"
    for key, default in COLUMNS.items():
        value = row.get(key, default)
        if value is None:
            raise UserError(f"{place}: {key} is missing; give it")
        least = LEAST.get(key, 0 if default == 0 else 1)
        if not np.isfinite(value) or value < least:
            raise UserError(f"{place}: {key}={value} must be a number of at least {least}")
    for key in SHARES:
        if row.get(key, 0) > 1:
            raise UserError(f"{place}: {key}={row[key]} must be a share, at most 1")
    if row.get("states_host", 0) + row.get("states_disk", 0) > 1:
        raise UserError(
            f"{place}: states_host={row['states_host']} and states_disk={row['states_disk']} are "
            "together more than all states; lower one"
        )
    if row.get("hardware") not in hardware:
        raise UserError(
            f"{place}: hardware={row.get('hardware')!r} is not described; use one of "
            f"{', '.join(hardware)}"
        )
    known = hardware[row["hardware"]].gpu
    for key, values in (
        ("precision", tuple(set(known.peak_flops) & set(known.attainable))),
        ("recompute", RECOMPUTE),
        ("schedule", SCHEDULES),
    ):
        value = row.get(key, {"precision": "bf16", "recompute": "none", "schedule": "1f1b"}[key])
        if value not in values:
            raise UserError(
                f"{place}: {key}={value!r} is not known on {row['hardware']}; use one of "
                f"{', '.join(sorted(values))}"
            )
    if row.get("experts", 0) and not (row.get("top_k", 0) and row.get("expert_ffn", 0)):
        raise UserError(f"{place}: experts={row['experts']} need top_k and expert_ffn; give both")


def _ranks_of_a_node(n: dict[str, Floats], cards: list[HardwareConfig]) -> list[int]:
    ranks = n["tp"] * n["pp"] * n["cp"] * n["dp"]
    return [int(min(own, card.gpus_per_node)) or 1 for own, card in zip(ranks, cards, strict=True)]


def _hardware_columns(
    cards: list[HardwareConfig], precision: Floats, ranks: list[int]
) -> dict[str, Floats]:
    def column(read: Any) -> Floats:
        return np.array([read(card) for card in cards], dtype=float)

    wide: list[Any] = ["bf16" if p in ("fp8", "fp4") else p for p in precision]
    pairs: list[tuple[HardwareConfig, Any]] = list(zip(cards, precision, strict=True))
    wides = list(zip(cards, wide, strict=True))
    rate = [c.gpu.peak_flops[p] * c.gpu.attainable[p] for c, p in pairs]
    wide_rate = [c.gpu.peak_flops[p] * c.gpu.attainable[p] for c, p in wides]
    left = np.array(
        [card.left(own) for card, own in zip(cards, ranks, strict=True)], dtype=float
    ).reshape(-1, 2)
    attention = np.array([c.gpu.peak_flops[p] * c.gpu.attention for c, p in wides], dtype=float)
    return {
        "products": np.array(rate, dtype=float) * left[:, 0],
        "wide_products": np.array(wide_rate, dtype=float) * left[:, 0],
        "attention": attention * left[:, 0],
        "memory": column(lambda c: c.gpu.memory_bandwidth * c.gpu.copy_efficiency) * left[:, 1],
        "asynchronous": column(lambda c: c.gpu.asynchronous),
        "adam": column(lambda c: c.host.adam_rate / c.gpus_per_node) * left[:, 1],
        "gpus_per_node": column(lambda c: c.gpus_per_node),
        "inside": column(lambda c: c.inside.bandwidth),
        "inside_latency": column(lambda c: c.inside.latency_s),
        "across": column(lambda c: c.network_bandwidth),
        "across_latency": column(lambda c: c.across.latency_s),
        "host": column(lambda c: c.host.bandwidth),
        "disk": column(lambda c: c.host.disk_bandwidth),
    }
