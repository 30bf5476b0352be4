"""Smallest run with a configuration's layout: random data, few steps, few tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from allometry.configs.decoder import LatentAttention
from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig
from allometry.configs.run import RunConfig
from allometry.data.changes import declared
from allometry.data.synthetic import write_random_store
from allometry.scaling.layout import Layout

STEPS = 4


def small_run(config: RunConfig, scratch: Path) -> RunConfig:
    """Return the configuration with random data, few steps, and without optional features."""
    sources = []
    for index, source in enumerate(config.data.sources):
        prefix = scratch / f"source-{index}"
        length = longest(config)
        write_random_store(
            prefix, 64 * length, config.model.vocab_size, mean_length=max(2, length // 2)
        )
        random = {"train": str(prefix), "validation": None, "max_epochs": None, "select": None}
        sources.append(source.model_copy(update=random))
    replay = config.data.replay
    data = config.data.model_copy(
        update={
            "sources": tuple(sources),
            "tokenizer": None,
            "continue_sources": False,
            "allow_epochs": 1e9,  # random tokens, for a few steps
            # Later ratios apply to a longer run.
            "replay": replay and replay.model_copy(update={"changes": ()}),
        }
    )
    text = config.model_dump(mode="json") | {
        "data": data.model_dump(mode="json"),
        "schedule": {"kind": "constant"},
        "checkpoint": {"every_steps": 2, "keep_last": 10, "asynchronous": False},
        "record": {"tensorboard": False},
        "evaluation": {},
    }
    text["run"] |= {"parent": None, "initial": None}
    text["training"] |= {"total_tokens": None, "total_steps": STEPS, "compile": False}
    text["training"] |= {"compute_dtype": "fp32"}
    text["batch"] = {"sequences": least_sequences(config), "micro_batch_sequences": 1}
    return RunConfig.model_validate(text)


def longest(config: RunConfig) -> int:
    """Return the tokens of the longest sequence or document."""
    data = config.data
    return data.max_document_tokens if data.kind == "documents" else data.sequence_length


def least_sequences(config: RunConfig) -> int:
    """Return the smallest batch of a configuration.

    A document of any length fits in, and in each step at least one document begins: the heaviest
    source has more windows per step than a document can cover (``feed.check_steps``).
    """
    data = config.data
    if data.kind != "documents":
        return 1
    heaviest = min(max(change.shares.values()) for change in declared(data))
    windows = data.max_document_tokens // data.sequence_length + 2
    return math.ceil(windows / heaviest + 1e-6)


def smallest_batch(configs: Sequence[RunConfig], *world_sizes: int) -> int:
    """Return the fewest sequences of a step that every layout can run, at least two per rank."""
    failure: UserError | None = None
    least = max(least_sequences(config) for config in configs)
    ranks = max(int(config.parallel.hdp) for config in configs)
    for sequences in range(max(2, least), max(129, 2 * least, 4 * ranks)):
        try:
            for config, world_size in zip(configs, world_sizes, strict=True):
                sized = config.batch.model_copy(update={"sequences": sequences})
                Layout.of(config.model_copy(update={"batch": sized}), world_size)
        except UserError as error:
            failure = error
        else:
            if sequences >= 2 * ranks:
                return sequences
    assert failure is not None
    raise failure


def shrunk(config: RunConfig, world_size: int) -> RunConfig:
    """Return a configuration with the same layout and kinds of modules, and a minimal model.

    Widths, heads, vocabulary and sequences become as small as ``tp`` and ``ep`` allow, with only as
    many layers as the pipeline needs. A parameterization may refuse a width, so several are tried.
    Raises UserError: the configuration's own layout is not possible. For example,
    ``shrunk(config, 8).model.num_layers``.
    """
    degrees = Layout.of(config, world_size).degrees
    failure: Exception | None = None
    for layers in _doubled(config.model.num_layers):
        for head_dim in (8, 16, 32, 64, 128):
            tree = config.model_dump(mode="json")
            tree["model"] |= _sizes(config.model, degrees.tp, layers, head_dim)
            tree["parallel"]["hdp"] = degrees.hdp
            _shorten(tree, degrees.tp)
            if config.model.window is not None:
                tree["model"]["window"] |= _narrowed(config, tree["data"], layers)
            try:
                found = RunConfig.model_validate(tree)
                Layout.of(found, world_size)
            except (UserError, ValueError) as error:
                failure = error
                continue
            return found
    raise UserError(f"no smaller model has this layout ({failure})")


def _doubled(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _sizes(model: ModelConfig, tp: int, layers: int, head_dim: int) -> dict[str, Any]:
    """Return keys of a model section: the fewest heads that tp can share, and matching widths."""
    kv_heads = model.num_kv_heads or model.num_heads
    kv_shared = math.lcm(tp, 2) if kv_heads % 2 == 0 else tp
    groups = model.num_heads // kv_heads
    heads = groups * kv_shared
    sizes: dict[str, Any] = {
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_shared,
        "head_dim": head_dim,
        "width": heads * head_dim,
        "vocab_size": min(model.vocab_size, max(128, 8 * tp)),
    }
    latent = model.latent_attention
    if latent is not None:
        sizes |= {"head_dim": None, "latent_attention": _latent_sizes(latent, head_dim)}
    if model.kind == "dense":
        return sizes | {"ffn_width": 16 * math.lcm(tp, 2)}
    if model.ffn_width is not None:
        sizes["ffn_width"] = 16 * math.lcm(tp, 2)
        sizes["first_dense_layers"] = min(model.first_dense_layers, layers - 1)
    experts = model.experts.model_dump(mode="json") | {"width": 16 * math.lcm(tp, 2)}
    if "latent_width" in experts:
        experts["latent_width"] = 16
    return sizes | {"experts": experts}


def _latent_sizes(latent: LatentAttention, head_dim: int) -> dict[str, Any]:
    """Keys of latent attention whose widths are that of a head, or twice it."""
    return latent.model_dump(mode="json") | {
        "q_lora_rank": None if latent.q_lora_rank is None else 2 * head_dim,
        "kv_lora_rank": 2 * head_dim,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim,
        "v_head_dim": head_dim,
    }


def _narrowed(config: RunConfig, short: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a window in proportion to short sequences or documents, with both layer kinds."""
    window, documents = config.model.window, short["kind"] == "documents"
    assert window is not None
    length = short["max_document_tokens" if documents else "sequence_length"]
    every = window.global_every
    return {
        "tokens": max(1, window.tokens * length // longest(config)),
        "global_every": every and max(2, min(every, layers)),
    }


def _shorten(tree: dict[str, Any], tp: int) -> None:
    """Shorten sequences, or documents and the tokens per rank, in the same proportion."""
    data = tree["data"]
    short = 32 * tp
    if data["kind"] == "documents":
        capacity = tree["parallel"]["context"]["capacity_tokens"]
        longest = data["max_document_tokens"]
        tree["parallel"]["context"]["capacity_tokens"] = short
        data["max_document_tokens"] = max(2, short * longest // capacity)
    data["sequence_length"] = min(data["sequence_length"], short)
    tree["batch"] |= {"ramp": None}
    tree["training"] |= {"total_tokens": None, "total_steps": STEPS, "compile": False}
    tree["schedule"] = {"kind": "constant"}
