"""Rotary positions and sliding windows: conversion of Hugging Face keys to ours and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from allometry.configs.decoder import Llama3Scaling, RopeScaling, YarnScaling, mscale
from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig
from allometry.interop.huggingface.families import TRAITS, Family
from allometry.models.rotary import attention_factor

FULL, SLIDING = "full_attention", "sliding_attention"
KEYS = frozenset(
    [
        *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        *("sliding_window_pattern", "_sliding_window_pattern"),
    ]
)
"""Keys of ``config.json`` that this module reads."""

_NAMES: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
"""Keys of each kind of scaling: Hugging Face name -> our name."""

_MSCALE = ("mscale", "mscale_all_dim")


def positions_of(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return ``rope_theta``, ``rope_scaling`` and ``window`` of our ``model`` section.

    Reads the keys of transformers 4 and 5. Raises UserError with the key for features that our
    models lack.
    """
    full, local = _rope_dicts(values)
    theta = full.pop("rope_theta", None)
    top = values.get("rope_theta")
    if theta is not None and top is not None and theta != top:
        raise UserError(f"{where}: rope_theta={top} and rope_parameters' {theta} differ; keep one")
    theta = top if theta is None else theta
    theta = TRAITS[family].rope_theta if theta is None else theta
    if theta is None:
        raise UserError(f"{where}: rope_theta is missing; add it")
    scaling = _scaling_of(full, values, where)
    if scaling is not None and scaling["kind"] == "yarn" and TRAITS[family].latent:
        scaling["mscale_all_dim"] = full.get("mscale_all_dim") or 0.0
    found = {"rope_theta": float(theta), "rope_scaling": scaling, "window": None}
    window = _window_of(values, family, where)
    if window is None:
        return found
    if TRAITS[family].own_rope:
        own = local.pop("rope_theta", values.get("rope_local_base_freq"))
        own = TRAITS[family].windowed_theta if own is None else own
        own = theta if own is None else own
        if _scaling_of(local, values, where) is not None:
            raise UserError(
                f"{where}: rope_parameters scale {SLIDING}, which is not supported: with windows "
                f"only {FULL} has scaled positions"
            )
        window["rope_theta"] = float(own) if own != theta or scaling is not None else None
    return {**found, "window": window}


