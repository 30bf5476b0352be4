"""A permutation of range(n) that is computed per index instead of stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK = (1 << 64) - 1
_AT_ONCE = 1 << 20


class Shuffle:
    """Permutation of range(``size``) that depends on ``key`` alone, in O(1) time and memory.

    A Feistel network over the smallest even number of bits that can represent range(``size``),
    applied repeatedly until the result is below ``size`` (cycle walking; Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). The round function is the finaliser of
    splitmix64 with round keys from SHA-512.

    For example, ``shuffle = Shuffle("epoch 0", 10)``; ``shuffle.inverse(shuffle(3))`` is 3.
    """

    def __init__(self, key: str, size: int) -> None:
        assert size > 0, size
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        self._low = (1 << self._half) - 1
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the image of ``index``."""
        return self._walk(index, self._forward)

    def inverse(self, image: int) -> int:
        """Return the index whose image is ``image``."""
        return self._walk(image, self._backward)

    def images(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the images of ``start`` to ``stop`` (exclusive), vectorized."""
        found = np.empty(stop - start, np.int64)
        for at in range(0, len(found), _AT_ONCE):
            end = min(at + _AT_ONCE, len(found))
            index = self._forward_many(np.arange(start + at, start + end, dtype=np.uint64))
            while len(outside := np.flatnonzero(index >= self.size)):
                index[outside] = self._forward_many(index[outside])
            found[at:end] = index
        return found

    def _forward_many(self, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half, low = np.uint64(self._half), np.uint64(self._low)
        left, right = index >> half, index & low
        for key in self._keys:
            left, right = right, left ^ (_mixed_many(right + np.uint64(key)) & low)
        return (left << half) | right

    def _walk(self, index: int, step: Callable[[int], int]) -> int:
        assert 0 <= index < self.size, (index, self.size)
        while True:
            index = step(index)
            if index < self.size:
                return index

    def _forward(self, index: int) -> int:
        left, right = index >> self._half, index & self._low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._low)
        return (left << self._half) | right

    def _backward(self, image: int) -> int:
        left, right = image >> self._half, image & self._low
        for key in reversed(self._keys):
            left, right = right ^ (_mixed(left + key) & self._low), left
        return (left << self._half) | right


def _mixed(value: int) -> int:
    """Return splitmix64's finaliser of a number, taken modulo 2**64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mixed_many(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return ``_mixed`` of an array; its products wrap around in uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
