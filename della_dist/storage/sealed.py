"""JSON documents that carry a digest of themselves, in one canonical form.

Whatever is changed in one, by a bit or by hand, is found when it is read; so is everything that is
no such document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def seal(content: Mapping[str, Any], key: str = "digest", *, indent: int | None = None) -> bytes:
    """Return the canonical bytes of `content` with its own SHA-256 added under `key`."""
    body = {k: v for k, v in content.items() if k != key}
    body[key] = hashlib.sha256(_canonical(body, indent)).hexdigest()
    return _canonical(body, indent)


def unseal(data: bytes, key: str = "digest", *, indent: int | None = None) -> dict[str, Any]:
    """Return what `seal` was given, and the digest.

    Raises
    ------
    ValueError
        If the bytes are not those that `seal` made.
    """
    try:
        content = json.loads(data)
        intact = isinstance(content, dict) and seal(content, key, indent=indent) == data
    except (ValueError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("it does not have the digest that it should have")
    loaded: dict[str, Any] = content
    return loaded


def _canonical(content: Mapping[str, Any], indent: int | None) -> bytes:
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, sort_keys=True, separators=separators)
    return text.encode() + b"\n"
