"""A model whose documents are distributed over rings of ranks has one process's gradients."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tiny
from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.models.loss import IGNORE
from allometry.models.transformer import Transformer
from allometry.parallel.apply import compile_parts
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.context import apply_context
from allometry.parallel.hdp.shard import ring_table
from allometry.parallel.mesh import Mesh
from ring_oracles import local_positions, ring_traffic
from rings import Unit, counting, held, unit_of

RunRanks = Callable[..., list[Any]]
FILLING = 2
# Units that run at the same time: rings in any order, some ranks alone, some idle.
WAVES: list[list[Unit]] = [
    [((3, 1, 0), (29, 5)), ((2,), (7, 4))],
    [((0, 2), (21,)), ((1, 3), (18, 1, 9))],
    [((1,), (6,))],
]
PAIRS: list[list[Unit]] = [
    [((1, 0), (29, 5))],
    [((0,), (12,)), ((1,), (7, 4))],
    [((0, 1), (21, 3, 8))],
]


def stream(length: int) -> Tensor:
    """Return a document's tokens and the following one."""
    return torch.randint(tiny.VOCAB, (length + 1,), generator=torch.Generator().manual_seed(length))


def micro_batch(unit: Unit, member: int, tag: int, filling: int = FILLING) -> tiny.MicroBatch:
    """Return ``member``'s part of a unit with targets, positions, runs and padding."""
    ring, lengths = unit
    rows = held(lengths, len(ring), member)
    places, runs = local_positions(lengths, len(ring), member)
    tokens, targets = (
        torch.cat([stream(n)[part] for n in lengths])[rows] for part in (slice(-1), slice(1, None))
    )
    table = ring_table(ring, member, lengths, tag) if len(ring) > 1 else None
    documents = Documents(
        torch.tensor([0, *runs, filling]).cumsum(0).int(),
        max(*runs, filling),
        torch.cat([torch.from_numpy(places), torch.arange(filling)])[None],
        torch.arange(len(rows) + filling)[None] < len(rows),
        table,
    )
    return tiny.MicroBatch(
        torch.cat([tokens, torch.zeros(filling, dtype=torch.int64)])[None],
        torch.cat([targets, torch.full((filling,), IGNORE)])[None],
        documents,
    )


def whole(waves: list[list[Unit]]) -> list[tiny.MicroBatch]:
    """Return the same documents for one process."""
    return [micro_batch(((0,), lengths), 0, 0, 0) for wave in waves for _, lengths in wave]


def shared(waves: list[list[Unit]], rank: int) -> Iterator[tiny.MicroBatch]:
    """Yield the micro-batches of a rank, in order."""
    for number, wave in enumerate(waves):
        mine = unit_of(wave, rank)
        if mine is not None:
            yield micro_batch(*mine, tag=10 * number + wave.index(mine[0]))


def summed_gradients(
    model: Transformer, waves: list[list[Unit]], mesh: Mesh, *, from_zero: bool = False
) -> dict[str, Tensor]:
    """Return gradients summed over ranks; ``from_zero``: wrong positions that count local rows."""
    count = tiny.global_count(whole(waves))
    for batch in shared(waves, mesh.hdp.rank):
        if from_zero:
            rows = torch.arange(batch.tokens_BL.shape[1])[None]
            batch = replace(batch, documents=replace(batch.documents, positions_BL=rows))
        (tiny.forward_loss(model, batch) / count).backward()
    return {
        name: mesh.all_reduce_sum(p.grad if p.grad is not None else torch.zeros_like(p), "hdp")
        for name, p in model.named_parameters()
    }


def with_context(dtype: str, mesh: Mesh, checkpointing: str = "none") -> Transformer:
    model = tiny.initialized(tiny.config(0, dtype), mesh.device)
    apply_context(model, mesh)
    if checkpointing != "none":
        apply_checkpointing(model, checkpointing, dropout=False)
    return model


