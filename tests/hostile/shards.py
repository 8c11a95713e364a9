"""Shards that are damaged, or written to do damage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.hostile.situation import Situation, file_bytes, hostile, save_family

GIB = 1 << 30
AGAIN = "again"


def refused_shard(folder: Path, content: bytes, *words: str) -> Situation:
    """Put `content` in the place of an expert's only shard."""
    family = save_family(folder)
    shard = family.experts[1] / "model.safetensors"
    shard.write_bytes(content)
    return family.refused(str(shard), *words)


def entry(start: int, stop: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@hostile
def case_truncated_shard(folder: Path) -> Situation:
    family = save_family(folder)
    shard = family.experts[0] / "model.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    return family.refused(str(shard), f"{size - 1} bytes", "cut short", AGAIN)


@hostile
def case_shard_with_bytes_appended(folder: Path) -> Situation:
    content = file_bytes({"a": entry(0, 4, 1)}, bytes(5))
    return refused_shard(folder, content, f"{len(content)} bytes", "past its end", AGAIN)


@hostile
def case_header_longer_than_the_file(folder: Path) -> Situation:
    content = (1000).to_bytes(8, "little") + b'{"a":'
    return refused_shard(folder, content, "13 bytes", "1008", "cut short", AGAIN)


@hostile
def case_header_of_2_to_the_63_bytes(folder: Path) -> Situation:
    content = (1 << 63).to_bytes(8, "little") + b"{}"
    return refused_shard(folder, content, str(1 << 63), "100000000", AGAIN)


@hostile
def case_header_over_100_mb_that_is_there(folder: Path) -> Situation:
    situation = refused_shard(folder, (100_000_001).to_bytes(8, "little"), "100000001", AGAIN)
    os.truncate(folder / "expert1" / "model.safetensors", GIB)
    return situation


@hostile
def case_zero_length_file(folder: Path) -> Situation:
    return refused_shard(folder, b"", "0 bytes", "too few", AGAIN)


@hostile
def case_seven_bytes(folder: Path) -> Situation:
    return refused_shard(folder, b"\x02\0\0\0\0\0\0", "7 bytes", "too few", AGAIN)


@hostile
def case_empty_header(folder: Path) -> Situation:
    return refused_shard(folder, file_bytes(b""), "8 bytes", AGAIN)


@hostile
def case_git_lfs_pointer(folder: Path) -> Situation:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"
    return refused_shard(folder, pointer, "pointer", "git lfs pull")


@hostile
def case_web_page(folder: Path) -> Situation:
    return refused_shard(folder, b"<!DOCTYPE html><html>404</html>", "no safetensors file")


@hostile
def case_pickle_with_the_wrong_name(folder: Path) -> Situation:
    return refused_shard(folder, b"PK\x03\x04" + bytes(100), "cut short, or is no safetensors file")


@hostile
def case_overlapping_offsets(folder: Path) -> Situation:
    header = {"a": entry(0, 8, 2), "b": entry(4, 12, 2)}
    return refused_shard(folder, file_bytes(header, bytes(12)), "'b'", "4 to 12", "ends at 8")


@hostile
def case_out_of_range_offsets(folder: Path) -> Situation:
    content = file_bytes({"a": entry(0, 4000, 1000)}, bytes(40))
    return refused_shard(folder, content, f"{len(content)} bytes", "4000", AGAIN)


@hostile
def case_reversed_offsets(folder: Path) -> Situation:
    header = {"a": entry(8, 0, 2)}
    return refused_shard(folder, file_bytes(header, bytes(8)), "'a'", "8 to 0", AGAIN)


@hostile
def case_negative_offsets(folder: Path) -> Situation:
    header = {"a": entry(-8, 0, 2)}
    return refused_shard(folder, file_bytes(header, bytes(8)), "'a'", "-8 to 0", AGAIN)


@hostile
def case_hole_between_tensors(folder: Path) -> Situation:
    header = {"a": entry(0, 4, 1), "b": entry(8, 12, 1)}
    return refused_shard(folder, file_bytes(header, bytes(12)), "'b'", "8 to 12", "ends at 4")


@hostile
def case_offsets_of_2_to_the_64(folder: Path) -> Situation:
    header = {"a": entry(0, 1 << 64, 1 << 62)}
    return refused_shard(folder, file_bytes(header, bytes(8)), "'a'", "out of range", AGAIN)


@hostile
def case_duplicate_keys_in_the_header(folder: Path) -> Situation:
    one = b'"twice":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return refused_shard(
        folder, file_bytes(b"{" + one + b"," + one + b"}", bytes(4)), "'twice'", "there twice"
    )


