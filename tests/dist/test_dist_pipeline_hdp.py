"""Pipelines whose micro-batches differ in shape and number, with rings across them.

Every document is on one rank or distributed over a ring of both pipelines; gradients are compared
with one process that runs the documents one by one.
"""

# L tokens of a micro-batch on a rank

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import harness
import pipelined
import tiny
from allometry.configs.execution import SCHEDULES
from allometry.configs.run import RunConfig
from allometry.models.documents import Documents
from allometry.models.loss import IGNORE
from allometry.models.moe import begin_step, routers
from allometry.models.transformer import Transformer
from allometry.parallel import pipeline
from allometry.parallel.apply import Parallel
from allometry.parallel.hdp.shard import ring_table
from allometry.parallel.mesh import Mesh
from ring_oracles import local_positions
from thinned import thinned

RunRanks = Callable[..., list[Any]]


class Held(NamedTuple):
    """Micro-batch: documents by number, on a ring of hdp ranks; without documents a dummy."""

    documents: tuple[int, ...]
    ring: tuple[int, ...]


Step = tuple[Any, ...]
"""Arguments of ``orders``."""

Orders = tuple[tuple[Held, ...], ...]
"""Micro-batches of each hdp rank, in order."""


def orders(counts: Sequence[int], rings: Sequence[int], length: int = 0) -> Orders:
    """Return every hdp rank's micro-batches; those at indices ``rings`` share documents.

    Dummies extend each list to ``length``.
    """
    number = iter(range(1000))
    shared = {
        # The members of a ring can have any order.
        index: Held((next(number), next(number)), (1, 0) if index % 2 else (0, 1))
        for index in rings
    }
    return tuple(
        tuple(
            shared[index]
            if index in shared
            else Held(tuple(next(number) for _ in range(1 + index % 3)), (rank,))
            for index in range(count)
        )
        + (Held((), (rank,)),) * (length - count)
        for rank, count in enumerate(counts)
    )


