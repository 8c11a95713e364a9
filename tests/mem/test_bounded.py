"""The memory of a merge is bounded whatever the size of the model or of one tensor.

Inputs are sparse files: their pages are mapped and counted like any others, but take no disk.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import della_dist
from della_dist import RunOptions
from della_dist.config.methods import METHODS
from tests.checkpoints import save_checkpoint, save_lora, tensor
from tests.sparse import (
    Shapes,
    link_checkpoint,
    llama_shapes,
    save_configuration,
    save_sparse,
    trillion_shapes,
)
from tests.torch_files import save_sparse_torch

MIB = 1 << 20
LIMIT_BYTES = 700 * MIB

SMALL = llama_shapes(hidden=1024, intermediate=2816, layers=16, vocab=16_000)
LARGE = llama_shapes(hidden=1536, intermediate=4224, layers=18, vocab=24_000)


def peak_of_merge(
    folder: Path, shapes: Shapes, method: str = "della", num_files_beside: int = 0
) -> int:
    base = save_sparse(folder / "base", shapes, num_shards=2)
    for number in range(num_files_beside):
        (base / f"{number}.npy").touch()
        os.truncate(base / f"{number}.npy", 64 * MIB)
    experts = [link_checkpoint(base, folder / f"expert{m}") for m in range(3)]
    config = save_configuration(folder / "merge.yaml", base, experts, method)
    command = [sys.executable, "-m", "della_dist", "merge", str(config), str(folder / "out")]
    done = subprocess.run(
        [*command, "--memory", "256MiB", "--json", "--quiet"],
        check=True,
        stdout=subprocess.PIPE,
    )
    summary = json.loads(done.stdout)
    for file in (folder / "out").iterdir():
        file.unlink()
    peak = summary["peak_rss_bytes"]
    assert isinstance(peak, int)
    return peak


@pytest.mark.slow
def test_peak_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small = peak_of_merge(tmp_path / "small", SMALL)  # 0.24 B parameters
    large = peak_of_merge(tmp_path / "large", LARGE)  # 0.61 B parameters
    assert small < LIMIT_BYTES
    assert large < LIMIT_BYTES
    # Threads seldom hold most at one moment, and on a busy machine less often in a short run. What
    # grew with the model would grow by 700 MiB an input.
    assert large < small + 64 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("method", ["della", "ties"])
def test_tensor_larger_than_the_budget(tmp_path: Path, method: str) -> None:
    shapes = {"huge": (1 << 15, 1 << 14)}  # 1 GiB in bf16
    assert peak_of_merge(tmp_path, shapes, method) < LIMIT_BYTES


@pytest.mark.slow
def test_files_beside_the_weights_are_streamed(tmp_path: Path) -> None:
    shapes = {"one": (64, 64), "two": (64, 64)}
    without = peak_of_merge(tmp_path / "without", shapes)
    beside = peak_of_merge(tmp_path / "with", shapes, num_files_beside=4)
    assert beside < without + 32 * MIB


def planned(config: Path, **options: Any) -> dict[str, Any]:
    """Return what a plan says, in this process."""
    return della_dist.plan(config, config.parent / "out", RunOptions(**options)).to_dict()


def merged(config: Path, **options: Any) -> dict[str, Any]:
    """Return the summary of a merge, in a process of its own, whose peak is to be known."""
    flags = {"memory_bytes": "--memory", "shard_bytes": "--shard-size", "threads": "--threads"}
    words = [f"{flags[name]}={value}" for name, value in options.items()]
    places = [str(config), str(config.parent / "out")]
    command = [sys.executable, "-m", "della_dist", "merge", *places, *words]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@functools.cache
def least_peak(**options: Any) -> int:
    """Return the peak of a merge of hardly anything, which gathers nothing of a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        base = save_sparse(Path(folder, "base"), {"one": (64, 64)})
        experts = [link_checkpoint(base, Path(folder, f"expert{m}")) for m in range(3)]
        config = save_configuration(Path(folder, "merge.yaml"), base, experts, "task_arithmetic")
        peak = merged(config, **options)["peak_rss_bytes"]
    assert isinstance(peak, int)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{}, {"rescale": "l1"}, {"granularity": "tensor"}])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_plan_says_of_every_method(
    tmp_path: Path, method: str, parameters: dict[str, str]
) -> None:
    """Memory and bytes are known before the run: at most as much, exactly as many."""
    drop = METHODS[method].drop
    is_rescaled = drop not in ("none", "importance", "variance", "threshold")
    if (parameters and not is_rescaled) or (drop != "magprune" and "granularity" in parameters):
        pytest.skip("has no effect")
    if METHODS[method].is_balanced and parameters:
        pytest.skip("takes what its matrices take")

    shapes: Shapes = {"one": (6144, 4096), "two": (4096, 6144), "three": (4096,)}
    if METHODS[method].is_balanced:  # matrices of its width for each expert
        width = 384 if METHODS[method].is_decomposed else 768
        shapes = {"one": (40_000, width), "two": (width, 640), "three": (4096,)}
    said, summary, used = planned_and_measured(tmp_path, method, parameters, shapes, 3)
    assert summary["bytes_read"] == said["bytes_to_read"]  # zeros need one selection pass
    assert summary["bytes_written"] >= said["bytes_to_write"]
    assert used <= said["projected_mem"]
    assert said["projected_mem"] < 96 * MIB or "granularity" in parameters


