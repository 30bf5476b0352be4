"""Conversion of our ``model`` section to Hugging Face ``config.json`` and back.

Only keys that change the function of a model are converted. A Hugging Face key that our models do
not support, or a choice of ours that the family does not support, is an error with the key's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from allometry.configs.decoder import Activation, YarnScaling
from allometry.configs.errors import UserError
from allometry.configs.model import DenseModel, ModelConfig, MoEModel
from allometry.interop.huggingface import deepseek
from allometry.interop.huggingface.families import (
    FAMILIES,
    TRAITS,
    Family,
    embedding_scale,
    gate_of,
    lacks,
)
from allometry.interop.huggingface.positions import (
    KEYS,
    lacks_of_positions,
    longest_of,
    positions_of,
    positions_to,
    windowed_theta,
)
from allometry.models.rotary import attention_factor

# Keys that do not change the function of given weights: names, tokens, caches, training settings.
# Llama's pretraining_tp only splits its matrix products.
_WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "initializer_range",
        "max_position_embeddings",
        "cache_implementation",
        "pretraining_tp",
        "output_router_logits",
        "router_aux_loss_coef",
    ]
)
# Keys with their only supported values, for features that our models lack.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "router_jitter_noise": (0, None),
    "partial_rotary_factor": (1, None),
    "decoder_sparse_step": (1, None),
}
_ACTIVATIONS: Mapping[Activation, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu_tanh": ("gelu_pytorch_tanh",),
}
_SIZES = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
        "hidden_activation",
    ]
)
_OWN_KEYS: Mapping[Family, frozenset[str]] = {
    "gemma3_text": frozenset({"query_pre_attn_scalar"}),
    "mixtral": frozenset({"num_local_experts", "num_experts_per_tok"}),
    "qwen3_moe": frozenset(
        [
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "mlp_only_layers",
        ]
    ),
    "deepseek_v3": deepseek.OWN_KEYS,
}
# Keys used in training but not in a forward pass with given weights.
_TRAINING_ONLY = ("dropout", "z_loss", "multi_token", "router.balance", "router.z_loss")


def choose_family(model: ModelConfig, asked: str | None = None) -> Family:
    """Return the family that computes the same function as ``model``; ``asked`` must be that one.

    Raises UserError with the first key of ``model`` that the family does not support. For example,
    a Llama-like dense model with ``qkv_bias`` gives "qwen2".
    """
    if asked is not None and asked not in FAMILIES:
        raise UserError(f"--family={asked} is not known; use one of {', '.join(FAMILIES)}")
    missing = {f: [*lacks(model, f), *lacks_of_positions(model, f)] for f in FAMILIES}
    alike = [f for f in FAMILIES if TRAITS[f].experts == isinstance(model, MoEModel)]
    windows = model.window is not None
    nearest = min(alike, key=lambda f: (len(missing[f]), windows and TRAITS[f].windows is None))
    chosen = nearest if asked is None else next(f for f in FAMILIES if f == asked)
    for key, value, why in missing[chosen]:
        said = json.dumps(value) if isinstance(value, bool) else value
        if asked is not None and not missing[nearest]:
            raise UserError(
                f"--family={asked} cannot hold model.{key}={said} ({why}); {nearest} can: leave "
                "--family out"
            )
        raise UserError(
            f"model.{key}={said} has no counterpart in {TRAITS[chosen].architecture} ({why}); this "
            "model cannot be exported to it"
        )
    return chosen


@dataclass(frozen=True, slots=True)
class Text:
    """Entries of ``config.json`` on lengths and tokens."""

    longest: int
    end_of_document_id: int | None = None


def to_hf(model: ModelConfig, family: Family, dtype: str, text: Text) -> dict[str, Any]:
    """Return the content of ``config.json``; ``dtype`` is torch's name, e.g. "bfloat16".

    Uses only keys that both transformers 4 and 5 (and other readers of such files) support.
    """
    values: dict[str, Any] = {
        "architectures": [TRAITS[family].architecture],
        "model_type": family,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": _ACTIVATIONS[model.activation][0],
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": longest_of(model, text.longest),
        "tie_word_embeddings": model.tied_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": text.end_of_document_id,
        "use_cache": True,
    }
    if family not in ("mistral", "qwen2", "mixtral"):
        values["attention_bias"] = False
    if family == "llama":
        values["mlp_bias"] = False
    if family == "gemma3_text":
        values["hidden_activation"] = values.pop("hidden_act")
        values["query_pre_attn_scalar"] = model.head_width
    values |= positions_to(model, family)
    if isinstance(model, DenseModel):
        return values | {"intermediate_size": model.ffn_width}
    if family == "deepseek_v3":
        del values["head_dim"]
        return values | deepseek.written(model)
    experts = model.experts
    values["num_experts_per_tok"] = experts.experts_per_token
    if family == "mixtral":
        return values | {
            "intermediate_size": experts.width,
            "num_local_experts": experts.num_experts,
        }
    return values | {
        # Read only by dense layers, but required by some readers.
        "intermediate_size": model.ffn_width or experts.width,
        "moe_intermediate_size": experts.width,
        "num_experts": experts.num_experts,
        "norm_topk_prob": gate_of(model)[1],
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.first_dense_layers)),
    }


def from_hf(values: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Return the family and our ``model`` section for the content of a ``config.json``.

    ``where``: name of the file in errors. Training-only keys (dropout, balance of experts, z-loss)
    get our defaults. Raises UserError for an unknown architecture, a feature that our models lack,
    an unknown key that is not empty, and a value of the wrong type.
    """
    try:
        return _described(values, where)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: a value is of another kind than its key takes ({error}); restore the file"
        ) from None


