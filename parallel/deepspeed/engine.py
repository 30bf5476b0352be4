"""Gradient reduction, clipping and updates by DeepSpeed's engine.

Stages 1 to 3 are those of ``parallel/zero.py``, except that stages 1 and 2 keep replicated
parameters on each rank. Gradients are SUMS over the ranks. Stages 1 and 2 have an option for sums.
Stage 3 can only average, so it is given a loss scale of 1/W, by which DeepSpeed divides the
averaged gradient. Multiplying the loss by W instead would miss the gradients that routers add
themselves in the backward pass.

Parameters, gradients, master weights and optimizer states are fp32 for every compute type: modules
cast weights when they use them, as they do without ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from allometry.configs.run import RunConfig
from allometry.models.transformer import Transformer
from allometry.parallel.deepspeed.adamw import FlatAdamW
from allometry.parallel.deepspeed.files import SwapFolder
from allometry.parallel.deepspeed.ops import check_built, checked_io
from allometry.parallel.deepspeed.package import check_installed, opened
from allometry.parallel.deepspeed.parts import Parts
from allometry.parallel.mesh import Mesh
from allometry.parallel.reduce import GradientSync
from allometry.scaling.deepspeed import nvme_bytes, settings


def check_available(config: RunConfig) -> None:
    """Raise UserError if the run uses DeepSpeed and this machine lacks it or its operator."""
    zero = config.parallel.zero
    if zero.engine == "deepspeed":
        check_installed()
        if zero.optimizer_states is not None and zero.optimizer_states.nvme is not None:
            check_built()


class DeepSpeedSync(GradientSync):
    """Gradient synchronization of one model by DeepSpeed; ``start`` passes the optimizer's groups.

    Raises UserError: see ``check_available`` and ``SwapFolder``.
    """

    def __init__(self, model: Transformer, config: RunConfig, mesh: Mesh) -> None:
        zero = config.parallel.zero
        self._model, self._mesh, self._stage = model, mesh, zero.stage
        check_available(config)
        self._deepspeed = opened(mesh)
        states = zero.optimizer_states
        self._folder: SwapFolder | None = None
        if states is not None and states.nvme is not None:
            self._folder = SwapFolder(states.nvme, nvme_bytes(config, mesh.hdp.size))
        cuda = mesh.device.type == "cuda"
        swap = "" if self._folder is None else str(self._folder.path)
        self._settings = settings(config, mesh.hdp.size, cuda=cuda, swap=swap)
        self._init: Any = None
        self._engine: Any = None
        self._adamw: FlatAdamW | None = None
        self._pending = ExitStack()  # delays the reduction of an uneven step
        self._group_norms: list[Tensor] = []
        if self._stage == 3:
            self._prepare_gathers()

    @property
    @override
    def whole(self) -> bool:
        return self._stage < 3

    @property
    @override
    def makes_parameters(self) -> bool:
        return self._stage == 3

    @override
    @contextmanager
    def hold(self, owner: nn.Module, name: str) -> Iterator[Tensor]:
        if self._stage < 3:
            yield getattr(owner, name).detach()
            return
        shape = getattr(owner, name).shape
        whole: Any = nn.Parameter(torch.empty(shape, device=self._mesh.device))
        owner.register_parameter(name, whole)
        yield whole.detach()
        self._init._convert_to_deepspeed_param(whole)
        whole.partition()

    def start(self, groups: Sequence[Mapping[str, Any]]) -> Parts:
        """Start the engine with these parameter groups; return access to parameters and states."""
        self._adamw = FlatAdamW(groups)
        with self._io():
            self._engine, zero, _, _ = self._deepspeed.initialize(
                model=self._model, optimizer=self._adamw, config=self._settings
            )
        assert zero is self._engine.optimizer
        if self._stage == 3:
            zero.override_loss_scale(1.0 / self._mesh.hdp.size)
        self._note_norms(zero)
        parts = Parts(zero, self._adamw, self._stage, self._folder)
        parts.check_files()
        return parts

    @property
    def folder(self) -> Path | None:
        """Folder of the NVMe files; None if states are in memory."""
        return None if self._folder is None else self._folder.path

    def _io(self) -> AbstractContextManager[None]:
        return nullcontext() if self._folder is None else checked_io()

    @override
    def micro_batch(self, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.optimizer.clear_backward_seen_flag()

    @override
    def backward(self, loss: Tensor) -> None:
        if self._stage == 3:
            loss = loss * float(self._mesh.hdp.size)  # the loss scale divides by W again
        # The engine's own forward would register this prologue on the model's output.
        self._engine._backward_prologue()
        self._engine.backward(loss)

    @override
    def close(self, part: nn.Module) -> None:
        raise AssertionError("not in a pipeline")

    @override
    def closed(self, part: nn.Module) -> None:
        raise AssertionError("not in a pipeline")

    @override
    def begin_uneven(self) -> bool:
        assert self._stage == 1, self._stage
        self._pending.enter_context(self._engine.coalesce_grad_reduction())
        self._engine.optimizer.clear_backward_seen_flag()
        return False

    @override
    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    def finish(self) -> None:
        if self._engine.inside_no_sync_ctxt:
            # Another rank may have the gradients that are missing here: all ranks must reduce the
            # same tensors.
            for parameter in self._model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._pending.close()

    @override
    def leave(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        if self._folder is not None:
            self._folder.close()

    def update(self, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """Clip and update with the rates of ``groups``; return the gradient norm, fp64, 0-dim.

        The norm is measured before clipping. If the norm is not finite, no parameter is updated and
        the returned norm is infinite.
        """
        assert self._adamw is not None
        for flat, group in zip(self._adamw.param_groups, groups, strict=True):
            flat["lr"] = group["lr"]
        self._group_norms.clear()
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float64, device=self._mesh.device)

    def groups_not_finite(self) -> list[int]:
        """Return the indices of the groups whose gradients were not finite in the last update."""
        zero = self._engine.optimizer
        of = zero.sub_group_to_group_id if self._stage == 3 else range(len(self._group_norms))
        norms = map(float, self._group_norms)
        found = [of[i] for i, norm in enumerate(norms) if not 0.0 <= norm < torch.inf]
        return sorted(set(found))

    def _note_norms(self, zero: Any) -> None:
        """Record the norm of each group; DeepSpeed computes the norms in group order."""
        for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            measure = getattr(zero, name)

            def noted(*args: Any, _measure: Any = measure, **kwargs: Any) -> Any:
                norm = _measure(*args, **kwargs)
                self._group_norms.append(norm)
                return norm

            setattr(zero, name, noted)

    def _prepare_gathers(self) -> None:
        """Configure the engine to gather parameters by block and to shard them at creation."""
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import set_z3_leaf_module

        # A block multiplies with weights of submodules whose forward it does not call.
        for block in self._model.blocks.values():
            set_z3_leaf_module(block, True)
        with self._io():
            self._init = Init(
                data_parallel_group=self._mesh.hdp.group,
                config_dict_or_path=self._settings,
                dtype=torch.float32,
            )
