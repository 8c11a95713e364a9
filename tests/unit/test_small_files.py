"""What counts as JSON beside the weights: what Python's own parser takes, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from della_dist.errors import InputError
from della_dist.runtime.companions.small_files import (
    CHUNK_BYTES,
    checked_digest,
    chunks,
    read_json,
    read_small,
)
from della_dist.storage.local.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1, 2]",
        ' "only a string" ',
        '{"a": NaN, "b": [Infinity, -Infinity]}',
        r'{"half": "\ud83d"}',  # of tokenizers that split characters
        '{"a": 1, "a": 2}',
        "[" * 300 + "]" * 300,
        '{"n": ' + "9" * 400 + "}",
    ],
)
def test_taken(store: LocalStore, text: str) -> None:
    store.put("x.json", text.encode())
    assert read_json(store, "x.json") == text.encode()
    assert checked_digest(store, "x.json")[1] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "data",
    [b"{", b"{'a': 1}", b'{"a": 1,}', b"{}{}", b"\0" * 100, b'{"a": "\xff"}', b"[" * 100_000],
)
def test_refused(store: LocalStore, data: bytes) -> None:
    store.put("x.json", data)
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        checked_digest(store, "x.json")


def test_other_files_are_not_parsed(store: LocalStore) -> None:
    store.put("x.jsonl", b"{")
    store.put("y.py", b"")
    assert checked_digest(store, "x.jsonl") == (1, hashlib.sha256(b"{").hexdigest())
    assert checked_digest(store, "y.py") == (0, hashlib.sha256(b"").hexdigest())


def test_documents_are_bounded(store: LocalStore) -> None:
    store.put("x.json", b'"12345678"')
    assert read_small(store, "x.json", 10) == b'"12345678"'
    store.put("x.json", b'"123456789"')
    with pytest.raises(InputError, match="has 11 bytes, more than such a file can have"):
        read_small(store, "x.json", 10)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunks_are_bounded_and_all_of_it(store: LocalStore, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    store.put("x", data)
    parts = list(chunks(store, "x", size))
    assert b"".join(parts) == data
    assert all(0 < len(part) <= CHUNK_BYTES for part in parts)