def planned_and_measured(
    folder: Path,
    method: str,
    parameters: dict[str, str],
    shapes: Shapes,
    num_experts: int,
    num_threads: int = 2,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return a plan, the summary of the merge, and how many bytes more it took than hardly any."""

    takes = METHODS[method]
    options: dict[str, Any] = {"memory_bytes": 96 * MIB, "threads": num_threads}

    def configuration(name: str, shapes: Shapes) -> Path:
        base = save_sparse(folder / name / "base", shapes)
        count = (takes.num_models or num_experts) - (takes.base_among == "first")
        experts = [link_checkpoint(base, folder / name / f"expert{m}") for m in range(count)]
        config = save_configuration(folder / name / "merge.yaml", base, experts, method)
        lines = config.read_text().splitlines()
        lines += [f"{key}: {value}" for key, value in parameters.items()]
        if method in ("slerp", "nearswap"):
            lines = [line.replace("density", "t") for line in lines]
        if not takes.has_base and takes.base_among is None:
            lines = [line for line in lines if not line.startswith("base_model")]
        config.write_text("\n".join(lines))
        return config

    # Compiling kernels would count, where they are not yet.
    few = {name: tuple(min(size, 64) for size in shape) for name, shape in shapes.items()}
    warm = configuration("warm", few)
    della_dist.merge(warm, folder / "warm" / "out", RunOptions(**options))
    config = configuration("large", shapes)
    said, summary = planned(config, **options), merged(config, **options)
    return said, summary, summary["peak_rss_bytes"] - least_peak(**options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "copy"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_files_of_torch_are_projected(tmp_path: Path, method: str, is_transposed: bool) -> None:
    """Storages are mapped like safetensors; transposed matrices are gathered in pieces."""

    def merge(name: str, method: str, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
        shapes = {"one": (rows, 4096), "two": (4096, rows), "three": (rows,)}
        base = save_sparse_torch(tmp_path / name / "base", shapes, is_transposed=is_transposed)
        experts = [link_checkpoint(base, tmp_path / name / f"expert{m}") for m in range(3)]
        config = save_configuration(tmp_path / name / "merge.yaml", base, experts, method)
        if method == "copy":
            config.write_text(f"merge_method: passthrough\nmodels: [{{model: {experts[0]}}}]\n")
        options = {"memory_bytes": 96 * MIB, "threads": 2}
        return planned(config, **options), merged(config, **options)

    _, small = merge("small", "task_arithmetic", 64)
    said, summary = merge("large", method, 6144)
    assert summary["bytes_read"] == said["bytes_to_read"]
    used = summary["peak_rss_bytes"] - small["peak_rss_bytes"]
    assert used <= said["projected_mem"]
    assert said["projected_mem"] < 96 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "num_threads"), [(8, 4), (30, 1), (30, 4)])
def test_what_is_gathered_for_many_experts_is_projected(
    tmp_path: Path, num_experts: int, num_threads: int
) -> None:
    shapes = {"one": (2048, 4096), "two": (4096,)}
    said, _, used = planned_and_measured(tmp_path, "ties", {}, shapes, num_experts, num_threads)
    assert 0.5 * said["projected_mem"] < used <= said["projected_mem"]


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", ["100kB", "5GB"])
def test_records_of_many_tensors_are_projected(tmp_path: Path, shard_size: str) -> None:
    """A plan knows what it takes itself, whether tensors are in many shards or in one."""

    def merge(name: str, num_tensors: int) -> tuple[int, int]:
        shapes = {
            f"model.layers.{i // 100}.mlp.experts.{i % 100}.gate_proj.weight": (8, 8)
            for i in range(num_tensors)
        }
        base = save_sparse(tmp_path / name / "base", shapes, num_shards=16)
        experts = [link_checkpoint(base, tmp_path / name / f"expert{m}") for m in range(3)]
        config = save_configuration(tmp_path / name / "merge.yaml", base, experts)
        projected = planned(config, shard_bytes=shard_size)["records_mem"]
        return merged(config, shard_bytes=shard_size)["peak_rss_bytes"], projected

    few_peak, few_projected = merge("few", 16)
    peak, projected = merge("many", 6_000)
    assert few_projected < MIB
    assert peak < few_peak + projected
    assert projected < 3 * (peak - few_peak)


@pytest.mark.slow
def test_plans_a_trillion_parameters_in_a_gigabyte(tmp_path: Path) -> None:
    base = save_sparse(tmp_path / "base", trillion_shapes(), num_shards=200)
    experts = [link_checkpoint(base, tmp_path / f"expert{m}") for m in range(8)]
    config = save_configuration(tmp_path / "merge.yaml", base, experts)
    code = (
        "import sys, della_dist.cli as c\n"
        "from della_dist.runtime.task.meter import peak_rss_bytes\n"
        "c.main(['plan', sys.argv[1], '--json'], standalone_mode=False)\n"
        "print(peak_rss_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], check=True, stdout=subprocess.PIPE
    )
    printed, peak = done.stdout.splitlines()
    described = json.loads(printed)
    assert described["num_tensors"] == 100_000
    assert described["num_parameters"] > 1e12
    assert int(peak) < 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("method", ["della", "ties"])
def test_rows_that_are_moved_are_projected(tmp_path: Path, method: str) -> None:
    """Every row of an embedding larger than the budget at another place in each model."""

    _, small = merge_others(tmp_path / "small", "task_arithmetic", 64, 4096)
    said, summary = merge_others(tmp_path / "large", method, 24_000, 4096)
    assert said["bytes_to_read"] == summary["bytes_read"]
    used = summary["peak_rss_bytes"] - small["peak_rss_bytes"]
    assert 0.1 * said["projected_mem"] < used <= said["projected_mem"]


@pytest.mark.slow
def test_large_vocabularies_are_projected(tmp_path: Path) -> None:
    _, small = merge_others(tmp_path / "small", "task_arithmetic", 100, 64)
    said, summary = merge_others(tmp_path / "large", "della", 128_000, 64)
    used = summary["peak_rss_bytes"] - small["peak_rss_bytes"]
    assert 0.1 * said["projected_mem"] < used <= said["projected_mem"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["della", "ties"])
def test_experts_put_together_are_projected(tmp_path: Path, method: str) -> None:
    """Of a tensor of the base larger than the budget, each expert has 64 matrices."""

    def merge(name: str, method: str, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
        prefix, norm = "model.layers.0.mlp.experts", {"model.norm.weight": (1024,)}
        fused: Shapes = {f"{prefix}.gate_up_proj": (32, 2 * rows, 1024), **norm}
        single: Shapes = norm | {
            f"{prefix}.{expert}.{part}_proj.weight": (rows, 1024)
            for expert in range(32)
            for part in ("gate", "up")
        }
        base = save_sparse(tmp_path / name / "base", fused)
        expert = save_sparse(tmp_path / name / "expert0", single)
        experts = [expert, link_checkpoint(expert, tmp_path / name / "expert1")]
        config = save_configuration(tmp_path / name / "merge.yaml", base, experts, method)
        options = {"memory_bytes": 96 * MIB, "threads": 2}
        return planned(config, **options), merged(config, **options)

    _, small = merge("small", "task_arithmetic", 2)
    said, summary = merge("large", method, 1024)
    assert said["bytes_to_read"] <= summary["bytes_read"] <= said["most_bytes_to_read"]
    used = summary["peak_rss_bytes"] - small["peak_rss_bytes"]
    assert 0.1 * said["projected_mem"] < used <= said["projected_mem"]


def merge_others(
    folder: Path, method: str, vocab: int, hidden: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan and merge four models, each with the tokens of the others at other numbers."""
    paths = []
    for m in range(4):
        shapes = {"model.embed_tokens.weight": (vocab + m, hidden), "norm": (hidden,)}
        paths.append(save_sparse(folder / f"model{m}", shapes))
        tokens = [f"t{i}" for i in range(vocab)]
        tokens = tokens[m:] + tokens[:m] if m else tokens
        tokens = tokens[:: -1 if m == 2 else 1] + [f"of{m}"] * (m > 0)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        document = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}}
        (paths[-1] / "tokenizer.json").write_text(json.dumps(document))
    config = save_configuration(folder / "merge.yaml", paths[0], paths[1:], method)
    config.write_text(config.read_text() + "\ntokenizer_source: union\n")
    return planned(config, memory_bytes=64 * MIB), merged(config, memory_bytes=64 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "rank", "is_dora"), [(64, 8, False), (3, 256, False), (2, 64, True)]
)
def test_adapters_are_projected(tmp_path: Path, count: int, rank: int, is_dora: bool) -> None:
    """64 on one base; of a high rank, whose factors count; DoRA, which reads the base again."""
    _, small = merge_adapters(tmp_path / "small", 64, 1, 4, is_dora)
    said, summary = merge_adapters(tmp_path / "large", 2048, count, rank, is_dora)
    assert said["bytes_to_read"] == summary["bytes_read"]
    used = summary["peak_rss_bytes"] - small["peak_rss_bytes"]
    assert 0.1 * said["projected_mem"] < used <= said["projected_mem"]


