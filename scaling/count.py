"""Counting parameters and floating-point operations."""

# L tokens in a sequence, N query heads, H width of a query, V width of a value

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import EXPERTS, MATRICES, ParamSpec, Role


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters a model has.

    ``total`` counts a tied embedding once. ``by_role`` holds the roles that occur.
    ``non_embedding`` is the total without embedding and head (roles input and output): norms are
    in it. Laws that mean matrices only want ``by_role["hidden"]``. ``active``: the part of the
    total that a token uses, of E routed experts the k it visits.
    """

    total: int
    by_role: dict[str, int]
    non_embedding: int
    active: int


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations for one token, a multiply-add being two.

    ``forward`` + ``backward`` = ``total``; ``attention`` is the share of ``total`` spent on
    scores and weighted values.
    """

    forward: int
    backward: int
    total: int
    attention: int


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count a model's parameters by role."""
    by_role: dict[str, int] = {}
    active = 0
    for spec in inventory(model):
        by_role[spec.role.value] = by_role.get(spec.role.value, 0) + spec.numel
        active += active_numel(model, spec)
    total = sum(by_role.values())
    ends = by_role.get(Role.INPUT.value, 0) + by_role.get(Role.OUTPUT.value, 0)
    return ParameterCount(total=total, by_role=by_role, non_embedding=total - ends, active=active)


def active_numel(model: ModelConfig, spec: ParamSpec) -> int:
    """Return how many elements of this parameter one token uses."""
    if spec.role not in EXPERTS:
        return spec.numel
    assert isinstance(model, MoEModel), spec.name
    return spec.numel // model.experts.num_experts * model.experts.experts_per_token


def attention_flops(model: ModelConfig, sequence_length: int, window: int | None = None) -> int:
    """Return forward FLOPs per token of scores and weighted values of one layer, rounded down.

    2·N·H of a score and 2·N·V of a weighted value, V wide, for each key that a query meets: (L+1)/2
    in the mean under the causal mask, and under a window W < L, where the first W meet as many and
    the others W, W - W(W-1)/2L.
    """
    features, length = _score_features(model), sequence_length
    if window is None or window >= length:
        return features * (length + 1)
    return features * window * (2 * length - window + 1) // length


def _score_features(model: ModelConfig) -> int:
    """Multiply-adds of a query and a key that it meets: N (H + V)."""
    return model.num_heads * (model.head_width + model.value_width)


@lru_cache(maxsize=64)
def layer_flops(model: ModelConfig, sequence_length: int) -> tuple[int, ...]:
    """Return forward FLOPs per token of the embedding (0), of each layer, and of the head.

    Their sum is ``flops_per_token(...).forward``.
    """
    layers = [
        attention_flops(model, sequence_length, model.window_of(layer))
        for layer in range(model.num_layers)
    ]
    for spec in inventory(model):
        if spec.role in MATRICES:
            layers[int(spec.name.split(".")[1])] += 2 * active_numel(model, spec)
    return (0, *layers, 2 * model.vocab_size * model.width)


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """Return the model FLOPs of training on one token of sequences of this length.

    Forward = 2 x (weights of every matrix product, the head included even when tied, and of the
    routed experts those that a token visits) + ``attention_flops`` of each layer: with 2·N·H for a
    score and 2·N·V for the weighted values of each key that a query meets, under the causal mask
    (position p meets p) or within a window. Backward = 2 x forward, one product for each operand.
    Lookups, norms, RoPE, softmax, and whatever a kernel or activation checkpointing recomputes are
    not counted: this is the numerator of MFU (PaLM, arXiv 2204.02311, appendix B, with the causal
    half counted once). The figure is that of one whole document of ``sequence_length`` tokens; of
    several documents in a sequence see ``DocumentFlops``.
    """
    assert sequence_length > 0, sequence_length
    products = sum(active_numel(model, spec) for spec in inventory(model) if spec.role in MATRICES)
    head = model.vocab_size * model.width
    attention = (model.num_layers - model.num_windowed) * attention_flops(model, sequence_length)
    if model.window is not None:
        each = attention_flops(model, sequence_length, model.window.tokens)
        attention += model.num_windowed * each
    forward = 2 * (products + head) + attention
    return Flops(forward=forward, backward=2 * forward, total=3 * forward, attention=3 * attention)


@dataclass(frozen=True, slots=True)
class DocumentFlops:
    """Model FLOPs of training on documents, each of which attends to itself alone.

    ``per_token`` of a token without attention, ``per_pair`` of a query and a key it meets: a
    document of L tokens has L (L + 1) / 2 pairs. ``per_windowed_pair``: the same in layers with a
    ``window``, in which a document longer than it has fewer.
    """

    per_token: int
    per_pair: int
    per_windowed_pair: int = 0
    window: int = 0

    @classmethod
    def of(cls, model: ModelConfig) -> DocumentFlops:
        """The coefficients of this model."""
        one = flops_per_token(model, 1)
        each = 3 * 2 * _score_features(model)
        windowed = model.num_windowed
        return cls(
            one.total - one.attention,
            (model.num_layers - windowed) * each,
            windowed * each,
            0 if model.window is None else model.window.tokens,
        )

    def __call__(self, tokens: int, squared_lengths: int) -> int:
        """Return the FLOPs of documents with so many tokens, their squared lengths summing to this.

        Of one document of every length it is ``flops_per_token(model, length).total * length``.
        In layers with a window that holds of documents of one length; of several it is the bound
        from above that squares give (the mean of min(L, W) over tokens is concave in L).
        """
        full = self.per_token * tokens + self.per_pair * (squared_lengths + tokens) // 2
        return full + round(self._in_windows(squared_lengths / max(tokens, 1)) * tokens)

    def expected(self, squared_lengths_per_token: float) -> float:
        """Return the FLOPs of a token, from the expected squared lengths of documents by token."""
        full = self.per_token + self.per_pair * (squared_lengths_per_token + 1) / 2
        return full + self._in_windows(squared_lengths_per_token)

    def _in_windows(self, length: float) -> float:
        """FLOPs of a token of a document of this length in layers with a window."""
        window = min(float(self.window), length)
        keys = window - window * (window - 1) / (2 * length) if window else 0.0
        return self.per_windowed_pair * keys


def document_flops(model: ModelConfig, lengths: Sequence[int]) -> int:
    """Return the model FLOPs of training on whole documents of these lengths."""
    return DocumentFlops.of(model)(sum(lengths), sum(length**2 for length in lengths))
