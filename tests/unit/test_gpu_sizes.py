"""Device memory as a number known before the run: chunks, shares, the plan, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from della_dist import RunOptions, plan
from della_dist.errors import ConfigError, RunError
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.gpu.sizes import NUM_LANES, chunk_size, device_bytes, is_large, shares
from della_dist.ops.prepare import Ready, prepare
from della_dist.ops.tensor import slice_block
from della_dist.report.plan import plan_lines
from della_dist.runtime import budget
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.rows import row_view
from tests.checkpoints import tensor
from tests.every_method import config_of
from tests.merging import run, save_family
from tests.tensors import DTYPES, RULES, angles_recipe, family, recipe_of, scored_recipe

MIB = 1 << 20


@st.composite
def recipes(draw: st.DrawFn) -> TensorRecipe:
    shape = tuple(draw(st.lists(st.integers(0, 3000), max_size=3)))
    experts = tuple(draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=9)))
    kinds: dict[str, Any] = {"base": draw(st.sampled_from([None, *DTYPES])), "out": "BF16"}
    if draw(st.booleans()):
        rule, by_row = draw(st.sampled_from(RULES))
        experts = experts[:2] if rule in ("slerp", "nuslerp") else experts
        return angles_recipe(shape, rule, experts=experts, by_row=by_row, **kinds)
    if draw(st.booleans()):
        how = {"elect": True, "normalize": True, "by_energy": True, "density": 0.3}
        return scored_recipe(shape, "variance", experts=experts, **how, **kinds)
    granularity = draw(st.sampled_from(["row", "tensor"]))
    return recipe_of(shape, experts=experts, granularity=granularity, **kinds)


@given(recipes(), st.integers(0, 1 << 26), st.integers(1, 1 << 38), st.integers(0, 1 << 34))
def test_chunks_fit_into_half(
    recipe: TensorRecipe, block_elements: int, device: int, host: int
) -> None:
    has = shares(device, host)
    size, needs = chunk_size(recipe, block_elements, has), device_bytes(recipe, block_elements, has)
    view = row_view(recipe)
    whole = min(max(block_elements, 1), max(view.num_elements, 1))
    assert 0 < size.elements <= whole
    assert size.elements % view.unit == 0 or size.elements == whole or whole < view.unit
    if not is_large(size, has):
        assert size.slot_need <= has.slot_bytes
        assert needs <= max(device // 2, 16 * NUM_LANES * has.slot_bytes)
    else:  # never more than one unit
        assert size.elements <= view.unit
        assert needs > size.computing + NUM_LANES * 2 * has.slot_bytes


def test_the_shares_of_a_large_gpu() -> None:
    """Slots are bounded by the host's part, or by what gains nothing."""
    of_default = shares(100 << 30, 256 * MIB)
    assert of_default.slot_bytes == 32 * MIB
    assert shares(100 << 30, 8 << 30).slot_bytes == 128 * MIB
    assert shares(512 * MIB, 8 << 30).slot_bytes == 8 * MIB


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rng = np.random.default_rng(0)
    base = {"model.layers.0.mlp.up_proj.weight": tensor(rng.normal(0, 1, (400, 500)), "BF16")}
    return config_of("della", *save_family(tmp_path_factory.mktemp("family"), base))


def on_torch(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let torch's CPU device stand for a GPU."""

    def choose(device: str, memory: Any, gpu_memory: int | None = None) -> TorchBackend:
        host_memory = memory.block_mem // 4
        return TorchBackend("cpu", gpu_memory=gpu_memory, host_memory=host_memory)

    monkeypatch.setattr(module, "choose_backend", choose)


def test_the_plan_says_it(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without = plan(config, options=RunOptions(device="cpu"))
    assert (without.projected_device_mem, without.allowed_device_mem) == (0, 0)
    assert not any("device memory" in line for line in plan_lines(without))
    on_torch(monkeypatch, budget)
    planned = plan(config, options=RunOptions(gpu_memory="1GiB"))  # type: ignore[arg-type]
    assert 0 < planned.projected_device_mem <= 512 * MIB
    content = planned.to_dict()
    assert content["allowed_device_mem"] == 1 << 30
    assert content["projected_device_mem"] == planned.projected_device_mem
    (line,) = (line for line in plan_lines(planned) if line.startswith("gpu"))
    assert line.endswith(" of projected device memory, 1.0 GiB allowed")


def test_what_does_not_fit_is_refused(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_torch(monkeypatch, budget)
    whole = replace(config, granularity="tensor")
    words = r"--gpu-memory is 64 MiB, and merging model\.layers.*up_proj.* takes \d+ MiB of the GPU"
    options = RunOptions(gpu_memory=64 * MIB)
    assert plan(config, options=options).projected_device_mem <= 64 * MIB
    with pytest.raises(ConfigError, match=words):
        plan(whole, options=options)
    with pytest.raises(ConfigError, match=words):
        run(whole, tmp_path / "out", device="auto", gpu_memory=64 * MIB)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "numbers"), [((400, 500), 500 * 500 * 4), ((100, 5000), 3 * 100 * 5000)]
)
def test_matrices_that_do_not_fit_are_said(
    shape: tuple[int, int], numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each expert a square, and the inverse; or the deltas of all, where they are few rows."""
    on_torch(monkeypatch, budget)
    base = {"mlp.up_proj.weight": tensor(np.random.default_rng(0).normal(0, 1, shape), "BF16")}
    wudi = config_of("wudi", *save_family(tmp_path, base))
    little, enough = (plan(wudi, options=RunOptions(gpu_memory=n * MIB)) for n in (256, 512))
    said = "up_proj.weight is multiplied on the CPU, and so is what is as large"
    assert sum(said in note for note in little.notes) == 1
    assert not any("multiplied on the CPU" in note for note in enough.notes)
    assert enough.projected_device_mem >= little.projected_device_mem + 8 * numbers
    without = plan(wudi, options=RunOptions(device="cpu"))
    assert not any("multiplied on the CPU" in note for note in without.notes)


def test_options() -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory \(--gpu-memory\) is .* at least 64 MiB"):
        RunOptions(gpu_memory=MIB)
    with pytest.raises(ConfigError, match="--gpu-memory is for GPUs"):
        RunOptions(gpu_memory=64 * MIB, device="cpu")


def test_memory_that_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, say: one error, after which the backend works."""
    recipe = recipe_of((3, 7))
    base, experts = family(recipe, 0)
    backend, block = TorchBackend(), slice_block(recipe, base, experts, 0, 21)
    prepared, out = prepare(recipe), np.zeros(84, np.uint8)
    assert isinstance(prepared, Ready)

    def used_up(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr("della_dist.ops.gpu.backend.merge_chunk", used_up)
        with pytest.raises(RunError, match=r"memory of the GPU is used up \(CUDA out of memory\)"):
            backend.merge(recipe, prepared, block, out)
    backend.merge(recipe, prepared, block, out)
    assert out.any()


def test_memory_that_is_used_up_by_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    products = TorchBackend().products("model.w")

    def used_up(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    words = r"tensor model\.w: the memory of the GPU is used up"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", used_up)
        with pytest.raises(RunError, match=words):
            products.zeros(3)
        patch.setattr(torch, "empty", used_up)
        with pytest.raises(RunError, match=words):
            products.hold(np.eye(3))
    assert np.array_equal(products.fetch(products.zeros(3)), np.zeros((3, 3)))
