"""Headers of safetensors files, read and written within the format's specification.

A file is eight bytes (the header's length N, little endian), N bytes of JSON, and the data. The
JSON maps tensor names to ``dtype``, ``shape`` and ``data_offsets`` (counted from the end of the
header), and ``__metadata__`` to a map of strings. Whether a header is accepted is decided as the
safetensors library (0.8) decides it, with one exception: a tensor name that is there twice is
refused, where the library silently keeps the last one. (And a number in a field that nobody reads,
within rounding of the largest double, 1.797e308, may be taken here and refused there.)

Sources: https://github.com/huggingface/safetensors#format and the behaviour of the library.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from della_dist.errors import InputError
from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.dtypes import DTYPE_BITS, num_bytes
from della_dist.storage.strict_json import MAX_DEPTH, check_plain, parse_object, paused_gc, unique

#: The library refuses headers longer than this.
MAX_HEADER_BYTES = 100_000_000

_LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_LFS_POINTER = b"version https://git-lfs"
_MAX_U64 = 2**64 - 1
#: One read usually brings the whole header of a shard; a remote store pays for each request.
_FIRST_READ_BYTES = 256 << 10
#: File order of dtypes: the reverse of the order in which the library declares them.
_RANK = {dtype: rank for rank, dtype in enumerate(reversed(tuple(DTYPE_BITS)))}
_DTYPES = {dtype: dtype for dtype in DTYPE_BITS}


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one safetensors file says."""

    tensors: tuple[TensorEntry, ...]
    """In the order of their data; `start` and `stop` count from the beginning of the file."""
    metadata: Mapping[str, str]
    size_bytes: int
    """Length of the header with its eight-byte length: where the data begins."""
    sha256: str
    """Hexadecimal digest of those bytes."""


def parse_header(
    read: Callable[[int, int], bytes], size_bytes: int, *, where: str, shard: int = 0
) -> Header:
    """Read and validate the header of a safetensors file; no data is read.

    Parameters
    ----------
    read : callable
        ``read(start, stop)`` returns exactly those bytes of the file.
    size_bytes : int
        Size of the file.
    where : str
        Name of the file, for messages.
    shard : int
        Goes into the `TensorEntry.shard` of every tensor.

    Raises
    ------
    InputError
        If the file is not a safetensors file that the library would open, or a tensor name is
        there twice. One paragraph: file, what is wrong with which numbers, what to do.
    """
    head = _read_bytes(read, size_bytes, where)
    try:
        with paused_gc():
            values = parse_object(head[_LENGTH_BYTES:])
            metadata = _metadata(values.pop(_METADATA_KEY, None))
            spans = sorted((_span(name, value) for name, value in values.items()), key=_offsets)
            tensors, data_bytes = _place(spans, len(head), shard)
    except ValueError as error:
        raise InputError(
            f"{where} is not a valid safetensors file: its header of {len(head)} bytes is wrong: "
            f"{error}. Download it again, or write it again with the safetensors library."
        ) from error
    if len(head) + data_bytes != size_bytes:
        raise InputError(
            f"{where} has {size_bytes} bytes, but its header describes {len(head)} + {data_bytes} "
            f"= {len(head) + data_bytes}: it was {_how(size_bytes, len(head) + data_bytes)}. "
            "Download or copy it again."
        )
    return Header(tensors, metadata, len(head), hashlib.sha256(head).hexdigest())


