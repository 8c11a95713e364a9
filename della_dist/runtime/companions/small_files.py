"""The files beside the weights, read in bounded memory.

What is not what its name says is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, core_schema

from della_dist.errors import InputError
from della_dist.storage.shard_files import LFS_POINTERS
from della_dist.storage.store import Store

#: Read at once. A file is never held whole, but for JSON, which cannot be checked in parts.
CHUNK_BYTES = 2 << 20
#: Files that are read at once.
FILES_AT_ONCE = 4
#: The largest tokenizer.json that people publish has 35 MB.
MAX_JSON_BYTES = 64 << 20
#: What reading and checking a JSON document takes, relative to its size: 6.1 at most was measured.
JSON_MEM_FACTOR = 7

#: Files that have no meaning without content.
_NEVER_EMPTY = (".json", ".model", ".spm", ".tiktoken", "vocab.txt")


def chunks(store: Store, key: str, size_bytes: int) -> Iterator[bytes]:
    """Yield the first `size_bytes` of a file, a bounded part at a time."""
    for start in range(0, size_bytes, CHUNK_BYTES):
        yield store.read(key, start, min(start + CHUNK_BYTES, size_bytes))


def checked_digest(store: Store, key: str) -> tuple[int, str]:
    """Return size and SHA-256 of a file that is what its name says; see `digest_of`.

    Raises
    ------
    InputError
        Also if it is JSON and does not parse.
    """
    if key.lower().endswith(".json"):
        data = read_json(store, key)
        return len(data), hashlib.sha256(data).hexdigest()
    return digest_of(store, key)


def digest_of(store: Store, key: str) -> tuple[int, str]:
    """Return size and SHA-256 of a file.

    Raises
    ------
    InputError
        If it is none (`Store.check`), a pointer of git-lfs, or empty where that means nothing.
    """
    size_bytes = size_of(store, key)
    digest = hashlib.sha256()
    for number, chunk in enumerate(chunks(store, key, size_bytes)):
        if number == 0:
            _check_no_pointer(store, key, chunk)
        digest.update(chunk)
    return size_bytes, digest.hexdigest()


def size_of(store: Store, key: str) -> int:
    """Return the size of a file, if it is one and not empty where that means nothing."""
    store.check(key)
    size_bytes = store.stat(key).size_bytes
    if size_bytes == 0 and key.lower().endswith(_NEVER_EMPTY):
        raise InputError(
            f"{store.describe(key)} is empty. Download it again, or remove it from the checkpoint "
            "if the model does not need it."
        )
    return size_bytes


def read_small(store: Store, key: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a file of at most `max_bytes`; refuses what `digest_of` does."""
    size_bytes = size_of(store, key)
    if size_bytes > max_bytes:
        raise InputError(
            f"{store.describe(key)} has {size_bytes} bytes, more than such a file can have "
            f"({max_bytes}). Download it again, or remove it from the checkpoint."
        )
    data = store.read(key, 0, size_bytes)
    _check_no_pointer(store, key, data)
    return data


def read_json(store: Store, key: str) -> bytes:
    """Return the bytes of a JSON document, which does parse; see `read_small`."""
    data = read_small(store, key)
    try:
        _any_json().validate_json(data)
    except ValidationError as error:
        if error.errors(include_input=False)[0]["type"] == "json_invalid":
            parse_json(data, store.describe(key))  # takes half surrogates, as tokenizers have
    return data


def parse_json(data: bytes, where: str) -> Any:  # noqa: ANN401
    """Return what a JSON document says.

    Raises
    ------
    InputError
        If it is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(
            f"{where} is not valid JSON: {reason}. Download it again, or remove it from the "
            "checkpoint if the model does not need it."
        ) from error


@functools.cache
def _any_json() -> SchemaValidator:
    # Makes no Python objects of what it parses: a third of the time, half of the memory.
    return SchemaValidator(core_schema.typed_dict_schema({}, extra_behavior="ignore"))


def _check_no_pointer(store: Store, key: str, head: bytes) -> None:
    if head.startswith(LFS_POINTERS):
        raise InputError(
            f"{store.describe(key)} is a pointer of git-lfs, not the file itself. Run 'git lfs "
            "pull' in the checkpoint, or download it with 'hf download'."
        )
