from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from allometry.data.documents import Pieces
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_store
from allometry.models.loss import IGNORE
from allometry.models.multi_token import ahead_of
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.trainer.feed import DeviceBatch, document_batch, fingerprint
from allometry.trainer.step import seed_dropout

CPU = torch.device("cpu")
UNITS = (Unit((0, 2), (0,)), Unit((1,), (0,)), Unit((3,), (0,)))


def test_each_micro_batch_of_documents_has_masks_of_its_own(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[1, 2, 3]] * 4)
    zeros = np.zeros(4, np.int64)
    pieces = Pieces(
        zeros + 3, zeros, np.arange(4), zeros, zeros == 0, {0: TokenStore(tmp_path / "store")}
    )

    def drawn(batch: DeviceBatch, seed: int = 0) -> float:
        seed_dropout(seed, batch.to(CPU))
        return float(torch.rand(()))

    batches = [
        document_batch(unit, 0, pieces, CPU, position=position)
        for position in (0, 8)
        for unit in UNITS
    ]
    numbers = [drawn(batch) for batch in batches]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [drawn(batch) for batch in batches]
    assert drawn(batches[0], seed=1) not in numbers


def test_a_plans_fingerprint_is_of_what_ranks_must_agree_on() -> None:
    units = (Unit((0,), (0, 1), cost=1.0), Unit((1,), (0,)), Unit((2,), (1,)))
    plan = Plan((9, 4, 4), 2, "free", units, ((0, 1), (0, 2)))
    other = Unit((0,), (1, 0), cost=1.0)
    changed = [
        replace(plan, lengths=(9, 4, 5)),
        replace(plan, units=(other, *units[1:])),
        replace(plan, orders=((1, 0), (0, 2))),
        replace(plan, mode="aligned"),
    ]
    found = {fingerprint(plan), *(fingerprint(one) for one in changed)}
    assert len(found) == 1 + len(changed)
    dearer = replace(units[0], cost=2.0)  # costs may differ in a last bit, but not other fields
    assert fingerprint(replace(plan, units=(dearer, *units[1:]))) == fingerprint(plan)
    assert max(found) < 2**62


def test_tokens_ahead_of_a_document_that_ranks_share(tmp_path: Path) -> None:
    """The parts of two ranks have the tokens ahead that the full document has."""
    lengths, depths = np.array([11, 2, 7]), 3
    write_store(tmp_path / "store", [list(range(n * 20, n * 20 + n + 1)) for n in lengths])
    zeros = np.zeros(3, np.int64)
    pieces = Pieces(
        lengths, zeros, np.arange(3), zeros, zeros == 0, {0: TokenStore(tmp_path / "store")}
    )
    alone = document_batch(Unit((0, 1, 2), (0,)), 0, pieces, CPU, depths=depths)
    assert alone.ahead_MBL is None
    ahead_MT = ahead_of(alone.targets_BL, alone.documents, depths).flatten(1)
    wanted = dict(zip(alone.tokens_BL[0].tolist(), ahead_MT.T.tolist(), strict=True))
    shared = [
        document_batch(Unit((0, 1, 2), (0, 1)), rank, pieces, CPU, multiple=4, depths=depths)
        for rank in (0, 1)
    ]
    found = {}
    for batch in shared:
        assert batch.ahead_MBL is not None
        assert torch.equal(batch.ahead_MBL[0], batch.targets_BL)
        counted = batch.targets_BL[0] != IGNORE
        rows = batch.ahead_MBL.flatten(1).T[counted].tolist()
        found |= dict(zip(batch.tokens_BL[0][counted].tolist(), rows, strict=True))
    assert found == {token: row for token, row in wanted.items() if row[0] != IGNORE}
    counts = sum(batch.targets_ahead(depths) for batch in shared)
    assert torch.equal(counts, alone.targets_ahead(depths))
