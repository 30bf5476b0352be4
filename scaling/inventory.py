"""The parameters of a model, from its description alone."""

# V vocabulary, D width, N query heads, K key/value heads, H head width, F feed-forward width,
# E experts

from __future__ import annotations

from collections.abc import Iterator

from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
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


def experts(name: str, role: Role, number: int, fan_out: int, fan_in: int) -> ParamSpec:
    """Return the spec of the same weight of all experts, stored [E, fan_out, fan_in]."""
    return ParamSpec(name, role, (number, fan_out, fan_in), fan_in=fan_in, fan_out=fan_out)


def inventory(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """Return every parameter a model of this description has, in ``named_parameters()`` order.

    Works without torch, so that a plan for thousands of GPUs can be made on a laptop; a test
    compares it with the specs that the modules themselves declare. A tied head is the embedding
    and is listed once.
    """
    specs = [embedding("embedding.weight", model.vocab_size, model.width)]
    for layer in range(model.num_layers):
        specs.extend(_block(model, layer))
    specs.append(vector("final_norm.weight", model.width))
    if not model.tied_embeddings:
        specs.append(matrix("head.weight", Role.OUTPUT, model.vocab_size, model.width))
    return tuple(specs)


def _block(model: ModelConfig, layer: int) -> Iterator[ParamSpec]:
    prefix = f"blocks.{layer}"
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
    if isinstance(model, MoEModel) and model.has_experts(layer):
        yield from _mixture(model, f"{prefix}.ffn")
    else:
        assert model.ffn_width is not None
        yield from _feed_forward(f"{prefix}.ffn", width, model.ffn_width)


def _feed_forward(prefix: str, width: int, ffn_width: int) -> Iterator[ParamSpec]:
    yield matrix(f"{prefix}.gate.weight", Role.HIDDEN, ffn_width, width)
    yield matrix(f"{prefix}.up.weight", Role.HIDDEN, ffn_width, width)
    yield matrix(f"{prefix}.down.weight", Role.HIDDEN, width, ffn_width)


def _mixture(model: MoEModel, prefix: str) -> Iterator[ParamSpec]:
    mixture, width = model.experts, model.width
    number, hidden = mixture.num_experts, mixture.width
    latent = mixture.latent_width if isinstance(mixture, LatentExperts) else None
    inner = latent or width
    yield matrix(f"{prefix}.router.weight", Role.ROUTER, number, width)
    if latent:
        yield matrix(f"{prefix}.latent_down.weight", Role.HIDDEN, latent, width)
    yield experts(f"{prefix}.experts.gate", Role.EXPERT_UP, number, hidden, inner)
    yield experts(f"{prefix}.experts.up", Role.EXPERT_UP, number, hidden, inner)
    yield experts(f"{prefix}.experts.down", Role.EXPERT_DOWN, number, inner, hidden)
    if latent:
        yield matrix(f"{prefix}.latent_up.weight", Role.HIDDEN, width, latent)
    if mixture.num_shared_experts:
        yield from _feed_forward(f"{prefix}.shared", width, mixture.num_shared_experts * hidden)
