"""Read and write access to the parameters and states that DeepSpeed keeps on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.parallel.deepspeed.adamw import MOMENTS, FlatAdamW
from allometry.parallel.deepspeed.boxes import Stretch
from allometry.parallel.deepspeed.files import SwapFolder


class _Place(NamedTuple):
    """Location of a parameter's elements: index of a flat partition, and offset in it."""

    group: int
    offset: int
    stretch: Stretch


class Parts:
    """Flat fp32 partitions of a started engine, addressed by parameter.

    A partition that is stored in files stays in memory until another partition is read or ``close``
    is called, since consecutive tensors are usually in the same partition. For example,
    ``parts.read(parameter, "exp_avg")``.
    """

    def __init__(
        self, zero: Any, adamw: FlatAdamW, stage: int, folder: SwapFolder | None = None
    ) -> None:
        self._zero, self._adamw, self._stage, self._folder = zero, adamw, stage, folder
        self._in_memory: int | None = None
        self._changed = False  # True if the partition in memory must be written back

    def check_files(self) -> None:
        """Raise UserError if NVMe is configured and DeepSpeed wrote no file on this rank.

        DeepSpeed silently keeps the states in memory if they take less than 1 MiB on a rank.
        """
        if self._folder is not None and not self._folder.held_bytes():
            raise UserError(
                "parallel.zero.optimizer_states.nvme with parallel.zero.engine=deepspeed: no group "
                "of parameters takes 1 MiB on a rank, so nothing would leave memory; use fewer "
                "ranks, a larger optimizer_states.bucket_mib, or leave nvme out"
            )

    def held_bytes(self) -> dict[str, int]:
        """Return bytes of master weights and allocated moments on this rank, by location."""
        held = {"device": 0, "cpu": 0, "nvme": 0}
        if self._folder is not None:
            held["nvme"] = self._folder.held_bytes()
        for flat in self._flats():
            states = self._adamw.state.get(flat, {})
            for tensor in (flat, *(states[key] for key in MOMENTS if key in states)):
                held["cpu" if tensor.device.type == "cpu" else "device"] += tensor.nbytes
        return held

    def stretch(self, parameter: Tensor) -> Stretch:
        """Return the range of a parameter's elements that this rank has."""
        return self._place(parameter).stretch

    def read(self, parameter: Tensor, key: str) -> Tensor:
        """Return this rank's elements of a parameter ("param") or a state, 1-dim, on the CPU.

        The key "step" returns the number of steps, 0-dim.
        """
        place = self._place(parameter)
        with self._open(place.group) as flat:
            return self._part(flat, place, key).detach().to("cpu", copy=True)

    def write(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Replace the values that ``read`` returns; call ``settle`` before the model runs."""
        place = self._place(parameter)
        with self._open(place.group, changed=True) as flat, torch.no_grad():
            self._part(flat, place, key).copy_(value)

    @torch.no_grad()
    def init_states(self) -> None:
        """Allocate the states of a new optimizer, all zeros."""
        for group in range(self._count()):
            with self._open(group, changed=True) as flat:
                self._adamw.made(flat)
        self.close()

    @torch.no_grad()
    def settle(self) -> None:
        """Copy written values to the model's parameters; every rank calls this method."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(self._count()):
            with self._open(group):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        self.close()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _count(self) -> int:
        return len(self._flats())

    def _flats(self) -> list[Tensor]:
        zero = self._zero
        flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero.single_partition_of_fp32_groups
        )
        return flats

    def _place(self, parameter: Any) -> _Place:
        zero = self._zero
        if self._stage == 3:
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            shape, numel = tuple(parameter.ds_shape), parameter.ds_numel
            start = min(numel, parameter.ds_zero_partition_rank * count)
            return _Place(group, offset, Stretch(shape, start, min(numel, start + count)))
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping
        if mapping is None:
            return _Place(self._group_of(parameter), 0, Stretch(shape, 0, 0))
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        stretch = Stretch(shape, here.start, here.start + here.numel)
        return _Place(mapping.param_group_index, there.start, stretch)

    def _group_of(self, parameter: Tensor) -> int:
        for number, members in enumerate(self._zero.bit16_groups):
            if any(member is parameter for member in members):
                return number
        raise AssertionError("not a parameter of this engine")

    def _part(self, flat: Tensor, place: _Place, key: str) -> Tensor:
        if key == "step":
            return self._adamw.made(flat)["step"]
        whole = flat if key == "param" else self._adamw.made(flat)[key]
        return whole.narrow(0, place.offset, place.stretch.stop - place.stretch.start)

    @contextmanager
    def _open(self, group: int, *, changed: bool = False) -> Iterator[Tensor]:
        swaps = self._stage == 3 and self._zero._swappable_optimizer_subgroup(group)
        if swaps and self._in_memory != group:
            self.close()
            self._zero._optimizer_states_and_gradient_swap_in(group)
            self._in_memory = group
        self._changed |= swaps and changed
        yield self._flats()[group]

    def close(self) -> None:
        """Release the partition in memory, written back if changed; a step needs the buffers."""
        group, self._in_memory = self._in_memory, None
        if group is None:
            return
        changed, self._changed = self._changed, False
        if changed:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self._zero._release_swap_buffers(group)
