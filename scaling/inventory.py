"""Parameters of a model, derived from its config; modules are built from this list."""

# V vocabulary, D width, N query heads, K key/value heads, H head width, F feed-forward width,
# E experts, P streams, n tokens of a prefix

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from allometry.configs.decoder import LatentAttention
from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
from allometry.scaling.roles import Normal, ParamSpec, Role, Start

PREFIX_STD = 0.02
"""Standard deviation of initial prefixes."""


def matrix(name: str, role: Role, fan_out: int, fan_in: int) -> ParamSpec:
    """Return the spec of a weight stored [fan_out, fan_in], used as ``x @ weight.T``.

    For example, ``matrix("head.weight", Role.OUTPUT, V, D)``.
    """
    return ParamSpec(name, role, (fan_out, fan_in), fan_in=fan_in, fan_out=fan_out)


def embedding(name: str, rows: int, width: int) -> ParamSpec:
    """Return the spec of a lookup table [rows, width], whose fan-in (rows) is constant."""
    return ParamSpec(name, Role.INPUT, (rows, width), fan_in=rows, fan_out=width)


def vector(name: str, size: int, start: Start = "ones", *, of_heads: bool = False) -> ParamSpec:
    """Return the spec of a gain, or of a bias that starts at zero, [size]."""
    return ParamSpec(name, Role.VECTOR, (size,), 1, size, start, of_heads)


def experts(name: str, role: Role, number: int, fan_out: int, fan_in: int) -> ParamSpec:
    """Return the spec of one weight of all experts, stored [E, fan_out, fan_in]."""
    return ParamSpec(name, role, (number, fan_out, fan_in), fan_in=fan_in, fan_out=fan_out)


Specs = Mapping[str, ParamSpec]
"""Specs by parameter name within a module; ``ParamSpec.name`` is the global name."""


def inventory(
    model: ModelConfig,
    layers: Iterable[int] | None = None,
    *,
    first: bool = True,
    last: bool = True,
) -> tuple[ParamSpec, ...]:
    """Return all parameters of a model with this config, in ``named_parameters()`` order.

    The function does not need torch, so a laptop can plan a run on thousands of GPUs. A tied head
    is the embedding and is listed once. For a part of the model: its ``layers`` (None: all), with
    the embedding if ``first`` and the head if ``last``. A tied head without its embedding has its
    own weight. For example, ``inventory(model, range(2), last=False)`` lists a first pipeline
    stage.
    """
    specs = [embedding("embedding.weight", model.vocab_size, model.width)] if first else []
    for layer in range(model.num_layers) if layers is None else layers:
        specs.extend(block_specs(model, layer, f"blocks.{layer}"))
    if last:
        specs.extend(depth_blocks(model))
        specs.append(vector("final_norm.weight", model.width))
        specs.extend(aggregator_specs(model, "aggregator"))
    if last and not (model.tied_embeddings and first):
        specs.append(matrix("head.weight", Role.OUTPUT, model.vocab_size, model.width))
    if last:
        specs.extend(depth_specs(model, mirrored=not first))
    return tuple(specs)


def depth_blocks(model: ModelConfig) -> Iterator[ParamSpec]:
    """Yield the parameters of the blocks of multi-token prediction, numbered after the others."""
    for layer in range(model.num_layers, model.num_layers + model.num_depths):
        yield from _ahead(block_specs(model, layer, f"blocks.{layer}"))


def depth_specs(model: ModelConfig, *, mirrored: bool = False) -> Iterator[ParamSpec]:
    """Yield the norms and projections of multi-token prediction; its blocks are yielded elsewhere.

    ``mirrored``: the part has no embedding, so multi-token prediction has a copy of it.
    """
    if mirrored and model.num_depths:
        table = embedding("mtp.embedding.weight", model.vocab_size, model.width)
        yield replace(table, ahead=True)
    for depth in range(model.num_depths):
        prefix = f"mtp.{depth}"
        yield from _ahead(
            (
                vector(f"{prefix}.embedding_norm.weight", model.width),
                vector(f"{prefix}.hidden_norm.weight", model.width),
                matrix(f"{prefix}.projection.weight", Role.HIDDEN, model.width, 2 * model.width),
                vector(f"{prefix}.final_norm.weight", model.width),
            )
        )


def _ahead(specs: Iterable[ParamSpec]) -> Iterator[ParamSpec]:
    return (replace(spec, ahead=True) for spec in specs)


def within(specs: Specs, module: str) -> Specs:
    """Return the specs of a submodule, by name in the submodule."""
    start = f"{module}."
    return {n.removeprefix(start): spec for n, spec in specs.items() if n.startswith(start)}


