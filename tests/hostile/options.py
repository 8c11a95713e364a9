"""Options of the command line that are wrong; the rest of the merge is healthy."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.situation import Situation, hostile, save_family


def refused_options(folder: Path, options: tuple[str, ...], *words: str) -> Situation:
    return save_family(folder).refused(*words, options=options)


@hostile
def case_memory_that_is_no_size(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", "12 parsecs"), "--memory", "12 parsecs", "256MiB")


@hostile
def case_memory_empty(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", ""), "--memory", "256MiB")


@hostile
def case_memory_of_half_a_unit(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", "5i"), "--memory", "'5i'", "256MiB")


@hostile
def case_memory_too_small(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", "1MiB"), "--memory", "1,048,576", "32 MiB")


@hostile
def case_memory_negative(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", "-1GiB"), "--memory", "-1GiB")


@hostile
def case_memory_of_five_hundred_digits(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", "9" * 500 + "TiB"), "--memory")


@hostile
def case_memory_in_other_digits(folder: Path) -> Situation:
    return refused_options(folder, ("--memory", "\u0665\u0660 GB"), "--memory", "256MiB")


@hostile
def case_gpu_memory_too_small(folder: Path) -> Situation:
    return refused_options(folder, ("--gpu-memory", "1MiB"), "--gpu-memory", "64 MiB")


@hostile
def case_gpu_memory_of_no_gpu(folder: Path) -> Situation:
    return refused_options(
        folder, ("--gpu-memory", "1GiB", "--device", "cpu"), "--gpu-memory", "leave it out"
    )


@hostile
def case_no_threads(folder: Path) -> Situation:
    return refused_options(folder, ("--threads", "0"), "--threads", "1 to 1024")


@hostile
def case_a_million_threads(folder: Path) -> Situation:
    return refused_options(folder, ("--threads", "1000000"), "--threads", "1 to 1024")


@hostile
def case_threads_that_are_no_number(folder: Path) -> Situation:
    return refused_options(folder, ("--threads", "all"), "--threads", "'all'")


@hostile
def case_negative_workers(folder: Path) -> Situation:
    return refused_options(folder, ("--workers", "-2"), "--workers", "-2", "1 to 1024")


@hostile
def case_seed_negative(folder: Path) -> Situation:
    return refused_options(folder, ("--seed", "-1"), "seed", "-1")


@hostile
def case_shards_of_no_bytes(folder: Path) -> Situation:
    return refused_options(folder, ("--shard-size", "0"), "--shard-size", "1 byte")


@hostile
def case_engine_that_is_not_there(folder: Path) -> Situation:
    return refused_options(folder, ("--engine", "warp"), "--engine", "warp", "local")


@hostile
def case_option_that_is_not_there(folder: Path) -> Situation:
    return refused_options(folder, ("--memroy", "1GiB"), "--memroy", "--memory")
