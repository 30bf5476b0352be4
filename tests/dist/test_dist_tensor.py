"""Tensor, sequence and loss parallelism give one process's gradients and losses."""

# B sequences, L tokens in a sequence, T = B*L, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import tiny
from allometry.configs.run import RunConfig
from allometry.models.documents import Documents
from allometry.models.head import Losses
from allometry.models.moe import begin_step, routers
from allometry.models.transformer import Transformer
from allometry.optim.clip import clip_by_global_norm
from allometry.parallel import reduce, zero
from allometry.parallel.mesh import Mesh
from thinned import thinned

RunRanks = Callable[..., list[Any]]
EXACT = {"fp64": 1e-10, "fp32": 1e-5}


def config(tp: int, dtype: str = "fp64", **options: Any) -> RunConfig:
    """Return a run with dimensions that 4 divides, an odd vocabulary and scales that matter.

    ``options``: ZeRO stage, and keys of the sections model and training.
    """
    given = tiny.config(options.pop("stage", 0), dtype).model_dump()
    for key in ("compile", "activation_checkpointing"):
        if key in options:
            given["training"][key] = options.pop(key)
    given["model"] |= {"num_heads": 8, "num_kv_heads": 4, "ffn_width": 28, "num_layers": 2}
    given["model"] |= {"qk_norm": True, "z_loss": 1e-2} | options
    if not given["model"]["tied_embeddings"]:
        given["parameterization"] = {"kind": "mup", "base_width": 11}
    given["parallel"]["tp"] = tp
    return RunConfig.model_validate(given)


def mixture(tp: int, dtype: str = "fp64", latent: bool = False, **options: Any) -> RunConfig:
    """Return the same with experts after a dense block: shared ones, auxiliary and z-loss."""
    experts = {"num_experts": 6, "experts_per_token": 2, "width": 16, "num_shared_experts": 1}
    experts |= {"kind": "latent", "latent_width": 10} if latent else {"kind": "swiglu"}
    balance = {"kind": "auxiliary", "coefficient": 0.1}
    given = config(tp, dtype, **options).model_dump()
    given["model"] |= {"kind": "moe", "first_dense_layers": 1, "experts": experts}
    given["model"]["router"] = {"balance": balance, "z_loss": 1e-2, "gate": "softmax_after_topk"}
    return RunConfig.model_validate(given)


def pairs(count: int) -> list[tiny.MicroBatch]:
    """Return micro-batches of two sequences: gathered tokens must keep their order."""
    single = tiny.micro_batches(2 * count)
    made = []
    for one, two in zip(single[::2], single[1::2], strict=True):
        first, second = one.documents, two.documents
        documents = Documents(
            torch.cat([first.cu_lengths, second.cu_lengths[1:] + tiny.LENGTH]),
            max(first.max_length, second.max_length),
            torch.cat([first.positions_BL, second.positions_BL]),
        )
        tokens = torch.cat([one.tokens_BL, two.tokens_BL])
        made.append(tiny.MicroBatch(tokens, torch.cat([one.targets_BL, two.targets_BL]), documents))
    return made


def prepare(model: Transformer, batches: list[tiny.MicroBatch]) -> None:
    """Set the routers' step size and an uneven load, as left by a previous step."""
    if routers(model):
        begin_step(model, sum(batch.tokens_BL.numel() for batch in batches))
    for each in routers(model).values():
        each.load.copy_(torch.arange(1.0, 1.0 + len(each.load)) / 21.0)


def compare(run: RunConfig, mesh: Mesh, twin: RunConfig | None = None) -> dict[str, float]:
    """Return errors of gradients, their norm and a held-out loss against one process."""
    batches = pairs(3 * mesh.hdp.size)
    held_out = replace(batches[0], tokens_BL=batches[0].tokens_BL.flip(1))
    model, sync = tiny.distributed(run, mesh)
    alone = tiny.initialized(twin or run, mesh.device)
    for each in (model, alone):
        prepare(each, batches)
    tiny.backward_shared(model, sync, batches, mesh)
    tiny.backward_alone(alone, batches)
    measured = {"gradients": tiny.worst_error(tiny.gradients(model), tiny.gradients(alone))}
    norms = [
        clip_by_global_norm(m.parameters(), None, on) for m, on in ((model, mesh), (alone, None))
    ]
    measured["norm"] = float((norms[0] / norms[1] - 1).abs())
    with torch.no_grad():
        losses = [tiny.forward_loss(m, held_out) for m in (model, alone)]
    measured["loss"] = float((losses[0] / losses[1] - 1).abs())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
    return measured


