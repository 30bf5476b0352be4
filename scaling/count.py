"""Count parameters and floating-point operations."""

# L tokens in a sequence, N query heads, H width of a query, V width of a value

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import EXPERTS, MATRICES, ParamSpec, Role, layer_of


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters of a model.

    ``total`` counts a tied embedding once. ``by_role`` contains the roles that occur.
    ``non_embedding`` is the total without embedding and head (roles input and output) and includes
    norms; laws of matrix parameters only use ``by_role["hidden"]``. ``active``: parameters used by
    one token, with k of E routed experts.
    """

    total: int
    by_role: dict[str, int]
    non_embedding: int
    active: int


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations per token; a multiply-add counts as two.

    ``forward`` + ``backward`` = ``total``; ``attention`` is the part of ``total`` for scores and
    weighted values.
    """

    forward: int
    backward: int
    total: int
    attention: int


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model by role.

    For example, ``count_parameters(config.model).active`` of a mixture with 8 experts and 2 per
    token counts a quarter of the expert parameters.
    """
    by_role: dict[str, int] = {}
    active = 0
    for spec in inventory(model):
        if spec.ahead:
            continue
        by_role[spec.role.value] = by_role.get(spec.role.value, 0) + spec.numel
        active += active_numel(model, spec)
    total = sum(by_role.values())
    ends = by_role.get(Role.INPUT.value, 0) + by_role.get(Role.OUTPUT.value, 0)
    return ParameterCount(total=total, by_role=by_role, non_embedding=total - ends, active=active)


def active_numel(model: ModelConfig, spec: ParamSpec) -> int:
    """Return the number of elements of the parameter that one token uses."""
    if spec.role not in EXPERTS:
        return spec.numel
    assert isinstance(model, MoEModel), spec.name
    return spec.numel // model.experts.num_experts * model.experts.experts_per_token


def attention_flops(model: ModelConfig, sequence_length: int, window: int | None = None) -> int:
    """Return forward FLOPs per token of scores and weighted values of one layer, rounded down.

    2·N·H for the score and 2·N·V for the weighted value, of width V, for each key of a query: on
    average (L+1)/2 keys with the causal mask. With a window W < L the first W queries have the same
    number of keys and all others have W, on average W - W(W-1)/2L. For example, N·H = N·V = 8
    features and L = 3 without a window give 64.
    """
    features, length = _score_features(model), sequence_length
    if window is None or window >= length:
        return features * (length + 1)
    return features * window * (2 * length - window + 1) // length


def prefix_flops(model: ModelConfig) -> int:
    """Return forward FLOPs per token of one layer's attention to the prefix: 2·n·N·(H + V)."""
    return 2 * model.prefix_tokens * _score_features(model)


def _score_features(model: ModelConfig) -> int:
    """Return the multiply-adds of a query and one of its keys: N (H + V)."""
    return model.num_heads * (model.head_width + model.value_width)