def document(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets of a document of 1 to 13 tokens; some have no target."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    length = int(torch.randint(1, 14, (), generator=generator))
    stream = torch.randint(tiny.VOCAB, (length + 1,), generator=generator)
    targets = stream[1:].clone()
    targets[: number % 4] = IGNORE
    return stream[:-1], targets


def micro_batch(held: Held, tag: int, rank: int, seed: int, multiple: int) -> tiny.MicroBatch:
    """Return hdp rank ``rank``'s part of a micro-batch, padded to a multiple of tokens."""
    whole = [document(number, seed) for number in held.documents]
    lengths = [len(tokens) for tokens, _ in whole]
    n, member = len(held.ring), held.ring.index(rank)
    if n == 1:
        places, runs = torch.cat([torch.arange(0), *map(torch.arange, lengths)]), tuple(lengths)
    else:
        held_places, runs = local_positions(lengths, n, member)
        places = torch.from_numpy(held_places)
    chosen: list[list[Tensor]] = [[], []]
    for part, run in enumerate(places.split(list(runs))):
        for kept, values in zip(chosen, whole[part if n == 1 else part // 2], strict=True):
            kept.append(values[run])
    filling = -len(places) % multiple or multiple * (len(places) == 0)
    tokens, targets, positions = (
        torch.cat([*kept, torch.full((filling,), value)])[None]
        for kept, value in zip((*chosen, [places]), (0, IGNORE, 0), strict=True)
    )
    ends = torch.tensor([0, *runs, *([filling] if filling else [])]).cumsum(0)
    documents = Documents(
        ends.to(torch.int32),
        max(*runs, filling, 1),
        positions,
        counted_BL=torch.arange(tokens.shape[1])[None] < len(places),
        ring=ring_table(held.ring, member, lengths, tag) if n > 1 else None,
    )
    return tiny.MicroBatch(tokens, targets, documents)


def micro_batches(plan: Orders, mesh: Mesh, seed: int) -> list[tiny.MicroBatch]:
    """Return this rank's micro-batches; a unit has the same tag on all ranks."""
    tags = {held: tag for tag, held in enumerate(dict.fromkeys(h for o in plan for h in o))}
    rank = mesh.hdp.rank
    return [micro_batch(held, tags[held], rank, seed, mesh.tp.size) for held in plan[rank]]


def config(schedule: str, policy: str = "pipeline_balanced", **options: Any) -> RunConfig:
    """Return a run on documents, on a pipeline of two; ``pipeline_balanced`` varies its length."""
    given = pipelined.config(2, schedule, layers=4, **options).model_dump()
    del given["data"]["packing"]
    given["data"] |= {"kind": "documents", "max_document_tokens": 16}
    given["parallel"]["context"] = {"policy": policy, "capacity_tokens": 64}
    return RunConfig.model_validate(given)


def mixture(schedule: str, **options: Any) -> RunConfig:
    """Return the same run with experts and both router losses."""
    given = config(schedule, **options).model_dump()
    balance = {"kind": "auxiliary", "coefficient": 0.1}
    given["model"] |= {
        "kind": "moe",
        "first_dense_layers": 1,
        "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 10},
        "router": {"balance": balance, "z_loss": 1e-2, "gate": "softmax"},
    }
    return RunConfig.model_validate(given)


def all_documents(plan: Orders, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for number in sorted({number for order in plan for held in order for number in held.documents}):
        yield number, *document(number, seed)


def train(made: Parallel, mesh: Mesh, plan: Orders, seed: int) -> dict[str, Tensor]:
    """Take a step and check its losses against one process; return this rank's gradients."""
    targets = [values for *_, values in all_documents(plan, seed)]
    count = int((torch.cat(targets) != IGNORE).sum())
    batches = micro_batches(plan, mesh, seed)
    begun: list[int] = []
    for _, parameter in made.named_parameters():
        parameter.grad = None
    made.execution.train(
        batches, torch.tensor(1.0 / count, dtype=torch.float64), lambda *_: None, begun.append
    )
    assert begun == list(range(len(batches))), begun
    return {name: tiny.whole(p.grad) for name, p in made.named_parameters() if p.grad is not None}


def expected_gradients(alone: Transformer, plan: Orders, seed: int) -> dict[str, Tensor]:
    made = [(tokens[None], targets[None]) for _, tokens, targets in all_documents(plan, seed)]
    count = sum(int((targets != IGNORE).sum()) for _, targets in made)
    alone.zero_grad(set_to_none=True)
    for tokens, targets in made:
        (alone(tokens, targets).total / count).backward()
    return tiny.gradients(alone)


def evaluation_error(
    made: Parallel, alone: Transformer, mesh: Mesh, plan: Orders, seed: int
) -> tuple[int, float]:
    """Return the number of losses on this rank and the worst error of a micro-batch's sum."""
    batches = micro_batches(plan, mesh, seed)
    seen: dict[int, Tensor] = {}
    made.execution.evaluate(batches, seen.__setitem__)
    worst = 0.0
    with torch.no_grad():
        for index, nll_BL in seen.items():
            held = plan[mesh.hdp.rank][index]
            if len(held.ring) > 1:
                continue
            wholes = [document(number, seed) for number in held.documents]
            exact = sum(float(alone(t[None], y[None]).nll_BL.sum()) for t, y in wholes)
            worst = max(worst, abs(float(nll_BL.sum()) - exact))
    return len(seen), worst


def errors(run: RunConfig, steps: Sequence[Step], held_out: int = 0) -> dict[str, float]:
    """Return worst errors of several steps, with evaluations of ``held_out`` micro-batches."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        alone = tiny.initialized(run, mesh.device)
        worst = {"absolute": 0.0, "relative": 0.0, "loss": 0.0, "losses": 0}
        for seed, step in enumerate(steps):
            plan = orders(*step)
            num_tokens = sum(len(tokens) for _, tokens, _ in all_documents(plan, seed))
            for part in (alone, *made.parts.values()):
                begin_step(part, num_tokens)
                for router in routers(part).values():  # even loads would have no effect
                    router.load.copy_(torch.arange(1.0, 5.0) / 10.0)
            gradients = train(made, mesh, plan, seed)
            wanted = expected_gradients(alone, plan, seed)
            assert gradients.keys() == dict(made.named_parameters()).keys()
            wanted = {name: wanted[name] for name in gradients}
            absolute = max(float((gradients[n] - wanted[n]).abs().max()) for n in gradients)
            worst["absolute"] = max(worst["absolute"], absolute)
            worst["relative"] = max(worst["relative"], tiny.worst_error(gradients, wanted))
            if held_out:
                evaluated = orders((held_out,) * mesh.hdp.size, (0, 2) * (mesh.hdp.size > 1))
                count, error = evaluation_error(made, alone, mesh, evaluated, 77)
                worst["losses"] += count
                worst["loss"] = max(worst["loss"], error)
        return worst


def assert_equal_to_one_process(of_ranks: Sequence[dict[str, float]]) -> None:
    assert max(errors["absolute"] for errors in of_ranks) < 1e-12
    assert max(errors["relative"] for errors in of_ranks) < 1e-10
    assert max(errors["loss"] for errors in of_ranks) < 1e-10


RINGS = (0, 1, 4, 7)  # the last index is the last micro-batch of the pipeline with eight


@pytest.mark.parametrize(
    ("schedule", "zero"),
    thinned(
        {
            ("1f1b", 0),
            ("1f1b", 2),
            ("interleaved_1f1b", 1),
            ("interleaved_zero_bubble", 0),
            ("zbv_zero_bubble", 2),
        },
        ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
        (0, 1, 2),
    ),
)
def test_different_numbers_in_each_pipeline(run_ranks: RunRanks, schedule: str, zero: int) -> None:
    run = config(schedule, zero=zero)
    of_ranks = run_ranks(errors, 4, run, [((8, 18), RINGS)])
    assert_equal_to_one_process(of_ranks)


@pytest.mark.parametrize("schedule", ["gpipe", "looped_bfs", "dualpipe_v"])
def test_different_numbers_with_the_other_schedules(run_ranks: RunRanks, schedule: str) -> None:
    run = config(schedule, tied=True, zero=1)
    assert_equal_to_one_process(run_ranks(errors, 4, run, [((8, 18), RINGS)]))


def errors_keeping_one(run: RunConfig, steps: Sequence[Step]) -> dict[str, float]:
    """Return the same errors with a schedule cache of one, so that each schedule is rebuilt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "KEPT_SCHEDULES", 1)
        return errors(run, steps)


def test_schedules_that_are_not_kept(run_ranks: RunRanks) -> None:
    steps = [((4, 2), (0,)), ((2, 4), (1,)), ((4, 2), (0, 1))]
    of_ranks = run_ranks(errors_keeping_one, 4, config("zbv_zero_bubble", zero=1), steps)
    assert_equal_to_one_process(of_ranks)


@pytest.mark.parametrize(
    ("schedule", "zero", "counts"),
    [
        ("1f1b", 0, [(8, 3), (5, 9), (8, 2)]),
        ("1f1b", 1, [(8, 3), (5, 9), (8, 2)]),
        ("interleaved_zero_bubble", 1, [(8, 4), (6, 10), (8, 2)]),
        ("zbv_zero_bubble", 2, [(7, 1), (4, 9), (7, 2)]),
    ],
)
def test_numbers_change_from_step_to_step(
    run_ranks: RunRanks, schedule: str, zero: int, counts: list[tuple[int, ...]]
) -> None:
    run = config(schedule, tied=True, zero=zero)
    steps = [(numbers, [i for i in (0, 1) if i < min(numbers)]) for numbers in counts]
    of_ranks = run_ranks(errors, 4, run, steps, 5)
    assert_equal_to_one_process(of_ranks)
    assert sum(errors["losses"] for errors in of_ranks) == 2 * 5 * len(counts)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_different_numbers_with_experts(run_ranks: RunRanks, schedule: str) -> None:
    run = mixture(schedule, zero=1)
    assert_equal_to_one_process(run_ranks(errors, 4, run, [((5, 9), (0, 1, 4))]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shapes_differ(run_ranks: RunRanks, schedule: str) -> None:
    """One pipeline: the shape differs between micro-batches, and between steps."""
    run = config(schedule, "balanced")
    assert_equal_to_one_process(run_ranks(errors, 2, run, [((6,), ())] * 2, 5))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_shapes_differ_with_tensor_parallelism(run_ranks: RunRanks, schedule: str) -> None:
    run = config(schedule, "balanced", tied=True, tp=2)
    assert_equal_to_one_process(run_ranks(errors, 4, run, [((4,), ())] * 2, 3))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble"])
def test_in_lockstep_with_dummies(run_ranks: RunRanks, schedule: str) -> None:
    """ZeRO 3 gathers within a step: equal numbers of micro-batches, without announcements."""
    run = config(schedule, "balanced", zero=3)
    assert_equal_to_one_process(run_ranks(errors, 4, run, [((6, 4), (0, 2), 6)] * 2, 5))


def meet(run: RunConfig, exchanged: bool) -> None:
    """Train a step; with ``exchanged``, one pipeline runs rings 0 and 1 in reversed order."""
    with tiny.mesh(run) as mesh:
        one, (first, second, *others) = orders((4, 6), (0, 1))
        rings = (second, first) if exchanged else (first, second)
        train(tiny.parallel(run, mesh), mesh, (one, (*rings, *others)), 0)


@pytest.mark.slow
def test_rings_in_another_order_get_stuck() -> None:
    """Tags prevent messages of one ring from being received by another."""
    pool = harness.RankPool()  # stuck ranks cannot be reused by other tests
    try:
        run = config("1f1b", zero=1)
        pool.run(meet, 4, run, False)
        with pytest.raises(harness.RankFailure, match=r"ring\.py.* in wait"):
            pool.run(meet, 4, run, True, timeout_s=5)
    finally:
        pool.close()