def errors(run: RunConfig, twin: RunConfig | None = None) -> dict[str, float]:
    with tiny.mesh(run) as mesh:
        return compare(run, mesh, twin)


def worst(results: list[dict[str, float]]) -> float:
    return max(value for errors_of_rank in results for value in errors_of_rank.values())


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [2, 4])
def test_gradients_and_losses_equal_one_process(
    run_ranks: RunRanks, tp: int, tied: bool, dtype: str
) -> None:
    run = config(tp, dtype, tied_embeddings=tied)
    assert worst(run_ranks(errors, tp, run)) < EXACT[dtype]


def chunked_against_whole(kind: str, dtype: str) -> tuple[bool, float]:
    """Return whether losses equal unchunked products bitwise, and the error of gradients."""
    make = {"dense": config, "mixture": mixture}[kind]
    made = []
    for overlap in ("off", "chunked"):
        given = make(2, dtype)
        parallel = given.parallel.model_copy(update={"tp_overlap": overlap})
        run = given.model_copy(update={"parallel": parallel})
        with tiny.mesh(run) as mesh:
            batches = pairs(1)
            model, sync = tiny.distributed(run, mesh)
            prepare(model, batches)
            sync.micro_batch(last=True)
            loss = tiny.forward_loss(model, batches[0])
            (loss / tiny.global_count(batches)).backward()
            sync.finish()
            made.append((loss.detach().clone(), tiny.gradients(model)))
    (loss, gradients), (chunked_loss, chunked) = made
    return torch.equal(loss, chunked_loss), tiny.worst_error(chunked, gradients)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_chunks_change_no_more_than_the_order_of_sums(run_ranks: RunRanks, kind: str) -> None:
    for _, error in run_ranks(chunked_against_whole, 2, kind, "fp64"):
        assert error < 1e-12
    for _, error in run_ranks(chunked_against_whole, 2, kind, "fp32"):
        assert error < 1e-5


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_zero_on_top(run_ranks: RunRanks, stage: int, dtype: str) -> None:
    assert worst(run_ranks(errors, 4, config(2, dtype, stage=stage))) < EXACT[dtype]


def test_with_zero_and_a_tied_head(run_ranks: RunRanks) -> None:
    assert worst(run_ranks(errors, 4, config(2, stage=3, tied_embeddings=True))) < 1e-10


def test_without_options(run_ranks: RunRanks) -> None:
    assert worst(run_ranks(errors, 2, config(2, qk_norm=False, z_loss=0.0))) < 1e-10


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_with_activation_checkpointing(run_ranks: RunRanks, kind: str) -> None:
    assert worst(run_ranks(errors, 2, config(2, activation_checkpointing=kind))) < 1e-10


@pytest.mark.parametrize(("stage", "world_size"), thinned({(0, 2)}, [(0, 2), (1, 4), (3, 4)]))
def test_compiled(run_ranks: RunRanks, stage: int, world_size: int) -> None:
    run, twin = (config(2, "fp32", stage=stage, compile=compiled) for compiled in (True, False))
    of_ranks = run_ranks(errors, world_size, run, twin, timeout_s=240.0)
    assert worst(of_ranks) < EXACT["fp32"]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("latent", [False, True], ids=["plain", "latent"])
@pytest.mark.parametrize("tp", [2, 4])
def test_mixtures_of_experts(run_ranks: RunRanks, tp: int, latent: bool, dtype: str) -> None:
    run = mixture(tp, dtype, latent)
    assert worst(run_ranks(errors, tp, run)) < EXACT[dtype]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_mixtures_of_experts_with_zero(run_ranks: RunRanks, stage: int) -> None:
    assert worst(run_ranks(errors, 4, mixture(2, stage=stage))) < 1e-10


def spread(stage: int, dtype: str = "fp64") -> RunConfig:
    """Return a run with experts on two ep ranks, each sharded over two tp ranks."""
    given = mixture(2, dtype, stage=stage).model_dump()
    given["parallel"]["ep"] = 2
    return RunConfig.model_validate(given)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_mixtures_of_experts_with_expert_parallelism(run_ranks: RunRanks, stage: int) -> None:
    assert worst(run_ranks(errors, 4, spread(stage))) < 1e-10


