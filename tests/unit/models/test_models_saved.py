"""FP8 tensors saved for backward, and their gradients."""

# B sequences, L tokens in a sequence, T = B*L, D width, F hidden width

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.configs.model import DenseModel, ModelConfig, MoEModel, StandardParameterization
from allometry.configs.precision import PrecisionConfig
from allometry.models import fp8
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.layers import Linear, RMSNorm, gated
from allometry.models.moe import begin_step
from allometry.models.precision import use_precision
from allometry.models.products import Stacked, cast_once, multiply, saved_linear
from allometry.models.transformer import Transformer
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.offload.store import apply_offload
from allometry.scaling.inventory import matrix, vector
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import Role

B, L = 2, 64
DENSE = {"kind": "dense", "vocab_size": 64, "width": 64, "num_layers": 2, "num_heads": 4}
DENSE |= {"num_kv_heads": 4, "ffn_width": 176}
EXPERTS = {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 48}
MOE = {**DENSE, "kind": "moe", "ffn_width": None, "experts": {**EXPERTS, "num_shared_experts": 1}}
RECIPES = ("fp8_tensorwise", "fp8_rowwise", "fp8_blockwise")
SAVED = PrecisionConfig(saved_activations="fp8")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------ saved tensors


def two(dtype: torch.dtype = torch.float32) -> tuple[Stacked, list[Tensor]]:
    layers = [Linear(matrix("weight", Role.HIDDEN, rows, 40)) for rows in (24, 56)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        layer.to(dtype)
    return Stacked(*((layer, "weight") for layer in layers)), [layer.weight for layer in layers]


def rounded(x: Tensor) -> Tensor:
    return fp8.restore(*fp8.save(x), x.shape, torch.float64)


def test_a_saved_input_changes_gradients_of_weights_alone() -> None:
    stacked, weights = two(torch.float64)
    stacked.saves = True
    x = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(50, 80, dtype=torch.float64)
    y = multiply(x, stacked)
    gx, *gw = torch.autograd.grad(y, [x, *weights], grad)
    whole = torch.cat([w.detach() for w in weights])
    for some, other in ((y, F.linear(x, whole)), (gx, grad @ whole)):
        torch.testing.assert_close(some, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(gw), grad.t() @ rounded(x), rtol=0, atol=1e-12)
    assert float((torch.cat(gw) - grad.t() @ x).detach().abs().max()) > 1e-3


def test_the_norm_equals_its_plain_twin() -> None:
    norm = RMSNorm(vector("w", 48), 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 7, 48, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(x.shape, dtype=torch.float64)
    exact = torch.autograd.grad(norm(x), [x, norm.weight], grad)
    norm.saves = True
    y = norm(x)
    got = torch.autograd.grad(y, [x, norm.weight], grad)
    # The norm as a product of its saved input and a number per row, plus that number's gradient.
    scale = (x.detach().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    unit, weighted = rounded(x) * scale, grad * norm.weight.detach()
    expected = scale * (weighted - unit * (unit * weighted).mean(-1, keepdim=True))
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], (grad * unit).sum((0, 1)), rtol=0, atol=1e-12)
    assert torch.equal(y, F.rms_norm(x, (48,), norm.weight, 1e-5))
    for some, other in zip(got, exact, strict=True):
        assert cosine(some, other) > 0.999
        assert not torch.equal(some, other)


def test_swiglu_equals_its_plain_twin() -> None:
    gate_up = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 48, dtype=torch.float64)
    y = gated(gate_up, saves=True)
    (got,) = torch.autograd.grad(y, gate_up, grad)
    kept = rounded(gate_up).requires_grad_()
    gate, up = kept.chunk(2, dim=-1)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, kept, grad)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert torch.equal(y, gated(gate_up))


def test_a_router_reads_its_input_and_keeps_less() -> None:
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 6, dtype=torch.float64)
    y = saved_linear(x, w)
    gx, gw = torch.autograd.grad(y, [x, w], grad)
    assert torch.equal(y, F.linear(x, w))
    torch.testing.assert_close(gx, grad @ w, rtol=0, atol=1e-13)
    torch.testing.assert_close(gw, grad.t() @ rounded(x), rtol=0, atol=1e-13)


# ------------------------------------------------------------------ models


