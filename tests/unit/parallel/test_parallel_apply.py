"""The recipe on one process: every stage, compiled blocks, storage for a model without any."""

# B sequences, L tokens in a sequence

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from allometry.configs.execution import ParallelConfig
from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.head import OutputHead
from allometry.models.products import cast_once
from allometry.models.transformer import Block, Part, Transformer
from allometry.parallel.apply import compile_parts, materialize, parallelize
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.parallel.reduce import FlatReducer, GradientSync
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization

VOCAB, L = 32, 24


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with open_mesh(ParallelConfig(), torch.device("cpu")) as mesh:
        yield mesh


def config(stage: int, checkpointing: str = "none", dropout: float = 0.0) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": {
                "kind": "dense",
                "vocab_size": VOCAB,
                "width": 16,
                "num_layers": 3,
                "num_heads": 2,
                "ffn_width": 24,
                "dropout": dropout,
            },
            "data": {"sequence_length": L, "sources": [{"name": "none", "train": "none"}]},
            "batch": {"sequences": 2, "micro_batch_sequences": 1},
            "training": {
                "total_steps": 1,
                "compute_dtype": "fp32",
                "activation_checkpointing": checkpointing,
            },
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": {"zero": {"stage": stage}},
        }
    )


def make(run: RunConfig, mesh: Mesh) -> tuple[Transformer, GradientSync]:
    parameterization = Parameterization(run.parameterization, run.model)

    def build(part: Part) -> Transformer:
        with torch.device("meta"):
            return build_model(run.model, parameterization, run.training.compute_dtype, part)

    made = parallelize(build, run, Layout.of(run, 1), mesh)
    made.materialize(mesh.device)
    made.initialize(parameterization, seed=1)
    return made.parts[0], made.sync


def loss(model: nn.Module, num_documents: int, B: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_documents)
    tokens_BL = torch.randint(VOCAB, (B, L), generator=generator)
    cuts = torch.linspace(0, B * L, num_documents * B + 1).int()
    positions_BL = torch.cat([torch.arange(int(n)) for n in cuts.diff()]).view(B, L)
    documents = Documents(cuts, int(cuts.diff().max()), positions_BL)
    return model(tokens_BL, tokens_BL.roll(-1, 1), documents).total


def local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_stage_0_alone_leaves_gradients_as_autograd_made_them(mesh: Mesh) -> None:
    model, sync = make(config(0), mesh)
    assert isinstance(sync, FlatReducer)
    for last in (False, True):
        sync.micro_batch(last)
        loss(model, 2).backward()
    before = {
        name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None
    }
    sync.finish()
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name][0]
        assert torch.equal(parameter.grad, before[name][1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharding_over_one_rank_changes_nothing(mesh: Mesh, stage: int) -> None:
    (whole, whole_sync), (sharded, sync) = make(config(0), mesh), make(config(stage), mesh)
    for _ in range(2):
        for model, each in ((whole, whole_sync), (sharded, sync)):
            model.zero_grad(set_to_none=True)
            for last in (False, False, True):
                each.micro_batch(last)
                loss(model, 3).backward()
            each.finish()
        for (name, a), (other, b) in zip(
            whole.named_parameters(), sharded.named_parameters(), strict=True
        ):
            assert name == other
            assert isinstance(b, DTensor)
            torch.testing.assert_close(local(a.grad), local(b.grad), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_are_shards_after_evaluation(mesh: Mesh, stage: int) -> None:
    model, _ = make(config(stage), mesh)
    with torch.no_grad():
        before = loss(model, 2)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(loss(model, 2), before), "evaluation used parameters of the past"


def test_materialize_moves_what_has_values_and_refuses_half_a_model() -> None:
    full = nn.Linear(3, 2)
    weight = full.weight.detach().clone()
    materialize(full, torch.device("cpu"))
    assert torch.equal(full.weight, weight)
    empty = nn.Linear(3, 2, device="meta")
    materialize(empty, torch.device("cpu"))
    assert empty.weight.device.type == "cpu"
    with pytest.raises(AssertionError, match="half of the model"):
        materialize(nn.Sequential(full, nn.Linear(2, 1, device="meta")), torch.device("cpu"))


def test_compiled_blocks_are_compiled_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test covers tracing, not code generation, which would take half a minute.
    for kind in (Block, OutputHead):
        compile_kind = kind.compile
        monkeypatch.setattr(
            kind,
            "compile",
            lambda self, compile_kind=compile_kind, **options: compile_kind(
                self, backend="aot_eager", **options
            ),
        )
    torch._dynamo.reset()
    counters.clear()
    (plain, _), (compiled, _) = make(config(0), mesh), make(config(0), mesh)
    compile_parts(compiled)
    for num_documents in (3, 1, 5, 2, 24, 4):
        for model in (plain, compiled):
            model.zero_grad(set_to_none=True)
            loss(model, num_documents).backward()
            with torch.no_grad():
                loss(model, num_documents)
        for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(local(a.grad), local(b.grad), rtol=1e-5, atol=1e-6)
    # Any block in training, any block in evaluation, the softmax of the loss.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    loss(compiled, 3, B=2).backward()
    assert counters["stats"]["unique_graphs"] > 3, "the count can change"


def test_compiled_blocks_share_the_cast_weights(mesh: Mesh) -> None:
    given = config(0).model_dump()
    given["training"]["compute_dtype"] = "bf16"
    given["model"]["ffn_width"] = 40  # so that no activation has a weight's size
    run = RunConfig.model_validate(given)
    torch._dynamo.reset()
    counters.clear()
    (plain, _), (compiled, _) = make(run, mesh), make(run, mesh)
    for block in compiled.blocks.values():
        block.compile(fullgraph=True, backend="aot_eager")
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() in (40 * 16, 2 * 40 * 16) and tensor.dtype == torch.bfloat16:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for step in range(2):
        for model in (plain, compiled):
            model.zero_grad(set_to_none=True)
            kept.clear()
            with (
                cast_once(model, torch.bfloat16),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                losses = [loss(model, 3 + i) for i in range(4)]
                assert len(kept) == 3 * 2, "gate with up and down in each of three blocks"
                for total in losses:
                    total.backward()
        errors = {
            name: float((a.grad - b.grad).norm() / a.grad.norm())
            for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True)
        }
        assert max(errors.values()) < 0.05, errors
        with torch.no_grad():
            for model in (plain, compiled):
                loss(model, 3)  # evaluation casts by itself
                for parameter in model.parameters():
                    parameter.mul_(1.01)
        assert counters["stats"]["unique_graphs"] == 2, step


def kept_bytes(model: nn.Module) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes that autograd saves between forward and backward, and the gradients."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model, 3)
    total.backward()
    return sum(kept.values()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_keeps_less_and_changes_no_bit(mesh: Mesh, dropout: float) -> None:
    results = {
        kind: kept_bytes(make(config(0, kind, dropout), mesh)[0])
        for kind in ("none", "selective", "full")
    }
    for kind in ("selective", "full"):
        assert results[kind][1].keys() == results["none"][1].keys()
        for name, gradient in results["none"][1].items():
            assert torch.equal(gradient, results[kind][1][name]), (kind, name)
    assert results["full"][0] < 0.6 * results["none"][0]


def test_checkpointed_blocks_compile_whole(mesh: Mesh) -> None:
    for kind in ("selective", "full"):
        torch._dynamo.reset()
        plain, checkpointed = (make(config(0, k), mesh)[0] for k in ("none", kind))
        for block in checkpointed.blocks.values():
            block.compile(fullgraph=True, backend="aot_eager")
        for model in (plain, checkpointed):
            loss(model, 3).backward()
        for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