def filled(run: RunConfig) -> dict[str, float]:
    """Return errors with sequences of 11 tokens padded to 16, against one unpadded process."""
    with tiny.mesh(run) as mesh:
        cuts = torch.tensor([0, 7, 11, 16, 23, 27, 32], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in (7, 4, 5)]).expand(2, 16)
        short = torch.tensor([0, 7, 11, 18, 22], dtype=torch.int32)
        counted = (torch.arange(16) < 11).expand(2, 16)
        stream = torch.randint(tiny.VOCAB, (4, 17), generator=torch.Generator().manual_seed(3))
        model, sync = tiny.distributed(run, mesh)
        alone = tiny.initialized(run, mesh.device)
        mine, whole = [], []
        for pair in stream.split(2):
            targets = pair[:, 1:].masked_fill(~counted, tiny.IGNORE)
            documents = Documents(cuts, 7, positions, counted_BL=counted)
            mine.append(tiny.MicroBatch(pair[:, :-1], targets, documents))
            documents = Documents(short, 7, positions[:, :11])
            whole.append(tiny.MicroBatch(pair[:, :11], targets[:, :11], documents))
        for each in (model, alone):
            prepare(each, whole)
        tiny.backward_shared(model, sync, mine, mesh)
        tiny.backward_alone(alone, whole)
        worst_of = {"gradients": tiny.worst_error(tiny.gradients(model), tiny.gradients(alone))}
        expected = alone.take_statistics()
        for layer, statistics in model.take_statistics().items():
            for name, value in statistics._asdict().items():
                dist.all_reduce(value, group=mesh.tp.group)
                exact = getattr(expected[layer], name)
                worst_of[f"{name} {layer}"] = float(((value - exact) / exact).abs().max())
        return worst_of


def test_routers_do_not_see_filling(run_ranks: RunRanks) -> None:
    of_ranks = run_ranks(filled, 2, mixture(2))
    assert len(of_ranks[0]) == 1 + 5
    assert worst(of_ranks) < 1e-10


@pytest.mark.slow
def test_compiled_mixtures_of_experts(run_ranks: RunRanks) -> None:
    # Widths that the grouped kernel accepts: its fallback loop cannot be compiled.
    run, twin = (mixture(2, "fp32", width=24, compile=compiled) for compiled in (True, False))
    assert worst(run_ranks(errors, 2, run, twin, timeout_s=280.0)) < EXACT["fp32"]


@contextmanager
def summed_by(function: Callable[..., None]) -> Iterator[None]:
    """Replace the sum over tp of replicated weights' gradients by ``function``."""
    right = reduce.sum_over_tp
    reduce.sum_over_tp = zero.sum_over_tp = function
    try:
        yield
    finally:
        reduce.sum_over_tp = zero.sum_over_tp = right


def unsummed_errors(run: RunConfig) -> dict[str, float]:
    with tiny.mesh(run) as mesh, summed_by(lambda *_: None):
        return compare(run, mesh)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("make", [config, mixture])
def test_the_comparison_sees_gradients_that_nobody_summed(
    run_ranks: RunRanks, make: Callable[..., RunConfig], stage: int
) -> None:
    for of_rank in run_ranks(unsummed_errors, 2, make(2, stage=stage)):
        assert of_rank["gradients"] > 0.1
        assert of_rank["loss"] < 1e-10


