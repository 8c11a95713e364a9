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
    x0, x1 = counter & _LOW_32, counter >> 32
    x2 = torch.zeros_like(counter)
    x3 = x2
    k0, k1 = key & _LOW_32, key >> 32
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high1, low1 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    offset = start - 4 * first
    return torch.stack((x0, x1, x2, x3), dim=1).reshape(-1)[offset : offset + stop - start]


def uniforms(key: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return the random numbers in [0, 1) of elements `start` to `stop`: (n,) float32."""
    return (philox_words(key, start, stop, device) >> 8).to(torch.float32) * 2.0**-24


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and the low 32 bits of ``x * factor``, both below 2**32.

    The product may pass 2**63: int64 multiplication keeps its low 64 bits, the arithmetic shift
    drags the sign along and the mask cuts it off.
    """
    product = x * factor
    return (product >> 32) & _LOW_32, product & _LOW_32
