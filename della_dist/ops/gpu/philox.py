"""Philox4x32-10 in torch's int64 arithmetic: the layout of `della_dist.ops.philox`, any device."""

from __future__ import annotations

import torch

_LOW_32 = 0xFFFFFFFF


def philox_words(key: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return the random words of elements `start` to `stop` of a tensor.

    Parameters
    ----------
    key
        The 64-bit key of the tensor and expert.
    start, stop
        Element positions in the whole tensor.
    device
        Where to compute.

    Returns
    -------
    torch.Tensor
        (stop - start,) int64, each in [0, 2**32).
    """
    first, last = start // 4, -(-stop // 4)
    counter = torch.arange(first, last, dtype=torch.int64, device=device)
    # Of x1 and x3 the lower 32 bits count: what is above is cut off where it matters.
    x0, x1 = counter & _LOW_32, counter >> 32
    x2 = torch.zeros_like(counter)
    x3 = x2
    k0, k1 = key & _LOW_32, key >> 32
    for _ in range(10):
        # The products may pass 2**63: int64 multiplication keeps their low 64 bits, the arithmetic
        # shift drags the sign along and the mask cuts it off.
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0 = (product1 >> 32).bitwise_xor_(x1).bitwise_xor_(k0).bitwise_and_(_LOW_32)
        x2 = (product0 >> 32).bitwise_xor_(x3).bitwise_xor_(k1).bitwise_and_(_LOW_32)
        x1, x3 = product1, product0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    offset = start - 4 * first
    words = torch.stack((x0, x1, x2, x3), dim=1).reshape(-1)
    return words.bitwise_and_(_LOW_32)[offset : offset + stop - start]


def uniforms(key: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return the random numbers in [0, 1) of elements `start` to `stop`: (n,) float32."""
    return (philox_words(key, start, stop, device) >> 8).to(torch.float32) * 2.0**-24