def _rope_dicts(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rope settings of layers with full attention, and of layers with a window."""
    full: dict[str, Any] = {}
    local: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = values.get(key) or {}
        given = dict(given) if isinstance(given, dict) else {key: given}
        local |= given.pop(SLIDING, None) or {}
        full |= given.pop(FULL, None) or {}
        full |= given
    return full, local


def _scaling_of(
    given: dict[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any] | None:
    """Return our ``rope_scaling`` from rope settings without ``rope_theta``."""
    said = {key: value for key, value in given.items() if value is not None}
    key = "rope_type" if "rope_type" in said else "type"
    kind = said.pop(key, "default")
    said.pop("type", None)
    if said.get("partial_rotary_factor") == 1:
        said.pop("partial_rotary_factor")
    names = {"default": {}, **_NAMES}.get(kind)
    if names is None:
        raise UserError(
            f"{where}: rotary positions with {key}={kind!r} are not supported; only default, "
            f"{', '.join(_NAMES)} are"
        )
    for other in sorted(said.keys() - names.keys() - set(_MSCALE if kind == "yarn" else ())):
        raise UserError(
            f"{where}: rotary positions with {other}={said[other]!r} are not supported for "
            f"rope_type={kind!r}"
        )
    if kind == "default":
        return None
    longest = values.get("max_position_embeddings")
    if "original_length" in names.values():
        said.setdefault("original_max_position_embeddings", longest)
    if kind == "yarn" and "factor" not in said and longest is not None:
        said["factor"] = longest / said["original_max_position_embeddings"]
    if kind == "yarn" and "attention_factor" not in said and all(said.get(m) for m in _MSCALE):
        one, all_dims = (mscale(said["factor"], said[m]) for m in _MSCALE)
        said["attention_factor"] = one / all_dims
    ours = {names[name]: value for name, value in said.items() if name in names}
    for name in ("factor", "original_length"):
        if name in names.values() and ours.get(name) is None:
            raise UserError(f"{where}: rope_type={kind!r} without {name} is not known; add it")
    return {"kind": kind, **ours}


def _window_of(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any] | None:
    """Return our ``window``, without its rotary base; None if no layer has a window."""
    tokens, windowed = values.get("sliding_window"), _windowed_layers(values, family, where)
    if not any(windowed):
        return None
    if tokens is None:
        raise UserError(f"{where}: sliding_window is missing, but layers have windows; add it")
    if all(windowed):
        return {"tokens": tokens}
    every = windowed.index(False) + 1
    if every == 1 or windowed != [(layer + 1) % every != 0 for layer in range(len(windowed))]:
        key = "layer_types" if values.get("layer_types") else "max_window_layers"
        raise UserError(
            f"{where}: {key}={values.get(key)!r} is not supported: of our layers each n-th sees "
            "everything and the others have a window, or all have one"
        )
    return {"tokens": tokens, "global_every": every}


def _windowed_layers(values: Mapping[str, Any], family: Family, where: str) -> list[bool]:
    """Return True for each layer with a window, by the rules of the family's class."""
    layers, has = int(values.get("num_hidden_layers") or 0), TRAITS[family].windows
    kinds = list(values.get("layer_types") or [])
    for kind in kinds:
        if kind not in (FULL, SLIDING) or (kind == SLIDING and has not in ("by_layer", "switched")):
            raise UserError(f"{where}: layer_types has {kind!r}, which is not supported")
    set_ = values.get("sliding_window") is not None
    match has:
        case "all":
            if family == "mistral" and "sliding_window" not in values:
                raise UserError(f"{where}: sliding_window is missing; add it (null: none)")
            return [set_] * layers
        case "by_layer":
            pattern = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern")
            every = pattern or TRAITS[family].global_every
            assert every is not None
            return [k == SLIDING for k in kinds] or [(i + 1) % every != 0 for i in range(layers)]
        case "switched":
            if not (set_ and values.get("use_sliding_window", False)):
                return [False] * layers
            first = values.get("max_window_layers", 28)
            return [k == SLIDING for k in kinds] or [i >= first for i in range(layers)]
        case None:
            if set_ and values.get("use_sliding_window", False):
                raise UserError(
                    f"{where}: sliding_window={values['sliding_window']!r} is not supported for "
                    f"model_type={family}; use a model without it (use_sliding_window: false)"
                )
            return [False] * layers


def positions_to(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the position keys of ``config.json``; the family must support them (``lacks``).

    Uses the old flat keys, plus the new nested keys if layers with a window have their own rope.
    """
    has, scaling = TRAITS[family], _scaling_to(model.rope_scaling)
    if has.latent and isinstance(model.rope_scaling, YarnScaling):
        scaling = _as_mscale(model.rope_scaling, scaling)
    values: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    kinds = [SLIDING if model.windowed(layer) else FULL for layer in range(model.num_layers)]
    tokens = model.window_tokens
    if has.windows == "all":
        values["sliding_window"] = tokens
    if has.windows == "switched" or family == "qwen3_moe":
        values |= {"use_sliding_window": tokens is not None, "sliding_window": tokens}
        if tokens is not None:
            values |= {"max_window_layers": 0, "layer_types": kinds}
    if has.windows == "by_layer":
        # Required also without windows, where the value has no effect.
        values |= {"sliding_window": tokens or model.width, "layer_types": kinds}
    if has.own_rope:
        own = windowed_theta(model) or model.rope_theta
        values["rope_parameters"] = {
            FULL: {"rope_type": "default", **(scaling or {}), "rope_theta": model.rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": own},
        }
        if has.windowed_theta is not None:
            values["rope_local_base_freq"] = own
    return values


def _scaling_to(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    said = scaling.model_dump()
    names = {ours: theirs for theirs, ours in _NAMES[scaling.kind].items()}
    kept = {names[key]: value for key, value in said.items() if key in names}
    return {"rope_type": scaling.kind, **{k: v for k, v in kept.items() if v is not None}}


def _as_mscale(scaling: YarnScaling, values: dict[str, Any] | None) -> dict[str, Any]:
    """Return YaRN's keys in the form of DeepSeek's files, if that form can express the factors.

    Rotated components are multiplied by mscale's factor over mscale_all_dim's; all scores are
    multiplied by the square of mscale_all_dim's factor.
    """
    assert values is not None
    if not scaling.mscale_all_dim:
        return values
    said = {**values, "mscale_all_dim": scaling.mscale_all_dim}
    if scaling.factor <= 1:
        return said
    own = attention_factor(scaling) * mscale(scaling.factor, scaling.mscale_all_dim)
    by = round((own - 1.0) / (0.1 * math.log(scaling.factor)), 12)
    if by <= 0:
        return {**said, "attention_factor": attention_factor(scaling)}
    return {k: v for k, v in said.items() if k != "attention_factor"} | {"mscale": by}


def longest_of(model: ModelConfig, longest: int) -> int:
    """Return ``max_position_embeddings``; some readers derive YaRN's factor from this value."""
    scaling = model.rope_scaling
    if isinstance(scaling, YarnScaling):
        return round(scaling.factor * scaling.original_length)
    if isinstance(scaling, Llama3Scaling):
        return max(longest, round(scaling.factor * scaling.original_length))
    return longest


def windowed_theta(model: ModelConfig) -> float | None:
    """Return the rotary base of layers with a window; None: scaled as in the other layers."""
    if model.window is None or model.window.rope_theta is None:
        return model.rope_theta if model.rope_scaling is None else None
    return model.window.rope_theta


def lacks_of_positions(model: ModelConfig, family: Family) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, reason) for position or window settings ``family`` lacks."""
    has, window = TRAITS[family], model.window
    if model.rope_fraction != 1.0:
        yield "rope_fraction", model.rope_fraction, "its heads turn whole"
    if window is None or not model.num_windowed:
        return
    if has.windows is None:
        yield "window.tokens", window.tokens, "it has no windows"
        return
    if has.windows == "all" and model.num_windowed < model.num_layers:
        yield "window.global_every", window.global_every, "all its layers have a window"
    own = windowed_theta(model)
    alike = own == model.rope_theta and model.rope_scaling is None
    if not has.own_rope and window.rope_theta is not None and not alike:
        yield "window.rope_theta", window.rope_theta, "all its layers turn alike"
    elif has.own_rope and own is None:
        yield "window.rope_theta", None, "its layers with a window have no rope_scaling"
    elif has.own_rope and has.windowed_theta is None and own != model.rope_theta:
        yield "window.rope_theta", own, f"it has rope_theta={model.rope_theta} there"
