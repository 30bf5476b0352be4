"""Memory probe: two real steps of a run on random tokens, with every storage counted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import open_stream
from allometry.data.synthetic import write_random_store
from allometry.optim.schedule import resolve_schedule
from allometry.parallel.agree import on_all_ranks, on_main_rank
from allometry.parallel.mesh import Mesh
from allometry.scaling.batch import BatchPlan
from allometry.scaling.layout import Layout
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.plan import RunPlan, memory_of
from allometry.studies.memory.allocator import AllocatorLog
from allometry.studies.memory.kinds import kind_of
from allometry.studies.memory.live import HEAD, LiveBytes, Peak, peak_of
from allometry.trainer.assemble import make_model, make_optimizer, make_train_step
from allometry.trainer.feed import DocumentPlanner, StepInput, document_steps, sequence_steps

STEPS = 2


@dataclass(frozen=True)
class Measured:
    """Memory of one rank at the peak of its second step.

    ``peak``: of all tensors, with their kinds. ``allocated``: the allocator's own peak in the same
    step, which includes workspaces of kernels (CPU: from its events, CUDA: its counter). None on a
    CPU with several ranks, because events do not include memory freed by gloo's threads. ``saved``:
    tensors saved for backward while the loss was computed, by operation (empty without a head).
    """

    rank: int
    peak: Peak
    allocated: int | None
    saved: dict[str, int]

    @property
    def bytes(self) -> int:
        """Peak in bytes: the larger of the tensors' and the allocator's peak, if known."""
        return self.peak.bytes if self.allocated is None else max(self.peak.bytes, self.allocated)


def as_probed(config: RunConfig, folder: Path) -> RunConfig:
    """Return the run of two full steps on random tokens in ``folder``, not compiled.

    Tensors inside of compiled code cannot be observed.
    """
    sources = [
        source.model_copy(
            update={"train": str(folder / f"source-{index}"), "validation": None, "select": None}
        )
        for index, source in enumerate(config.data.sources)
    ]
    tree = config.model_dump(mode="json")
    data = config.data.model_copy(update={"sources": tuple(sources), "tokenizer": None})
    tree |= {"data": data.model_dump(mode="json"), "schedule": {"kind": "constant"}}
    tree["run"] |= {"parent": None, "initial": None}
    tree["batch"] |= {"ramp": None}
    tree["training"] |= {"total_tokens": None, "total_steps": STEPS, "compile": False}
    return RunConfig.model_validate(tree)


def write_tokens(config: RunConfig, folder: Path) -> None:
    """Write the random token files of ``as_probed`` for one launch."""
    data = config.data
    longest = data.max_document_tokens if data.kind == "documents" else data.sequence_length
    tokens = max(64 * longest, 2 * STEPS * config.batch.sequences * data.sequence_length)
    for index in range(len(data.sources)):
        write_random_store(
            folder / f"source-{index}", tokens, config.model.vocab_size, max(2, longest // 2), index
        )


def probe(config: RunConfig, mesh: Mesh) -> Measured:
    """Take two steps of ``config`` on this rank of ``mesh`` and return the memory of the second.

    Every rank calls it. The model starts from its initial values; only token files are written, to
    a temporary folder that all ranks must see. For example, ``probe(config, mesh).peak.kinds``.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(_shared_folder(mesh))
        config = as_probed(config, scratch)
        on_main_rank(mesh, lambda: write_tokens(config, scratch), "writing random tokens")
        plan = RunPlan.of(config, mesh.world_size)
        steps = list(_inputs(config, plan, mesh))
        log = stack.enter_context(AllocatorLog(mesh.device))
        live = stack.enter_context(LiveBytes())
        batches = [[batch.to(mesh.device) for batch in step.batches] for step in steps]
        parallel = make_model(config, plan, mesh)
        optimizer = make_optimizer(config, plan, parallel, mesh)
        schedule = resolve_schedule(config, plan.batch)
        train_step = make_train_step(config, plan, parallel, optimizer, schedule, mesh)
        parts = list(parallel.parts.values())
        live.mark((p for part in parts for p in part.parameters()), "parameters")
        live.mark((b for part in parts for b in part.buffers()), "buffers")

        def mark_gradients(*_: object) -> None:
            live.mark((p.grad for part in parts for p in part.parameters()), "gradients")

        stack.enter_context(live.watch((n, m) for p in parts for n, m in p.named_modules() if n))
        stack.enter_context(live.updating(optimizer))
        stack.callback(optimizer.register_step_pre_hook(mark_gradients).remove)
        for number, step in enumerate(batches, 1):
            begin = len(live.events)
            log.begin()
            train_step(number, step)
            states = [s for state in optimizer.state.values() for s in state.values()]
            live.mark((s for s in states if isinstance(s, torch.Tensor)), "optimizer states")
        allocated = log.peak() if mesh.device.type == "cuda" or mesh.world_size == 1 else None
        kinds = kind_of(config.model)
        head = (
            peak_of(live, kinds, begin, HEAD) if HEAD in {e.moment for e in live.events} else None
        )
        return Measured(mesh.rank, peak_of(live, kinds, begin), allocated, _saved(head))


def predicted(config: RunConfig, world_size: int, device: str, rank: int | None) -> MemoryEstimate:
    """Return the estimate for the measurement of ``probe``: the same run, not compiled.

    Of this rank, which is that of the fullest rank of its pipeline stage; None: of the fullest
    rank.
    """
    config = as_probed(config, Path("nowhere"))
    layout = Layout.of(config, world_size)
    each = layout.degrees.hdp * layout.degrees.tp
    batch = BatchPlan(config.batch, config.data.sequence_length)
    return memory_of(config, layout, batch, device, None if rank is None else rank // each)


def _saved(peak: Peak | None) -> dict[str, int]:
    kinds = peak.kinds if peak is not None else {}
    return {
        name.removeprefix("saved: "): size
        for name, size in kinds.items()
        if name.startswith("saved: ")
    }


def _inputs(config: RunConfig, plan: RunPlan, mesh: Mesh) -> Iterator[StepInput]:
    stream = on_all_ranks(
        mesh, lambda: open_stream(config.data, config.run.seed), "opening random tokens"
    )
    if isinstance(stream, DocumentStream):
        planner = DocumentPlanner(config, plan.layout)
        return document_steps(stream, plan, planner, mesh, 0)
    return sequence_steps(stream, plan, mesh, 0)


@contextmanager
def _shared_folder(mesh: Mesh) -> Iterator[Path]:
    """Yield a temporary folder of the main rank, on all ranks; deleted after all finish."""
    with ExitStack() as stack:
        made = stack.enter_context(tempfile.TemporaryDirectory()) if mesh.is_main else None
        yield Path(mesh.broadcast_object(made))
        mesh.barrier("measuring memory")