def seen(run: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total, the losses of all tokens and their logits on this rank."""
    with tiny.mesh(run) as mesh:
        model, _ = tiny.distributed(run, mesh)
        return forward(model)


def forward(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    batch = pairs(2)[1]
    losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
    assert isinstance(losses, Losses)
    logits_BLV = model(batch.tokens_BL, None, batch.documents)
    return losses.total.detach(), losses.nll_BL, logits_BLV.detach()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_has_all_losses_and_all_logits(run_ranks: RunRanks, tp: int, tied: bool) -> None:
    run = config(tp, "fp32", tied_embeddings=tied)
    of_ranks = run_ranks(seen, tp, run)
    wanted = forward(tiny.initialized(run, torch.device("cpu")))
    for rank in of_ranks:
        for mine, first, alone in zip(rank, of_ranks[0], wanted, strict=True):
            assert torch.equal(mine, first)
            assert mine.shape == alone.shape
            assert float((mine - alone).abs().max() / alone.abs().max()) < 1e-5


def logits_gradient_error(run: RunConfig) -> float:
    """Return the gradient error through the logits, weighted differently for each column."""
    with tiny.mesh(run) as mesh:
        model, sync = tiny.distributed(run, mesh)
        alone = tiny.initialized(run, mesh.device)
        batch = pairs(1)[0]
        for each in (model, alone):
            sync.micro_batch(last=True)
            logits_BLV = each(batch.tokens_BL, None, batch.documents)
            weights_V = torch.arange(logits_BLV.shape[2], dtype=logits_BLV.dtype)
            (logits_BLV.sin() * weights_V).sum().backward()
            if each is model:
                sync.finish()
        return tiny.worst_error(tiny.gradients(model), tiny.gradients(alone))


def test_logits_can_be_differentiated(run_ranks: RunRanks) -> None:
    assert max(run_ranks(logits_gradient_error, 2, config(2))) < 1e-10


def initial(run: RunConfig) -> dict[str, Tensor]:
    with tiny.mesh(run) as mesh:
        model, _ = tiny.distributed(run, mesh)
        return tiny.values(model)


@pytest.mark.parametrize(("tp", "stage"), [(2, 0), (4, 0), (2, 3)])
@pytest.mark.parametrize("make", [config, mixture])
def test_initial_parameters_are_the_same_bits(
    run_ranks: RunRanks, make: Callable[..., RunConfig], tp: int, stage: int
) -> None:
    alone = tiny.values(tiny.initialized(make(1, "fp32"), torch.device("cpu")))
    for of_rank in run_ranks(initial, 4, make(tp, "fp32", stage=stage)):
        assert of_rank.keys() == alone.keys()
        assert all(torch.equal(of_rank[name], alone[name]) for name in alone)


def bf16_errors(run: RunConfig) -> dict[str, float]:
    with tiny.mesh(run) as mesh:
        batches = pairs(4 * mesh.hdp.size)
        model, sync = tiny.distributed(run, mesh)
        tiny.backward_shared(model, sync, batches, mesh)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        rows = model.embedding(batches[0].tokens_BL)
        gradients = tiny.gradients(model)
        same, exact = (
            tiny.initialized(config(1, dtype), mesh.device) for dtype in ("bf16", "fp64")
        )
        for alone in (same, exact):
            tiny.backward_alone(alone, batches)
        wanted = same.embedding(batches[0].tokens_BL).chunk(mesh.tp.size, dim=1)[mesh.tp.rank]
        return {
            "rows": float((rows - wanted).abs().max()),
            "to exact": tiny.worst_error(gradients, tiny.gradients(exact)),
            "of one process": tiny.worst_error(tiny.gradients(same), tiny.gradients(exact)),
        }


def test_bf16_compute(run_ranks: RunRanks) -> None:
    for of_rank in run_ranks(bf16_errors, 2, config(2, "bf16")):
        assert of_rank["rows"] == 0.0  # one rank stores the row, and adding zeros is exact
        # Sums over ranks are rounded once more than those of one process.
        assert of_rank["to exact"] < 1.5 * of_rank["of one process"]


def parts_of_a_pipeline(run: RunConfig) -> list[str]:
    """Return the parameters on a rank without the embedding or the head."""
    from allometry.models.transformer import Part
    from allometry.parallel.tensor import apply_tensor

    with tiny.mesh(run) as mesh:
        names = []
        for part in (Part(range(1), last=False), Part(range(1, 2), first=False)):
            model = tiny.build(run, part)
            apply_tensor(model, mesh)
            names += [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
            assert len(names) == len(set(names))
        return names


def test_parts_of_a_model(run_ranks: RunRanks) -> None:
    run = config(2)
    whole = [name for name, _ in tiny.build(run).named_parameters()]
    for names in run_ranks(parts_of_a_pipeline, 2, run):
        assert sorted(names) == sorted(whole)


def test_a_vocabulary_smaller_than_the_group_is_refused(run_ranks: RunRanks) -> None:
    with pytest.raises(AssertionError, match="leaves a rank without a row"):
        run_ranks(initial, 4, config(4, vocab_size=5))
