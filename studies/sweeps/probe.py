"""Small model trained in one process, for checks that compare many models."""

# B sequences, L tokens in a sequence, V vocabulary, D width

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.configs.model import AuxiliaryBalance, ModelConfig, MoEModel, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.data.stream import Stream
from allometry.models.build import ComputeDtype, build_model, parameter_specs
from allometry.models.init import initialize
from allometry.models.loss import IGNORE
from allometry.models.moe import begin_step, end_step, set_loads
from allometry.models.multi_token import ahead_of
from allometry.models.transformer import Transformer
from allometry.optim.build import build_optimizer, set_lr
from allometry.optim.clip import clip_by_global_norm
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import RunScale

LOGITS = "logits"
STREAM = "stream"
Sequences = NDArray[np.int64]
"""Token ids [..., L+1]: L inputs and, shifted by one, L targets."""


class Probe:
    """A model with its optimizer, on the CPU, determined by (configuration, seed).

    ``zero``: parts that start at zero ("head", "queries"); a matrix that keeps its norm (a sphere)
    is not changed, because zero has no direction and would never move. For example,
    ``Probe(model, parameterization, optimizer, seed=0).step(tokens_BL)``.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameterization: ParameterizationConfig,
        optimizer: OptimizerConfig,
        seed: int,
        *,
        scale: RunScale | None = None,
        zero: tuple[str, ...] = (),
        compute_dtype: ComputeDtype = "fp32",
    ) -> None:
        torch.manual_seed(seed)  # for dropout
        self.rules = Parameterization(parameterization, model, optimizer, scale)
        self.model = probe_model(model, self.rules, compute_dtype)
        initialize(self.model, self.rules, seed)
        self.specs = parameter_specs(self.model)
        endings = {"head": "head.weight", "queries": ".attention.wq.weight"}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                wanted = any(name.endswith(endings[part]) for part in zero)
                if wanted and not self.rules.resolve(self.specs[name]).sphere:
                    parameter.zero_()
        self.optimizer = build_optimizer(
            self.model.named_parameters(), self.specs, self.rules, optimizer, seed=seed
        )
        self._mixture = isinstance(model, MoEModel)
        self._counts_first = counts_first(model)

    def step(
        self, sequences_BL: Sequences, *, fraction: float = 1.0, clip: float | None = None
    ) -> float:
        """Take one step at this fraction of the peak rate; return the loss before it."""
        inputs_BL, targets_BL = split(sequences_BL)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        if self._mixture:
            begin_step(self.model, inputs_BL.numel())
        if self._counts_first:
            with torch.no_grad():
                self.model(inputs_BL, targets_BL, blocks_only=True)
            set_loads(self.model, self._visits())
        if self.model.mtp is not None:
            ahead_MBL = ahead_of(targets_BL, None, self.model.mtp.number)
            self.model.mtp.set_targets((ahead_MBL != IGNORE).flatten(1).sum(1))
        loss = self.model(inputs_BL, targets_BL).total / targets_BL.numel()
        loss.backward()
        if clip is not None:
            clip_by_global_norm(self.model.parameters(), clip)
        set_lr(self.optimizer, fraction)
        self.optimizer.step()
        if self._mixture:
            end_step(self.model, self._visits())
        return float(loss.detach())

    @torch.no_grad()
    def loss(self, sequences_BL: Sequences) -> float:
        """Return the loss in nats per token, without a step."""
        inputs_BL, targets_BL = split(sequences_BL)
        self.model.eval()
        losses = self.model(inputs_BL, targets_BL)
        self._forget()
        return float(losses.nll_BL.double().sum()) / targets_BL.numel()

    @torch.no_grad()
    def activations(self, sequences_BL: Sequences) -> dict[str, Tensor]:
        """Return each block's output ("blocks.0", ...) and the logits in float64.

        The blocks of multi-token prediction are those after the model's own.
        """
        self.model.eval()
        kept: dict[str, Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda _module, _args, output, name=f"blocks.{index}": kept.update(
                    {name: output[0].double()}
                )
            )
            for index, block in self.model.blocks.items()
        ]
        try:
            inputs_BL, targets_BL = split(sequences_BL)
            kept[LOGITS] = self.model(inputs_BL).double()
            if self.model.mtp is not None:
                with self.model.mtp.compared():
                    self.model(inputs_BL, targets_BL)
        finally:
            for handle in handles:
                handle.remove()
        self._forget()
        return kept

    def _visits(self) -> dict[int, Tensor]:
        return {n: seen.counts_E for n, seen in self.model.take_statistics().items()}

    def _forget(self) -> None:
        if self._mixture:
            self.model.take_statistics()


def probe_model(
    model: ModelConfig, rules: Parameterization, compute_dtype: ComputeDtype
) -> Transformer:
    """Return an uninitialized model, completely in ``compute_dtype``: fp32 or fp64."""
    built = build_model(model, rules, compute_dtype)
    return built.double() if compute_dtype == "fp64" else built


def counts_first(model: ModelConfig) -> bool:
    """Return True if the auxiliary loss uses this batch's loads, which are counted before it."""
    balance = model.router.balance if isinstance(model, MoEModel) else None
    # A sweep compares small models on random batches, for which auto is the cheaper choice.
    return isinstance(balance, AuxiliaryBalance) and balance.loads == "this_batch"


def split(sequences_BL: Sequences) -> tuple[Tensor, Tensor]:
    """Return inputs [B, L] and targets [B, L] of sequences of L+1 tokens."""
    tokens = torch.from_numpy(np.ascontiguousarray(sequences_BL, dtype=np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def sample(pool_PL: Sequences, count: int, seed: int) -> Sequences:
    """Return ``count`` different sequences of the pool, in an order that the seed determines.

    Raises UserError: the pool has fewer sequences.
    """
    chosen: Sequences = pool_PL[order(pool_PL, count, seed)]
    return chosen


def order(pool_PL: Sequences, count: int, seed: int) -> NDArray[np.int64]:
    """Return the indices in the pool of the sequences that ``sample`` returns."""
    if count > len(pool_PL):
        raise UserError(
            f"{count} sequences are needed and {len(pool_PL)} are there; prepare more data or "
            "take fewer steps"
        )
    return np.random.default_rng(seed).permutation(len(pool_PL))[:count]


def read_pools(
    data: SequenceData | DocumentData, seed: int, length: int, counts: Sequence[int]
) -> list[Sequences]:
    """Return sequences of ``length`` + 1 tokens of a run's sources, in the run's mixture.

    One array for each count, without common sequences. Documents are concatenated without masks,
    independent of the run. Raises UserError: the files cannot be used, or a source is too short.
    For example, ``pool_PL, held_out_HL = read_pools(config.data, 0, 64, [640, 64])``.
    """
    plain = SequenceData(
        sequence_length=length,
        packing="concatenated",
        tokenizer=data.tokenizer,
        sources=data.sources,
        replay=data.replay,
    )
    stream = Stream(plain, seed)
    short = {name for name, epochs in stream.epochs(sum(counts)).items() if epochs > 1.0}
    if short:
        raise UserError(
            f"data.sources: {', '.join(sorted(short))} would be read more than once for "
            f"{sum(counts)} sequences of {length} tokens; prepare more of it or take fewer steps "
            "or shorter sequences"
        )
    pools, position = [], 0
    for count in counts:
        batch = stream.batch(position, count)
        pools.append(np.concatenate([batch.tokens_BL, batch.targets_BL[:, -1:]], axis=1))
        position += count
    return pools
