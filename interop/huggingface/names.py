"""Tensor names and layouts: our parameters to Hugging Face tensors and back, one at a time.

Linear weights and rotary halves have the same layout on both sides and are not transposed; only
DeepSeek-V3's rotated rows are permuted (``Counterpart.rows``). The experts of a layer are one
tensor in our models and one tensor per expert in Hugging Face files.
"""

# E experts, F feed-forward width, D width, V vocabulary

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from allometry.configs.decoder import NormPlaces
from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, MoEModel
from allometry.interop.huggingface import deepseek
from allometry.interop.huggingface.families import TRAITS, Family
from allometry.scaling.inventory import inventory, vector
from allometry.scaling.parameterizations.base import ForwardScales
from allometry.scaling.roles import ParamSpec

_OUTER: Mapping[str, str] = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INNER: Mapping[str, str] = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
# Norms by their place in a block; Hugging Face names depend on the neighbouring module.
_NORMS: Mapping[NormPlaces, Mapping[str, str]] = {
    "before": {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    "after": {
        "attention_post_norm": "post_attention_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
}
# Module of the experts, and names of gate, up and down, in the family's files.
_EXPERTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "deepseek_v3": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
HEAD = "lm_head.weight"
# Tables stored in old files; every model computes them.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
# Router buffers of visit fractions; the forward pass does not read them.
_BOOKKEEPING = re.compile(r"^blocks\.\d+\.ffn\.router\.load$")
# Selection bias of a router, all zeros unless router.balance.kind is bias.
_ROUTER_BIAS = re.compile(r"^blocks\.\d+\.ffn\.router\.bias$")

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """One layout in which a file may store a parameter.

    ``names``: one tensor, or one per expert if ``stacked``. ``half`` 0 or 1: the first or second
    half of dimension 1 (gate and up fused to [E, 2F, D]).
    """

    names: tuple[str, ...]
    stacked: bool = False
    half: int | None = None


@dataclass(frozen=True, slots=True)
class Counterpart:
    """One of our parameters and its Hugging Face tensors; files are written as ``sources[0]``.

    ``offset``: added to the stored tensor by the Hugging Face model. ``rows``: for each of our rows
    the index of the Hugging Face row; None for equal order. ``buffer``: a router's bias, which is
    not a parameter of ours and stays in fp32. ``copies``: tensors with the same values, written as
    well, and optional in a folder that is read.
    """

    spec: ParamSpec
    sources: tuple[Source, ...]
    offset: float = 0.0
    rows: tuple[int, ...] | None = None
    buffer: bool = False
    copies: tuple[str, ...] = ()

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        """Return the stored type of this tensor in a model of ``dtype``."""
        return torch.float32 if self.buffer else dtype

    @property
    def written(self) -> tuple[str, ...]:
        """Return the names of the tensors to write."""
        return (*self.sources[0].names, *self.copies)

    def shape_in(self, source: Source) -> tuple[int, ...]:
        """Return the shape that each tensor of ``source`` must have."""
        if source.stacked:
            return self.spec.shape[1:]
        if source.half is not None:
            E, F, D = self.spec.shape
            return E, 2 * F, D
        return self.spec.shape

    def split(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the tensors to write from our fp32 ``tensor``, each with its own storage."""
        assert tuple(tensor.shape) == self.spec.shape, (self.spec.name, tensor.shape)
        tensor = (tensor - self.offset if self.offset else tensor).to(self.stored_as(dtype))
        if self.rows is not None:
            tensor = tensor[torch.tensor(self.rows).argsort()]
        if not self.sources[0].stacked:
            copies = {name: tensor.clone() for name in self.copies}
            return {self.written[0]: tensor.contiguous(), **copies}
        return {name: part.clone() for name, part in zip(self.written, tensor, strict=True)}

    def kept(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return our fp32 ``tensor`` as it reads back after ``split`` to ``dtype``."""
        if not self.offset:
            return tensor.to(self.stored_as(dtype)).float()
        return (tensor - self.offset).to(dtype).float() + self.offset

    def join(self, source: Source, read: Read) -> Tensor:
        """Return our parameter in fp32, from the tensors of ``source``."""
        if source.stacked:
            joined = torch.empty(self.spec.shape, dtype=torch.float32)
            for name, into in zip(source.names, joined, strict=True):
                into.copy_(read(name))
            return joined
        tensor = read(source.names[0])
        if source.half is not None:
            tensor = tensor.chunk(2, dim=1)[source.half]
        tensor = tensor.to(torch.float32).contiguous()
        if self.rows is not None:
            tensor = tensor[torch.tensor(self.rows)]
        return tensor + self.offset if self.offset else tensor


def counterparts(model: ModelConfig, family: Family) -> tuple[Counterpart, ...]:
    """Return the counterpart of each parameter of ``model`` in ``family``, in our order.

    Raises UserError with the name of a parameter without counterpart. For example,
    ``blocks.0.attention.wq.weight`` is ``model.layers.0.self_attn.q_proj.weight`` in Llama.
    """
    has = TRAITS[family]
    found = [
        Counterpart(
            spec,
            _sources(spec, model, family),
            has.gain_offset if spec.start == "ones" else 0.0,
            deepseek.rows_of(model, spec.name) if has.latent else None,
            copies=deepseek.copies_of(model, spec) if has.latent else (),
        )
        for spec in inventory(model)
    ]
    return (*found, *(_router_biases(model) if has.latent else ()))


def _router_biases(model: ModelConfig) -> Iterator[Counterpart]:
    """Yield the router biases, which DeepSeek-V3's forward pass reads."""
    assert isinstance(model, MoEModel)
    for layer in filter(model.has_experts, range(model.num_blocks)):
        spec = vector(f"blocks.{layer}.ffn.router.bias", model.experts.num_experts, "zeros")
        name = f"model.layers.{layer}.{deepseek.ROUTER_BIAS}"
        yield Counterpart(spec, (Source((name,)),), buffer=True)


def _modules(model: ModelConfig, family: Family) -> dict[str, str]:
    """Return the Hugging Face names of a block's modules, by our names."""
    has = TRAITS[family]
    own = dict(deepseek.NAMES) if has.latent else {}
    if model.latent_attention is not None and model.latent_attention.q_lora_rank is None:
        own.pop("attention.wq", None)  # without low rank, wq has the usual name
    return {**_INNER, **_NORMS[has.norms], **own}


def _sources(spec: ParamSpec, model: ModelConfig, family: Family) -> tuple[Source, ...]:
    if spec.name in _OUTER:
        return (Source((_OUTER[spec.name],)),)
    if spec.ahead and not TRAITS[family].latent:
        raise UserError(
            f"parameter {spec.name} of multi-token prediction has no counterpart in a model of "
            f"{family}; add --main-model to convert the model without its multi-token prediction"
        )
    if (depth := deepseek.name_of_depth(model, spec.name)) is not None:
        return (Source((depth,)),)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+?)(?:\.(weight|bias))?", spec.name)
    if match is not None:
        layer, inner, kind = f"model.layers.{match[1]}", match[2], match[3]
        modules = _modules(model, family)
        if inner in modules:
            return (Source((f"{layer}.{modules[inner]}.{kind}",)),)
        if family in _EXPERTS:
            module, names = _EXPERTS[family]
            if inner == "ffn.router":
                # transformers 5 names Mixtral's module mlp in memory and in raw state dicts.
                places = dict.fromkeys((module, "mlp"))
                return tuple(Source((f"{layer}.{place}.gate.weight",)) for place in places)
            kind = inner.removeprefix("ffn.experts.")
            if kind in names:
                # One tensor per expert in files; fused in raw state dicts of transformers 5.
                each = f"{layer}.{module}.experts.{{}}.{names[kind]}.weight"
                fused = f"{layer}.mlp.experts.{'down_proj' if kind == 'down' else 'gate_up_proj'}"
                half = {"gate": 0, "up": 1}.get(kind)
                files = Source(tuple(map(each.format, range(spec.shape[0]))), stacked=True)
                return files, Source((fused,), half=half)
    raise UserError(
        f"parameter {spec.name} has no counterpart in a model of {family}; nothing was written"
    )


def locate(
    wanted: Collection[Counterpart],
    present: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    tied: bool,
    left_out: Collection[str] = (),
) -> dict[str, Source]:
    """Return the source of each of our parameters among the tensors ``present`` (names, shapes).

    Raises UserError with the names of tensors that are missing, unexpected (except ``left_out``) or
    of another shape. A tied model may also store the head; the caller must compare the head with
    the embedding.
    """
    places: dict[str, Source] = {}
    missing: list[str] = []
    for counterpart in wanted:
        source = next((s for s in counterpart.sources if set(s.names) <= present.keys()), None)
        if source is None:
            names = counterpart.sources[0].names
            missing += [name for name in names if name not in present]
            continue
        places[counterpart.spec.name] = source
        for name in source.names:
            if present[name] != counterpart.shape_in(source):
                raise UserError(
                    f"{where}: tensor {name} has shape {list(present[name])}, but config.json "
                    f"asks for {list(counterpart.shape_in(source))}"
                )
    used = {name for source in places.values() for name in source.names}
    used |= {HEAD} if tied else set()
    used |= {name for counterpart in wanted for name in counterpart.copies}
    used |= set(left_out)
    extra = [name for name in present if name not in used and not _COMPUTED.search(name)]
    for problem, names in (("is missing", missing), ("has no counterpart in our models", extra)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where}: tensor {min(names)} {problem}{more}; nothing was written")
    return places


def check_names(
    model: ModelConfig, present: Mapping[str, tuple[int, ...]], where: str
) -> tuple[str, ...]:
    """Raise UserError unless ``present`` are the parameters of ``model``; return the router biases.

    ``present``: names and shapes of a checkpoint's model tensors, buffers included. The caller must
    check that the biases are zero if the family has none.
    """
    specs = {spec.name: spec for spec in inventory(model)}
    biases = tuple(name for name in present if _ROUTER_BIAS.search(name))
    for name, spec in specs.items():
        if name not in present:
            raise UserError(f"{where}: parameter {name} is missing; nothing was written")
        if present[name] != spec.shape:
            raise UserError(
                f"{where}: parameter {name} has shape {list(present[name])}, but the run's model "
                f"section asks for {list(spec.shape)}"
            )
    for name in present:
        if name not in specs and name not in biases and not _BOOKKEEPING.search(name):
            raise UserError(f"{where}: tensor {name} has no counterpart there; nothing was written")
    return biases


@dataclass(frozen=True, slots=True)
class Fold:
    """Multiplier of our forward pass that an export multiplies into weights."""

    scale: str
    factor: float
    parameters: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """True if the multiplication is exact: the factor is a power of two."""
        return math.frexp(self.factor)[0] == 0.5

    def describe(self) -> str:
        """Return a line for a report, e.g. "output x 0.25 into head (exact)"."""
        how = "exact" if self.exact else "one rounding"
        return f"{self.scale} x {self.factor:.6g} into {', '.join(self.parameters)} ({how})"

    def applies_to(self, name: str) -> bool:
        """Return True if the parameter ``name`` is multiplied by the factor."""
        inside = re.sub(r"^blocks\.\d+\.", "", name)
        return inside.removesuffix(".weight").removesuffix(".bias") in self.parameters


def folds(
    model: ModelConfig, scales: ForwardScales, attention: float | None = None
) -> tuple[Fold, ...]:
    """Return the factors to fold into weights, so that a forward pass without ``scales`` is equal.

    The Hugging Face model multiplies scores by ``attention`` (None: 1/sqrt(head width)) and has no
    other factor. Raises UserError for a factor on only the head or only the embedding if they are
    tied.
    """
    folding: list[Fold] = []
    usual = 1.0 / math.sqrt(model.head_width) if attention is None else attention
    if scales.attention != usual:
        # A factor on the queries: rotation commutes with the factor, a query norm would undo it.
        # A bias of the queries is multiplied as well.
        target = "attention.q_norm" if model.qk_norm else "attention.wq"
        # Snap to a power of two if only the rounding of square roots differs.
        factor = scales.attention / usual
        near = 2.0 ** round(math.log2(factor))
        factor = near if math.isclose(factor, near, rel_tol=1e-14) else factor
        folding.append(Fold("attention", factor, (target,)))
    if scales.residual != 1.0:
        folding.append(Fold("residual", scales.residual, _ends_of_branches(model)))
    if scales.experts != 1.0:
        folding.append(Fold("experts", scales.experts, ("ffn.experts.down",)))
    for scale, factor, target in (
        ("embedding", scales.embedding, "embedding"),
        ("output", scales.output, "head"),
    ):
        if factor == 1.0:
            continue
        if model.tied_embeddings:
            raise UserError(
                f"the parameterization multiplies the {scale} by {factor:.6g}, which a weight "
                "shared by embedding and head cannot hold; model.tied_embeddings=true cannot be "
                "converted with it"
            )
        folding.append(Fold(scale, factor, (target,)))
    return tuple(folding)


def _ends_of_branches(model: ModelConfig) -> tuple[str, ...]:
    """Return the modules that a factor on each branch can be folded into."""
    if model.norms_after:
        return "attention_post_norm", "ffn_post_norm"
    targets = ["attention.wo"]
    if isinstance(model, MoEModel):
        targets.append("ffn.experts.down")
        if model.experts.num_shared_experts:
            targets.append("ffn.shared.down")
    if not isinstance(model, MoEModel) or model.first_dense_layers:
        targets.append("ffn.down")
    return tuple(targets)


def unfolded(name: str, tensor: Tensor, folding: Collection[Fold]) -> Tensor:
    """Return ``tensor`` (fp32) divided by the factors of our parameter ``name``, rounded once."""
    factor = math.prod(fold.factor for fold in folding if fold.applies_to(name))
    return tensor if factor == 1.0 else (tensor.double() / factor).to(tensor.dtype)


def folded(name: str, tensor: Tensor, folding: Collection[Fold]) -> Tensor:
    """Return ``tensor`` (fp32) times the factors of our parameter ``name``, rounded once."""
    factor = math.prod(fold.factor for fold in folding if fold.applies_to(name))
    return tensor if factor == 1.0 else (tensor.double() * factor).to(tensor.dtype)
