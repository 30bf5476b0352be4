"""Description of this machine for the planner, fitted to timed pieces of a step.

Rates and constants minimize the errors of the cost model's own formulas on the timed pieces, so
that the prediction of a step is consistent with these pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from allometry.configs.machine import HardwareConfig
from allometry.scaling.planner import operators
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.studies.machine.pieces import EXPERTS, TOP_K

NAME = "this machine"
BACKWARD = 3.5  # forward and backward over forward of attention, as in the cost model
NOTHING = 1e-6  # a share close to 0, as constants are positive
ASSUMED_POWER_W = 250.0


def describe(found: Mapping[str, Any], machine: Mapping[str, Any]) -> HardwareConfig:
    """Return the description. ``found``: ``pieces`` and, under "together", ``measure_ranks``.

    ``machine``: name, memory_bytes, ranks (that fit on it), host_memory_bytes, disk_bandwidth,
    adam_rate, asynchronous and, for a known GPU, its datasheet's peak_flops and power_w.
    """
    rates, halves = fit_products(found["products"])
    sheet = machine.get("peak_flops") or {}
    peaks = {name: max(sheet.get(name, 0.0), best(found["products"], name)) for name in rates}
    attainable = {name: min(1.0, rate / peaks[name]) for name, rate in rates.items()}
    wide = found["dtypes"][0]
    speed, half = fit_attention(found["attention"])
    links, link_constants = fit_messages(found.get("together"))
    memory = found["copy_bytes_per_s"]
    crowds = []
    if (together := found.get("together")) is not None and "crowd" in together:
        crowds = [{"ranks": together["ranks"], **together["crowd"]}]
    tree = {
        "name": machine["name"],
        "gpu": {
            "peak_flops": peaks,
            "attainable": attainable,
            "attention": min(1.0, speed / peaks[wide]),
            "memory_bytes": machine["memory_bytes"],
            "memory_bandwidth": memory,
            "copy_efficiency": 1.0,
            "power_w": machine.get("power_w") or ASSUMED_POWER_W,
            "asynchronous": machine["asynchronous"],
        },
        "gpus_per_node": machine["ranks"],
        "nics_per_node": 1,
        "inside": links,
        "across": links,
        "host": {
            "memory_bytes": machine["host_memory_bytes"],
            "bandwidth": found.get("host_bytes_per_s", memory),
            "disk_bandwidth": machine["disk_bandwidth"],
            "adam_rate": machine["adam_rate"],
            "power_w": ASSUMED_POWER_W,
        },
        "crowds": crowds,
    }
    hardware = HardwareConfig.model_validate(tree)
    constants = replace(
        Constants(), products=1.0, attention=1.0, memory=1.0, attention_half=half, **halves
    )
    fitted = fit_layers(found, hardware, constants, machine["asynchronous"])
    kept = {
        **{"products": 1.0, "attention": 1.0, "memory": 1.0, "attention_half": half},
        **halves,
        **fitted,
        **link_constants,
    }
    return hardware.model_copy(update={"constants": kept})


def best(products: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the FLOP/s of the fastest product of a type."""
    return max(float(flops(p) / p["seconds"]) for p in products if p["dtype"] == name)


def flops(product: Mapping[str, Any]) -> float:
    """Return the FLOPs of the three products of a linear layer."""
    return 6.0 * product["rows"] * product["k"] * product["n"]


