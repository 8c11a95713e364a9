"""Where the tensors of the output go."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from della_dist.planning.layout import (
    GIB,
    MAX_SHARD_BYTES,
    MIB,
    MIN_SHARD_BYTES,
    OutputTensor,
    ShardLayout,
    default_shard_bytes,
    is_shard_name,
    lay_out,
    natural_key,
    weight_map,
)


def byte_tensor(name: str, size_bytes: int) -> OutputTensor:
    return OutputTensor(name, "U8", (size_bytes,))


def names(shards: tuple[ShardLayout, ...]) -> list[list[str]]:
    return [[t.name for t in shard.tensors] for shard in shards]


def test_natural_order() -> None:
    ordered = [
        "layers.0.a",
        "layers.1.a",
        "layers.1.b",
        "layers.2.a",
        "layers.10.a",
        "layers.10.a2",
        "layers.10.a10",
        "layers.a",
        "norm",
    ]
    shuffled = [ordered[i] for i in (8, 3, 5, 0, 7, 2, 6, 1, 4)]
    assert sorted(shuffled, key=natural_key) == ordered


def test_a_number_sorts_before_a_word_at_the_same_place() -> None:
    assert sorted(["h.x", "h.3", "3.h", "x"], key=natural_key) == ["3.h", "h.3", "h.x", "x"]


@pytest.mark.parametrize(
    "name", ["", "²", "x²", "a1²3", "٣", "x.٣.y", "9" * 5000, "a" + "٣" * 5000, "\0", "½"]
)
def test_any_name_can_be_sorted(name: str) -> None:
    sorted([name, "a.1.b", "1", "a"], key=natural_key)


def test_packing_in_order() -> None:
    sizes = {"a": 4, "b": 4, "c": 3, "d": 2, "e": 8, "f": 1}
    shards = lay_out([byte_tensor(n, s) for n, s in sizes.items()], 8)
    assert names(shards) == [["a", "b"], ["c", "d"], ["e"], ["f"]]
    assert [s.size_bytes for s in shards] == [8, 5, 8, 1]
    assert [s.name for s in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]


def test_single_shard_has_the_plain_name() -> None:
    (shard,) = lay_out([byte_tensor("b", 4), byte_tensor("a", 4)], 8)
    assert shard.name == "model.safetensors"
    assert names((shard,)) == [["a", "b"]]


def test_oversized_tensor_gets_a_shard_of_its_own() -> None:
    shards = lay_out([byte_tensor("a", 1), byte_tensor("b", 100), byte_tensor("c", 1)], 10)
    assert names(shards) == [["a"], ["b"], ["c"]]
    assert names(lay_out([byte_tensor("a", 100)], 10)) == [["a"]]


def test_empty_tensors_take_no_room() -> None:
    tensors = [byte_tensor("a", 10), byte_tensor("b", 0), byte_tensor("c", 10), byte_tensor("d", 0)]
    assert names(lay_out(tensors, 10)) == [["a", "b"], ["c", "d"]]


def test_no_tensors_are_one_empty_shard() -> None:
    assert lay_out([], 10) == (ShardLayout("model.safetensors", (), 0),)


def test_more_than_99999_shards() -> None:
    shards = lay_out([byte_tensor(f"{i}", 1) for i in range(100_001)], 1)
    assert shards[0].name == "model-00001-of-100001.safetensors"
    assert shards[-1].name == "model-100001-of-100001.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "a.safetensors",
        "model-1-of-2.safetensors",
        "model-00001-of-00002.safetensors.bak",
        "sub/model.safetensors",
        "model.safetensors.index.json",
        "my-model-00001-of-00002.safetensors",
    ],
)
def test_what_is_no_name_of_ours(name: str) -> None:
    assert not is_shard_name(name)


def test_default_shard_size() -> None:
    assert default_shard_bytes(0) == MIN_SHARD_BYTES == 256 * MIB
    assert default_shard_bytes(16 * GIB) == 256 * MIB
    assert default_shard_bytes(16 * GIB + 1) == 256 * MIB + 1
    assert default_shard_bytes(100 * GIB) == 100 * GIB // 64
    assert default_shard_bytes(128 * GIB) == 2 * GIB == MAX_SHARD_BYTES
    assert default_shard_bytes(2000 * GIB) == 2 * GIB


def test_shards_are_of_about_the_same_size() -> None:
    shards = lay_out([byte_tensor(f"{i:02}", 10) for i in range(11)], 100)
    assert [s.size_bytes for s in shards] == [60, 50]


def test_weight_map() -> None:
    shards = lay_out([byte_tensor(n, 6) for n in ("b.10", "b.9", "a")], 12)
    first, second = (s.name for s in shards)
    assert list(weight_map(shards).items()) == [("a", first), ("b.10", second), ("b.9", first)]


def test_size_of_an_output_tensor() -> None:
    assert OutputTensor("a", "BF16", (3, 5)).size_bytes == 30
    assert OutputTensor("a", "F64", ()).size_bytes == 8
    assert OutputTensor("a", "F32", (3, 0)).size_bytes == 0


# Names that only differ in leading zeros have the same natural key.
NAMES = st.text(alphabet="ab.0123", min_size=1, max_size=6)
TENSORS = st.dictionaries(NAMES, st.integers(0, 30), max_size=25).map(
    lambda sizes: [byte_tensor(n, s) for n, s in sizes.items()]
)


@given(TENSORS, st.integers(1, 60), st.randoms(use_true_random=False))
def test_layout(tensors: list[OutputTensor], shard_bytes: int, rng: random.Random) -> None:
    shards = lay_out(tensors, shard_bytes)
    placed = [t for shard in shards for t in shard.tensors]
    assert sorted(placed, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    assert len({s.name for s in shards}) == len(shards)
    for i, shard in enumerate(shards):
        assert shard.size_bytes == sum(t.size_bytes for t in shard.tensors)
        large = [t for t in shard.tensors if t.size_bytes]
        assert shard.size_bytes <= shard_bytes or len(large) == 1
        if len(shards) > 1:
            assert shard.name == f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        assert is_shard_name(shard.name)
    total = sum(t.size_bytes for t in tensors)
    even = total / max(1, -(-total // shard_bytes))
    for i, following in enumerate(shards[1:]):
        # A shard ends where it has its even part, or has no room for the next tensor.
        full = shards[i].size_bytes + following.tensors[0].size_bytes > shard_bytes
        assert full or shards[i].size_bytes >= even
    # The layout does not know the order in which the inputs have their tensors.
    shuffled = list(tensors)
    rng.shuffle(shuffled)
    assert lay_out(shuffled, shard_bytes) == shards
