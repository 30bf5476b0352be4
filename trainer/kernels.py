"""Choose the kernels of a launch: named, as recorded before, by rule, or by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from allometry.configs.errors import UserError
from allometry.configs.renamed import new_names
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import Stream
from allometry.models.build import torch_dtype
from allometry.parallel.agree import from_main_rank, on_all_ranks
from allometry.parallel.mesh import Mesh
from allometry.scaling.attention import AttentionCall, choose_backend, refusal, worth_measuring
from allometry.scaling.kernels import apex_folder, apex_refusal, quantise_refusal
from allometry.scaling.plan import RunPlan
from allometry.trainer import precision
from allometry.trainer.measure import (
    AttentionShape,
    Outcome,
    time_adamw,
    time_attention,
    time_norms,
    time_quantisers,
)
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.resume import Start

CLOSE = 1.03
"""Minimum speedup for a kernel to replace one that precedes it in the order of preference."""


@dataclass(frozen=True)
class Choice:
    """A kernel, how it was chosen (``by``), measured times, and excluded kernels with reasons.

    For example, ``Choice("flash2", "measured", {"flash": 1.1, "flash2": 0.8})``.
    """

    name: str
    by: Literal["named", "record", "rule", "measured"]
    milliseconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernels:
    """The kernels of a launch, recorded in run.json as ``kernels``."""

    attention: Choice
    norm: Choice
    adamw: Choice
    linears: Choice  # recipe of FP8 matrix products, or "compute"
    deterministic: bool
    quantize: Choice = field(default_factory=lambda: Choice("torch", "rule"))
    by_call: bool = False  # attention: each call uses the first suitable back end

    @property
    def core(self) -> str | None:
        """The attention back end of all calls; None if each call selects its own."""
        return None if self.by_call else self.attention.name

    def describe(self) -> dict[str, Any]:
        """Return the choices as JSON."""
        return {key: value for key, value in asdict(self).items() if key != "by_call"}

    def changes(self, before: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the differences from the recorded ``kernels`` of a launch as event details."""
        for key in ("attention", "norm", "adamw", "linears", "quantize"):
            choice: Choice = getattr(self, key)
            was = before.get(key, {}).get("name")
            if was not in (None, choice.name):
                reason = choice.left_out.get(was, f"chosen by: {choice.by}")
                yield {"kernel": key, "before": was, "now": choice.name, "reason": reason}
        was = before.get("deterministic", self.deterministic)
        if was != self.deterministic:
            yield {
                "kernel": "training.deterministic",
                **{"before": was, "now": self.deterministic, "reason": "the configuration"},
            }


def settle(
    key: str,
    asked: str,
    names: Sequence[str],
    refused: Callable[[str], str | None],
    measure: Callable[[Sequence[str]], dict[str, Outcome]] | None,
    before: str | None = None,
    *,
    by_clock: bool = True,
) -> Choice:
    """Choose one of ``names``, which are valid candidates in order of preference.

    ``asked`` is a name, or auto: the recorded kernel ``before`` if it still works, else the fastest
    (without ``by_clock`` the first that runs). ``refused(name)`` returns the reason why a kernel
    cannot be used, or None. ``measure(names)`` times kernels on the device; if it is None, the
    first name is chosen. For example, with names ("a", "b") measured at 1.02 and 1.00 ms "a" is
    chosen, because "b" is less than 3 % faster.

    Raises:
        UserError: the named kernel cannot be used, or no candidate runs on this device.
    """
    if asked != "auto":
        reason = refused(asked)
        if reason is not None:
            raise UserError(f"kernels.{key}={asked} {reason}, or kernels.{key}: auto")
        tried = measure([asked]) if measure is not None else {}
        if isinstance(tried.get(asked), str):
            raise UserError(f"kernels.{key}={asked} {tried[asked]}; use kernels.{key}: auto")
        return Choice(asked, "named", _times(tried))
    left_out: dict[str, str] = {}
    if before is not None and measure is not None:
        reason = refused(before)
        tried = measure([before]) if reason is None else {before: reason}
        if not isinstance(tried[before], str):
            return Choice(before, "record", _times(tried))
        left_out = _failures(tried)
    if measure is None or len(names) == 1:
        return Choice(names[0], "rule", left_out=left_out)
    found = measure(names)
    times, left_out = _times(found), left_out | _failures(found)
    if not times:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise UserError(f"kernels.{key}=auto finds none that runs on this device: {reasons}")
    slowest = CLOSE * min(times.values()) if by_clock else max(times.values())
    best = next(name for name in names if times.get(name, np.inf) <= slowest)
    return Choice(best, "measured" if by_clock else "rule", times, left_out)