def expected_traffic(batches: list[tiny.MicroBatch], run: Any, kind: str) -> tuple[int, int]:
    features = (run.model.num_kv_heads or run.model.num_heads) * run.model.head_width
    dtype = getattr(torch, {"fp64": "float64", "fp32": "float32"}[run.training.compute_dtype])
    hops = size = 0
    for batch in batches:
        if batch.documents.ring is not None:
            forward, backward = (
                ring_traffic(batch.documents.ring, features, dtype, backward=b) for b in (0, 1)
            )
            again = 2 if kind == "full" else 1
            hops += run.model.num_layers * (again * forward.hops + backward.hops)
            size += run.model.num_layers * (again * forward.bytes + backward.bytes)
    return hops, size


def model_error(dtype: str, kind: str, world_size: int, compiled: bool = False) -> dict[str, Any]:
    waves = WAVES if world_size == 4 else PAIRS
    with tiny.mesh() as mesh:
        run = tiny.config(0, dtype)
        model = with_context(dtype, mesh, kind)
        if compiled:
            compile_parts(model)
        groups = len(dist.distributed_c10d._world.pg_map)
        with counting() as sent:
            got = summed_gradients(model, waves, mesh)
        plain = tiny.initialized(run, mesh.device)
        tiny.backward_alone(plain, whole(waves))
        return {
            "error": tiny.worst_error(got, tiny.gradients(plain)),
            "new groups": len(dist.distributed_c10d._world.pg_map) - groups,
            "sent": tuple(sent.traffic),
            "said": expected_traffic(list(shared(waves, mesh.hdp.rank)), run, kind),
        }


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_gradients_equal_one_process(
    run_ranks: RunRanks, dtype: str, tolerance: float, kind: str
) -> None:
    for rank, of_rank in enumerate(run_ranks(model_error, 4, dtype, kind, 4)):
        assert of_rank["error"] < tolerance
        assert of_rank["new groups"] == 0
        assert of_rank["sent"] == of_rank["said"], rank
        assert of_rank["sent"][0] > 0


def misplaced_error() -> float:
    """Return the error if members place their rows at the start of the document."""
    with tiny.mesh() as mesh:
        got = summed_gradients(with_context("fp64", mesh), PAIRS, mesh, from_zero=True)
        plain = tiny.initialized(tiny.config(0, "fp64"), mesh.device)
        tiny.backward_alone(plain, whole(PAIRS))
        return tiny.worst_error(got, tiny.gradients(plain))


def test_the_comparison_sees_wrong_positions(run_ranks: RunRanks) -> None:
    assert min(run_ranks(misplaced_error, 2)) > 1e-3


@pytest.mark.parametrize("kind", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_whole_compiled_blocks_equal_one_process(run_ranks: RunRanks, kind: str) -> None:
    for of_rank in run_ranks(model_error, 2, "fp32", kind, 2, True, timeout_s=240.0):
        assert of_rank["error"] < 1e-5
        assert of_rank["sent"] == of_rank["said"]


def compilations(dtype: str, own: bool = True) -> list[int]:
    """Return the number of block compilations after each of 12 units of different shapes.

    ``own`` False: with the model's own attention, without rings.
    """
    lengths = [(9,), (30, 4), (17, 3, 5), (64,), (41, 6), (23, 8, 2), (12, 12), (90,)]
    lengths += [(33, 1, 1, 7), (57,), (28, 3, 40), (19, 2)]
    with tiny.mesh() as mesh:
        model = with_context(dtype, mesh)
        if not own:
            for block in model.blocks.values():
                block.attention.core = attend
        counter = CompileCounterWithBackend("aot_eager")
        for block in model.blocks.values():
            block.compile(fullgraph=True, backend=counter)
        seen = []
        for number, documents in enumerate(lengths):
            wave = [((0, 1), documents)]
            if number % 2 or not own:
                wave = [((0,), documents), ((1,), (*documents, 5))]
            summed_gradients(model, [wave], mesh)
            seen.append(counter.frame_count)
        return seen


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_shapes_do_not_compile_blocks_anew(run_ranks: RunRanks, dtype: str) -> None:
    for seen in run_ranks(compilations, 2, dtype, timeout_s=240.0):
        assert seen[-1] <= 4, seen


@pytest.mark.slow
def test_the_count_sees_what_is_compiled_for_one_length(run_ranks: RunRanks) -> None:
    assert min(run_ranks(first_failure, 2)) == "FailOnRecompileLimitHit"


def first_failure() -> str:
    try:
        return str(compilations("bf16", own=False))
    except Exception as error:
        return type(error).__name__
