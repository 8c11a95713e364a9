"""JSON as the safetensors library reads it, and nothing more than it reads.

Python's parser is more generous than RFC 8259 (NaN, lone surrogates, any depth, repeated keys).
Here objects become tuples of (key, value) pairs, so that a repeated key is seen and so that the
whole parse stays in C; arrays become lists.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

#: Levels of nesting that serde_json, the library's parser, allows.
MAX_DEPTH = 127

#: Python's default limit on the digits of a number; above it conversion takes quadratic time.
_MAX_INT_DIGITS = 4300
_MINUS_ZERO = re.compile(rb"-0[\s,\]}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
#: One escape sequence: a good pair of surrogates, or (group 1) one alone, or any other.
_ESCAPES = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F]..)|.)", re.S
)


def parse_pairs(data: bytes, *, allow_constants: bool = False) -> object:
    """Parse strict JSON; objects become tuples of (key, value) pairs, arrays lists.

    Parameters
    ----------
    data : bytes
        The document.
    allow_constants : bool
        Whether to take ``NaN``, ``Infinity`` and ``-Infinity``, which Python writes into the
        configurations of some models.

    Raises
    ------
    ValueError
        If `data` is not UTF-8 or not JSON, holds NaN, an infinity, a number too large for a
        double or half a surrogate pair, or is nested deeper than `MAX_DEPTH`. The message says
        which and where.
    """
    text = data.decode("utf-8")
    # Converting endless digits takes quadratic time. Python refuses to, unless it is older than
    # 3.10.7 or told otherwise; the slower conversion of ours is for those.
    # It is also for minus zero, which is not a whole number to the library.
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    is_plain = 0 < limit <= _MAX_INT_DIGITS and not _MINUS_ZERO.search(data)
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=tuple,
            parse_constant=float if allow_constants else _refuse_constant,
            parse_float=_finite_float,
            parse_int=None if is_plain else _bounded_int,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if _SURROGATE.search(data) and any(match[1] for match in _ESCAPES.finditer(text)):
        raise ValueError("a string holds half a surrogate pair")
    return value


def check_plain(value: object, max_depth: int) -> None:
    """Refuse a parsed `value` that is nested too deep, or holds a number no double can hold.

    For the parts of a document that nobody looks at: they are to be JSON all the same.

    Raises
    ------
    ValueError
        If it is. Scalars have depth 0.
    """
    below: list[object] = [value]
    levels = 0
    while below:
        inner: list[object] = []
        num_containers = 0
        for item in below:
            if isinstance(item, (list, tuple)):
                num_containers += 1
                inner.extend(item if isinstance(item, list) else (pair[1] for pair in item))
            elif isinstance(item, int) and item.bit_length() > 1024:
                raise ValueError(f"a number of {item.bit_length()} bits is out of range")
        levels += num_containers > 0
        if levels > max_depth:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        below = inner


def parse_object(data: bytes, *, allow_constants: bool = False) -> dict[str, object]:
    """Parse a JSON object whose keys, at its top level, are all different.

    Raises
    ------
    ValueError
        If it is no object, repeats a key, or is not what `parse_pairs` takes.
    """
    pairs = parse_pairs(data, allow_constants=allow_constants)
    if not isinstance(pairs, tuple):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - the file is wrong
    return unique(pairs)


def plain_object(document: Mapping[str, object]) -> dict[str, Any]:
    """Return a parsed object whose inner objects are dictionaries, too; repeated keys: the last."""
    return {key: _plain(value) for key, value in document.items()}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def object_at(document: Mapping[str, object], key: str) -> dict[str, object]:
    """Return the object that a parsed `document` has at `key`.

    Raises
    ------
    ValueError
        If there is none, or it repeats a key.
    """
    pairs = document.get(key)
    if not isinstance(pairs, tuple):
        raise ValueError(f'it has no object "{key}"')  # noqa: TRY004 - the file is wrong
    return unique(pairs)


def unique(pairs: tuple[tuple[str, object], ...]) -> dict[str, object]:
    """Return the pairs of an object as a dictionary.

    Raises
    ------
    ValueError
        If a key is there twice; the message names it.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:200]!r} is there twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _bounded_int(text: str) -> int | float:
    if text == "-0" or len(text) > 20:  # of more than 64 bits only its being finite matters
        return _finite_float(text)
    return int(text)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Hold back the cyclic garbage collector while many small objects are made.

    It finds nothing in what a parser makes, and looking takes most of the time of a big header.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
