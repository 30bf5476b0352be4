"""Activation checkpointing: recompute activations of a block in its backward pass."""

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
from allometry.parallel.hdp.prefix import PREFIX_RING_OPERATOR
from allometry.parallel.hdp.ring import RING_OPERATOR
from allometry.parallel.offload.results import with_saved_tensor_hooks
from allometry.scaling.attention import BACKENDS

# Namespaces of collectives. Their results are saved, since recomputation would send data twice.
_COMMUNICATION = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm")
_ATTENTION = frozenset(
    {RING_OPERATOR, PREFIX_RING_OPERATOR}
    | {name for backend in BACKENDS for name in backend.operators}
)
# Dispatch modes that save results in the first pass and replay them in the second pass.
_SELECTION = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def apply_checkpointing(
    model: Transformer,
    kind: Literal["selective", "full"],
    *,
    dropout: bool,
    to_the_end: bool = False,
) -> None:
    """Checkpoint each block: save only its input ('full'), or also expensive results ('selective').

    Selective checkpointing saves the results of matrix products, attention and communication (arXiv
    2205.05198 saves all but the attention scores; flash attention stores no scores). Recomputation
    runs the same operators in the same order, so gradients are bit-identical. ``dropout``: restore
    the RNG state so that the recomputed dropout masks are the same. ``to_the_end``: recompute
    blocks to their end rather than to the last tensor that the backward pass needs, because tensors
    in flight must be received (``in_two.py``). For example,
    ``apply_checkpointing(model, "selective", dropout=False)``.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    options["early_stop"] = not to_the_end
    if kind == "selective":
        options["context_fn"] = _selective_contexts
    for block in model.blocks.values():
        # Replace the method rather than wrap the module: parameter names do not change, and the
        # hooks of ZeRO on the block run outside the recomputed region.
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def forward_and_forget(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    # A function of this package, since torch's compiler skips frames in torch's own files.
    return forward_and_forget


def _selective_contexts() -> tuple[Any, Any]:
    # Saved results may be offloaded to the host (see offload/).
    return with_saved_tensor_hooks(partial(create_selective_checkpoint_contexts, _policy))


def hide_fsdp_hooks(model: Transformer) -> None:
    """Hide the FSDP hooks of modules inside blocks from selective checkpointing.

    Call this function after ZeRO has been applied. A module that is sharded on its own (experts,
    routers) gathers its weights inside the recomputed region, where the weights may already be
    gathered. The two passes would then run different operators, which selective checkpointing
    rejects.
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
    """Return True if selective checkpointing saves results of ``operator``, such as "aten::mm"."""
    namespace, _, short = operator.partition("::")
    return namespace in _COMMUNICATION or short in _PRODUCTS or operator in _ATTENTION


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    overload = isinstance(operator, torch._ops.OpOverload)
    name = operator._schema.name if overload else str(operator)
    return CheckpointPolicy.MUST_SAVE if keeps(name) else CheckpointPolicy.PREFER_RECOMPUTE
