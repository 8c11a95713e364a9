"""Tensors whose values cannot be merged: known only when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import Tensor, tensor, values_of
from tests.hostile.situation import (
    DOWN,
    EMBED,
    NORM,
    STEPS,
    UP,
    Family,
    Situation,
    healthy_tensors,
    hostile_data,
    save_family,
)


def spoiled(name: str, value: float, *, at: int = -1, count: int = 1) -> dict[str, Tensor]:
    """Return the tensor `name` with `value` at `count` places from `at` on."""
    healthy = healthy_tensors()[name]
    values = values_of(healthy).reshape(-1).copy()
    values[np.arange(at, at + count) % values.size] = value
    with np.errstate(over="ignore"):
        return {name: tensor(values.reshape(healthy.shape), healthy.dtype)}


def sharded_output(family: Family) -> dict[str, Any]:
    """Make the merge write a shard a tensor: by then, others are committed."""
    return {"options": ("--shard-size", "1", "--workers", "1")}


@hostile_data
def case_nan_in_a_bf16_expert(folder: Path) -> Situation:
    # NORM is F16, and its natural place is the last: everything else is merged by then.
    family = save_family(folder, expert1=spoiled(UP, np.nan))
    return family.refused(UP, str(family.experts[1]), "1 of the deltas", "NaN", "on_nonfinite")


@hostile_data
def case_nan_in_an_f32_expert(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(DOWN, np.nan, at=3, count=2))
    return family.refused(DOWN, str(family.experts[1]), "2 of the deltas", "NaN", "on_nonfinite")


@hostile_data
def case_infinity_in_a_bf16_expert(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(EMBED, -np.inf, at=0))
    return family.refused(EMBED, str(family.experts[1]), "infinite", "on_nonfinite")


@hostile_data
def case_infinity_in_an_f16_expert(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(NORM, np.inf))
    return family.refused(NORM, str(family.experts[1]), "infinite", "on_nonfinite")


@hostile_data
def case_nan_in_the_first_of_several_shards(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled("lm_head.weight", np.nan, at=0), num_shards=3)
    words = ("lm_head.weight", str(family.experts[1]), "NaN")
    return family.refused(*words, **sharded_output(family))


@hostile_data
def case_nan_in_the_last_of_several_shards(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(NORM, np.nan), num_shards=3)
    return family.refused(NORM, str(family.experts[1]), "NaN", **sharded_output(family))


@hostile_data
def case_nan_with_two_workers(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(NORM, np.nan))
    options = ("--shard-size", "1", "--workers", "2", "--threads", "2")
    return family.refused(NORM, str(family.experts[1]), "NaN", options=options)


@hostile_data
def case_nan_in_the_base(folder: Path) -> Situation:
    family = save_family(folder)
    from tests.checkpoints import save_file

    save_file(family.base / "model.safetensors", {**healthy_tensors(), **spoiled(UP, np.nan)})
    return family.refused(UP, "NaN", "its base", "on_nonfinite")


@hostile_data
def case_nan_where_ranks_are_of_whole_tensors(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(DOWN, np.nan))
    family.configure("granularity: tensor")
    return family.refused(DOWN, str(family.experts[1]), "NaN")


@hostile_data
def case_nan_that_a_measuring_pass_meets_first(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(DOWN, np.nan))
    text = family.config.read_text().replace("merge_method: della", "merge_method: ties")
    family.config.write_text(text)
    return family.refused(DOWN, str(family.experts[1]), "NaN")


@hostile_data
def case_nan_into_an_empty_directory_that_was_there(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(NORM, np.nan))
    family.out.mkdir()
    return family.refused(NORM, "NaN", **sharded_output(family))


@hostile_data
def case_nan_into_a_directory_whose_parents_are_missing(folder: Path) -> Situation:
    family = save_family(folder, expert1=spoiled(NORM, np.nan))
    return family.refused(NORM, "NaN", out=folder / "new" / "newer" / "out")


@hostile_data
def case_overflow_of_f16(folder: Path) -> Situation:
    huge = tensor(np.full((5, 7), 70_000.0), "F32")
    family = save_family(folder, base={DOWN: tensor(np.zeros((5, 7)), "F32")}, expert1={DOWN: huge})
    family.configure("out_dtype: float16")
    return family.refused(DOWN, "F16", "out_dtype: bfloat16")


@hostile_data
def case_overflow_of_bf16(folder: Path) -> Situation:
    huge = tensor(np.full((5, 7), 3.4e38), "F32")
    base = {DOWN: tensor(np.full((5, 7), 3e38), "F32")}
    family = save_family(folder, base=base, expert1={DOWN: huge})
    family.configure("out_dtype: bfloat16")
    return family.refused(DOWN, "BF16", "too large")


@hostile_data
def case_integers_differ(folder: Path) -> Situation:
    family = save_family(folder, expert1={STEPS: tensor(np.array([0, 1, 3]), "I64")})
    return family.refused(STEPS, "I64", str(family.experts[1]), str(family.base), "differs")


@hostile_data
def case_booleans_differ(folder: Path) -> Situation:
    mask = tensor(np.array([True, False]), "BOOL")
    other = {"mask": tensor(np.array([True, True]), "BOOL")}
    base = {**healthy_tensors(), "mask": mask}
    family = save_family(folder, base=base, expert1=other)
    return family.refused("mask", "BOOL", str(family.experts[1]), "differs")


@hostile_data
def case_packed_weights_differ(folder: Path) -> Situation:
    packed = tensor(np.arange(16) % 251, "U8")
    base = {**healthy_tensors(), "packed": packed}  # as no scheme that is known calls it
    other = {"packed": tensor(np.arange(16) % 7, "U8")}
    family = save_family(folder, base=base, expert1=other)
    return family.refused("packed", "U8", str(family.experts[1]), "quantised")
