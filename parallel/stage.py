"""Pipeline stage as run by torch's schedules."""

# B sequences of a micro-batch, L tokens in a sequence, D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from typing_extensions import override

from allometry.models.head import Losses
from allometry.parallel.execution import MicroBatch, Observe
from allometry.parallel.reduce import GradientSync


@dataclass(frozen=True)
class StepInputs:
    """Inputs that the stages of a rank share in a step; ``first`` is the rank's lowest stage.

    ``empty(i)`` allocates the activation of micro-batch i between stages. ``begin`` is a collective
    of all ranks before this rank's first message and forward; it may be called repeatedly. ``sync``
    reduces a stage's gradients during its last backward; None: ranks must not wait for each other
    there.
    """

    batches: Sequence[MicroBatch]
    scale: Tensor
    observe: Observe
    before: Callable[[int], None] | None
    first: int
    empty: Callable[[int], Tensor]
    begin: Callable[[], object]
    sync: GradientSync | None


class Stage(PipelineStage):
    """Stage that looks up its micro-batch in ``inputs`` and frees received tensors after use.

    Set ``inputs`` for each step. The stage is called with the number of a micro-batch, ``mb``, on
    the host, and, after the first stage, with the output of the previous stage. Micro-batches may
    have different shapes: the example tensors given to torch specify only type and number of
    dimensions.
    """

    inputs: StepInputs | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._emptied: set[str] = set()
        self._backwards = 0  # with weight gradients, in this step
        self._last, self._reduced = False, False

    def scaled_loss(self, total: Tensor, _: Tensor) -> Tensor:
        """Return the loss to differentiate; the second argument is the micro-batch number."""
        assert self.inputs is not None
        return total * self.inputs.scale.to(total.dtype)

    def forward_maybe_with_nosync(self, *args: Tensor, mb: Tensor) -> Tensor:
        """Run the module; return [B, L, D], or the total loss on the last stage."""
        assert self.inputs is not None
        index = int(mb)
        self._begin(index)
        batch = self.inputs.batches[index]
        if self.inputs.before is not None and self.stage_index == self.inputs.first:
            self.inputs.before(index)
        x_BLD = None if self.is_first else args[0]
        made = self.submod(
            *(batch.tokens_BL, batch.targets_BL, batch.documents, x_BLD),
            ahead_MBL=batch.ahead_MBL,
        )
        if not isinstance(made, Losses):
            # Output of a frozen first stage; torch's schedules differentiate every output.
            return made if made.requires_grad else made.detach().requires_grad_()
        self.inputs.observe(index, made.nll_BL)
        return made.total

    @override
    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        # Allocate a buffer just before it is received, not all buffers at the start.
        self._begin(fwd_chunk_id)
        self._make_buffers("forward", self.args_recv_info, fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    @override
    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._make_buffers("backward", self.grad_recv_info, bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    @override
    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        # Messages must be contiguous, and chunks of several sequences give other gradients.
        made = self.bwd_cache.get(bwd_chunk_id)
        if made is not None:
            self.bwd_cache[bwd_chunk_id] = tuple(
                x.contiguous() if isinstance(x, Tensor) else x for x in made
            )
        return super().get_bwd_send_ops(bwd_chunk_id)

    @override
    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        # Afterwards only the autograd graph keeps the input.
        made = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._drop_buffers(self.args_recv_info, fwd_chunk_id)
        return made

    @override
    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        with self._gradients_of_weights() if full_backward else nullcontext():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._drop_buffers(self.grad_recv_info, bwd_chunk_id)

    @contextmanager
    def _gradients_of_weights(self) -> Iterator[None]:
        """Count a backward with weight gradients (full or half), one for each micro-batch."""
        assert self.inputs is not None
        self._backwards += 1
        sync = self.inputs.sync
        self._last = sync is not None and self._backwards == len(self.inputs.batches)
        if sync is not None and self._last:
            sync.close(self.submod)
        yield
        if sync is not None and self._last:
            sync.closed(self.submod)
        self._last = False

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        """Differentiate; a full last backward runs with FSDP2's reduction block by block.

        torch would disable FSDP2's reduction until all backwards are done.
        """
        whole = backward_type == "full" and isinstance(self.submod, FSDPModule)
        if not (self._last and whole):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self._reduced = True
        return stage_backward(**bwd_kwargs), None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce the gradients unless the last backward has reduced them."""
        if not self._reduced:
            super().perform_reduce_grad(grad_scale_factor)
        elif grad_scale_factor != 1:
            self.scale_grads(grad_scale_factor)

    @override
    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute weight gradients. With FSDP2 in bf16, accumulate the gradients in fp32.

        FSDP2 casts gradients when a backward has passed through a block, which this half does not
        do: consecutive micro-batches would be accumulated in bf16.
        """
        with self._gradients_of_weights():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self._reduced:
            return
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                for parameter in group.fsdp_params if group is not None else ():
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()

    @override
    def clear_runtime_states(self) -> None:
        # Received tensors are new each time, so they have no gradients to clear.
        self._backwards, self._reduced = 0, False
        self.fwd_cache.clear()
        self.output_chunks.clear()

    def _begin(self, index: int) -> None:
        """Start the step if micro-batch ``index`` is the first one of this rank.

        The start must follow the start of the schedule, which initializes and reshards stages.
        """
        assert self.inputs is not None
        if index == 0 and self.stage_index == self.inputs.first:
            self.inputs.begin()

    def _make_buffers(self, way: str, infos: dict[int, tuple[Any, ...]], index: int) -> None:
        assert self.inputs is not None
        if way not in self._emptied:  # torch has allocated all buffers
            self._emptied.add(way)
            for other in infos:
                self._drop_buffers(infos, other)
        for info in filter(_is_received, infos[index]):
            # Inputs of the forward need gradients to send back; torch 2.11 does not set this flag.
            info.buffer = self.inputs.empty(index).requires_grad_(way == "forward")

    def _drop_buffers(self, infos: dict[int, tuple[Any, ...]], index: int) -> None:
        for info in filter(_is_received, infos.get(index, ())):
            info.buffer = None

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Accept any shape. torch 2.11 would compare the shape with the example tensor."""

    def _validate_stage_tensors(self, *_: Any) -> None:
        """Accept any shape. torch 2.13 would compare shapes at debug level DETAIL."""


def _is_received(info: Any) -> bool:
    """Return True if ``info`` describes a tensor received from another stage."""
    return getattr(info, "source", None) is not None
