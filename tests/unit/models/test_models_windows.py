"""Sliding windows of attention, each back end against the definition; rotary frequencies."""

# B sequences, L tokens, N query heads, K key/value heads, H head width

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from allometry.configs.decoder import RopeScaling, YarnScaling
from allometry.configs.model import DenseModel
from allometry.models.attention import attend, backend_of
from allometry.models.documents import Documents
from allometry.models.rotary import attention_factor, frequencies, rotate, turn_of
from allometry.scaling.attention import AttentionCall, choose_backend, refusal, worth_measuring

L, LENGTHS = 40, [13, 27, 40]
CPU = torch.device("cpu")


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, L, n, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (4, 2, 2)
    ]


def documents() -> Documents:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, L)
    return Documents(ends, max(LENGTHS), positions_BL)


def by_definition(q: Tensor, k: Tensor, v: Tensor, packed: Documents | None, window: int) -> Tensor:
    """Compute one query and one head at a time: the last ``window`` keys of its document."""
    made = torch.zeros_like(q)
    for b in range(2):
        for i in range(L):
            place = i if packed is None else int(packed.positions_BL[b, i])
            first = i - min(place, window - 1)
            for n in range(4):
                keys, values = k[b, first : i + 1, n // 2], v[b, first : i + 1, n // 2]
                made[b, i, n] = (0.3 * keys @ q[b, i, n]).softmax(0) @ values
    return made


def outcome(o: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    return [o.detach(), *torch.autograd.grad((o * o.detach().cos()).sum(), qkv)]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [1, 7, 39])
def test_each_back_end_is_the_definition(window: int, packed: bool) -> None:
    within, qkv = documents() if packed else None, inputs()
    expected = outcome(by_definition(*qkv, within, window), qkv)
    for backend in ("reference", "masked", "blocked", None):
        got = outcome(attend(*qkv, within, 0.3, backend, window=window), qkv)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # torch's flex_attention has no backward on a CPU.
    alone = [x.detach() for x in qkv]
    got_BLNH = attend(*alone, within, 0.3, "flex", window=window)
    torch.testing.assert_close(got_BLNH, expected[0], rtol=1e-12, atol=1e-12)
    wrong = attend(*qkv, within, 0.3, "reference", window=window + 1)
    assert (wrong - expected[0]).abs().max() > 1e-3, "the negative control"


def test_a_window_of_all_tokens_is_none() -> None:
    q, k, v = inputs()
    assert torch.equal(attend(q, k, v, None, 0.3, window=L), attend(q, k, v, None, 0.3))
    assert backend_of(q, None, compiled=False, window=7).name == "masked"
    assert backend_of(q, None, compiled=False, window=L).name == "flash"


CALL = AttentionCall("cuda", "bf16", packed=False, length=4096, compiled=True, window=1024)


def test_only_what_has_windows_is_chosen() -> None:
    assert choose_backend(CALL, lambda package: True).name == "flash3"
    assert choose_backend(CALL, lambda package: package is None).name == "flex"
    assert worth_measuring(CALL, lambda package: package is None) == ("flex",)
    said = refusal("flash", CALL, lambda package: package is None)
    assert said is not None
    assert said.startswith("has no sliding windows, which model.window=1024 asks for; use flex")
    assert refusal("flash", CALL._replace(window=4096), lambda package: True) is None


def test_which_layers_have_a_window() -> None:
    model = DenseModel(
        vocab_size=8,
        width=8,
        num_layers=7,
        num_heads=2,
        ffn_width=8,
        window={"tokens": 4, "global_every": 3},
    )
    assert [model.window_of(layer) for layer in range(7)] == [4, 4, None, 4, 4, None, 4]
    assert model.num_windowed == 5
    with pytest.raises(ValidationError, match="greater than 1"):
        DenseModel(**model.model_dump() | {"window": {"tokens": 4, "global_every": 1}})


def scaling(**values: object) -> RopeScaling:
    made: RopeScaling = TypeAdapter(RopeScaling).validate_python(values)
    return made


def test_llama3_divides_long_wavelengths_and_keeps_short_ones() -> None:
    """Each frequency by the published rule, one at a time."""
    chosen = scaling(kind="llama3", factor=8.0, original_length=8192)
    got_h = frequencies(128, 5e5, chosen, CPU).tolist()
    kinds = set()
    for i, got in enumerate(got_h):
        plain = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            kind, expected = "kept", plain
        elif wavelength > 8192:
            kind, expected = "divided", plain / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            kind, expected = "mixed", (1 - smooth) * plain / 8 + smooth * plain
        kinds.add(kind)
        assert got == pytest.approx(expected, rel=1e-12)
    assert kinds == {"kept", "divided", "mixed"}


def test_yarn_ramps_between_its_bounds() -> None:
    chosen = scaling(kind="yarn", factor=4.0, original_length=4096)
    share_h = frequencies(64, 1e4, chosen, CPU) / frequencies(64, 1e4, None, CPU)
    assert share_h[0] == 1.0
    assert share_h[-1] == pytest.approx(0.25)
    assert bool((share_h.diff() <= 0).all())
    # A frequency that turns 32 times in 4096 tokens has number 32 ln(4096/64 pi)/ln 1e4 = 10.4.
    assert share_h[10] == 1.0
    assert share_h[11] < 1.0
    assert attention_factor(chosen) == pytest.approx(0.1 * math.log(4) + 1)
    plain, scaled = (
        turn_of(torch.zeros(1, 1), 1e4, s, rotary_width=8, dtype=torch.float64)
        for s in (None, chosen)
    )
    assert scaled.cos_BL1h == pytest.approx(plain.cos_BL1h * attention_factor(chosen))


@pytest.mark.parametrize(
    "values",
    [
        {"factor": 4.0},
        {"factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"factor": 8.0, "attention_factor": 1.3},
        {"factor": 1.0},
    ],
)
def test_yarn_is_that_of_transformers(values: dict[str, Any]) -> None:
    """``_compute_yarn_parameters``, which computes in fp32."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    chosen = scaling(kind="yarn", original_length=4096, **values)
    theirs = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    config = LlamaConfig(head_dim=128, rope_parameters=theirs | values)
    inverse_h, factor = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    torch.testing.assert_close(frequencies(128, 1e4, chosen, CPU).float(), inverse_h)
    assert isinstance(chosen, YarnScaling)
    assert attention_factor(chosen) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "yarn", "factor": 2, "original_length": 8, "beta_fast": 1.0}, "beta_slow=1.0"),
        ({"kind": "llama3", "factor": 2, "original_length": 8, "low_freq_factor": 4}, "must be"),
        ({"kind": "linear", "factor": 0.5}, "greater than or equal to 1"),
        ({"kind": "yarn", "factor": 2}, "original_length"),
    ],
)
def test_scalings_that_are_none_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        scaling(**values)


def test_a_part_of_a_head_turns_as_glm_does() -> None:
    """transformers' GLM 4.5 turns the first half of a head, in pairs of its quarters."""
    glm = pytest.importorskip("transformers.models.glm4_moe.modeling_glm4_moe")
    q_BLNH, k_BLKH, _ = inputs()
    positions_BL = documents().positions_BL
    turn = turn_of(positions_BL, 1e4, None, rotary_width=4, dtype=torch.float64)
    cos, sin = (torch.cat([t[:, :, 0], t[:, :, 0]], dim=-1) for t in turn)
    theirs = glm.apply_rotary_pos_emb(q_BLNH, k_BLKH, cos, sin, unsqueeze_dim=2)
    for x, other in zip((q_BLNH, k_BLKH), theirs, strict=True):
        got = rotate(x, *turn)
        torch.testing.assert_close(got, other, rtol=1e-14, atol=1e-15)
        assert torch.equal(got[..., 4:], x[..., 4:])
        whole = turn_of(positions_BL, 1e4, None, rotary_width=8, dtype=torch.float64)
        assert not torch.allclose(rotate(x, *whole), other)


@pytest.mark.parametrize(
    ("fraction", "said"),
    [
        (0.3, "is 2.4 components, which must be an even"),
        (0.375, "is 3 comp"),
        (0.0, "greater than 0"),
    ],
)
def test_fractions_that_cut_pairs_are_refused(fraction: float, said: str) -> None:
    sizes = {"vocab_size": 8, "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16}
    assert DenseModel(**sizes, rope_fraction=0.25).rotary_width == 2
    with pytest.raises(ValidationError, match=said):
        DenseModel(**sizes, rope_fraction=fraction)
