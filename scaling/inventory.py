"""The parameters of a model, from its description alone."""

# V vocabulary, D width, N query heads, K key/value heads, H head width, F feed-forward width

from __future__ import annotations

from collections.abc import Iterator

from allometry.configs.model import ModelConfig
from allometry.scaling.roles import ParamSpec, Role


def matrix(name: str, role: Role, fan_out: int, fan_in: int) -> ParamSpec:
    """Return the spec of a weight stored [fan_out, fan_in], used as ``x @ weight.T``."""
    return ParamSpec(name, role, (fan_out, fan_in), fan_in=fan_in, fan_out=fan_out)


def embedding(name: str, rows: int, width: int) -> ParamSpec:
    """Return the spec of a lookup table [rows, width], whose fan-in (rows) never grows."""
    return ParamSpec(name, Role.INPUT, (rows, width), fan_in=rows, fan_out=width)


def vector(name: str, size: int) -> ParamSpec:
    """Return the spec of a gain or bias [size]."""
    return ParamSpec(name, Role.VECTOR, (size,), fan_in=1, fan_out=size)


def inventory(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """Return every parameter a model of this description has, in ``named_parameters()`` order.

    Works without torch, so that a plan for thousands of GPUs can be made on a laptop; a test
    compares it with the specs that the modules themselves declare. A tied head is the embedding
    and is listed once.
    """
    specs = [embedding("embedding.weight", model.vocab_size, model.width)]
    for layer in range(model.num_layers):
        specs.extend(_block(model, f"blocks.{layer}"))
    specs.append(vector("final_norm.weight", model.width))
    if not model.tied_embeddings:
        specs.append(matrix("head.weight", Role.OUTPUT, model.vocab_size, model.width))
    return tuple(specs)


def _block(model: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    width, head_width = model.width, model.head_width
    queries, keys = model.num_heads * head_width, model.kv_heads * head_width
    yield vector(f"{prefix}.attention_norm.weight", width)
    yield matrix(f"{prefix}.attention.wq.weight", Role.HIDDEN, queries, width)
    yield matrix(f"{prefix}.attention.wk.weight", Role.HIDDEN, keys, width)
    yield matrix(f"{prefix}.attention.wv.weight", Role.HIDDEN, keys, width)
    if model.qk_norm:
        yield vector(f"{prefix}.attention.q_norm.weight", head_width)
        yield vector(f"{prefix}.attention.k_norm.weight", head_width)
    yield matrix(f"{prefix}.attention.wo.weight", Role.HIDDEN, width, queries)
    yield vector(f"{prefix}.ffn_norm.weight", width)
    yield matrix(f"{prefix}.ffn.gate.weight", Role.HIDDEN, model.ffn_width, width)
    yield matrix(f"{prefix}.ffn.up.weight", Role.HIDDEN, model.ffn_width, width)
    yield matrix(f"{prefix}.ffn.down.weight", Role.HIDDEN, width, model.ffn_width)
