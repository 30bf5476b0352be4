"""A permutation of range(n) that is looked up, not stored."""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Shuffle:
    """A bijection of range(``size``) that follows from ``key`` alone, in O(1) time and memory.

    A Feistel network over the smallest even number of bits that holds ``size``, walked along its
    cycle until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002);
    its round function is the finaliser of splitmix64 under round keys from SHA-256.
    """

    def __init__(self, key: str, size: int) -> None:
        assert size > 0, size
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        self._low = (1 << self._half) - 1
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where ``index`` goes."""
        assert 0 <= index < self.size, (index, self.size)
        while True:
            left, right = index >> self._half, index & self._low
            for key in self._keys:
                mixed = (right + key) & _MASK
                mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
                mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
                left, right = right, left ^ ((mixed ^ (mixed >> 31)) & self._low)
            index = (left << self._half) | right
            if index < self.size:
                return index
