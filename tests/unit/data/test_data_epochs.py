"""Each epoch reads a source's windows, and its documents, in a different order."""

from __future__ import annotations

from pathlib import Path

import pytest

from allometry.data.order import DocumentOrder
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_store

LENGTH, WINDOWS, EPOCHS = 4, 40, 5


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    write_store(tmp_path / "store", [[1] * 16] * 10)  # windows have fixed positions in all epochs
    return TokenStore(tmp_path / "store")


def windows(order: DocumentOrder, epoch: int) -> tuple[int, ...]:
    """Return the windows of an epoch in reading order, numbered from 0."""
    samples = range(epoch * WINDOWS, (epoch + 1) * WINDOWS)
    return tuple(order.window(sample, LENGTH) - epoch * WINDOWS for sample in samples)


def test_epochs_read_windows_and_documents_in_different_orders(store: TokenStore) -> None:
    order = DocumentOrder(store, "code", seed=3)
    orders = [windows(order, epoch) for epoch in range(EPOCHS)]
    assert all(sorted(one) == list(range(WINDOWS)) for one in orders)
    assert len(set(orders)) == EPOCHS
    documents = [tuple(order.epoch(epoch).numbers(0, 10).tolist()) for epoch in range(EPOCHS)]
    assert all(sorted(one) == list(range(10)) for one in documents)
    assert len(set(documents)) == EPOCHS


def test_negative_control_held_out_windows_come_in_one_order(store: TokenStore) -> None:
    order = DocumentOrder(store, "code", seed=None)
    assert {windows(order, epoch) for epoch in range(EPOCHS)} == {tuple(range(WINDOWS))}
