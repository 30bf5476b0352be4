"""Names of the storages of a step, equal to the names in a memory estimate."""

from __future__ import annotations

from collections.abc import Callable

from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.moment import COPIES, LOSS, WORKSPACE
from allometry.scaling.saved import (
    ATTENTION,
    GATE_UP,
    GATHERED,
    NORMS,
    QKV,
    RESIDUAL,
    ROUTER,
    ROWS,
    STREAMS,
    SWIGLU,
)
from allometry.studies.memory.live import BACKWARD, BETWEEN, FORWARD, HEAD, Stored

_MODULES = {
    **dict.fromkeys(("attention_norm", "ffn_norm", "final_norm"), NORMS),
    **dict.fromkeys(("q_norm", "k_norm", "kv_norm"), NORMS),
    **dict.fromkeys(("attention_post_norm", "ffn_post_norm"), NORMS),
    **dict.fromkeys(("wq", "wk", "wv", "latent_q", "latent_kv", "wkv"), QKV),
    **dict.fromkeys(("gate", "up"), GATE_UP),
    **dict.fromkeys(("latent_down", "latent_up"), ROWS),
    "router": ROUTER,
    **dict.fromkeys(("aggregator", "mix", "choice"), STREAMS),
}
_INPUTS = {"wo": ATTENTION, "down": SWIGLU, "latent_down": NORMS, "latent_up": ROWS}
_PRODUCTS = ("mm", "linear", "_to_copy", "cat", "clone")


def kind_of(model: ModelConfig) -> Callable[[Stored], str]:
    """Return a function that names a storage of a step of this model."""

    def kind(stored: Stored) -> str:
        if stored.kind is not None:
            return stored.kind
        # Memory allocated before the first forward, and kept, is that of cast weights.
        kept = stored.born == BETWEEN and stored.operator == "aten::empty" and stored.half
        if stored.of_weight or stored.resized or kept:
            return COPIES
        if stored.born == HEAD:
            return LOSS
        forward = stored.born == FORWARD and stored.died in (None, BACKWARD)
        recomputed = stored.born == BACKWARD and stored.scope.startswith("blocks.")
        return f"saved: {_operation(stored, model)}" if forward or recomputed else WORKSPACE

    return kind


def _operation(stored: Stored, model: ModelConfig) -> str:
    leaf = stored.scope.rpartition(".")[2]
    name = stored.operator.partition("::")[2]
    whole = stored.last_dim == model.width and name != "mm"
    sent = stored.operator.startswith(("c10d", "_c10d"))
    if stored.fp8:
        return _input(leaf, stored.last_dim, model)
    if leaf in ("attention", "ffn", "shared") and whole and (sent or name == "cat"):
        return GATHERED
    if leaf in _MODULES:
        return _MODULES[leaf]
    if leaf == "attention":
        return QKV if name in _PRODUCTS else ATTENTION
    if leaf == "experts":
        width = model.experts.width if isinstance(model, MoEModel) else 0
        if stored.last_dim % width or stored.last_dim == model.width:
            return ROWS
    if leaf in ("ffn", "shared", "experts"):
        return SWIGLU if name in ("silu", "gelu", "mul") else GATE_UP
    return RESIDUAL


def _input(leaf: str, last_dim: int, model: ModelConfig) -> str:
    """Return the kind of an FP8 tensor: the input of the module that keeps it."""
    if leaf == "experts" and isinstance(model, MoEModel):
        inside = {2 * model.experts.width: GATE_UP, model.experts.width: SWIGLU}
        return inside.get(last_dim, ROWS)
    if leaf in ("attention", "ffn", "shared"):
        return NORMS if last_dim == model.width else GATE_UP
    return _INPUTS.get(leaf) or _MODULES.get(leaf, RESIDUAL)
