"""The random words: Philox4x32-10, keyed a tensor and expert, counted by element.

The layout is normative; a third party can reproduce every random decision from it:

* **Key**: the first 8 bytes, little-endian, of ``BLAKE2b`` (64-byte digest, no key) over the seed
  (8 bytes, little-endian), the expert's position in the configuration counted from 0 (8 bytes,
  little-endian) and the tensor's name in UTF-8. ``k0`` is its low 32 bits, ``k1`` its high ones.
* **Counter**: element `i` of the tensor, in row-major order, uses word ``i % 4`` of the counter
  ``(c & 0xffffffff, c >> 32, 0, 0)`` with ``c = i // 4``.
* **Uniform**: ``u = (word >> 8) * 2**-24``, exact in float32, in [0, 1).

References
----------
Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
"""

from __future__ import annotations

import hashlib


def stream_key(seed: int, tensor_name: str, expert: int) -> int:
    """Return the 64-bit Philox key of one expert's part of one tensor."""
    message = seed.to_bytes(8, "little") + expert.to_bytes(8, "little") + tensor_name.encode()
    return int.from_bytes(hashlib.blake2b(message).digest()[:8], "little")
