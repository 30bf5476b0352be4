"""Selective checkpointing saves the attention of every back end: no backward recomputes it."""

# B sequences, L tokens in a sequence, T tokens, N query heads, H head width

import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from allometry.configs.execution import ParallelConfig
from allometry.configs.model import DenseModel, StandardParameterization
from allometry.models.attention import RUN, attend
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.init import initialize
from allometry.models.transformer import Transformer
from allometry.parallel.checkpointing import apply_checkpointing, keeps
from allometry.parallel.context import apply_context
from allometry.parallel.hdp.ring import RING_OPERATOR
from allometry.parallel.hdp.shard import ring_table
from allometry.parallel.mesh import open_mesh
from allometry.scaling.attention import BACKENDS
from allometry.scaling.parameterization import Parameterization

LENGTHS = [10, 14]
Checkpointing = Literal["none", "selective", "full"]


class Executions(TorchDispatchMode):
    """Count the executed operators, including those that a checkpoint recomputes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def model_on(device: str) -> Transformer:
    config = DenseModel(
        vocab_size=32, width=16, num_layers=2, num_heads=2, num_kv_heads=2, ffn_width=24
    )
    rules = Parameterization(StandardParameterization(), config)
    with torch.device(device):
        model = build_model(config, rules, "fp32")
    if device != "meta":
        initialize(model, rules, seed=0)
    return model


def documents_on(device: str, ring: Tensor | None = None) -> Documents:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    positions_BL = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(device)
    bounds_host = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(bounds, max(LENGTHS), positions_BL, ring=ring, cu_host=bounds_host)


Step = tuple[Counter[str], Counter[str], list[Tensor]]


def step(model: Transformer, kind: Checkpointing, documents: Documents | None, device: str) -> Step:
    """Return the operators executed in forward and in backward, and the gradients."""
    if kind != "none":
        apply_checkpointing(model, kind, dropout=False)
    tokens_BL = torch.arange(sum(LENGTHS), device=device)[None] % 32
    with Executions() as forward:
        total = model(tokens_BL, tokens_BL, documents).total
    with Executions() as backward:
        total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return forward.counts, backward.counts, grads


def check(operators: tuple[str, ...], plain: Step, kept: Step, again: Step) -> None:
    ran = [name for name in operators if plain[0][name]]
    assert ran, "none of the operators that the table names ran"
    for name in ran:
        assert keeps(name), name
        assert kept[1][name] == plain[1][name], f"{name} ran again in the backward"
        assert again[1][name] > plain[1][name], "the negative control"
    for a, b in zip(plain[2], kept[2], strict=True):
        assert a.is_meta or torch.equal(a, b)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.devices in (None, ("cpu",))])
def test_backward_does_not_run_attention_again(backend) -> None:
    documents = None if backend.name == "flash" else documents_on("cpu")
    steps = []
    for kind in ("none", "selective", "full"):
        model = model_on("cpu")
        for block in model.blocks.values():
            block.attention.core = partial(attend, backend=backend.name)
        steps.append(step(model, kind, documents, "cpu"))
    check(backend.operators, *steps)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace flash-attn's packages, whose functions call their own custom operators."""
    packages = {
        "flash_attn": ("flash_attn", "_flash_attn_varlen_forward"),
        "flash_attn_interface": ("flash_attn_3", "_flash_attn_forward"),
    }
    with ExitStack() as stack:
        for package, (namespace, short) in packages.items():
            library = stack.enter_context(torch.library._scoped_library(namespace, "DEF"))
            library.define(f"{short}(Tensor q, Tensor k, Tensor v) -> Tensor")
            library.impl(short, lambda q, k, v: torch.empty_like(q), "Meta")
            module = types.ModuleType(package)
            module.flash_attn_func = None
            module.flash_attn_varlen_func = _varlen(getattr(torch.ops, namespace), short)
            monkeypatch.setitem(sys.modules, package, module)
        yield


def _varlen(operators: Any, short: str) -> Any:
    class FlashAttnVarlenFunc(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = getattr(operators, short)(q, k, v)
            ctx.save_for_backward(q, k, v, o)
            return o

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            q, k, v, _ = ctx.saved_tensors
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    return lambda q, k, v, *_, **__: FlashAttnVarlenFunc.apply(q, k, v)


# In eager mode flex runs code that it compiles itself, which no dispatcher observes.
ON_CUDA = [b for b in BACKENDS if b.devices == ("cuda",) and b.name != "flex"]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("backend", ON_CUDA)
def test_backward_does_not_run_attention_of_cuda_again(backend) -> None:
    """On the meta device: only the executed operators are checked."""
    steps = []
    for kind in ("none", "selective", "full"):
        model = model_on("meta")
        for block in model.blocks.values():
            block.attention.core = partial(attend, backend=backend.name)
        steps.append(step(model, kind, documents_on("meta"), "meta"))
    check(backend.operators, *steps)


def test_backward_does_not_run_a_ring_again() -> None:
    with open_mesh(ParallelConfig(), torch.device("cpu")) as mesh:
        steps = []
        for kind in ("none", "selective", "full"):
            model = model_on("cpu")
            apply_context(model, mesh)
            documents = documents_on("cpu", ring_table([0], 0, LENGTHS, tag=1))
            steps.append(step(model, kind, documents, "cpu"))
        check((RING_OPERATOR,), *steps)


def test_every_backend_runs_and_names_operators_that_exist() -> None:
    import torch.nn.attention.varlen  # registers its operator
    from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator

    assert {backend.name for backend in BACKENDS} == RUN.keys()
    for backend in BACKENDS:
        assert backend.operators, backend.name
        for name in backend.operators:
            assert keeps(name), name
            namespace, _, short = name.rpartition("::")
            # flash-attn cannot be installed without CUDA: the names come from its releases.
            if namespace == "":
                assert str(flex_attention_operator) == short
            elif namespace not in ("flash_attn", "flash_attn_3"):
                assert hasattr(getattr(torch.ops, namespace), short), name


def test_what_is_cheap_is_not_kept() -> None:
    for name in ("aten::mul", "aten::silu", "aten::rms_norm", "aten::_to_copy"):
        assert not keeps(name), name
