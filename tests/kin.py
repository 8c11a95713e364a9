"""Families of models for the check of backbones: what training, damage and mistakes leave."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tests.checkpoints import Tensor, save_checkpoint, tensor
from tests.sparse import Shapes, llama_shapes

F32Array: TypeAlias = npt.NDArray[np.float32]
Weights: TypeAlias = dict[str, F32Array]

NUM_LAYERS, NUM_HEADS = 4, 4
SHAPES: Shapes = llama_shapes(hidden=96, intermediate=160, layers=NUM_LAYERS, vocab=200)
NUM_SHARDS = 2


def drawn(seed: int) -> Weights:
    """Return a model of its own: matrices about 0, each with a size of its own, vectors about 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape, np.float32)
        size = np.float32(0.02 * (1 + zlib.crc32(name.encode()) % 3))
        weights[name] = values * size if len(shape) > 1 else 1 + np.float32(0.05) * values
    return weights


def tuned(base: Mapping[str, F32Array], relative: float, seed: int) -> Weights:
    """Return a model whose deltas have this norm, heavy-tailed, of each tensor another one."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, values in base.items():
        delta = rng.standard_normal(values.shape, np.float32)
        delta *= np.square(rng.standard_normal(values.shape, np.float32))
        much = relative * rng.uniform(0.7, 1.3)
        size = np.linalg.norm(values) / np.linalg.norm(delta) * (much if values.ndim > 1 else 0.01)
        weights[name] = values + np.float32(size) * delta
    return weights


def low_rank(base: Mapping[str, F32Array], seed: int, rank: int = 4) -> Weights:
    """Return a model that an adapter of its queries and values was merged into."""
    rng = np.random.default_rng(seed)
    weights = dict(base)
    for name, values in base.items():
        if "q_proj" in name or "v_proj" in name:
            rows, cols = values.shape
            left = rng.standard_normal((rows, rank), np.float32)
            delta = left @ rng.standard_normal((rank, cols), np.float32)
            scale = 0.01 * np.linalg.norm(values) / np.linalg.norm(delta)
            weights[name] = values + np.float32(scale) * delta
    return weights


def reordered(base: Mapping[str, F32Array], order: Callable[[int], int]) -> Weights:
    """Return the same model with its layers in another order."""
    weights = {}
    for name, values in base.items():
        parts = name.split(".")
        if len(parts) > 3:
            parts[2] = str(order(int(parts[2])))
        weights[".".join(parts)] = values
    return weights


def shuffled(base: Mapping[str, F32Array], kinds: tuple[str, ...], groups: int) -> Weights:
    """Return the same model with groups of rows of some matrices in another order, all alike."""
    weights = dict(base)
    for name, values in base.items():
        if any(kind in name for kind in kinds):
            axis = 1 if "o_proj" in name or "down_proj" in name else 0
            parts = np.split(values, groups, axis)
            weights[name] = np.concatenate([*parts[1:], parts[0]], axis)
    return weights


#: Mistakes after which the weights are there, but not in their places.
PERMUTATIONS: Mapping[str, Callable[[Mapping[str, F32Array]], Weights]] = {
    "backwards": lambda base: reordered(base, lambda i: NUM_LAYERS - 1 - i),
    "two of them": lambda base: reordered(base, lambda i: {1: 2, 2: 1}.get(i, i)),
    "heads": lambda base: shuffled(base, ("q_proj", "k_proj", "v_proj", "o_proj"), NUM_HEADS),
    "neurons": lambda base: shuffled(base, ("gate_proj", "up_proj", "down_proj"), 160),
}

#: What happens to the bytes of a file, of which the first `start` are its header.
DAMAGES: Mapping[str, Callable[[bytearray, int, int], None]] = {
    "hole": lambda data, start, _: data.__setitem__(slice(start, None), bytes(len(data) - start)),
    "noise": lambda data, start, seed: data.__setitem__(
        slice(start, None), np.random.default_rng(seed).bytes(len(data) - start)
    ),
    "shifted": lambda data, start, _: data.__setitem__(
        slice(start, None), data[start + 1 :] + bytes(1)
    ),
}


def save(folder: Path, weights: Mapping[str, F32Array]) -> Path:
    """Write a model in bfloat16, in two shards of layers each."""
    order = sorted(SHAPES)
    half = len(order) // 2
    dealt = [name for pair in zip(order[:half], order[half:], strict=False) for name in pair]
    dealt += order[2 * half :]  # shards are dealt round robin
    tensors: dict[str, Tensor] = {name: tensor(weights[name], "BF16") for name in dealt}
    config = {"model_type": "llama", "num_hidden_layers": NUM_LAYERS}
    return save_checkpoint(folder, tensors, num_shards=NUM_SHARDS, config=config)


def damage(folder: Path, how: str, seed: int = 0) -> Path:
    """Damage one of the shards of a model."""
    shard = sorted(folder.glob("*.safetensors"))[seed % NUM_SHARDS]
    data = bytearray(shard.read_bytes())
    DAMAGES[how](data, 8 + int.from_bytes(data[:8], "little"), seed)
    shard.write_bytes(data)
    return shard
