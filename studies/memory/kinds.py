"""What each storage that was alive in a step is called: the names that a prediction has."""

from __future__ import annotations

from collections.abc import Callable

from allometry.configs.model import ModelConfig, MoEModel
from allometry.studies.memory.live import BACKWARD, FORWARD, HEAD, Stored

_OPERATIONS = {
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "final_norm": "norms",
    "q_norm": "norms",
    "k_norm": "norms",
    "wq": "q, k, v",
    "wk": "q, k, v",
    "wv": "q, k, v",
    "gate": "gate, up",
    "up": "gate, up",
    "router": "router",
    "latent_down": "expert rows",
    "latent_up": "expert rows",
}


def kind_of(model: ModelConfig) -> Callable[[Stored], str]:
    """Return what names a storage of a step of this model."""
    hidden = model.experts.width if isinstance(model, MoEModel) else 0

    def kind(stored: Stored) -> str:
        if stored.kind is not None:
            return stored.kind
        if stored.of_weight or stored.resized:
            return "weight copies"
        if stored.born == HEAD:
            return "loss"
        if stored.born == FORWARD and stored.died in (None, BACKWARD):
            return f"saved: {_operation(stored, hidden)}"
        return "workspace"

    return kind


def _operation(stored: Stored, hidden: int) -> str:
    leaf = stored.scope.rpartition(".")[2]
    name = stored.operator.partition("::")[2]
    if stored.operator.startswith(("c10d", "_c10d")) and leaf != "experts":
        return "gathered tokens"
    if leaf in _OPERATIONS:
        return _OPERATIONS[leaf]
    if leaf == "attention":
        return "q, k, v" if name in ("_to_copy", "cat") else "attention"
    if leaf == "experts" and name not in ("silu", "mul"):
        return "gate, up" if stored.last_dim == hidden else "expert rows"
    if leaf in ("ffn", "shared", "experts"):
        return "SwiGLU" if name in ("silu", "mul") else "residual"
    return "residual"
