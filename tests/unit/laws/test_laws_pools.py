"""Choice of pools at a budget, and the share to keep: published and computed numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.allocation import best_share
from allometry.laws.filter_rate import published_share
from allometry.laws.forms.quality import QualityPools
from allometry.laws.pools import candidates, choose_pools, pool_changes
from allometry.laws.registry import form_named

POOLS = ("p1", "p2", "p3", "p4")
TRUE = {"d": 0.1, "D0": 1e5} | {
    f"{name}_p{number}": value
    for name, values in (("b", (0.20, 0.17, 0.14, 0.11)), ("tau", (3, 4, 5, 6)))
    for number, value in enumerate(values, 1)
}
SIZES = dict.fromkeys(POOLS, 1e7)


def law(pools: tuple[str, ...] = POOLS) -> QualityPools:
    form = form_named(f"quality_pools:{','.join(pools)}")
    assert isinstance(form, QualityPools)
    return form


def test_the_best_sets_of_four_equal_pools() -> None:
    """Computed for this law independently of this code, by budgets of 1 to 200 pools' tokens."""
    budgets = (1e7, 4e7, 1e8, 2e8, 5e8, 2e9)
    found = choose_pools(law(), TRUE, SIZES, budgets)
    assert [len(one.best.pools) for one in found] == [1, 1, 2, 2, 3, 3]
    assert all(one.best.pools == POOLS[: len(one.best.pools)] for one in found)
    losses = [round(one.loss, 5) for one in found]
    assert losses == [0.49811, 0.42926, 0.39411, 0.37548, 0.36441, 0.35455]
    assert [one.epochs for one in found] == pytest.approx([1, 4, 5, 10, 50 / 3, 200 / 3])
    assert all(one.second_loss is not None and one.second_loss > one.loss for one in found)
    assert len(candidates(law(), TRUE, SIZES)) == 15


def test_where_the_choice_changes() -> None:
    changes = pool_changes(law(), TRUE, SIZES, 1e7, 2e9)
    assert [(len(before), len(after)) for _, before, after in changes] == [(1, 2), (2, 3)]
    for at, before, after in changes:
        for tokens, best in ((at * 0.999, before), (at * 1.001, after)):
            assert choose_pools(law(), TRUE, SIZES, [tokens])[0].best.pools == best


def test_pools_of_other_sizes_are_mixed_by_size() -> None:
    sizes = {"p1": 1e7, "p2": 3e7}
    form = law(("p1", "p2"))
    (one,) = choose_pools(form, TRUE, sizes, [1e9])
    assert one.best.pools == ("p1", "p2")
    assert one.best.shares == (0.25, 0.75)
    assert one.epochs == 25


def test_many_pools_are_compared_by_their_use() -> None:
    names = tuple(f"q{number}" for number in range(14))
    form = law(names)
    values = {"d": 0.1, "D0": 1e5}
    for number, name in enumerate(names):
        values |= {f"b_{name}": 0.05 + 0.01 * ((5 * number) % 14), f"tau_{name}": 3.0}
    found = candidates(form, values, dict.fromkeys(names, 1e7))
    assert [len(one.pools) for one in found] == list(range(1, 15))
    for small, large in pairwise(found):
        assert small.pools == large.pools[:-1]
        assert values[f"b_{small.pools[-1]}"] > values[f"b_{large.pools[-1]}"]


def test_what_cannot_be_chosen_from() -> None:
    with pytest.raises(UserError, match="give one for each of its pools"):
        choose_pools(law(), TRUE, {"p1": 1e7}, [1e8])
    with pytest.raises(UserError, match="p1=-1"):
        choose_pools(law(), TRUE, SIZES | {"p1": -1.0}, [1e8])
    with pytest.raises(UserError, match="reads all pools 2500 times"):
        choose_pools(law(), TRUE, SIZES, [1e11])
    # Sets with too many repetitions are excluded, and the others are still compared.
    (one,) = choose_pools(law(), TRUE, SIZES, [2e10])
    assert one.epochs <= 1000


def test_published_shares() -> None:
    """BETR's best shares in percent at 1e20 to 1e23 FLOPs (2507.12466)."""
    budgets = (1e20, 1e21, 1e22, 1e23)
    found = {
        corpus: [round(100 * published_share(corpus, one), 1) for one in budgets]
        for corpus in ("Nemotron-CC", "RefinedWeb")
    }
    assert found["Nemotron-CC"] == pytest.approx([4.0, 7.1, 12.6, 22.5], abs=0.051)
    assert found["RefinedWeb"] == pytest.approx([3.8, 5.2, 7.2, 10.0], abs=0.051)


def test_two_laws_cross_where_algebra_says() -> None:
    """With alpha = beta the optimum's loss is E + k C^-(alpha/2), so that two laws cross once."""
    form = form_named("chinchilla")
    laws = [
        {"E": 1.9, "A": 300.0, "B": 300.0, "alpha": 0.4, "beta": 0.4},
        {"E": 1.8, "A": 400.0, "B": 400.0, "alpha": 0.4, "beta": 0.4},
    ]
    crossing = 6.0 * (2.0 * 100.0 / 0.1) ** 5.0
    for factor, best in ((0.9, 0), (1.1, 1)):
        losses = [best_share(form, values, factor * crossing).loss for values in laws]
        assert int(np.argmin(losses)) == best
