"""Checksums over bits: any single bit changes them, and other properties do not."""

import pytest
import torch

from allometry.trainer.record import bits
from allometry.trainer.record.bits import checksum, combined

CPU = torch.device("cpu")


def test_each_bit_counts() -> None:
    values = torch.randn(37)
    seen = {int(checksum(values))}
    for place in range(0, 37, 4):
        for bit in range(32):
            other = values.clone()
            other.view(torch.int32)[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
            seen.add(int(checksum(other)))
    assert len(seen) == 1 + 10 * 32
    assert int(checksum(values.flip(0))) not in seen  # values exchange positions


def test_where_a_tensor_lies_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.randn(5001)
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        whole = buffer.to(dtype)
        for start in (0, 1, 3):
            part = whole[start : start + 4000]
            assert int(checksum(part)) == int(checksum(part.clone()))
    matrix = buffer[:5000].view(50, 100)
    assert int(checksum(matrix.T)) == int(checksum(matrix.T.contiguous()))
    assert int(checksum(torch.zeros(0))) == 0
    before = checksum(buffer[1:])
    monkeypatch.setattr(bits, "_WORDS", 64)  # in pieces: a different sum with the same property
    assert int(checksum(buffer[1:])) == int(checksum(buffer[1:].clone())) != int(before)
    changed = buffer.clone()
    changed.view(torch.int32)[4000] ^= 1
    assert int(checksum(changed)) != int(checksum(buffer))


def test_order_counts() -> None:
    one, other = checksum(torch.ones(3)), checksum(torch.zeros(3))
    assert int(combined([one, other], CPU)) != int(combined([other, one], CPU))
