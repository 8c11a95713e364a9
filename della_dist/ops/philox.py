"""The random words: Philox4x32-10, keyed a tensor and expert, counted by element.

The layout is normative; a third party can reproduce every random decision from it:

* **Key**: the first 8 bytes, little-endian, of ``BLAKE2b`` (64-byte digest, no key) over the seed
  (8 bytes), the expert's position in the configuration counted from 0 (4 bytes), the stage
  (4 bytes), all little-endian, and the tensor's name in UTF-8. ``k0`` is its low 32 bits, ``k1``
  its high ones.
* **Stage**: 0 where no input is itself the output of a merge, else one more than the largest stage
  of an input. Merges in a chain therefore share no words, whatever their seeds: what one of them
  kept is not more likely to be kept by the next, which would scale it twice.
* **Counter**: element `i` of the tensor, in row-major order, uses word ``i % 4`` of the counter
  ``(c & 0xffffffff, c >> 32, 0, 0)`` with ``c = i // 4``.
* **Uniform**: ``u = (word >> 8) * 2**-24``, exact in float32, in [0, 1).

References
----------
Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_LOW_32 = np.uint64(0xFFFFFFFF)
_FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_key(seed: int, tensor_name: str, expert: int, stage: int = 0) -> int:
    """Return the 64-bit Philox key of one expert's part of one tensor."""
    numbers = (
        seed.to_bytes(8, "little") + expert.to_bytes(4, "little") + stage.to_bytes(4, "little")
    )
    return int.from_bytes(hashlib.blake2b(numbers + tensor_name.encode()).digest()[:8], "little")


def philox4x32(counter: npt.ArrayLike, key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Return the random words of Philox4x32-10.

    Parameters
    ----------
    counter
        (4, N) integers below 2**32: the words of N counters.
    key
        The two 32-bit words of the key.

    Returns
    -------
    numpy.ndarray
        (4, N) uint32.
    """
    x0, x1, x2, x3 = np.asarray(counter, np.uint64)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The factors are below 2**32, so the products fit.
        product0, product1 = x0 * _FACTORS[0], x2 * _FACTORS[1]
        x0 = (product1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0)
        x1 = product1 & _LOW_32
        x2 = (product0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1)
        x3 = product0 & _LOW_32
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3)).astype(np.uint32)


def element_words(key: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
    """Return the random words of elements `start` to `stop` of a tensor: (stop - start,).

    Parameters
    ----------
    key
        `stream_key` of the tensor and expert.
    start, stop
        Positions in the whole tensor, in row-major order.
    """
    first = start // 4
    low = np.arange(first, -(-stop // 4), dtype=np.uint64)
    zero = np.zeros_like(low)
    counter = np.stack((low & _LOW_32, low >> np.uint64(32), zero, zero))
    words = philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))
    in_order: npt.NDArray[np.uint32] = words.T.reshape(-1)
    return in_order[start - 4 * first : stop - 4 * first]


def element_uniforms(key: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the random numbers in [0, 1) of elements `start` to `stop`: (stop - start,)."""
    u: npt.NDArray[np.float32] = (element_words(key, start, stop) >> np.uint32(8)).astype(
        np.float32
    ) * np.float32(2.0**-24)
    return u
