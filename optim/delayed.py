"""Delayed updates on the host: the device uses each update one step later, so neither waits.

Step t computes its gradients with parameters that lack the update of step t - 1, which the host
computes at the same time: W(t+1) = W(t) + U(g(t-1)), where g(t) is computed at W(t), and U uses the
learning rates of the step of its gradients. Steps 1 and 2 therefore compute with the initial
values. This is not the exact update rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from allometry.configs.execution import Zero
from allometry.optim.matrix_ops import LocalMatrixOps
from allometry.optim.offload.held import MASTER, Stored, without_memory
from allometry.optim.offload.swap import StatesLost
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.states import Group
from allometry.optim.tiered import TieredOptimizer
from allometry.parallel.buffers import host_buffer
from allometry.parallel.mesh import local

LATE = "late"
"""Key of the parameter values used by the model, which lack the last update."""


class _Twin(NamedTuple):
    """Host copy of this rank's part of a parameter with all updates, and its gradient."""

    values: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, parameter: Tensor, device: torch.device) -> _Twin:
        """Return a copy with the current values, in page-locked memory for ``device``."""
        part = local(parameter.detach())
        values, gradient = (
            host_buffer(part.nbytes, device).view(part.dtype).view(part.shape) for _ in range(2)
        )
        values.copy_(part)
        values.grad = gradient
        return cls(values, gradient)


class DelayedOptimizer(Optimizer):
    """Optimizer that updates host copies ("twins") of parameters in a thread, by elementwise rules.

    ``step`` waits for the update started by the previous step, copies its results to the
    parameters, and starts its own update with the current gradients and learning rates. States are
    stored in host memory or, if ``zero.optimizer_states`` names a folder, in a file; ``sizes``:
    bytes of each parameter's states on a rank. ``state`` stays empty (see ``stored``).

    A checkpoint saves the twins, which include every update, as the model, and in addition the
    values used by the model (``LATE``). Saving waits for the host and changes no values.

    Raises:
        UserError: see ``TieredOptimizer``.
        StatesLost: states cannot be written or read back, or an update takes longer than
            ``timeout_s``; every later call raises the error again.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        zero: Zero,
        sizes: Mapping[str, int],
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__(list(groups), {})
        wanted = zero.optimizer_states
        assert wanted is not None
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._device, self._timeout_s = local(parameters[0]).device, timeout_s
        self._twins = {p: _Twin.of(p, self._device) for p in parameters}
        self._of = {twin.values: p for p, twin in self._twins.items()}
        mine = [
            group | {"params": [self._twins[p].values for p in group["params"]]}
            for group in self.param_groups
        ]
        self._host: RuleOptimizer
        if wanted.nvme is None:
            self._host = RuleOptimizer(mine)
        else:  # the "device" tier of the twins is host memory
            near = wanted.model_copy(update={"device": wanted.cpu or 0.0, "cpu": None})
            there = zero.model_copy(update={"optimizer_states": near, "offload": "none"})
            self._host = TieredOptimizer(mine, LocalMatrixOps(), there, sizes, timeout_s)
        self._thread = ThreadPoolExecutor(1, "delayed-update")
        self._pending: Future[None] | None = None
        self.waited_s = 0.0

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Copy earlier updates to the parameters, and start the update of this step.

        Returns the result of ``closure``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._finish()
        for parameter, twin in self._twins.items():
            if parameter.grad is None:
                raise RuntimeError("a parameter has no gradient")
            local(parameter.detach()).copy_(twin.values, non_blocking=True)
            twin.gradient.copy_(local(parameter.grad), non_blocking=True)
        for mine, group in zip(self._host.param_groups, self.param_groups, strict=True):
            mine["lr"] = group["lr"]
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(self._device))
        self._pending = self._thread.submit(self._update, copied)
        return loss

    def init_states(self) -> None:
        """Create missing states, to be filled by a checkpoint."""
        self._finish()
        self._host.init_states()

    def stored(self) -> Iterator[tuple[Tensor, str, Stored]]:
        """Yield (parameter, name, values) of twins, parameters and states, after pending updates.

        Twins have the name ``MASTER``.
        """
        self._finish()
        for parameter, twin in self._twins.items():
            part = local(parameter.detach())
            yield parameter, MASTER, _stored(twin.values, parameter)
            yield parameter, LATE, _stored(part, parameter)
            for key, value in self._host.state[twin.values].items():
                alike = value.shape == part.shape
                yield parameter, key, _stored(value, parameter if alike else value)
        if isinstance(self._host, TieredOptimizer):
            for values, key, stored in self._host.stored():
                parameter = self._of[values]
                assert isinstance(stored.like, Tensor)
                like = without_memory(parameter, stored.like.dtype)
                yield parameter, key, stored._replace(like=like)

    def held_bytes(self) -> dict[str, int]:
        """Return this rank's bytes of twins and states by location."""
        if isinstance(self._host, TieredOptimizer):
            held = {str(tier): size for tier, size in self._host.held_bytes().items()}
        else:
            states = (value for each in self._host.state.values() for value in each.values())
            held = {"device": sum(value.nbytes for value in states), "cpu": 0, "nvme": 0}
        return held | {"device": 0, "cpu": held["cpu"] + held["device"] + self.parameters_bytes}

    @property
    def parameters_bytes(self) -> int:
        """Bytes of twins included in ``held_bytes``."""
        return sum(twin.values.nbytes for twin in self._twins.values())

    def place(self) -> dict[str, str]:
        """Return a record of delayed updates, with the folder of ``TieredOptimizer.place``."""
        there = self._host.place() if isinstance(self._host, TieredOptimizer) else {}
        return there | {"update": "delayed"}

    def _update(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._host.step()

    def _finish(self) -> None:
        """Wait for the pending update; its error is raised again at every later call."""
        if self._pending is None:
            return
        begun = time.perf_counter()
        try:
            self._pending.result(self._timeout_s)
        except FutureTimeoutError:
            raise StatesLost(
                "an update on the host took longer than "
                f"parallel.timeout_s={self._timeout_s:g}: the disk or the host is too slow or hangs"
            ) from None
        self._pending = None
        self.waited_s += time.perf_counter() - begun


def _stored(value: Tensor, like: Tensor) -> Stored:
    """Return a host tensor as ``Stored`` with the layout of ``like``."""
    shown = without_memory(like, value.dtype)

    def write(part: Tensor) -> None:
        value.copy_(part)

    return Stored(shown, lambda: value.cpu(), write)