@hostile
def case_bad_json_in_the_header(folder: Path) -> Situation:
    return refused_shard(folder, file_bytes(b'{"a": {]}'), "not a valid safetensors file", AGAIN)


@hostile
def case_header_not_utf_8(folder: Path) -> Situation:
    header = b'{"\xff\xfe":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return refused_shard(folder, file_bytes(header, bytes(4)), "utf-8", AGAIN)


@hostile
def case_header_is_a_list(folder: Path) -> Situation:
    return refused_shard(folder, file_bytes(b"[1, 2]  "), "not a JSON object", AGAIN)


@hostile
def case_header_begins_with_a_byte_order_mark(folder: Path) -> Situation:
    header = '\ufeff{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode()
    return refused_shard(folder, file_bytes(header, bytes(4)), "not a valid safetensors file")


@hostile
def case_header_is_text(folder: Path) -> Situation:
    return refused_shard(folder, file_bytes(b'"a model"'), "not a JSON object", AGAIN)


@hostile
def case_deeply_nested_header(folder: Path) -> Situation:
    header = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    return refused_shard(folder, file_bytes(header), "nested deeper", AGAIN)


@hostile
def case_shape_whose_product_overflows(folder: Path) -> Situation:
    # The product is 2**64 * 4 + 4 bytes: in 64 bits, and in 32, it seems to be 4.
    header = {"a": entry(0, 4, (1 << 64) + 1)}
    return refused_shard(folder, file_bytes(header, bytes(4)), "'a'", "out of range", AGAIN)


@hostile
def case_shape_whose_product_wraps_to_the_size(folder: Path) -> Situation:
    header = {"a": entry(0, 0, 1 << 32, 1 << 32)}
    return refused_shard(folder, file_bytes(header), "'a'", "out of range", AGAIN)


@hostile
def case_negative_dimensions(folder: Path) -> Situation:
    header = {"a": entry(0, 16, -2, -2)}
    return refused_shard(folder, file_bytes(header, bytes(16)), "'a'", "out of range", AGAIN)


@hostile
def case_fractional_dimensions(folder: Path) -> Situation:
    header = {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}
    return refused_shard(folder, file_bytes(header, bytes(4)), "'a'", "whole numbers", AGAIN)


@hostile
def case_true_as_a_dimension(folder: Path) -> Situation:
    header = {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}
    return refused_shard(folder, file_bytes(header, bytes(4)), "'a'", "whole numbers", AGAIN)


@hostile
def case_unknown_dtype(folder: Path) -> Situation:
    header = {"a": entry(0, 4, 1, dtype="F33")}
    return refused_shard(folder, file_bytes(header, bytes(4)), "'a'", "dtype", "F33", AGAIN)


@hostile
def case_size_that_is_not_the_dtypes(folder: Path) -> Situation:
    header = {"a": entry(0, 6, 2)}
    return refused_shard(folder, file_bytes(header, bytes(6)), "'a'", "6 bytes", "F32", "8")


@hostile
def case_half_a_byte(folder: Path) -> Situation:
    header = {"a": entry(0, 2, 3, dtype="F4")}
    return refused_shard(folder, file_bytes(header, bytes(2)), "'a'", "F4", "not whole bytes")


@hostile
def case_tensor_without_offsets(folder: Path) -> Situation:
    header = {"a": {"dtype": "F32", "shape": [1]}}
    return refused_shard(folder, file_bytes(header, bytes(4)), "'a'", "data_offsets", AGAIN)


@hostile
def case_metadata_that_is_no_text(folder: Path) -> Situation:
    header = {"__metadata__": {"step": 7}, "a": entry(0, 4, 1)}
    return refused_shard(folder, file_bytes(header, bytes(4)), "__metadata__", "step", AGAIN)