def block_specs(model: ModelConfig, layer: int, prefix: str) -> Iterator[ParamSpec]:
    """Yield the parameters of a block: norms and branches in order."""
    for branch in ("attention", "ffn"):
        if model.norms_before:
            yield vector(f"{prefix}.{branch}_norm.weight", model.width)
        if branch == "attention":
            yield from attention_specs(model, f"{prefix}.attention")
        elif isinstance(model, MoEModel) and model.has_experts(layer):
            yield from mixture_specs(model, f"{prefix}.ffn")
        else:
            assert model.ffn_width is not None, layer
            yield from ffn_specs(model.width, model.ffn_width, f"{prefix}.ffn")
        if model.norms_after:
            yield vector(f"{prefix}.{branch}_post_norm.weight", model.width)


def attention_specs(model: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    """Yield the parameters of attention: grouped-query, or latent."""
    if model.latent_attention is not None:
        yield from latent_attention_specs(model, model.latent_attention, prefix)
        return
    width, head_width = model.width, model.head_width
    queries, keys = model.num_heads * head_width, model.kv_heads * head_width
    for name, fan_out in (("wq", queries), ("wk", keys), ("wv", keys)):
        yield matrix(f"{prefix}.{name}.weight", Role.HIDDEN, fan_out, width)
        if model.qkv_bias:
            yield vector(f"{prefix}.{name}.bias", fan_out, "zeros", of_heads=True)
    if model.qk_norm:
        whole = model.qk_norm_over == "width"
        for name, features in (("q_norm", queries), ("k_norm", keys)):
            size = features if whole else head_width
            yield vector(f"{prefix}.{name}.weight", size, of_heads=whole)
    yield matrix(f"{prefix}.wo.weight", Role.HIDDEN, width, queries)
    yield from prefix_specs(model, f"{prefix}.prefix")


def prefix_specs(model: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    """Yield the prefixes of the streams in a layer, keys and values [K, P, n, H], flattened.

    As a bias, a prefix has one dimension that grows with the width, the heads.
    """
    size = model.kv_heads * model.num_streams * model.prefix_tokens * model.head_width
    for name in ("keys", "values") if size else ():
        yield vector(f"{prefix}.{name}", size, Normal(PREFIX_STD), of_heads=True)


def aggregator_specs(model: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    """Yield the parameters that compute the streams' weights, [D, D P], [D], [P, D] and [P]."""
    width, count = model.width, model.num_streams
    if model.streams is None:
        return
    yield matrix(f"{prefix}.mix.weight", Role.HIDDEN, width, width * count)
    yield vector(f"{prefix}.mix.bias", width, "zeros")
    yield matrix(f"{prefix}.choice.weight", Role.ROUTER, count, width)
    yield vector(f"{prefix}.choice.bias", count, "zeros")


def stream_names(model: ModelConfig) -> frozenset[str]:
    """Return the parameters that ``model.streams`` adds to a model of one stream."""
    plain = model.model_copy(update={"streams": None})
    return frozenset(s.name for s in inventory(model)) - {s.name for s in inventory(plain)}


def latent_attention_specs(
    model: ModelConfig, latent: LatentAttention, prefix: str
) -> Iterator[ParamSpec]:
    """Yield the parameters of multi-head latent attention; ranks grow with the width, as heads."""
    heads, width, rank = model.num_heads, model.width, latent.q_lora_rank
    if rank is not None:
        yield matrix(f"{prefix}.latent_q.weight", Role.HIDDEN, rank, width)
        yield vector(f"{prefix}.q_norm.weight", rank)
    yield matrix(f"{prefix}.wq.weight", Role.HIDDEN, heads * model.head_width, rank or width)
    shared = latent.kv_lora_rank + latent.qk_rope_head_dim
    yield matrix(f"{prefix}.latent_kv.weight", Role.HIDDEN, shared, width)
    yield vector(f"{prefix}.kv_norm.weight", latent.kv_lora_rank)
    own = latent.qk_nope_head_dim + latent.v_head_dim
    yield matrix(f"{prefix}.wkv.weight", Role.HIDDEN, heads * own, latent.kv_lora_rank)
    yield matrix(f"{prefix}.wo.weight", Role.HIDDEN, width, heads * latent.v_head_dim)


def ffn_specs(width: int, ffn_width: int, prefix: str) -> Iterator[ParamSpec]:
    """Yield the parameters of a gated feed-forward."""
    yield matrix(f"{prefix}.gate.weight", Role.HIDDEN, ffn_width, width)
    yield matrix(f"{prefix}.up.weight", Role.HIDDEN, ffn_width, width)
    yield matrix(f"{prefix}.down.weight", Role.HIDDEN, width, ffn_width)


def mixture_specs(model: MoEModel, prefix: str) -> Iterator[ParamSpec]:
    """Yield the parameters of a mixture: router, routed experts, latent projections, shared."""
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
        if isinstance(mixture, LatentExperts) and mixture.norm:
            yield vector(f"{prefix}.latent_norm.weight", latent)
        yield matrix(f"{prefix}.latent_up.weight", Role.HIDDEN, width, latent)
    if mixture.num_shared_experts:
        yield from ffn_specs(width, mixture.num_shared_experts * hidden, f"{prefix}.shared")