def described(model: dict[str, Any]) -> ModelConfig:
    kind = DenseModel if model["kind"] == "dense" else MoEModel
    return kind.model_validate(model)


def make(model: dict[str, Any], precision: PrecisionConfig, dtype: Any = "bf16") -> Transformer:
    config = described(model)
    rules = Parameterization(StandardParameterization(), config)
    made = build_model(config, rules, dtype)
    initialize(made, rules, seed=0)
    use_precision(made, precision)
    begin_step(made, B * L)
    return made


def text() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (B, L + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def step(model: Transformer) -> tuple[Tensor, Tensor]:
    """Return the loss, and all gradients in one row."""
    with cast_once(model, model.compute_dtype):
        loss = model(*text()).total / (B * L)
        loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda m: m["kind"])
def test_saved_activations_leave_the_loss_and_hardly_turn_the_gradient(
    model: dict[str, Any], qk_norm: bool
) -> None:
    model = model | {"qk_norm": qk_norm}
    loss, grad = step(make(model, PrecisionConfig()))
    got_loss, got = step(make(model, SAVED))
    assert torch.equal(got_loss, loss)
    assert 0.999 <= cosine(got, grad) < 1.0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda m: m["kind"])
def test_recipes_stay_near(model: dict[str, Any], recipe: Any) -> None:
    loss, grad = step(make(model, PrecisionConfig()))
    got_loss, got = step(make(model, PrecisionConfig(linears=recipe)))
    assert 0 < abs(float(got_loss - loss)) < 0.02
    assert cosine(got, grad) > 0.95