def build_header(
    entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Return the header of a file that holds `entries`, and where each tensor's data goes.

    The tensors are ordered as the library orders them (wide dtypes first, then by name), so that
    the file equals, byte for byte, what the library writes for the same tensors.

    Parameters
    ----------
    entries : sequence of (name, dtype, shape)
        The tensors, in any order.
    metadata : mapping of str to str
        Goes under ``__metadata__``; nothing is written where it is empty.

    Returns
    -------
    header : bytes
        With the eight-byte length, padded with spaces to a multiple of eight.
    placed : tuple of TensorEntry
        In file order, ``shard`` 0, offsets counted from the beginning of the file.

    Raises
    ------
    ValueError
        If a name is there twice or reserved, a dtype unknown, a tensor not whole bytes, or the
        header longer than the format allows. An internal error: plans are validated before.
    """
    names = {name for name, _, _ in entries}
    if len(names) != len(entries) or _METADATA_KEY in names:
        raise ValueError(f"tensor names are repeated, or one is {_METADATA_KEY!r}")
    ordered = sorted(entries, key=lambda entry: (_RANK[entry[1]], entry[0].encode()))
    document: dict[str, object] = {}
    if metadata:
        document[_METADATA_KEY] = dict(sorted(metadata.items()))
    spans: list[tuple[str, str, tuple[int, ...], int, int]] = []
    stop = 0
    for name, dtype, shape in ordered:
        start, stop = stop, stop + num_bytes(dtype, shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        spans.append((name, dtype, shape, start, stop))
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is longer than {MAX_HEADER_BYTES}")
    base = _LENGTH_BYTES + len(text)
    placed = tuple(
        TensorEntry(name, dtype, shape, 0, base + start, base + stop)
        for name, dtype, shape, start, stop in spans
    )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, placed


def _read_bytes(read: Callable[[int, int], bytes], size_bytes: int, where: str) -> bytes:
    """Return the length and the JSON, nothing being allocated before it is known to be there."""
    if size_bytes < _LENGTH_BYTES:
        raise InputError(
            f"{where} has {size_bytes} bytes, too few for a safetensors file (a header alone has "
            f"{_LENGTH_BYTES} and more). Download or copy it again."
        )
    head = read(0, min(size_bytes, _FIRST_READ_BYTES))
    if head.startswith(_LFS_POINTER):
        raise InputError(
            f"{where} is not a safetensors file but a pointer to one that git did not download. "
            "Run 'git lfs pull' in the checkpoint, or download it with 'hf download'."
        )
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{where} says that its header has {length} bytes, more than the {MAX_HEADER_BYTES} "
            "that the format allows: it is damaged, or no safetensors file. Download it again."
        )
    stop = _LENGTH_BYTES + length
    if stop > size_bytes:
        raise InputError(
            f"{where} has {size_bytes} bytes, but its header alone should have {stop}: it was cut "
            "short, or is no safetensors file. Download or copy it again."
        )
    return head[:stop] if stop <= len(head) else head + read(len(head), stop)


_Span = tuple[int, int, str, str, tuple[int, ...]]


def _offsets(span: _Span) -> tuple[int, int]:
    return span[:2]


def _metadata(value: object) -> dict[str, str]:
    """Return ``__metadata__``; the library takes null, and the last of repeated keys."""
    if value is None:
        return {}
    if not isinstance(value, tuple):
        raise ValueError(f"{_METADATA_KEY} is not an object")  # noqa: TRY004
    for key, item in value:
        if not isinstance(item, str):
            raise ValueError(f"{_METADATA_KEY}[{key[:200]!r}] is not a string")  # noqa: TRY004
    return dict(value)


def _span(name: str, value: object) -> _Span:
    """Return (start, stop, name, dtype, shape) of one tensor, as the library would read it."""
    if (
        type(value) is tuple
        and len(value) == 3
        and (value[0][0], value[1][0], value[2][0]) == _FIELDS
    ):
        dtype, shape, offsets = value[0][1], value[1][1], value[2][1]
    else:
        dtype, shape, offsets = _unusual_fields(name, value)
    # Types are compared exactly: True is an int to Python, and 1.0 equals 1.
    if type(dtype) is not str or dtype not in _DTYPES:
        dtype = _unusual_dtype(name, dtype)
    if type(shape) is not list or not {int}.issuperset(map(type, shape)):
        raise ValueError(f"the shape of {name[:200]!r} is not a list of whole numbers")
    if type(offsets) is not list or len(offsets) != 2 or {*map(type, offsets)} != {int}:
        raise ValueError(f"the data_offsets of {name[:200]!r} are not two whole numbers")
    return offsets[0], offsets[1], name, _DTYPES[dtype], tuple(shape)


def _unusual_fields(name: str, value: object) -> tuple[object, object, object]:
    """Return dtype, shape, offsets of an entry in another order, with more fields, or a list."""
    if isinstance(value, list):
        if len(value) != 3:
            raise ValueError(f"the entry of {name[:200]!r} has {len(value)} items instead of 3")
        return value[0], value[1], value[2]
    if not isinstance(value, tuple):
        raise ValueError(f"the entry of {name[:200]!r} is not an object")  # noqa: TRY004
    known = tuple(pair for pair in value if pair[0] in _FIELDS)
    fields = unique(known)
    for field in _FIELDS:
        if field not in fields:
            raise ValueError(f"the entry of {name[:200]!r} has no {field}")
    check_plain(value, MAX_DEPTH - 1)  # it is one level down itself
    return fields["dtype"], fields["shape"], fields["data_offsets"]


def _unusual_dtype(name: str, value: object) -> str:
    """Return the dtype written as ``{"F32": null}``, which the library reads as ``"F32"``."""
    if isinstance(value, tuple) and len(value) == 1 and value[0][1] is None:
        value = value[0][0]
    if not isinstance(value, str) or value not in _DTYPES:
        raise ValueError(f"the dtype of {name[:200]!r} is unknown: {_short(value)}")
    return value


def _place(spans: list[_Span], base: int, shard: int) -> tuple[tuple[TensorEntry, ...], int]:
    """Check that the spans, sorted, cover the data without gap; return entries and its size."""
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    tensors = []
    stop = 0
    begin = end = base
    for start, span_stop, name, dtype, shape in spans:
        if start != stop or span_stop < start:
            raise ValueError(
                f"the data of {name[:200]!r} is at {_short(start)} to {_short(span_stop)}, but the "
                f"data before it ends at {stop}"
            )
        size = sizes.get((dtype, shape))
        if size is None:
            shape = shapes.setdefault(shape, shape)  # noqa: PLW2901 - one tuple a shape
            size = sizes[dtype, shape] = _checked_bytes(name, dtype, shape)
        else:
            shape = shapes[shape]  # noqa: PLW2901
        if span_stop - start != size:
            raise ValueError(
                f"{name[:200]!r} has {_short(span_stop - start)} bytes from {start}, but {dtype} "
                f"of shape {_short(shape)} has {size}"
            )
        stop = span_stop
        begin, end = end, base + stop
        tensors.append(TensorEntry(sys.intern(name), dtype, shape, shard, begin, end))
    return tuple(tensors), stop


def _checked_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor, refusing what overflows 64 bits on the way, as they do."""
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        if not 0 <= factor <= _MAX_U64 or (bits := bits * factor) > _MAX_U64:
            raise ValueError(f"the shape of {name[:200]!r} is out of range: {_short(shape)}")
    if bits % 8:
        raise ValueError(f"{name[:200]!r}, {dtype} of shape {_short(shape)}, is not whole bytes")
    return bits // 8


def _short(value: object) -> str:
    """Return `value` as a message shows it, however long it is."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _how(actual_bytes: int, described_bytes: int) -> str:
    return "cut short" if actual_bytes < described_bytes else "written past its end"
