"""The same model at other sizes."""

from __future__ import annotations

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import load, presets
from allometry.configs.model import DenseModel, LatentExperts, MoEModel
from allometry.scaling.count import count_parameters
from allometry.scaling.shapes import (
    Axis,
    at_experts,
    at_width,
    resize,
    size_of,
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