def _times(found: Mapping[str, Outcome]) -> dict[str, float]:
    return {name: round(each, 4) for name, each in found.items() if not isinstance(each, str)}


def _failures(found: Mapping[str, Outcome]) -> dict[str, str]:
    return {name: each for name, each in found.items() if isinstance(each, str)}


def choose_kernels(
    config: RunConfig,
    plan: RunPlan,
    stream: Stream | DocumentStream,
    folder: RunFolder,
    start: Start,
    mesh: Mesh,
) -> tuple[Kernels, list[dict[str, Any]]]:
    """Return the launch's kernels, the same on all ranks, and their changes since the last launch.

    The main rank chooses on its own device; on a CPU it applies fixed rules only, so that no choice
    depends on timings. Raises UserError on all ranks if a named kernel cannot be used on any rank.
    """

    def decide() -> tuple[Kernels, list[dict[str, Any]]]:
        before = _recorded(config, folder, start)
        kernels = _decide(config, plan, stream, start, mesh, before)
        return kernels, list(kernels.changes(before))

    kernels, changes = from_main_rank(mesh, decide, "choosing kernels")
    on_all_ranks(mesh, lambda: _check(config, plan, mesh, kernels), "checking kernels")
    return kernels, changes


def _recorded(config: RunConfig, folder: RunFolder, start: Start) -> dict[str, Any]:
    """Return the kernels recorded for the steps taken so far; empty before the first step."""
    if not start.step or start.weights_only:
        return {}
    parent = config.run.parent
    taken = RunFolder(parent.folder) if start.branched and parent is not None else folder
    return new_names(taken.recorded().get("kernels", {}), "kernels")


def _call(config: RunConfig, plan: RunPlan, mesh: Mesh) -> AttentionCall:
    documents = config.data.kind == "documents"
    return AttentionCall(
        mesh.device.type,
        config.training.compute_dtype,
        packed=documents or config.data.packing == "per_document",
        length=plan.micro_batch_tokens if documents else config.data.sequence_length,
        compiled=config.training.compile and not documents,
        head_width=config.model.head_width,
        window=config.model.window_tokens,
        deterministic=config.training.deterministic and mesh.device.type == "cuda",
    )


def _decide(
    config: RunConfig,
    plan: RunPlan,
    stream: Stream | DocumentStream,
    start: Start,
    mesh: Mesh,
    before: Mapping[str, Any],
) -> Kernels:
    asked, device, on_cuda = config.kernels, mesh.device, mesh.device.type == "cuda"
    by_clock = not config.training.deterministic  # two runs of one config must be identical
    call, compiled = _call(config, plan, mesh), config.training.compile

    def known(key: str) -> str | None:
        name: str | None = before.get(key, {}).get("name")
        return name

    attention = settle(
        "attention",
        asked.attention,
        worth_measuring(call) if on_cuda else (choose_backend(call).name,),
        lambda name: refusal(name, call),
        (lambda names: time_attention(names, _shape(config, plan, stream, start, mesh), device))
        if on_cuda
        else None,
        known("attention"),
        by_clock=by_clock,
    )
    apex = ("torch", "apex") if on_cuda and apex_folder() is not None else ("torch",)
    dtype, rows = torch_dtype(config.training.compute_dtype), plan.micro_batch_tokens
    norm = settle(
        "norm",
        asked.norm,
        ("torch",) if compiled else apex,
        lambda name: apex_refusal(device.type, compiled=compiled) if name == "apex" else None,
        (lambda names: time_norms(names, rows, config.model.width, dtype, device))
        if len(apex) > 1 or asked.norm == "apex"
        else None,
        known("norm"),
        by_clock=by_clock,
    )
    adamw = settle(
        "adamw",
        asked.adamw,
        apex,
        lambda name: apex_refusal(device.type, compiled=False) if name == "apex" else None,
        (lambda names: time_adamw(names, device))
        if len(apex) > 1 or asked.adamw == "apex"
        else None,
        known("adamw"),
        by_clock=by_clock,
    )
    recipe, by, left_out = precision.choose(config, mesh.tp.size, device, known("linears"))
    linears = Choice(recipe, by, left_out=left_out)
    quantize = _quantiser(config, plan, device, recipe, known("quantize"))
    if on_cuda:
        torch.cuda.empty_cache()
    by_call = not on_cuda and asked.attention == "auto"
    deterministic = config.training.deterministic
    return Kernels(attention, norm, adamw, linears, deterministic, quantize, by_call)


