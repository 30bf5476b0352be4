"""The same model at other sizes."""

from __future__ import annotations

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import load, presets
from allometry.configs.model import DenseModel, LatentExperts, MoEModel, SwiGLUExperts
from allometry.scaling.count import count_parameters
from allometry.scaling.shapes import (
    Axis,
    at_experts,
    at_regime,
    at_width,
    regime_unit,
    resize,
    tuning_width,
    width_unit,
)

MODEL = DenseModel(vocab_size=128, width=32, num_layers=2, num_heads=2, ffn_width=128)
MIXTURE = MoEModel(
    vocab_size=128,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_width=96,
    first_dense_layers=1,
    experts=LatentExperts(num_experts=4, experts_per_token=2, width=48, latent_width=32),
)


def size_of(model: MoEModel, axis: Axis) -> int:
    if axis is Axis.WIDTH:
        return model.width
    return model.num_layers if axis is Axis.DEPTH else model.experts.num_experts


def test_a_width_that_cannot_be_made_is_named() -> None:
    wider = at_width(MODEL, 48)
    assert (wider.num_heads, wider.kv_heads, wider.ffn_width, wider.head_width) == (3, 3, 192, 16)
    with pytest.raises(UserError, match=r"model.num_heads=2 cannot be scaled from width=32 to"):
        at_width(MODEL, 40)


def test_experts_widen_with_the_model_and_stay_as_many() -> None:
    wider = at_width(MIXTURE, 128)
    assert isinstance(wider, MoEModel)
    assert isinstance(wider.experts, LatentExperts)
    assert (wider.experts.width, wider.experts.latent_width, wider.ffn_width) == (96, 64, 192)
    assert (wider.experts.num_experts, wider.experts.experts_per_token) == (4, 2)
    with pytest.raises(UserError, match="cannot be scaled"):
        at_width(MIXTURE, 66)


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_unit_is_the_smallest_width_there_is(name: str) -> None:
    model = load(f"preset:{name}").model
    unit = width_unit(model)
    assert count_parameters(at_width(model, unit)).total > 0
    assert at_width(model, 3 * unit).width == 3 * unit
    for width in range(2, unit, 2):
        with pytest.raises(UserError, match=f"multiples of {unit}"):
            at_width(model, width)
    assert unit <= tuning_width(model) <= model.width


def test_number_of_experts_and_layers() -> None:
    more = at_experts(MIXTURE, 16)
    assert isinstance(more, MoEModel)
    assert (more.experts.num_experts, more.experts.experts_per_token) == (16, 2)
    with pytest.raises(UserError, match="1 experts"):
        at_experts(MIXTURE, 1)
    with pytest.raises(UserError, match="no experts to vary"):
        at_experts(MODEL, 4)
    with pytest.raises(UserError, match="first_dense_layers"):
        resize(MIXTURE, Axis.DEPTH, 1)
    assert resize(MODEL, Axis.HORIZON, 7) == MODEL
    for axis, size in ((Axis.WIDTH, 128), (Axis.DEPTH, 5), (Axis.EXPERTS, 8)):
        assert size_of(resize(MIXTURE, axis, size), axis) == size


def test_one_expert_is_a_mixture_too() -> None:
    alone = SwiGLUExperts(num_experts=4, experts_per_token=1, width=48)
    one = at_experts(MIXTURE.model_copy(update={"experts": alone}), 1)
    assert isinstance(one, MoEModel)
    assert one.experts.num_experts == one.experts.experts_per_token == 1


def test_regimes_grow_width_experts_and_visits_together() -> None:
    """Regime II keeps the width of an expert, III widens it; both can also shrink."""
    sizes = {}
    for wide in (False, True):
        for number in (2, 8):
            grown = at_regime(MIXTURE, number, widen_experts=wide)
            assert isinstance(grown, MoEModel)
            assert isinstance(grown.experts, LatentExperts)
            experts = grown.experts
            sizes[wide, number] = experts.width
            assert (experts.num_experts, experts.experts_per_token) == (number, number // 2)
            assert (grown.width, grown.num_heads, grown.ffn_width) == (
                16 * number,
                number,
                24 * number,
            )
            assert experts.latent_width == 8 * number
    assert sizes == {(False, 2): 48, (False, 8): 48, (True, 2): 24, (True, 8): 96}
    assert at_regime(MIXTURE, 4, widen_experts=True).width == MIXTURE.width
    with pytest.raises(UserError, match=r"experts_per_token=2 cannot be scaled from num_experts=4"):
        at_regime(MIXTURE, 5, widen_experts=False)
    with pytest.raises(UserError, match="no experts to vary"):
        at_regime(MODEL, 4, widen_experts=False)
    for axis in (Axis.REGIME_II, Axis.REGIME_III):
        assert size_of(resize(MIXTURE, axis, 8), axis) == 8


def test_the_least_number_of_experts_of_a_regime() -> None:
    unit = regime_unit(MIXTURE)
    assert unit == 2, "half of 4: one key/value head, one visit"
    for wide in (False, True):
        assert at_regime(MIXTURE, 3 * unit, widen_experts=wide).width == 3 * 32
        with pytest.raises(UserError, match="cannot be scaled"):
            at_regime(MIXTURE, unit - 1, widen_experts=wide)
    indivisible = MIXTURE.model_copy(update={"first_dense_layers": 0, "ffn_width": None})
    alone = SwiGLUExperts(num_experts=4, experts_per_token=1, width=48)
    assert regime_unit(indivisible.model_copy(update={"experts": alone})) == 4
    with pytest.raises(UserError, match="no experts to vary"):
        regime_unit(MODEL)
