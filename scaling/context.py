"""Checks of hybrid data/context parallelism that do not depend on documents.

The functions are pure; ``layout.py`` calls them for every run.
"""

from __future__ import annotations

from typing import Literal

from allometry.configs.data import DocumentData
from allometry.configs.errors import UserError
from allometry.configs.execution import ContextConfig
from allometry.configs.run import RunConfig
from allometry.scaling.degrees import Degrees, check_divides


def mode_of(config: RunConfig, degrees: Degrees) -> Literal["free", "aligned", "lockstep"]:
    """Return how far hdp ranks must run in lockstep (``scaling.hdp.plan.Mode``).

    Collectives inside a micro-batch (ZeRO 2 and 3, expert parallelism) need the same number of
    micro-batches on each rank. A pipeline alternates forward and backward passes of different
    micro-batches, so a ring needs the same micro-batch index on all its members; otherwise two
    ranks would deadlock. For example, ZeRO 1 without pp and ep returns "free".
    """
    alone = degrees.pp == 1 and degrees.ep == 1
    if alone and config.parallel.zero.stage <= 1:
        return "free"
    uneven = degrees.pp > 1 and config.parallel.context.policy == "pipeline_balanced"
    return "aligned" if uneven else "lockstep"


def check_context(config: RunConfig, degrees: Degrees) -> None:
    """Check ``parallel.context`` against the data, the model and the mesh.

    Raises UserError, naming the keys, for settings that are unsupported or have no effect.
    """
    context = config.parallel.context
    if not isinstance(config.data, DocumentData):
        usual = ContextConfig()
        for name in ContextConfig.model_fields:
            told = name == "costs" and config.training.activation_offload > 0.0  # for dry runs
            if told or getattr(context, name) == getattr(usual, name):
                continue
            raise UserError(
                f"parallel.context.{name} has no effect while data.kind is "
                f"{config.data.kind}; set data.kind: documents or leave parallel.context out"
            )
        return
    _check_policy(config, degrees)
    _check_room(config.data, context, degrees)
    _check_windows(config, degrees)
    if config.model.dropout and degrees.hdp > 1:
        raise UserError(
            f"model.dropout={config.model.dropout} with data.kind: documents on {degrees.hdp} hdp "
            "ranks: its masks would depend on the layout; set model.dropout: 0"
        )


def _check_policy(config: RunConfig, degrees: Degrees) -> None:
    context, stage = config.parallel.context, config.parallel.zero.stage
    if context.policy == "static":
        check_divides("parallel.context.degree", context.degree, "hdp", degrees.hdp)
        if context.offload != "none":
            raise UserError(
                f"parallel.context.offload={context.offload} saves ranks that policy: static gives "
                "anyway; set offload: none or policy: balanced"
            )
    if context.policy == "pipeline_balanced":
        if degrees.pp == 1:
            raise UserError(
                "parallel.context.policy=pipeline_balanced needs a pipeline, but parallel.pp=1; "
                "use policy: balanced or set parallel.pp"
            )
        for key, value, most in (("ep", degrees.ep, 1), ("zero.stage", stage, 2)):
            if value > most:
                raise UserError(
                    "parallel.context.policy=pipeline_balanced gives pipelines different numbers "
                    f"of micro-batches, which parallel.{key}={value} cannot have; use policy: "
                    f"balanced or parallel.{key}: {most}"
                )


def _check_windows(config: RunConfig, degrees: Degrees) -> None:
    """Reject windows for documents that may be sharded over several ranks."""
    assert isinstance(config.data, DocumentData)
    window, context = config.model.window, config.parallel.context
    ranks = context.degree if context.policy == "static" else degrees.hdp
    longest = config.data.max_document_tokens
    if window is not None and ranks > 1 and window.tokens < longest:
        raise UserError(
            f"model.window.tokens={window.tokens} is shorter than data.max_document_tokens="
            f"{longest}, and attention over documents that lie on {ranks} ranks has no windows; "
            "use another data.kind, one rank of hdp or data.max_document_tokens: "
            f"{window.tokens}"
        )


def _check_room(data: DocumentData, context: ContextConfig, degrees: Degrees) -> None:
    longest, capacity, tp = data.max_document_tokens, context.capacity_tokens, degrees.tp
    if capacity % tp:
        raise UserError(
            f"parallel.context.capacity_tokens={capacity} must be a multiple of parallel.tp={tp}; "
            f"use {-(-capacity // tp) * tp}"
        )
    static = context.policy == "static"
    ranks = context.degree if static else degrees.hdp
    if longest > ranks * capacity:
        key = "parallel.context.degree" if static else "hdp"
        member = -(-longest // ranks)
        enough = -(-member // tp) * tp
        raise UserError(
            f"data.max_document_tokens={longest} does not fit {key}={ranks} ranks of "
            f"parallel.context.capacity_tokens={capacity}; use data.max_document_tokens: "
            f"{ranks * capacity} or less, parallel.context.capacity_tokens: {enough} or more, or "
            f"{key}: {-(-longest // capacity)} or more"
        )
