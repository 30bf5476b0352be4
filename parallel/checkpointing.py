"""Activation checkpointing: what a block's backward computes again instead of keeping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from allometry.models.transformer import Transformer
from allometry.parallel.hdp.ring import RING_OPERATOR
from allometry.parallel.offload.results import with_saved_tensor_hooks
from allometry.scaling.attention import BACKENDS

# Namespaces of collectives, whose results are kept: recomputing them would send everything twice.
_COMMUNICATION = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm")
_ATTENTION = frozenset(
    {RING_OPERATOR, *(name for backend in BACKENDS for name in backend.operators)}
)
# The modes that note and answer operators in the first and in the second pass.
_SELECTION = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def apply_checkpointing(
    model: Transformer,
    kind: Literal["selective", "full"],
    *,
    dropout: bool,
    to_the_end: bool = False,
) -> None:
    """Make each block keep only its input ('full'), or also what is dear to compute ('selective').

    Selective keeps matrix products, attention and the results of communication (arXiv 2205.05198
    keeps all but attention's scores; flash attention has none to keep). The arithmetic is the
    same operators in the same order, so gradients do not change by a bit. ``dropout``: the masks
    must be drawn again as they were. ``to_the_end``: blocks are computed again to their end, not to
    the last tensor that backward needs, as what they send must arrive (``in_two.py``).
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    options["early_stop"] = not to_the_end
    if kind == "selective":
        options["context_fn"] = _selective_contexts
    for block in model.blocks.values():
        # In place of the method rather than around the module: names stay as they are, and what
        # ZeRO hooks on to the block happens outside of what is computed again.
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def forward_and_forget(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    # A function of ours, as torch's compiler does not begin in torch's own files.
    return forward_and_forget


def _selective_contexts() -> tuple[Any, Any]:
    # What is kept may wait on the host (see offload/).
    return with_saved_tensor_hooks(partial(create_selective_checkpoint_contexts, _policy))


def hide_fsdp_hooks(model: Transformer) -> None:
    """Hide from selective checkpointing what FSDP does for modules inside of blocks.

    Call it when ZeRO has been applied. A module that is sharded on its own (experts, routers)
    gathers its weights within the region that is computed again, where they may be there already:
    the two passes would then not run the same operators, which selective checkpointing demands.
    """
    for block in model.blocks.values():
        for module in block.modules():
            if module is not block and isinstance(module, FSDPModule):
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key, hook in hooks.items():
                        hooks[key] = _outside_selection(hook)


def _outside_selection(hook: Callable[..., Any]) -> Callable[..., Any]:
    def hook_outside_of_selection(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes() as modes, ExitStack() as others:
            for mode in modes:
                if not isinstance(mode, _SELECTION):
                    others.enter_context(mode)
            return hook(*args, **kwargs)

    return hook_outside_of_selection


def keeps(operator: str) -> bool:
    """Return whether selective checkpointing keeps the results of an operator, as "aten::mm"."""
    namespace, _, short = operator.partition("::")
    return namespace in _COMMUNICATION or short in _PRODUCTS or operator in _ATTENTION


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    overload = isinstance(operator, torch._ops.OpOverload)
    name = operator._schema.name if overload else str(operator)
    return CheckpointPolicy.MUST_SAVE if keeps(name) else CheckpointPolicy.PREFER_RECOMPUTE
