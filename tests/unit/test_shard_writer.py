"""Shards are the library's files, hashed as they pass, and complete or not there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from della_dist.errors import StorageError
from della_dist.storage.local.store import LocalStore
from della_dist.storage.shard_writer import ShardWriter

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "b": np.random.default_rng(0).standard_normal((100, 30)).astype(np.float32),
    "a": np.random.default_rng(1).standard_normal(1001).astype(np.float16),
    "empty": np.empty((0, 4), np.float32),
    "z.empty": np.empty((3, 0), np.float16),
    "scalar": np.array(2.5, np.float32),
}
ENTRIES = [
    (name, {"f4": "F32", "f2": "F16"}[array.dtype.str[1:]], array.shape)
    for name, array in ARRAYS.items()
]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def tensor_digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("step", [1, 1000, 10**9])
def test_shard_equals_save_file(store: LocalStore, tmp_path: Path, step: int) -> None:
    writer = ShardWriter(store, "model.safetensors", ENTRIES, {"format": "pt"})
    data = b"".join(ARRAYS[tensor.name].tobytes() for tensor in writer.begin())
    buffer = np.empty(min(step, len(data)), np.uint8)
    for start in range(0, len(data), step):  # blocks that know nothing of tensors, reused
        part = np.frombuffer(data[start : start + step], np.uint8)
        buffer[: part.size] = part
        writer.write(buffer[: part.size])
        buffer[:] = 0
    record = writer.finish()
    save_file(ARRAYS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    written = store.read("model.safetensors")
    assert written == (tmp_path / "theirs.safetensors").read_bytes()
    assert record.name == "model.safetensors"
    assert record.size_bytes == writer.size_bytes == len(written)
    assert record.sha256 == digest(written)
    assert record.tensors == {
        name: tensor_digest(array.tobytes()) for name, array in ARRAYS.items()
    }
    assert list(record.tensors) == [tensor.name for tensor in writer.tensors]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all((loaded[name] == array).all() for name, array in ARRAYS.items())
    assert store.list() == ["model.safetensors", "theirs.safetensors"]


@pytest.mark.parametrize("entries", [[], [("a", "BF16", (0,))]])
def test_shard_without_data(
    store: LocalStore, entries: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    with ShardWriter(store, "x", entries, {}) as writer:
        writer.begin()
        record = writer.finish()
    assert set(record.tensors.values()) <= {tensor_digest(b"")}
    assert record.sha256 == digest(store.read("x"))


def test_too_few_and_too_many_bytes(store: LocalStore) -> None:
    with ShardWriter(store, "x", [("a", "F32", (3,))], {}) as writer:
        with pytest.raises(AssertionError, match="before begin"):
            writer.write(b"")
        writer.begin()
        writer.write(bytes(8))
        with pytest.raises(AssertionError, match=r"of .* bytes"):
            writer.finish()
        with pytest.raises(AssertionError, match="more than"):
            writer.write(bytes(5))
        writer.write(bytes(4))
        writer.finish()
        with pytest.raises(AssertionError, match="after finish"):
            writer.write(b"")
    assert store.list() == ["x"]


def test_abort_leaves_nothing(store: LocalStore) -> None:
    with ShardWriter(store, "x", [("a", "F32", (3,))], {}) as writer:
        writer.begin()
        writer.write(bytes(12))
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_failed_write_is_not_forgotten(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(store, "x", [("a", "F32", (3,))], {}) as writer:
        writer.begin()

        def fail(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(StorageError, match="No space"):
            writer.write(bytes(12))
        monkeypatch.undo()
        with pytest.raises(AssertionError):
            writer.finish()
    assert store.list() == []
