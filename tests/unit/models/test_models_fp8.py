"""FP8: numbers with scales, products of them, and what a model keeps for backward."""

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
from allometry.models.grouped import multiply_groups
from allometry.models.init import initialize
from allometry.models.layers import Linear, RMSNorm, swiglu
from allometry.models.moe import begin_step
from allometry.models.parameters import OwnsParameters
from allometry.models.precision import use_precision
from allometry.models.products import Stacked, cast_once, multiply, saved_linear
from allometry.models.transformer import Transformer
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.hdp.offload import apply_offload
from allometry.scaling.inventory import matrix
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import ParamSpec, Role

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


# ------------------------------------------------------------------ numbers with scales


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 128), (128, 128), (1, 16)])
def test_every_number_is_near_its_own(block: fp8.Block, dtype: torch.dtype) -> None:
    x = torch.randn(3, 150, 200) * torch.logspace(-3, 3, 150)[:, None]
    small = fp8.quantise(x, block, dtype)
    assert small.values.shape == x.shape
    assert small.values.dtype == dtype
    error = (fp8.dequantise(small, block, torch.float32) - x).abs()
    rows, columns = block[0] or 150, block[1] or 200
    scales = small.scales.repeat_interleave(rows, 1)[:, :150].repeat_interleave(columns, 2)
    # Half a unit in the last place: 3 or 2 bits, and the smallest numbers' fixed steps.
    bits, least = (2**-4, 2**-10) if dtype == fp8.E4M3 else (2**-3, 2**-17)
    assert bool((error <= x.abs() * bits * 1.001 + least * scales[..., :200] * 1.001).all())


def test_one_rounding_to_the_nearest() -> None:
    x = torch.tensor([[448.0, 17.0, 18.0, 19.0, 2**-9, 2**-10, 3 * 2**-11]])
    values = fp8.quantise(x, (1, None)).values.float()
    assert values.tolist() == [[448.0, 16.0, 18.0, 20.0, 2**-9, 0.0, 2**-9]]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.randn(4, 32)
    x[1, 3] = bad
    made = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    assert bool(made[1, :16].isnan().all()), "never 448"
    assert bool(made[1, 16:].isfinite().all())
    assert bool(made[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-38, 3e38])
def test_the_ends_of_the_range(size: float) -> None:
    x = torch.full((2, 16), size)
    made = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    assert bool(((made - x).abs() <= 2**-4 * size).all())


def test_a_scale_that_is_rounded_down_clips_by_less_than_it_rounds() -> None:
    x = torch.rand(4096, 16) + 1.0
    made = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    assert float(((made - x).abs() / x).max()) <= 2**-4 * 1.01


def test_rows_do_not_know_each_other() -> None:
    x = torch.randn(6, 40)
    whole = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    parts = [fp8.restore(*fp8.save(p), p.shape, torch.float32) for p in x.split(2)]
    assert torch.equal(whole, torch.cat(parts))


# ------------------------------------------------------------------ products


