"""A flipped bit on one rank is detected and the rank reported; ranks that agree are not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import events, rows
from test_dist_monitors import DOCUMENTS, MOE, SPHERES
from test_dist_runs import launch

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
SHORT = (
    "training.total_steps=4",
    "schedule.warmup_steps=1",
    "checkpoint.every_steps=null",
    "record.checks.replicas_every_steps=1",
)
TWICE = ("training.deterministic=true", "record.checks.twice_every_steps=2")
THIS_BATCH = "kind: auxiliary, coefficient: 0.01, loads: this_batch"
KINDS = ("replicas_differ", "computed_twice_differs", "self_test_failed")


def found(config: RunConfig) -> list[dict[str, Any]]:
    return [event for event in events(Path(config.run.folder)) if event["event"] in KINDS]


@contextmanager
def flipping(rank: int, name: str, step: int = 2) -> Iterator[None]:
    """Flip the lowest bit of one value of a tensor of ``rank`` after ``step``."""
    import torch
    import torch.distributed as dist

    from allometry.parallel.mesh import local
    from allometry.trainer.step import TrainStep

    take = TrainStep.__call__

    def taken(self: TrainStep, number: int, batches: Any) -> Any:
        outcome = take(self, number, batches)
        if number == step and dist.get_rank() == rank:
            named = dict(self.parallel.named_parameters())
            whole, _, key = name.partition("|")
            tensor = named[whole].data
            if key:
                tensor = self._optimizer.state[named[whole]][key]
            local(tensor).flatten().view(torch.int32)[3] ^= 1
        return outcome

    TrainStep.__call__ = taken  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainStep.__call__ = take  # type: ignore[method-assign]


def flipped(config: RunConfig, rank: int, name: str) -> str:
    from allometry.configs.errors import UserError

    with flipping(rank, name):
        try:
            launch(config)
        except UserError as error:
            return str(error)
    return ""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("keys", "ranks", "wrong", "name"),
    [
        (("batch.sequences=6",), 3, 1, "blocks.0.attention.wo.weight"),
        (("batch.sequences=6",), 3, 2, "embedding.weight|exp_avg"),
        (("parallel.tp=2",), 2, 1, "blocks.1.attention_norm.weight"),
        ((*MOE, "parallel.ep=2", "batch.sequences=8"), 2, 0, "blocks.1.ffn.router.weight"),
        slow(("parallel.zero={stage: 2, replicas: 2}",), 4, 3, "blocks.0.ffn.up.weight"),
        slow(("parallel.pp=2", "batch.micro_batch_sequences=1"), 4, 2, "head.weight"),
        slow((*SPHERES, "batch.sequences=6"), 3, 1, "blocks.0.ffn.up.weight|momentum_buffer"),
    ],
)
def test_a_flipped_bit_is_found_and_its_rank_named(
    tiny: Make, run_ranks: Ranks, keys: tuple[str, ...], ranks: int, wrong: int, name: str
) -> None:
    config = tiny(*SHORT, *keys)
    run_ranks(flipped, ranks, config, wrong, name)
    (event, *_) = found(config)
    (one,) = event["found"]
    tensor = f"optimizer.{name.replace('|', '.')}" if "|" in name else name
    assert one["tensors"] == [tensor]
    assert event["step"] == 2
    if one["majority"]:
        assert one["ranks"] == [wrong]
        assert f"rank {wrong} holds other bits of {tensor}" in event["said"]
    else:
        assert wrong in one["of"]
        assert len(one["of"]) == 2
    assert ranks != 3 or one["majority"]


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [
        ((), 2),
        ((*MOE, "parallel.ep=2"), 2),
        ((*MOE, "model.dropout=0.1"), 2),
        slow((*MOE, "parallel.tp=2"), 2),
        slow(("parallel.zero.stage=3",), 2),
        slow(("parallel.zero={stage: 1, replicas: 2}",), 4),
        slow(("parallel.pp=2", "batch.micro_batch_sequences=1", "model.tied_embeddings=true"), 4),
        slow((*SPHERES, "parallel.zero.stage=0"), 4),
        slow((*SPHERES, "parallel.tp=2"), 4),
        slow(DOCUMENTS, 2),
        slow(("optimizer.states={kind: fp8, rounding: stochastic}",), 2),
        slow(
            (*MOE, "model.router.balance={kind: auxiliary, coefficient: 0.01, loads: this_batch}"),
            2,
        ),
        slow(("optimizer={kind: apollo, lr: 0.01, rank: 4}",), 2),
    ],
)
def test_checks_find_nothing_and_change_nothing(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, keys: tuple[str, ...], ranks: int
) -> None:
    checked = tiny(*SHORT, *TWICE, *keys, folder=tmp_path / "checked")
    off = ("record.checks={replicas_every_steps: null, self_test: false}",)
    plain = tiny(*SHORT, *keys, *off, folder=tmp_path / "plain")
    for config in (checked, plain):
        run_ranks(launch, ranks, config)
    assert found(checked) == []
    numbers = [
        [{k: v for k, v in row.items() if k in ("loss", "grad_norm")} for row in rows(folder)]
        for folder in (tmp_path / "checked", tmp_path / "plain")
    ]
    assert numbers[0] == numbers[1]


def test_stop_and_refuse_saves(tiny: Make, run_ranks: Ranks, tmp_path: Path) -> None:
    keys = (*SHORT, "batch.sequences=6", "checkpoint.every_steps=1")
    for action, last in (("stop", 2), ("refuse_saves", 4)):
        folder = tmp_path / action
        config = tiny(*keys, f"record.checks.on_failure={action}", folder=folder)
        said = run_ranks(flipped, 3, config, 1, "embedding.weight")
        assert len(set(said)) == 1
        assert "rank 1 holds other bits of embedding.weight than ranks 0, 2" in said[0]
        assert rows(folder)[-1]["step"] == last
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-1"]


def faulty(config: RunConfig, rank: int, where: str) -> None:
    """Run a rank whose gradients, or matrix products, are wrong once."""
    import torch
    import torch.distributed as dist

    from allometry.parallel.mesh import local
    from allometry.trainer.record import twice
    from allometry.trainer.step import TrainStep

    compute, count, products = TrainStep.compute, 0, torch.mm
    shape = (twice.ROWS_OF_CPU, twice.INNER)

    def computed(self: TrainStep, batches: Any) -> Any:
        nonlocal count
        losses = compute(self, batches)
        count += 1
        if count == 2 and dist.get_rank() == rank:
            if where == "losses":
                return losses + 1
            if where == "product":
                return losses
            gradient = dict(self.parallel.named_parameters())["head.weight"].grad
            local(gradient).view(torch.int32)[1, 2] ^= 1 << 20
        return losses

    def multiplied(left: Any, right: Any, **options: Any) -> Any:
        product = products(left, right, **options)
        if where == "product" and dist.get_rank() == rank and left.shape == shape:
            product[5, 7] += 2
        return product

    TrainStep.compute, torch.mm = computed, multiplied  # type: ignore[method-assign, assignment]
    try:
        launch(config)
    finally:
        TrainStep.compute, torch.mm = compute, products  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["gradient", "losses", "product"])
def test_a_rank_that_computes_wrongly_is_named(tiny: Make, run_ranks: Ranks, where: str) -> None:
    config = tiny(*SHORT, *TWICE)
    run_ranks(faulty, 2, config, 1, where)
    events = found(config)
    assert len(events) == 1, events
    (event,) = events
    assert event["ranks"] == [1]
    kind = "self_test_failed" if where == "product" else "computed_twice_differs"
    assert event["event"] == kind
    assert where != "gradient" or event["tensors"] == ["head.weight"]