def kept_bytes(model: Transformer) -> int:
    """Return the bytes saved for one block's backward, without parameters and rotary tables."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}
    block = model.blocks["1"]
    geometry = model._geometry(text()[0], None)
    owned |= {t.untyped_storage().data_ptr() for t in geometry.turn}
    x = torch.randn(B, L, model.embedding.embedding_dim).bfloat16().requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with cast_once(model, torch.bfloat16):
        owned |= {
            s.copy.untyped_storage().data_ptr()
            for module in model.modules()
            for s in vars(module).values()
            if isinstance(s, Stacked) and s.copy is not None
        }
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x, geometry)
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in owned)


# As in COAT: F = 8/3 D, as many key heads as query heads; U is one activation in bf16.
WIDE = {**DENSE, "width": 192, "num_heads": 3, "num_kv_heads": 3, "ffn_width": 512}
MIXTURES: dict[str, tuple[dict[str, Any], float]] = {
    "4 experts of 2/3 D": ({"num_experts": 4, "width": 128}, 12.0),
    "4 experts of 2/3 D, one shared": (
        {"num_experts": 4, "width": 128, "num_shared_experts": 1},
        13.5,
    ),
    "8 experts of 4/3 D": ({"num_experts": 8, "width": 256}, 14.0),
    "8 experts of 2/3 D, one shared": (
        {"num_experts": 8, "width": 128, "num_shared_experts": 1},
        13.5,
    ),
    "64 experts of 1/4 D, 6 for each token, one shared": (
        {"num_experts": 64, "experts_per_token": 6, "width": 48, "num_shared_experts": 1},
        17.7,
    ),
}
"""Experts, 2 per token, and the largest number of U that a layer may save."""


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bytes_of_a_dense_layer(qk_norm: bool) -> None:
    unit = B * L * 192 * 2
    of = partial(make, WIDE | {"qk_norm": qk_norm})
    saved, before = (kept_bytes(of(p)) / unit for p in (SAVED, PrecisionConfig()))
    both = kept_bytes(of(PrecisionConfig(saved_activations="fp8", linears="fp8_rowwise"))) / unit
    print(f"dense, qk_norm={qk_norm}: bf16 {before:.2f} U, saved {saved:.2f} U, both {both:.2f} U")
    assert both < saved <= (14.0 if qk_norm else 12.0)
    assert before > 18.0


@pytest.mark.parametrize("name", MIXTURES)
def test_bytes_of_a_layer_of_experts(name: str) -> None:
    unit, (experts, most) = B * L * 192 * 2, MIXTURES[name]
    described = {**WIDE, "kind": "moe", "ffn_width": None}
    described["experts"] = {"kind": "swiglu", "experts_per_token": 2, **experts}
    rows = PrecisionConfig(saved_activations="fp8", linears="fp8_rowwise")
    before, saved, both = (
        kept_bytes(make(described, p)) / unit for p in (PrecisionConfig(), SAVED, rows)
    )
    print(f"{name}: bf16 {before:.2f} U, saved {saved:.2f} U, both {both:.2f} U")
    assert saved <= most
    assert saved < 0.6 * before


@pytest.mark.parametrize("recipe", ["compute", "fp8_rowwise", "fp8_blockwise"])
@pytest.mark.parametrize("latent", [False, True])
def test_kept_tokens_have_the_bits_of_kept_rows(recipe: Any, latent: bool) -> None:
    """Rows exchanged between ranks are saved as received."""
    experts = {**MOE["experts"], **({"kind": "latent", "latent_width": 32} if latent else {})}
    model = {**MOE, "experts": experts}
    found = []
    for travels in (False, True):
        made = make(model, PrecisionConfig(saved_activations="fp8", linears=recipe))
        for block in made.blocks.values() if travels else ():
            block.ffn.experts.exchange = lambda x, counts: lambda compute: compute(x, counts)
        found.append((*step(made), kept_bytes(made)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] < found[1][2]


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda m: m["kind"])
def test_checkpointing_changes_no_bit(model: dict[str, Any], kind: Any) -> None:
    precision = PrecisionConfig(saved_activations="fp8", linears="fp8_rowwise")
    wanted = step(make(model, precision))
    again = make(model, precision)
    apply_checkpointing(again, kind, dropout=False)
    for some, other in zip(step(again), wanted, strict=True):
        assert torch.equal(some, other)


def test_offload_changes_no_bit_and_moves_fp8() -> None:
    from allometry.models.documents import Documents

    model = DENSE | {"num_layers": 4}
    found = []
    for precision, offload in ((SAVED, 0.0), (SAVED, 1.0), (PrecisionConfig(), 1.0)):
        made = make(model, precision)
        store = apply_offload(made, torch.device("cpu"))
        store.smallest_bytes = 256
        documents = Documents(
            cu_lengths=torch.tensor([0, L], dtype=torch.int32),
            max_length=L,
            positions_BL=torch.arange(L)[None],
            offload=offload,
        )
        tokens, targets = (x[:1] for x in text())
        with cast_once(made, torch.bfloat16):
            made(tokens, targets, documents).total.backward()
        found.append((store.bytes_out, [p.grad for p in made.parameters()]))
    for some, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(some, other)
    assert found[0][0] == 0 < found[1][0] < 0.7 * found[2][0]


@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda m: m["kind"])
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("compute", marks=pytest.mark.slow),
        "fp8_rowwise",
        pytest.param("fp8_tensorwise", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_are_whole(model: dict[str, Any], recipe: Any) -> None:
    torch._dynamo.reset()
    precision = PrecisionConfig(saved_activations="fp8", linears=recipe)
    wanted = step(make(model, precision, "fp32"))
    compiled = make(model, precision, "fp32")
    for block in compiled.blocks.values():
        block.compile(fullgraph=True, backend="aot_eager")
    got = step(compiled)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=0)
    assert cosine(got[1], wanted[1]) > 0.99999


def test_only_what_was_asked_for_is_fp8() -> None:
    precision = PrecisionConfig(linears="fp8_rowwise", roles=("hidden",), compute_layers=(1,))
    made = make(MOE, precision)
    of: Callable[[int], Any] = lambda layer: made.blocks[str(layer)]  # noqa: E731
    assert of(0).attention.qkv.recipe == of(0).ffn.shared.gate_up.recipe == "fp8_rowwise"
    assert of(0).ffn.experts.gate_up.recipe == of(0).ffn.experts.down_only.recipe == ""
    assert of(1).attention.qkv.recipe == ""
    assert made.head is not None
    assert made.head.stacked.recipe == ""
    assert not made.head.stacked.saves


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"gradients": "e5m2"}, "gradients says how"),
        ({"compute_layers": [0]}, "compute_layers says how"),
        ({"roles": ["hidden"]}, "roles says how"),
        ({"roles": [], "linears": "auto"}, "at least 1 item"),
        ({"linears": "fp8"}, "fp8_tensorwise"),
        ({"roles": ["output"], "linears": "auto"}, "expert_up"),
    ],
    ids=json.dumps,
)
def test_sections_without_effect_are_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PrecisionConfig.model_validate(section)
