"""Raw bytes to numbers and back in torch, bit for bit the same on every device."""

from __future__ import annotations

import torch

#: The integer dtype of each format's bits, and the one quiet NaN that is ever written.
_BITS = {
    "F16": (torch.int16, 0x7E00),
    "BF16": (torch.int16, 0x7FC0),
    "F32": (torch.int32, 0x7FC00000),
    "F64": (torch.int64, 0x7FF8000000000000),
}


def widen(raw: torch.Tensor, dtype: str, compute: torch.dtype) -> torch.Tensor:
    """Return the numbers in the raw bytes of a tensor, exactly.

    Parameters
    ----------
    raw
        (n * itemsize,) uint8, aligned to the item size.
    dtype
        The safetensors dtype of the bytes.
    compute
        float32, or float64 where the bytes are F64.

    Returns
    -------
    torch.Tensor
        (n,) of dtype `compute`.
    """
    bits = raw.view(_BITS[dtype][0])
    if dtype == "BF16":
        return (bits.to(torch.int32) << 16).view(torch.float32).to(compute)
    if dtype == "F16":
        return bits.view(torch.float16).to(compute)
    return bits.view(torch.float32 if dtype == "F32" else torch.float64).to(compute)


def narrow(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the bits of `values` (float32 or float64) rounded once, to nearest even, to `dtype`.

    Returns
    -------
    torch.Tensor
        (n,) int16, int32 or int64; NaNs have the canonical bits.
    """
    integer, nan_bits = _BITS[dtype]
    if dtype == "F64":
        bits = values.to(torch.float64).view(integer)
    elif dtype == "F32":
        bits = values.to(torch.float32).view(integer)
    else:
        # torch converts float64 to the 16-bit formats by way of float32, which rounds twice.
        single = values if values.dtype == torch.float32 else _round_to_odd(values)
        if dtype == "F16":
            bits = single.to(torch.float16).view(integer)
        else:
            wide = single.view(torch.int32)
            tie_to_even = (wide >> 16) & 1
            bits = ((wide + (tie_to_even + 0x7FFF)) >> 16).to(integer)
    return torch.where(torch.isnan(values), nan_bits, bits)


def count_overflow(base: torch.Tensor, bits: torch.Tensor, dtype: str) -> torch.Tensor:
    """Count the elements that are not finite in the output `bits` although `base` is.

    Returns
    -------
    torch.Tensor
        () int64, on the device.
    """
    exponent = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}[dtype]
    return ((bits & exponent) == exponent).logical_and_(torch.isfinite(base)).sum()


def _round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """Return float64 `values` as float32, inexact ones as the neighbour whose last bit is 1.

    Rounding that once more, to nearest even in a format at least two bits shorter, gives what
    rounding `values` directly gives (Boldo and Melquiond, 2008).
    """
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    # The bits count magnitudes upwards: one less is one step towards zero.
    too_large = (back.abs() > values.abs()).to(torch.int32)
    inexact = (back != values).to(torch.int32)
    return ((nearest.view(torch.int32) - too_large) | inexact).view(torch.float32)