@lru_cache(maxsize=64)
def layer_flops(model: ModelConfig, sequence_length: int) -> tuple[int, ...]:
    """Return forward FLOPs per token of the embedding (0), of each layer, and of the head.

    The head's FLOPs include the depths of multi-token prediction, which run on the head's stage.
    The sum is ``flops_per_token(...).forward``.
    """
    layers = [
        attention_flops(model, sequence_length, model.window_of(layer)) + prefix_flops(model)
        for layer in range(model.num_layers)
    ]
    ahead = range(model.num_layers, model.num_blocks)
    end = 2 * model.vocab_size * model.width * (1 + model.num_depths)
    end += sum(attention_flops(model, sequence_length, model.window_of(n)) for n in ahead)
    for spec in inventory(model):
        if spec.role not in MATRICES:
            continue
        layer = layer_of(spec.name)
        if spec.ahead or layer is None:  # the weights of the streams have no layer
            end += 2 * active_numel(model, spec)
        else:
            layers[layer] += 2 * active_numel(model, spec)
    return (0, *(model.num_streams * layer for layer in layers), end)


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """Return the model FLOPs of training per token, for sequences of ``sequence_length`` tokens.

    Forward = 2 x (weights of every matrix product, including a tied head, and only the routed
    experts that a token visits) + ``attention_flops`` of each layer: 2·N·H for the scores and 2·N·V
    for the weighted values of each key that a query attends to, with the causal mask (position p
    attends to p) or a window. With ``model.streams`` blocks and attention count once for each
    stream, with the prefix's keys; the weights of the streams and the head count once. Backward = 2
    x forward, one product for each operand. Lookups, norms, RoPE, softmax, and recomputation by
    kernels or activation checkpointing are not counted: the result is the numerator of MFU (PaLM,
    arXiv 2204.02311, appendix B, with the causal half counted once). The result is for one document
    per sequence; for packed documents see ``DocumentFlops``. For example,
    ``flops_per_token(model, 4096).total * tokens`` for a run of such sequences.
    """
    assert sequence_length > 0, sequence_length
    products = sum(
        active_numel(model, spec) * (1 if layer_of(spec.name) is None else model.num_streams)
        for spec in inventory(model)
        if spec.role in MATRICES
    )
    head = model.vocab_size * model.width * (1 + model.num_depths)
    windowed = sum(map(model.windowed, range(model.num_blocks)))
    attention = (model.num_blocks - windowed) * attention_flops(model, sequence_length)
    if model.window is not None:
        attention += windowed * attention_flops(model, sequence_length, model.window.tokens)
    attention = model.num_streams * (attention + model.num_layers * prefix_flops(model))
    forward = 2 * (products + head) + attention
    return Flops(forward=forward, backward=2 * forward, total=3 * forward, attention=3 * attention)


@dataclass(frozen=True, slots=True)
class DocumentFlops:
    """Model FLOPs of training on documents with attention within each document.

    ``per_token``: of a token without attention to the document, but to the streams' prefixes.
    ``per_pair``: of a query and one of its keys; a
    document of L tokens has L (L + 1) / 2 pairs. ``per_windowed_pair``: the same in layers with a
    ``window``, where longer documents have fewer pairs.
    """

    per_token: int
    per_pair: int
    per_windowed_pair: int = 0
    window: int = 0

    @classmethod
    def of(cls, model: ModelConfig) -> DocumentFlops:
        """Return the coefficients of ``model``."""
        one = flops_per_token(model, 1)
        each = 3 * 2 * _score_features(model) * model.num_streams
        windowed = sum(map(model.windowed, range(model.num_blocks)))
        return cls(
            one.total - model.num_blocks * each,  # a document of one token has one pair
            (model.num_blocks - windowed) * each,
            windowed * each,
            0 if model.window is None else model.window.tokens,
        )

    def __call__(self, tokens: int, squared_lengths: int) -> int:
        """Return the FLOPs of documents with this sum of lengths and sum of squared lengths.

        For one document of any length the result is ``flops_per_token(model, length).total *
        length``. For layers with a window the result is exact for documents of equal length;
        otherwise it is an upper bound (the mean of min(L, W) over tokens is concave in L).
        """
        full = self.per_token * tokens + self.per_pair * (squared_lengths + tokens) // 2
        return full + round(self._in_windows(squared_lengths / max(tokens, 1)) * tokens)

    def expected(self, squared_lengths_per_token: float) -> float:
        """Return the FLOPs of a token, from the expected squared document length per token."""
        full = self.per_token + self.per_pair * (squared_lengths_per_token + 1) / 2
        return full + self._in_windows(squared_lengths_per_token)

    def _in_windows(self, length: float) -> float:
        """Return FLOPs per token of a document of ``length`` tokens in layers with a window."""
        window = min(float(self.window), length)
        keys = window - window * (window - 1) / (2 * length) if window else 0.0
        return self.per_windowed_pair * keys


def document_flops(model: ModelConfig, lengths: Sequence[int]) -> int:
    """Return the model FLOPs of training on documents of these lengths.

    For example, ``document_flops(model, [512, 512]) < document_flops(model, [1024])``.
    """
    return DocumentFlops.of(model)(sum(lengths), sum(length**2 for length in lengths))
