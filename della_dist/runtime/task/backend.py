"""Choose the backend for a device, without importing torch where there is no GPU."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np

from della_dist.errors import ConfigError
from della_dist.ops.blocks import Backend
from della_dist.ops.tensor import load_backend, merge_tensor
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.options import Device
from della_dist.specs.dtypes import itemsize
from della_dist.specs.recipe import of_deltas
from della_dist.specs.sources import Balanced, Factor, Merged

#: Part of the memory for blocks that goes to buffers between host and GPU: one of so many.
STAGING_SHARE = 4


def choose_backend(device: Device, memory: MemoryBudget, gpu_memory: int | None = None) -> Backend:
    """Return the backend that merges on `device`.

    ``auto`` is CUDA where the machine has an NVIDIA device and torch can use it, else the CPU.

    Parameters
    ----------
    device
        Where tensors are merged.
    memory
        Of the host, of which a backend for a GPU takes a part.
    gpu_memory
        Bytes that may be used of a GPU; None: a share of what is free there.

    Raises
    ------
    ConfigError
        If CUDA is asked for and torch is not installed or finds no device, or if Numba is told not
        to compile.
    """
    if device == "cpu" or (device == "auto" and not _has_nvidia_device()):
        return _numba()
    if importlib.util.find_spec("torch") is None:
        if device == "auto":
            return _numba()
        raise ConfigError(
            "--device cuda needs torch, which is not installed: pip install 'della-dist[torch]'."
        )
    import torch

    if torch.cuda.is_available():
        from della_dist.ops.gpu.backend import TorchBackend

        host_memory = memory.block_mem // STAGING_SHARE
        return TorchBackend("cuda", gpu_memory=gpu_memory, host_memory=host_memory)
    if device == "auto":
        return _numba()
    raise ConfigError(
        "--device cuda: torch finds no CUDA device here. Use --device cpu, or check the driver."
    )


def with_backend(memory: MemoryBudget, backend: Backend) -> MemoryBudget:
    """Return the budget with what a backend takes of it, and has beside."""
    return replace(
        memory,
        staging_mem=backend.staging_bytes,
        device_mem=backend.device_memory,
        max_block_elements=backend.block_elements,
    )


def warm_up(backend: Backend, plan: MergePlan) -> None:
    """Merge one made-up element, so that kernels are loaded (or compiled) and devices awake.

    Done by the main thread before any other merges: Numba loads kernels under a lock, and a third
    faster on the main thread.
    """
    for shard in plan.shards:
        for tensor in shard.tensors:
            source = plan.source(tensor)
            if isinstance(source, Balanced):
                source = source.of
            if isinstance(source, Factor):
                source = replace(source.of, recipe=of_deltas(source.of.recipe))
            if isinstance(source, Merged):
                recipe = replace(source.recipe, shape=(1,))
                base, *experts = (
                    np.zeros(itemsize(dtype), np.uint8)
                    for dtype in (recipe.base_dtype or "F32", *recipe.expert_dtypes)
                )
                merge_tensor(
                    recipe, None if recipe.base_dtype is None else base, experts, backend=backend
                )
                return


def _has_nvidia_device() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _numba() -> Backend:
    try:
        return load_backend("numba")
    except ValueError as error:
        raise ConfigError(f"merging on the CPU: {error}. Unset it.") from error