def fit_products(
    products: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return FLOP/s of large products by type, and the sizes at which products are half as fast."""
    rows, k, n, seconds = (
        np.array([p[key] for p in products], dtype=float) for key in ("rows", "k", "n", "seconds")
    )
    names = list(dict.fromkeys(p["dtype"] for p in products))
    which = np.array([names.index(p["dtype"]) for p in products])
    first = [best(products, name) for name in names]

    def errors(x: Floats) -> Floats:
        constants = replace(Constants(), rows_half=np.exp(x[-2]), width_half=np.exp(x[-1]))
        rate = np.exp(x[which])
        return np.log(3 * operators.product_time(rows, k, n, rate, constants) / seconds)

    found = fitted(errors, [*first, 30.0, 30.0])
    rates = {name: float(rate) for name, rate in zip(names, found, strict=False)}
    return rates, {"rows_half": float(found[-2]), "width_half": float(found[-1])}


def fit_attention(timed: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return FLOP/s of causal attention on long sequences, and the length of half this rate."""
    tokens, length, inner, seconds = (
        np.array([t[key] for t in timed], dtype=float)
        for key in ("tokens", "length", "inner", "seconds")
    )
    work = BACKWARD * 2 * tokens * length * inner

    def errors(x: Floats) -> Floats:
        return np.asarray(np.log(work / np.exp(x[0]) * (1 + np.exp(x[1]) / length) / seconds))

    rate, half = fitted(errors, [float(max(work / seconds)), 300.0])
    return float(rate), float(half)


def fit_messages(
    together: Mapping[str, Any] | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return a link's bandwidth and latency, and constants of its messages.

    Without other ranks there are no messages: returns a bandwidth that no prediction uses.
    """
    if together is None:
        return {"bandwidth": 1e10, "latency_s": 1e-4}, {}
    small, bus = {}, {}
    for kind in {m["kind"] for m in together["messages"]}:
        short, long = sorted(
            (m for m in together["messages"] if m["kind"] == kind), key=lambda m: m["bytes"]
        )
        small[kind] = short["seconds"]
        moved = long["bus_bytes"] - short["bus_bytes"]
        bus[kind] = moved / max(long["seconds"] - short["seconds"], 1e-9)
    pair = ("all-gather", "reduce-scatter")
    inside = 2 / sum(1 / bus[kind] for kind in pair)
    latency = sum(small[kind] for kind in pair) / 2 / (together["ranks"] - 1)
    constants = {
        "inside": 1.0,
        "across": 1.0,
        "inside_latency": 1.0,
        "across_latency": 1.0,
        "data_bandwidth": bus["all-reduce"] / inside,
        "experts_bandwidth": bus["all-to-all"] / inside,
        "message_s": small["send forward"],
        "congestion": NOTHING,
    }
    return {"bandwidth": inside, "latency_s": latency}, constants


def fit_layers(
    found: Mapping[str, Any], hardware: HardwareConfig, constants: Constants, asynchronous: bool
) -> dict[str, float]:
    """Return constants of the loss, and of a layer apart from products and attention."""
    dtype = found["dtypes"][0]
    kept: dict[str, float] = {}
    for experts, names in (
        (False, ("launch_eager_s", "passes_eager")),
        (True, ("launch_experts", "experts_products")),
    ):
        timed = [layer for layer in found["layers"] if bool(layer["expert_ffn"]) == experts]
        cases = Cases.of([_layer_row(layer, dtype) for layer in timed], {NAME: hardware})
        seconds = np.array([layer["seconds"] for layer in timed])
        start = [float(getattr(constants, name)) for name in names]

        errors = partial(_layer_errors, cases, seconds, constants, names, asynchronous)
        kept |= dict(zip(names, map(float, fitted(errors, start)), strict=True))
        constants = replace(constants, **kept)
    heads = [_head_row(head, dtype) for head in found["heads"]]
    cases = Cases.of(heads, {NAME: hardware})
    seconds = np.array([head["seconds"] for head in found["heads"]])

    def head_errors(x: Floats) -> Floats:
        now = replace(constants, loss_eager=np.exp(x[0]))
        return np.asarray(np.log(operators.head(cases, now) / seconds))

    kept["loss_eager"] = float(fitted(head_errors, [constants.loss_eager])[0])
    return kept


def _layer_errors(
    cases: Cases,
    seconds: Floats,
    constants: Constants,
    names: tuple[str, ...],
    asynchronous: bool,
    x: Floats,
) -> Floats:
    now = replace(constants, **dict(zip(names, np.exp(x), strict=True)))
    return np.asarray(np.log(layer_seconds(cases, now, asynchronous) / seconds))


def layer_seconds(cases: Cases, constants: Constants, asynchronous: bool) -> Floats:
    """Return the seconds of a layer, forward and backward, summed as in the cost model."""
    device = 3 * (
        operators.attention_products(cases, constants)
        + operators.ffn_products(cases, constants)
        + operators.elementwise(cases, constants)
    ) + BACKWARD * operators.scores(cases, constants)
    host = operators.launches(cases, constants)
    return np.asarray((device**4 + host**4) ** 0.25 if asynchronous else device + host)


def _layer_row(layer: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    row = {
        **_row(layer["width"], layer["heads"], dtype),
        "sequence": layer["length"],
        "micro_batch": layer["sequences"],
        "global_batch": layer["sequences"],
        "vocab": 256,
    }
    if layer["expert_ffn"]:
        row |= {"experts": EXPERTS, "top_k": TOP_K, "expert_ffn": layer["expert_ffn"]}
    return row


def _head_row(head: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    shape = {"sequence": head["tokens"], "micro_batch": 1, "global_batch": 1}
    return {**_row(head["width"], 1, dtype), **shape, "vocab": head["vocabulary"]}


def _row(width: int, heads: int, dtype: str) -> dict[str, Any]:
    return {
        **{"layers": 1, "width": width, "heads": heads, "kv_heads": heads},
        **{"head_dim": width // heads, "ffn": 3 * width, "eager": 1},
        **{"hardware": NAME, "precision": dtype},
    }


def fitted(errors: Any, start: Sequence[float]) -> Floats:
    """Return positive numbers that minimize errors of logarithms, robust to outliers."""
    from scipy.optimize import least_squares  # import takes half a second

    first = np.log(np.array(start, dtype=float))
    found = least_squares(
        errors, first, loss="soft_l1", f_scale=0.1, bounds=(first - 12, first + 12)
    )
    return np.asarray(np.exp(found.x))
