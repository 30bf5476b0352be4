"""Many configurations at once: model, layout, batch and hardware as columns."""

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
"""Those that a run can have, and published ones: ``pipeline.bubble``."""
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
"""Numbers of a configuration and their defaults; None: it has to be given.

``repeats``, ``reduces``: shares, of element-wise work done again in backward, and of the
micro-batches before the last that reduce gradients. ``attention_rate``: of the kernel, over the
card's best. ``eager``: kernels are launched one by one from Python. ``grouped``: all experts'
products are one launch. ``replicas``: whole copies that a sharded ``dp`` is divided into.
``gather_bytes``, ``reduce_bytes``: of a parameter and of a gradient as they travel.
``tensor_chunks``: parts of a product that tensor parallelism's messages run behind.
``deduplicated``: a token goes to each node once, not once for each of its experts there.
``attended``: tokens that a token's attention reads; 0: the sequence. ``document_stretch``:
``scaling.hdp.stretch``. ``narrow_share``: of the blocks' products in ``precision``, if that is fp8
or fp4. ``experts_beside``: share of a micro-batch's computation that the exchange of another
one's tokens may run beside, as DualPipe's does. ``nodes_of_token``: nodes that a token's experts
are at most on; 0: any. ``quantize_bytes``: that casts move for each number of a narrow product,
beyond what the products' rate holds (``operators.QUANTIZE_BYTES``). ``saved_fp8``: activations
wait in FP8. ``state_bytes``: of the optimizer for a parameter. ``states_host``, ``states_disk``:
shares of them in the host's memory and on disk between steps. ``host_update``: the host's CPUs take
the optimizer's step. ``activations_host``: share of the layers whose ``kept_bytes``, of a token,
wait in the host's memory.
"""
LEAST = {
    **dict.fromkeys(("gated", "zero", "ffn", "sequence_parallel", "flash", "overlap"), 0),
    **{"grouped": 0, "attention_rate": 0.01, "deduplicated": 0, "document_stretch": 0.01},
    **{"gather_bytes": 0.1, "reduce_bytes": 0.1, "narrow_share": 0, "state_bytes": 0},
}
"""What a number is at least, where that is not 1, or 0 as its default."""
SHARES = (
    *("narrow_share", "repeats", "reduces", "states_host", "states_disk", "activations_host"),
    "experts_beside",
)


@dataclass(frozen=True)
class Cases:
    """C configurations. ``n[NAME]`` is a column of ``COLUMNS``, (C,), ``hw[NAME]`` of the hardware.

    ``dp``: ranks that hold the same parameters and see different data, those of ``ep`` among them.
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
        """Read rows that name ``COLUMNS``, and ``hardware``, ``precision``, ``recompute``,
        ``schedule``.

        Raises UserError for a value that is missing or unknown and for a precision that a card has
        no rate of: nothing is guessed.
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
        """The configurations at these indices, or where a mask is true."""
        return Cases(
            {key: column[chosen] for key, column in self.n.items()},
            {key: column[chosen] for key, column in self.hw.items()},
            *(self.hardware[chosen], self.generation[chosen], self.precision[chosen]),
            *(self.recompute[chosen], self.schedule[chosen]),
        )

    @property
    def kinds(self) -> list[tuple[str, str, str]]:
        """Card, class of precision and class of model of each: what calibration carries over in."""
        wide = np.where(np.isin(self.precision, ("fp16", "bf16")), "16 bit", self.precision)
        model = np.where(self.n["experts"] > 0, "experts", "dense")
        return list(zip(self.hardware.tolist(), wide.tolist(), model.tolist(), strict=True))

    @property
    def gpus(self) -> Floats:
        """GPUs of each layout."""
        return self.n["tp"] * self.n["pp"] * self.n["cp"] * self.n["dp"]

    @property
    def micro_batches(self) -> Floats:
        """Micro-batches of a pipeline in a step."""
        return np.asarray(self.n["global_batch"] / (self.n["micro_batch"] * self.n["dp"]))

    @property
    def step_tokens(self) -> Floats:
        """Tokens of a step."""
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
