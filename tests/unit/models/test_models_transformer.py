"""The full model: contract, causality, documents, and two independent implementations."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.models.build import build_model, parameter_specs, torch_dtype
from allometry.models.documents import Documents
from allometry.models.head import Losses
from allometry.models.init import initialize
from allometry.models.loss import IGNORE
from allometry.models.transformer import Part, Transformer
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import ForwardScales, Parameterization
from allometry.scaling.roles import Role

SLOW = pytest.mark.slow
B, L, V = 2, 16, 61
LENGTHS = [5, 0, 10, 1, 16]
SMALL = {
    "vocab_size": V,
    "width": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_width": 40,
    "rope_theta": 100.0,
}


def sp(model: DenseModel) -> Parameterization:
    return Parameterization(StandardParameterization(), model)


def small(dtype: str = "fp64", **changes) -> Transformer:
    config = DenseModel(**{**SMALL, **changes})
    model = build_model(config, sp(config), dtype)
    initialize(model, sp(config), seed=0)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # gains of exactly one would hide a missing gain
            nn.init.normal_(parameter, 1.0, 0.2, torch.Generator().manual_seed(len(name)))
        elif name.endswith(".bias"):
            nn.init.normal_(parameter, 0.0, 0.2, torch.Generator().manual_seed(len(name)))
    return model.double() if dtype == "fp64" else model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(seed))


def documents() -> Documents:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(B, L)
    return Documents(ends, max(LENGTHS), positions_BL)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parameters_are_saved_in_the_order_of_the_inventory(tied, qk_norm):
    config = DenseModel(**SMALL, tied_embeddings=tied, qk_norm=qk_norm)
    with torch.device("meta"):
        model = build_model(config, sp(config), "bf16")
    names = [spec.name for spec in inventory(config)]
    assert names == [name for name, _ in model.named_parameters()] == list(model.state_dict())


def test_a_tied_head_away_from_its_embedding_has_a_weight():
    config = DenseModel(**SMALL, tied_embeddings=True)
    with torch.device("meta"):
        model = build_model(config, sp(config), "bf16", Part(range(1, 2), first=False))
    specs = parameter_specs(model)
    assert list(specs) == [n for n, _ in model.named_parameters()]
    assert list(specs)[-2:] == ["final_norm.weight", "head.weight"]
    assert {name.split(".")[1] for name in list(specs)[:-2]} == {"1"}
    assert specs["head.weight"].role is Role.OUTPUT


@pytest.mark.parametrize("mistake", ["one more", "another order"])
def test_a_model_is_what_the_inventory_says(monkeypatch, mistake):
    def other(*args, **options):
        specs = inventory(*args, **options)
        if mistake == "another order":
            return (*specs[1:], specs[0])
        return (*specs, dataclasses.replace(specs[0], name="second_embedding.weight"))

    monkeypatch.setattr("allometry.models.transformer.inventory", other)
    monkeypatch.setattr("allometry.models.build.inventory", other)
    config = DenseModel(**SMALL)
    with torch.device("meta"), pytest.raises(AssertionError, match="modules and inventory differ"):
        build_model(config, sp(config), "bf16")


def test_a_parameter_without_a_spec_is_an_error():
    model = small()
    model.blocks["0"].extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"blocks\.0\.extra.*has no spec"):
        parameter_specs(model)


def test_a_parameter_of_another_shape_is_an_error():
    model = small()
    model.final_norm.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="final_norm"):
        parameter_specs(model)


def test_wrappers_do_not_change_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = small()
    names = list(parameter_specs(model))
    model.blocks["1"] = checkpoint_wrapper(model.blocks["1"])
    assert any("_checkpoint" in name for name, _ in model.named_modules())
    assert list(parameter_specs(model)) == names


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_types_and_shapes(dtype):
    model = small(dtype)
    wide = torch.promote_types(torch_dtype(dtype), torch.float32)
    logits = model(tokens())
    assert (logits.shape, logits.dtype) == ((B, L, V), wide)
    targets_BL = tokens(1)
    targets_BL[0, :3] = IGNORE
    losses = model(tokens(), targets_BL)
    assert isinstance(losses, Losses)
    assert (losses.nll_BL.shape, losses.nll_BL.dtype, losses.total.dtype) == ((B, L), wide, wide)
    assert not losses.nll_BL.requires_grad
    assert not losses.nll_BL[0, :3].any()
    losses.total.backward()
    for name, parameter in model.named_parameters():
        expected = torch.float64 if dtype == "fp64" else torch.float32
        assert parameter.grad.dtype == expected, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), name
    with torch.no_grad():
        quiet = model(tokens(), targets_BL)
    torch.testing.assert_close(quiet.nll_BL, losses.nll_BL, rtol=1e-6, atol=1e-6)


def test_bf16_is_near_fp64():
    assert (small("bf16")(tokens()) - small()(tokens())).abs().max() < 0.1


def test_an_uninitialised_model_does_not_look_alive():
    config = DenseModel(**SMALL)
    assert build_model(config, sp(config), "fp32")(tokens()).isnan().all()


def test_future_tokens_change_nothing():
    model = small()
    first, second = tokens(), tokens()
    second[:, 9:] = (second[:, 9:] + 1) % V
    before, after = model(first), model(second)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_a_document_is_as_if_alone():
    model = small()
    packed_BLV = model(tokens(), None, documents()).flatten(0, 1)
    whole_BLV = model(tokens()).flatten(0, 1)
    bounds = documents().cu_lengths.tolist()
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        alone_LV = model(tokens().flatten()[None, start:stop])[0]
        torch.testing.assert_close(packed_BLV[start:stop], alone_LV, rtol=1e-10, atol=1e-12)
        if start % L:  # the negative control: without documents, neighbours have an effect
            assert (whole_BLV[start:stop] - alone_LV).abs().max() > 1e-3


def plain_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def plain_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    state: dict[str, Tensor],
    at: str,
    layer: int,
    model: DenseModel,
    scales: ForwardScales,
) -> Tensor:
    """Compute one head and one query of a document at a time."""
    width, half, windowed = model.head_width, model.rotary_width // 2, model.windowed(layer)

    def norm(x: Tensor, name: str) -> Tensor:
        gain = state[f"{at}attention.{name}_norm.weight"]
        return plain_norm(x, gain, model.norm_eps)

    def turn(x: Tensor) -> Tensor:
        own = windowed and model.window.rope_theta is not None
        theta = model.window.rope_theta if own else model.rope_theta
        frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        if model.rope_scaling is not None and not own:
            frequencies = frequencies / model.rope_scaling.factor
        angle = torch.arange(len(x))[:, None] * frequencies
        z = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag, x[:, 2 * half :]], dim=1)

    heads = []
    for n in range(model.num_heads):
        kv = n // (model.num_heads // model.kv_heads)
        own, shared = (slice(i * width, (i + 1) * width) for i in (n, kv))
        q, k, v = qkv[0][:, own], qkv[1][:, shared], qkv[2][:, shared]
        if model.qk_norm and model.qk_norm_over == "head":
            q, k = norm(q, "q"), norm(k, "k")
        q, k = turn(q), turn(k)
        seen = model.window.tokens if windowed else len(q)
        rows = [
            (scales.attention * k[j : i + 1] @ q[i]).softmax(0) @ v[j : i + 1]
            for i, j in enumerate(max(0, i + 1 - seen) for i in range(len(q)))
        ]
        heads.append(torch.stack(rows) if rows else q)
    return torch.cat(heads, dim=1)


def plain(state: dict[str, Tensor], model: DenseModel, scales: ForwardScales) -> Tensor:
    """Return logits [T, V] from the formulas: one document, one head, one query at a time."""
    T_tokens = tokens().flatten()
    bounds = documents().cu_lengths.tolist()

    def norm(x: Tensor, name: str) -> Tensor:
        return plain_norm(x, state[name], model.norm_eps)

    def project(x: Tensor, name: str) -> Tensor:
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if model.qkv_bias else y

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    outputs = []
    for start, stop in itertools.pairwise(bounds):
        x = state["embedding.weight"][T_tokens[start:stop]] * scales.embedding
        x = x * model.embedding_scale
        for layer in range(model.num_layers):
            at = f"blocks.{layer}."
            normed = norm(x, at + "attention_norm.weight") if model.norms != "after" else x
            q_TM, k_TM, v_TM = (project(normed, f"{at}attention.{w}") for w in ("wq", "wk", "wv"))
            if model.qk_norm and model.qk_norm_over == "width":
                q_TM = norm(q_TM, at + "attention.q_norm.weight")
                k_TM = norm(k_TM, at + "attention.k_norm.weight")
            attended = plain_attention((q_TM, k_TM, v_TM), state, at, layer, model, scales)
            out = attended @ state[at + "attention.wo.weight"].T
            if model.norms != "before":
                out = norm(out, at + "attention_post_norm.weight")
            x = x + scales.residual * out
            normed = norm(x, at + "ffn_norm.weight") if model.norms != "after" else x
            gate = normed @ state[at + "ffn.gate.weight"].T
            up = normed @ state[at + "ffn.up.weight"].T
            active = gate * gate.sigmoid() if model.activation == "silu" else gelu(gate)
            down = (active * up) @ state[at + "ffn.down.weight"].T
            if model.norms != "before":
                down = norm(down, at + "ffn_post_norm.weight")
            x = x + scales.residual * down
        outputs.append(norm(x, "final_norm.weight"))
    head = state["embedding.weight" if model.tied_embeddings else "head.weight"]
    return torch.cat(outputs) @ head.T * scales.output


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied_embeddings": True},
        {"qk_norm": True},
        {"qkv_bias": True},
        {"qk_norm": True, "qk_norm_over": "width", "norms": "after", "qkv_bias": True},
        {"norms": "both", "activation": "gelu_tanh", "qk_norm": True, "embedding_scale": 3.5},
        {"window": {"tokens": 3}},
        {
            "window": {"tokens": 5, "global_every": 2, "rope_theta": 9.0},
            "rope_scaling": {"kind": "linear", "factor": 2.0},
        },
        {"rope_fraction": 0.5, "qk_norm": True},
    ],
    ids=["plain", "tied", "qk_norm", "bias", "after", "both", "windows", "local", "partial"],
)
def test_equals_the_formulas(options):
    """Logits, loss and every gradient, with each multiplier different from one."""
    config = DenseModel(**SMALL, **options, z_loss=1e-2)
    scales = ForwardScales(embedding=3.0, residual=0.7, attention=0.3, output=0.5)
    model = Transformer(config, scales, torch.float64).double()
    model.load_state_dict(small(**options).state_dict())
    targets_BL = tokens(1)
    targets_BL[1, 4:7] = IGNORE

    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits_TV = plain(state, config, scales)
    counted = targets_BL.flatten() != IGNORE
    log_z = logits_TV.logsumexp(1)
    nll_T = log_z - logits_TV.gather(1, targets_BL.flatten().clamp_min(0)[:, None])[:, 0]
    expected = (nll_T + 1e-2 * log_z**2)[counted].sum()
    expected.backward()

    got_BLV = model(tokens(), None, documents())
    torch.testing.assert_close(got_BLV.flatten(0, 1), logits_TV, rtol=1e-10, atol=1e-12)
    losses = model(tokens(), targets_BL, documents())
    losses.total.backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.nll_BL.flatten()[counted], nll_T[counted], rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, state[name].grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_hugging_face(qk_norm):
    """Llama, and Qwen3 for the norm of queries and keys: a converter renames and copies."""
    transformers = pytest.importorskip("transformers")
    model = small("fp32", qk_norm=qk_norm)
    options = {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
    }
    if qk_norm:
        twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**options))
    else:
        twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    names = {
        "embedding": "model.embed_tokens",
        "head": "lm_head",
        "final_norm": "model.norm",
        "blocks": "model.layers",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention": "self_attn",
        **{f"w{x}": f"{x}_proj" for x in "qkvo"},
        "ffn": "mlp",
        **{x: f"{x}_proj" for x in ("gate", "up", "down")},
    }
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): value
        for name, value in model.state_dict().items()
    }
    twin.load_state_dict(state)
    got, expected = model(tokens()), twin(tokens()).logits
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_dropout_in_training_only():
    model = small(dropout=0.5)
    without = small()
    torch.manual_seed(0)
    first, second = model(tokens()), model(tokens())
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens()), without(tokens()))


# aot_eager traces everything that inductor traces, and compiles no code.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_equal_blocks_compile_whole(backend):
    """With and without documents, whose number may change without recompilation."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, compiled = small("fp32", num_layers=3), small("fp32", num_layers=3)
    counter = CompileCounterWithBackend(backend)
    for block in compiled.blocks.values():
        block.compile(backend=counter, fullgraph=True)
    compiled.head.compile(backend=backend, fullgraph=True)
    fewer = Documents(torch.tensor([0, 16, 32], dtype=torch.int32), 16, documents().positions_BL)

    for packed in (None, documents(), fewer):
        for one in (model, compiled):
            one.zero_grad()
            one(tokens(), tokens(1), packed).total.backward()
        for (name, one), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
            difference = (one.grad - other.grad).abs().max()
            assert difference < 1e-5 * one.grad.abs().max(), name
    assert counter.frame_count == 2
