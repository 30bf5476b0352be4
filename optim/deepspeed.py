"""Optimizer of the DeepSpeed engine, which clips, updates and stores states itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import override

from allometry.optim.offload.held import MASTER, Stored
from allometry.optim.offload.swap import StatesLost
from allometry.optim.states import Group
from allometry.parallel.deepspeed.adamw import MOMENTS
from allometry.parallel.deepspeed.engine import DeepSpeedSync
from allometry.parallel.deepspeed.files import FilesLost
from allometry.parallel.folder import described
from allometry.parallel.mesh import Mesh


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """AdamW by DeepSpeed with the usual groups; ``state`` stays empty (see ``stored``).

    Every rank of ``mesh`` constructs the optimizer after the model is initialized, and all ranks
    make the same calls. ``groups`` are the groups of ``parameter_groups``.

    Raises:
        UserError: files on NVMe cannot be used.
        StatesLost: a file cannot be written, or differs from the written data.
    """

    def __init__(self, groups: Sequence[Group], sync: DeepSpeedSync, mesh: Mesh) -> None:
        super().__init__(list(groups), {})
        self._sync, self._mesh = sync, mesh
        self._made = False  # True once states exist
        self._lost: str | None = None  # error message after the loss of a file
        with self._files():
            self._parts = sync.start(self.param_groups)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients before a step."""
        super().zero_grad(set_to_none)
        with self._files():
            self._parts.close()

    def take_step(self, along: Sequence[Tensor]) -> Tensor:
        """Clip and update with the groups' rates; return the norm before clipping, 0-dim float64.

        The tensors ``along`` (float64) are summed over all ranks in place. If the norm is not
        finite, the result is infinite and no parameter is updated.
        """
        self._made = True
        with self._files():
            norm = self._sync.update(self.param_groups)
        self._mesh.sum_together(along)
        return norm

    def groups_not_finite(self) -> list[str]:
        """Return the names of groups whose gradients of the last step were not all finite."""
        numbers = self._sync.groups_not_finite()
        return [str(self.param_groups[number]["name"]) for number in numbers]

    def init_states(self) -> None:
        """Create the states of a new optimizer, to be filled by a checkpoint."""
        self._made = True
        with self._files():
            self._parts.init_states()

    def settle(self) -> None:
        """Make values written through ``stored`` visible to the model."""
        with self._files():
            self._parts.settle()

    def stored(self) -> Iterator[tuple[Tensor, str, Stored]]:
        """Yield (parameter, name, values) of all parameters and of existing states.

        Parameter values have the name ``MASTER``.
        """
        for parameter in self._parameters():
            yield parameter, MASTER, self._stored(parameter, "param")
            for key in MOMENTS if self._made else ():
                yield parameter, key, self._stored(parameter, key)
            if self._made:
                yield parameter, "step", Stored(torch.zeros(()), *self._calls(parameter, "step"))

    def held_bytes(self) -> dict[str, int]:
        """Return this rank's bytes of master weights and states on device, host and NVMe."""
        return self._parts.held_bytes()

    @property
    def parameters_bytes(self) -> int:
        """Bytes of master weights included in ``held_bytes``, without padding."""
        parts = map(self._parts.stretch, self._parameters())
        return sum(4 * (part.stop - part.start) for part in parts)

    def place(self) -> dict[str, str]:
        """Return a record of the folder of the files: see ``parallel/folder.py``."""
        folder = self._sync.folder
        return {} if folder is None else described(folder)

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _stored(self, parameter: Tensor, key: str) -> Stored:
        return Stored(self._parts.stretch(parameter), *self._calls(parameter, key))

    def _calls(
        self, parameter: Tensor, key: str
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
        def read() -> Tensor:
            with self._files():
                return self._parts.read(parameter, key)

        def write(value: Tensor) -> None:
            with self._files():
                self._parts.write(parameter, key, value)

        return read, write

    @contextmanager
    def _files(self) -> Iterator[None]:
        """Convert FilesLost to StatesLost, and raise the same error at every later call."""
        if self._lost is not None:
            raise StatesLost(self._lost)
        try:
            yield
        except FilesLost as error:
            self._lost = str(error)
            raise StatesLost(self._lost) from None