def _described(values: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    family: Family | None = next((f for f in FAMILIES if f == values.get("model_type")), None)
    if family is None:
        raise UserError(
            f"{where}: model_type={values.get('model_type')!r} cannot be imported; use a model of "
            f"{', '.join(FAMILIES)}"
        )
    has = TRAITS[family]
    positions = positions_of(values, family, where)
    _check_features(values, family, where)
    description = {
        "vocab_size": _need(values, "vocab_size", where),
        "width": _need(values, "hidden_size", where),
        "num_layers": _need(values, "num_hidden_layers", where),
        "num_heads": _need(values, "num_attention_heads", where),
        "num_kv_heads": values.get("num_key_value_heads")
        if family in ("llama", "olmo2", "olmo3")
        else _need(values, "num_key_value_heads", where),
        "head_dim": values.get("head_dim", has.head_dim),
        "qkv_bias": has.qkv_bias,
        "qk_norm": has.qk_norm is not None,
        "qk_norm_over": has.qk_norm or "head",
        "norms": has.norms,
        "activation": has.activation,
        "tied_embeddings": bool(values.get("tie_word_embeddings", has.tied)),
        "norm_eps": _need(values, "rms_norm_eps", where),
        **positions,
    }
    if has.scaled_embedding:
        description["embedding_scale"] = embedding_scale(description["width"])
    try:
        if not has.experts:
            ffn_width = _need(values, "intermediate_size", where)
            return family, DenseModel.model_validate({**description, "ffn_width": ffn_width})
        experts = _experts(values, family, where)
        return family, MoEModel.model_validate({**description, **experts})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "model"
        raise UserError(
            f"{where} does not describe a model of ours: {key}={first.get('input')!r}: "
            f"{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _need(values: Mapping[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{where}: {key} is missing; add it")
    return values[key]


def _experts(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the keys of ``MoEModel`` that are not in a dense model."""
    if family == "deepseek_v3":
        return deepseek.described(values, lambda values, key: _need(values, key, where))
    visits = _need(values, "num_experts_per_tok", where)
    experts: dict[str, Any] = {"kind": "swiglu", "experts_per_token": visits}
    if family == "mixtral":
        experts["num_experts"] = _need(values, "num_local_experts", where)
        experts["width"] = _need(values, "intermediate_size", where)
        return {"experts": experts, "router": {"gate": "softmax_after_topk"}}
    counts = {values[key] for key in ("num_experts", "num_local_experts") if values.get(key)}
    if len(counts) > 1:
        raise UserError(f"{where}: num_experts and num_local_experts differ; remove one of them")
    experts["num_experts"] = counts.pop() if counts else _need(values, "num_experts", where)
    experts["width"] = _need(values, "moe_intermediate_size", where)
    dense = list(values.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise UserError(
            f"{where}: mlp_only_layers={dense} is not supported: our dense layers are the first "
            "ones, 0, 1, ..."
        )
    return {
        "experts": experts,
        "first_dense_layers": len(dense),
        "ffn_width": _need(values, "intermediate_size", where) if dense else None,
        "router": {"gate": "softmax", "normalize": bool(values.get("norm_topk_prob", False))},
    }


def _check_features(values: Mapping[str, Any], family: Family, where: str) -> None:
    """Raise UserError for a key that is unknown or that our models do not support."""
    fixed = {**_FIXED, **(deepseek.FIXED if family == "deepseek_v3" else {})}
    for key, allowed in fixed.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"{where}: {key}={values[key]!r} is not supported; only {allowed[0]!r} is"
            )
    names = _ACTIVATIONS[TRAITS[family].activation]
    for key in ("hidden_act", "hidden_activation"):
        if values.get(key, names[0]) not in (*names, None):
            raise UserError(
                f"{where}: {key}={values[key]!r} is not supported; only {names[0]!r} is"
            )
    known = _WITHOUT_EFFECT | _FIXED.keys() | _SIZES | KEYS | _OWN_KEYS.get(family, frozenset())
    for key in sorted(values.keys() - known):
        # Old files write absent features as null, false, 0 or empty lists.
        if values[key]:
            raise UserError(
                f"{where}: {key}={values[key]!r} is not known for model_type={family}, and might "
                "change what the model computes; remove it if it does not"
            )


def attention_scale(values: Mapping[str, Any], model: ModelConfig, family: Family) -> float:
    """Return the factor on attention scores in the Hugging Face model.

    Usually 1/sqrt(head width); Gemma's files may set another width, and DeepSeek multiplies by
    YaRN's factor. ``values``: content of the ``config.json``, read or to be written.
    """
    plain = 1.0 / math.sqrt(values.get("query_pre_attn_scalar") or model.head_width)
    return plain * model.score_factor if TRAITS[family].latent else plain


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, ours, theirs) for each key in which two models compute different functions.

    Defaults are filled in, and training-only keys are excluded.
    """
    one, other = _function(ours), _function(theirs)
    keys = sorted(one.keys() | other.keys())
    return [(k, one.get(k), other.get(k)) for k in keys if one.get(k) != other.get(k)]


def _function(model: ModelConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if any(path == key or path.startswith(f"{key}.") for key in _TRAINING_ONLY):
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            flat[path] = value

    walk(model.model_dump(mode="json"), "")
    flat |= {"num_kv_heads": model.kv_heads, "head_dim": model.head_width}
    if model.window is not None:
        every = model.window.global_every
        flat["window.global_every"] = every if every and every <= model.num_layers else None
        flat["window.rope_theta"] = windowed_theta(model)
    if isinstance(model.rope_scaling, YarnScaling):
        # DeepSeek's files give this factor as a quotient, so it is rounded.
        flat["rope_scaling.attention_factor"] = round(attention_factor(model.rope_scaling), 12)
    if isinstance(model, MoEModel):
        flat["router.gate"], flat["router.normalize"] = gate_of(model)
        if model.router.groups_per_token in (None, model.router.num_groups):
            flat["router.num_groups"] = flat["router.groups_per_token"] = None
    return flat
