"""Checkpoints whose files do not add up: indexes that lie, shards that are missing or no files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints import save_file
from tests.hostile.situation import (
    NORM,
    UP,
    Family,
    Situation,
    healthy_tensors,
    hostile,
    save_family,
)

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"
LAST = "model-00003-of-00003.safetensors"


def sharded(folder: Path) -> tuple[Family, Path]:
    """Return a family in three shards, and the second expert."""
    family = save_family(folder, num_shards=3)
    return family, family.experts[1]


def refused_index(folder: Path, text: str | bytes, *words: str) -> Situation:
    family, expert = sharded(folder)
    (expert / INDEX).write_bytes(text.encode() if isinstance(text, str) else text)
    return family.refused(str(expert / INDEX), *words)


def refused_map(folder: Path, change: Callable[[dict[str, Any]], object], *words: str) -> Situation:
    """Change the map of tensors to shards."""
    family, expert = sharded(folder)
    index = json.loads((expert / INDEX).read_text())
    change(index["weight_map"])
    (expert / INDEX).write_text(json.dumps(index))
    return family.refused(str(expert), *words)


@hostile
def case_index_points_above_the_checkpoint(folder: Path) -> Situation:
    outside = "../base/" + FIRST
    return refused_map(folder, lambda m: m.update({UP: outside}), outside, INDEX, "trust")


@hostile
def case_index_points_to_an_absolute_path(folder: Path) -> Situation:
    outside = str(folder / "base" / FIRST)
    return refused_map(folder, lambda m: m.update({UP: outside}), outside, INDEX, "trust")


@hostile
def case_index_points_to_a_name_with_nul(folder: Path) -> Situation:
    return refused_map(folder, lambda m: m.update({UP: "a\0.safetensors"}), "a\\x00", INDEX)


@hostile
def case_index_points_to_another_kind_of_file(folder: Path) -> Situation:
    return refused_map(folder, lambda m: m.update({UP: "config.json"}), "config.json", "Convert")


@hostile
def case_index_points_to_no_text(folder: Path) -> Situation:
    return refused_map(folder, lambda m: m.update({UP: 7}), UP, "no string", "again")


@hostile
def case_index_without_tensors(folder: Path) -> Situation:
    return refused_map(folder, lambda m: m.clear(), INDEX, "names no tensors", "again")


@hostile
def case_index_names_a_tensor_that_no_shard_has(folder: Path) -> Situation:
    return refused_map(folder, lambda m: m.update(ghost=FIRST), "ghost", FIRST, "again")


@hostile
def case_index_forgets_a_tensor(folder: Path) -> Situation:
    return refused_map(folder, lambda m: m.pop(NORM), NORM, "does not know", "again")


@hostile
def case_index_places_a_tensor_wrongly(folder: Path) -> Situation:
    def swap(weight_map: dict[str, Any]) -> None:
        assert weight_map[UP] == SECOND
        weight_map[UP] = FIRST

    return refused_map(folder, swap, UP, FIRST, SECOND, "again")


@hostile
def case_index_is_a_list(folder: Path) -> Situation:
    return refused_index(folder, "[1]", "not a JSON object", "again")


@hostile
def case_index_without_weight_map(folder: Path) -> Situation:
    return refused_index(folder, "{}", "weight_map", "again")


@hostile
def case_index_is_no_json(folder: Path) -> Situation:
    return refused_index(folder, '{"weight_map": {', "not a valid index", "again")


@hostile
def case_index_is_binary(folder: Path) -> Situation:
    return refused_index(folder, b"\x80\x04\x95\xff", "not a valid index", "again")


@hostile
def case_index_with_a_name_twice(folder: Path) -> Situation:
    text = f'{{"weight_map": {{"{UP}": "{FIRST}", "{UP}": "{SECOND}"}}}}'
    return refused_index(folder, text, UP, "there twice", "again")


@hostile
def case_index_nested_without_end(folder: Path) -> Situation:
    return refused_index(folder, '{"weight_map":' + "[" * 100_000, "not a valid index")


@hostile
def case_index_is_a_fifo(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / INDEX).unlink()
    os.mkfifo(expert / INDEX)
    return family.refused(str(expert / INDEX), "not a regular file")


@hostile
def case_missing_shard(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / LAST).unlink()
    return family.refused(str(expert / LAST), "missing", "ownload")


@hostile
def case_missing_shard_without_index(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / LAST).unlink()
    (expert / INDEX).unlink()
    return family.refused(str(expert), LAST, "2 of 3", "ownload")


@hostile
def case_same_tensor_in_two_shards(folder: Path) -> Situation:
    family, expert = sharded(folder)
    shutil.copy(expert / FIRST, expert / LAST)
    return family.refused(str(expert), FIRST, LAST, "both in")


@hostile
def case_two_checkpoints_in_one_directory(folder: Path) -> Situation:
    family, expert = sharded(folder)
    save_file(expert / "model.safetensors", healthy_tensors())
    return family.refused(str(expert), INDEX, "model.safetensors", "two")


@hostile
def case_two_files_without_index(folder: Path) -> Situation:
    family = save_family(folder)
    save_file(family.base / "other.safetensors", healthy_tensors())
    (family.base / "model.safetensors").rename(family.base / "one.safetensors")
    return family.refused(str(family.base), "one.safetensors", "other.safetensors")


@hostile
def case_shard_is_a_directory(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / SECOND).unlink()
    (expert / SECOND).mkdir()
    return family.refused(str(expert / SECOND), "is a directory")


@hostile
def case_shard_is_a_fifo(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / SECOND).unlink()
    os.mkfifo(expert / SECOND)
    return family.refused(str(expert / SECOND), "not a regular file")


@hostile
def case_only_shard_is_a_fifo(folder: Path) -> Situation:
    family = save_family(folder)
    shard = family.base / "model.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    return family.refused(str(shard), "not a regular file")


@hostile
def case_shard_is_a_link_out_of_the_checkpoint(folder: Path) -> Situation:
    family, expert = sharded(folder)
    target = folder / "elsewhere.safetensors"
    (expert / SECOND).rename(target)
    (expert / SECOND).symlink_to(target)
    return family.refused(str(expert / SECOND), str(target), "outside")


@hostile
def case_shard_is_a_link_to_nothing(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / SECOND).unlink()
    (expert / SECOND).symlink_to(expert / "gone")
    return family.refused(str(expert / SECOND), "leads to nothing")


@hostile
def case_shard_is_a_link_to_itself(folder: Path) -> Situation:
    family, expert = sharded(folder)
    (expert / SECOND).unlink()
    (expert / SECOND).symlink_to(SECOND)
    return family.refused(str(expert / SECOND), "leads to nothing")


@hostile
def case_safetensors_with_the_name_of_a_pickle(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "model.safetensors").rename(family.base / "pytorch_model.bin")
    return family.refused(str(family.base / "pytorch_model.bin"), "no file of torch.save")


@hostile
def case_adapter_instead_of_a_model(folder: Path) -> Situation:
    family = save_family(folder)
    expert = family.experts[0]
    (expert / "model.safetensors").rename(expert / "adapter_model.safetensors")
    (expert / "config.json").rename(expert / "adapter_config.json")
    return family.refused(str(expert), "peft_type", "save_pretrained")


@hostile
def case_empty_directory(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.experts[0])
    family.experts[0].mkdir()
    return family.refused(str(family.experts[0]), "no safetensors files")


@hostile
def case_missing_directory(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.experts[0])
    return family.refused(str(family.experts[0]), "does not exist", "Check")


@hostile
def case_several_missing_directories(folder: Path) -> Situation:
    family = save_family(folder)
    for path in family.experts:
        shutil.rmtree(path)
    said = f"2 problems. (1) checkpoint {family.experts[0]} does not exist. (2) checkpoint"
    return family.refused(said, f"{family.experts[1]} does not exist. Check the path")


@hostile
def case_checkpoint_is_a_file(folder: Path) -> Situation:
    family = save_family(folder)
    file = family.experts[0] / "model.safetensors"
    family.configure(experts=[file, family.experts[1]])
    return family.refused(str(file), "not a directory", "Give the directory")


@hostile
def case_checkpoint_is_a_hub_name(folder: Path) -> Situation:
    family = save_family(folder)
    family.configure(experts=["acme-ai/llama-9", family.experts[1]])
    return family.refused("acme-ai/llama-9", "hf download")


@hostile
def case_checkpoint_without_tensors(folder: Path) -> Situation:
    family = save_family(folder, base={})
    return family.refused(str(family.base), "no tensors")