def merge_adapters(
    folder: Path, size: int, count: int, rank: int, is_dora: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan and merge adapters of a base of four square matrices."""
    base = save_sparse(folder / "base", {f"m{i}.weight": (size, size) for i in range(4)})
    models = []
    for m in range(count):
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(4):
            shapes[f"base_model.model.m{i}.lora_A.weight"] = (rank, size)
            shapes[f"base_model.model.m{i}.lora_B.weight"] = (size, rank)
            if is_dora:
                shapes[f"base_model.model.m{i}.lora_magnitude_vector"] = (size,)
        adapter = save_sparse(folder / f"adapter{m}", shapes)
        (adapter / "model-00001-of-00001.safetensors").rename(adapter / "adapter_model.safetensors")
        (adapter / "model.safetensors.index.json").unlink()
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_dora": is_dora}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        models.append(Path(f"{base}+{adapter}"))
    config = save_configuration(folder / "merge.yaml", base, models, "task_arithmetic")
    # Rows of zeros have no direction in which they could have a length.
    config.write_text(config.read_text() + "\non_nonfinite: zero\n")
    return planned(config, memory_bytes=64 * MIB), merged(config, memory_bytes=64 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "num_threads"), [(8, 1), (96, 4), (1400, 4)])
def test_factoring_is_projected(tmp_path: Path, rank: int, num_threads: int) -> None:
    """An adapter takes a basis and steps of each matrix; of most of its rank, the matrix."""
    shapes = {"layers.0.up_proj.weight": (2500, 2000)}
    if rank < 1000:
        shapes = {
            "layers.0.up_proj.weight": (5000, 3000),
            "layers.0.down_proj.weight": (3000, 5000),
            "embed_tokens.weight": (40_000, 512),
        }
    output = {"output": f"{{adapter: {rank}}}"}
    said, summary, used = planned_and_measured(
        tmp_path, "della", output, {**shapes, "norm.weight": (3000,)}, 2, num_threads
    )
    assert summary["bytes_read"] == said["bytes_to_read"]
    assert summary["bytes_written"] == said["bytes_to_write"]
    assert used <= said["projected_mem"]
    assert said["projected_mem"] < (512 if rank > 1000 else 160) * MIB


DECOMPOSED = [name for name, one in METHODS.items() if one.is_decomposed]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "shape", "num_threads", "num_tensors"),
    [
        (method, *numbers)
        for method in DECOMPOSED
        for numbers in [
            ((1000, 1000), 1, 1),
            ((8000, 400), 4, 1),
            ((500, 4000), 1, 1),
            ((2, 600, 800), 4, 1),
            ((800, 800), 2, 3),  # two at a time, each in a shard
        ]
    ]
    # Fewer rows, of all experts, than columns.
    + [("wudi", (300, 6000), 4, 1), ("wudi", (2, 600, 2000), 1, 1)],
)
def test_matrices_of_numbers_are_projected(
    tmp_path: Path, method: str, shape: tuple[int, ...], num_threads: int, num_tensors: int
) -> None:
    """Of numbers that are not zero: LAPACK uses the room that it takes, and so does an inverse."""

    def models(folder: Path, shape: tuple[int, ...]) -> list[Path]:
        rng = np.random.default_rng(0)
        base = rng.normal(0, 0.05, (num_tensors, *shape))
        paths = []
        for m in range(4):
            values = base + rng.normal(0, 0.003, base.shape) if m else base
            numbers = {f"w{number}": tensor(one, "BF16") for number, one in enumerate(values)}
            paths.append(save_checkpoint(folder / f"model{m}", numbers))
        return paths

    few = tuple(min(size, 24) for size in shape)
    how: dict[str, Any] = {"threads": num_threads, "shard_bytes": 2 * math.prod(shape)}
    said, used = numbers_merged(tmp_path, models, few, shape, method, **how)
    assert said["num_tasks"] == num_tensors
    assert 0.05 * said["projected_mem"] < used <= said["projected_mem"]


@pytest.mark.slow
def test_adapters_of_wudi_are_projected(tmp_path: Path) -> None:
    """Of low rank: nothing is as wide as the matrix."""

    def models(folder: Path, shape: tuple[int, ...]) -> list[Path]:
        (size, rank), rng = shape, np.random.default_rng(0)
        base = save_checkpoint(folder / "base", {"w.weight": tensor(np.ones((size, size)), "BF16")})
        found = [base]
        for m in range(3):
            a, b = rng.normal(0, 0.05, (rank, size)), rng.normal(0, 0.05, (size, rank))
            adapter = save_lora(folder / f"adapter{m}", {"w": (a, b)}, rank=rank, alpha=rank)
            found.append(Path(f"{base}+{adapter}"))
        return found

    how: dict[str, Any] = {"threads": 2, "memory_bytes": 256 * MIB}
    said, used = numbers_merged(tmp_path, models, (64, 2), (4000, 128), "wudi", **how)
    assert 0.2 * said["projected_mem"] < used <= said["projected_mem"]
    assert said["projected_mem"] < 256 * MIB < 8 * 4000**2 * 3


def numbers_merged(
    folder: Path,
    models: Callable[[Path, tuple[int, ...]], Sequence[Path]],
    few: tuple[int, ...],
    shape: tuple[int, ...],
    method: str,
    **how: Any,
) -> tuple[dict[str, Any], int]:
    """Return the plan of a merge of numbers, and how many bytes more it took than hardly any.

    Parameters
    ----------
    folder
        For all of it.
    models
        Writes a base and experts whose matrices have a shape.
    few, shape
        That of a first merge, which compiles kernels where they are not yet, and of the measured.
    method, how
        Of both, and options.
    """

    def configuration(name: str, shape: tuple[int, ...]) -> Path:
        base, *experts = models(folder / name, shape)
        config = save_configuration(folder / name / "merge.yaml", base, experts, method)
        if method == "wudi":
            config.write_text(config.read_text().replace("density: 0.5", "density: 1.0"))
        return config

    options = {"memory_bytes": 1 << 30, **how}
    warm = configuration("warm", few)
    della_dist.merge(warm, warm.parent / "out", RunOptions(**options))
    config = configuration("large", shape)
    said, summary = planned(config, **options), merged(config, **options)
    assert summary["bytes_read"] == said["bytes_to_read"]
    return said, summary["peak_rss_bytes"] - least_peak(**options)