def _quantiser(
    config: RunConfig, plan: RunPlan, device: torch.device, recipe: str, before: str | None
) -> Choice:
    """Choose the kernel that rounds to FP8."""
    dtype, rows = torch_dtype(config.training.compute_dtype), plan.micro_batch_tokens
    rounds = recipe != "compute" or config.precision.saved_activations == "fp8"
    reason = quantise_refusal(device.type, compiled=config.training.compile, rounds=rounds)

    def measure(names: Sequence[str]) -> dict[str, Outcome]:
        return time_quantisers(names, rows, config.model.width, dtype, device)

    return settle(
        "quantize",
        config.kernels.quantize,
        ("triton", "torch") if reason is None else ("torch",),
        lambda name: reason if name == "triton" else None,
        measure if reason is None else None,
        before,
        by_clock=not config.training.deterministic,
    )


def _check(config: RunConfig, plan: RunPlan, mesh: Mesh, kernels: Kernels) -> None:
    """Raise UserError if this rank's machine lacks a kernel that the main rank chose."""
    reason, key = refusal(kernels.attention.name, _call(config, plan, mesh)), "attention"
    for other in ("norm", "adamw"):
        if reason is None and getattr(kernels, other).name == "apex":
            reason, key = apex_refusal(mesh.device.type, compiled=False), other
    if reason is None and kernels.quantize.name == "triton":
        reason = quantise_refusal(mesh.device.type, compiled=False, rounds=True)
        key = "quantize"
    if reason is None and kernels.linears.name != "compute":
        found = precision.Device.of(mesh.device)
        reason = precision.refusal(kernels.linears.name, config, mesh.tp.size, found)
        key = "linears"
    if reason is not None:
        name = getattr(kernels, key).name
        section = "precision" if key == "linears" else "kernels"
        raise UserError(f"{section}.{key}={name} on rank {mesh.rank}: {reason}")


def _shape(
    config: RunConfig,
    plan: RunPlan,
    stream: Stream | DocumentStream,
    start: Start,
    mesh: Mesh,
) -> AttentionShape:
    """Return the attention shape of the next micro-batch; with documents, of a full micro-batch."""
    model, size = config.model, plan.micro_batch_sequences
    shape = AttentionShape(
        sequences=size,
        length=config.data.sequence_length,
        heads=model.num_heads // mesh.tp.size,
        kv_heads=max(model.kv_heads // mesh.tp.size, 1),
        head_width=model.head_width,
        window=model.window_tokens,
        dtype=torch_dtype(config.training.compute_dtype),
        documents=None,
        compiled=config.training.compile,
    )
    position = plan.batch.sequences_before(start.step + 1)
    if isinstance(stream, DocumentStream):
        lengths = _filled(stream, position, plan)
        return replace(shape, sequences=1, length=sum(lengths), documents=lengths)
    packed = stream.batch(position, size).documents
    if packed is None:
        return shape
    return replace(shape, documents=tuple(np.diff(packed.cu_lengths).tolist()))


def _filled(stream: DocumentStream, position: int, plan: RunPlan) -> tuple[int, ...]:
    """Return lengths of documents that fill a micro-batch."""
    room, lengths = plan.micro_batch_tokens, []
    for length in stream.pieces(position, plan.batch.sequences(1)).lengths.tolist():
        lengths.append(min(length, room))
        room -= lengths[-1]
        if not room:
            return tuple(lengths)
    return (*lengths, room)