def plain_product(a: fp8.Quantised, b: fp8.Quantised, recipe: str) -> Tensor:
    """Each quantised number by its scale in fp64, block by block, then the sum."""
    sides = []
    for side, block in ((a, fp8.ACTIVATION_BLOCKS[recipe]), (b, fp8.WEIGHT_BLOCKS[recipe])):
        values = side.values.double().clone()
        rows, columns = block[0] or values.shape[0], block[1] or values.shape[1]
        for m in range(side.scales.shape[0]):
            for k in range(side.scales.shape[1]):
                values[m * rows : (m + 1) * rows, k * columns : (k + 1) * columns] *= float(
                    side.scales[m, k]
                )
        sides.append(values)
    return sides[0] @ sides[1].t()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_products_equal_those_of_the_quantised_numbers(recipe: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(37, 300) * torch.rand(37, 1), torch.randn(130, 300)
    left = fp8.quantise(a, fp8.ACTIVATION_BLOCKS[recipe], dtype)
    right = fp8.quantise(b, fp8.WEIGHT_BLOCKS[recipe])
    made = fp8.scaled_product(left, right, recipe, torch.float32)
    expected = plain_product(left, right, recipe)
    assert float((made - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert float((made - a @ b.t()).abs().max()) > 1e-3, "negative control: it is FP8"


def two(dtype: torch.dtype = torch.float32) -> tuple[Stacked, list[Tensor]]:
    layers = [Linear(matrix("weight", Role.HIDDEN, rows, 40)) for rows in (24, 56)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        layer.to(dtype)
    return Stacked(*((layer, "weight") for layer in layers)), [layer.weight for layer in layers]


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_equals_its_plain_twin(recipe: str, saves: bool) -> None:
    stacked, weights = two()
    stacked.saves, stacked.recipe, stacked.gradients = saves, recipe, fp8.E5M2
    x, grad = torch.randn(3, 50, 40, requires_grad=True), torch.randn(3, 50, 80)
    y = multiply(x, stacked)
    assert isinstance(y, Tensor)
    got = torch.autograd.grad(y, [x, *weights], grad)
    q, of_weights = fp8.quantise, fp8.WEIGHT_BLOCKS[recipe]
    of_rows = fp8.ACTIVATION_BLOCKS[recipe]
    rows, whole = x.detach().flatten(0, 1), torch.cat([w.detach() for w in weights])
    g = grad.flatten(0, 1)
    small = q(rows, of_rows)
    kept = fp8.dequantise(small, of_rows, torch.float32) if saves else rows
    if recipe == "fp8_tensorwise":
        gw = plain_product(q(g.t(), of_rows, fp8.E5M2), q(kept.t(), of_weights), recipe)
    else:
        gw = g.double().t() @ kept.double()
    expected = (
        plain_product(small, q(whole, of_weights), recipe).view(3, 50, 80),
        plain_product(q(g, of_rows, fp8.E5M2), q(whole.t(), of_weights), recipe).view(x.shape),
        *gw.split([24, 56]),
    )
    for some, other in zip((y, *got), expected, strict=True):
        assert float((some - other).abs().max()) <= 5e-6 * float(other.abs().max())
    with torch.no_grad():
        assert torch.equal(multiply(x, stacked), y), "an evaluation computes the same"


class Groups(OwnsParameters):
    def __init__(self) -> None:
        super().__init__()
        self.own("w", ParamSpec("w", Role.EXPERT_UP, (3, 24, 40), fan_in=40, fan_out=24))
        torch.nn.init.normal_(self.w)
        self.stacked = Stacked((self, "w"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("counts", [[7, 0, 22], [0, 0, 0]])
def test_grouped_products_equal_those_of_each_group(recipe: str, counts: list[int]) -> None:
    groups = Groups()
    groups.stacked.saves, groups.stacked.recipe = True, recipe
    alone = "fp8_rowwise" if recipe == "fp8_tensorwise" else recipe
    x = torch.randn(sum(counts), 40, requires_grad=True)
    y = multiply_groups(x, groups.stacked, torch.tensor(counts))
    assert isinstance(y, Tensor)
    grad = torch.randn(y.shape)
    got = torch.autograd.grad(y, [x, groups.w], grad)
    of_rows, of_weights = fp8.ACTIVATION_BLOCKS[alone], fp8.WEIGHT_BLOCKS[alone]
    made, gx, gw = [], [], []
    for rows, g, w in zip(x.detach().split(counts), grad.split(counts), groups.w, strict=True):
        small, w = fp8.quantise(rows, of_rows), w.detach()
        kept = fp8.dequantise(small, of_rows, torch.float64)
        made.append(plain_product(small, fp8.quantise(w, of_weights), alone))
        both = fp8.quantise(g, of_rows), fp8.quantise(w.t(), of_weights)
        gx.append(plain_product(*both, alone))
        gw.append(g.double().t() @ kept)
    for some, other in zip(
        (y, *got), (torch.cat(made), torch.cat(gx), torch.stack(gw)), strict=True
    ):
        assert some.shape == other.shape
        if other.numel():
            assert float((some - other).abs().max()) <= 5e-6 * max(float(other.abs().max()), 1e-9)


# ------------------------------------------------------------------ what is kept


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
    norm = RMSNorm(ParamSpec("w", Role.VECTOR, (48,), fan_in=1, fan_out=48), 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 7, 48, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(x.shape, dtype=torch.float64)
    exact = torch.autograd.grad(norm(x), [x, norm.weight], grad)
    norm.saves = True
    y = norm(x)
    got = torch.autograd.grad(y, [x, norm.weight], grad)
    # The norm as a product of its kept input and a number of each row, and that number's own part.
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
    y = swiglu(gate_up, saves=True)
    (got,) = torch.autograd.grad(y, gate_up, grad)
    kept = rounded(gate_up).requires_grad_()
    gate, up = kept.chunk(2, dim=-1)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, kept, grad)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert torch.equal(y, swiglu(gate_up))


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
    """The loss, and all gradients in one row."""
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
    """What waits for the backward of one block, parameters and rotary tables aside."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}
    block = model.blocks["1"]
    geometry = model._geometry(text()[0], None)
    owned |= {t.untyped_storage().data_ptr() for t in (geometry.cos_BL1h, geometry.sin_BL1h)}
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


# As COAT counts: F = 8/3 D, as many heads of keys as of queries; U is one activation in bf16.
WIDE = {**DENSE, "width": 192, "num_heads": 3, "num_kv_heads": 3, "ffn_width": 512}
WIDE_MOE = {**WIDE, "kind": "moe", "ffn_width": None, "experts": {**EXPERTS, "width": 128}}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bytes_of_a_dense_layer(qk_norm: bool) -> None:
    unit = B * L * 192 * 2
    of = partial(make, WIDE | {"qk_norm": qk_norm})
    saved, before = (kept_bytes(of(p)) / unit for p in (SAVED, PrecisionConfig()))
    both = kept_bytes(of(PrecisionConfig(saved_activations="fp8", linears="fp8_rowwise"))) / unit
    print(f"dense, qk_norm={qk_norm}: bf16 {before:.2f} U, saved {saved:.2f} U, both {both:.2f} U")
    assert both < saved <= (14.0 if qk_norm else 12.0)
    assert before > 18.0


def test_bytes_of_a_layer_of_experts() -> None:
    unit = B * L * 192 * 2
    saved, before = (kept_bytes(make(WIDE_MOE, p)) / unit for p in (SAVED, PrecisionConfig()))
    print(f"moe: bf16 {before:.2f} U, saved {saved:.2f} U")
    assert saved < 0.65 * before


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
@pytest.mark.parametrize("recipe", ["compute", "fp8_rowwise", "fp8_tensorwise"])
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
