"""Small checkpoints for tests, written with the safetensors library."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors

_LIBRARY_NAMES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
_NUMPY_TYPES: dict[str, Any] = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """Its bytes."""
        return np.frombuffer(self.data, np.uint8)


def tensor(values: Any, dtype: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return `values` rounded to `dtype` (bf16 by nearest even)."""
    array = np.asarray(values)
    shape = array.shape if shape is None else shape
    if dtype == "BF16":
        bits = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return Tensor(dtype, shape, rounded.astype("<u2").tobytes())
    return Tensor(dtype, shape, array.astype(_NUMPY_TYPES[dtype]).tobytes())


def save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file."""
    arrays = {name: np.frombuffer(t.data, np.uint8) for name, t in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=_LIBRARY_NAMES[t.dtype],
            shape=list(t.shape),
            data_ptr=arrays[name].ctypes.data,
            data_len=arrays[name].nbytes,
        )
        for name, t in tensors.items()
    }
    safetensors.serialize_file(specs, str(path), {"format": "pt"})


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    num_shards: int = 1,
    order: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory, in one file or in shards dealt round robin with an index."""
    path.mkdir(parents=True)
    names = list(tensors if order is None else order)
    if num_shards == 1:
        save_file(path / "model.safetensors", {n: tensors[n] for n in names})
    else:
        weight_map = {}
        for i in range(num_shards):
            shard = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
            mine = names[i::num_shards]
            save_file(path / shard, {n: tensors[n] for n in mine})
            weight_map.update(dict.fromkeys(mine, shard))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def save_lora(
    path: Path, factors: Mapping[str, tuple[Any, Any]], rank: int, alpha: float, **config: Any
) -> Path:
    """Write an adapter of PEFT, in F32.

    Parameters
    ----------
    factors
        A and B by module, as the model calls it.
    rank, alpha, config
        What its configuration says.
    """
    path.mkdir(parents=True)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor(matrix, "F32")
        for module, pair in factors.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    save_file(path / "adapter_model.safetensors", tensors)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint directory with the safetensors library."""
    library_to_ours = {v: k for k, v in _LIBRARY_NAMES.items()} | {k: k for k in _LIBRARY_NAMES}
    loaded = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, content in safetensors.deserialize(file.read_bytes()):
            dtype = library_to_ours[content["dtype"]]
            loaded[name] = Tensor(dtype, tuple(content["shape"]), bytes(content["data"]))
    return loaded


def make_experts(
    base: Mapping[str, Tensor], num_experts: int, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return experts that differ from `base` by deltas with ties, zeros and a heavy tail."""
    rng = np.random.default_rng(seed)
    experts = []
    for _ in range(num_experts):
        expert = {}
        for name, t in base.items():
            if t.dtype not in ("F16", "BF16", "F32", "F64"):
                expert[name] = t
                continue
            values = values_of(t)
            delta = rng.standard_t(3, t.shape) * 2e-3
            # Exact zeros, on top of the deltas that rounding makes zero.
            delta = np.where(rng.random(t.shape) < 0.2, 0.0, delta)
            expert[name] = tensor(values + delta, t.dtype, t.shape)
        experts.append(expert)
    return experts


def values_of(t: Tensor) -> npt.NDArray[np.float64]:
    """Return the values of a floating-point tensor."""
    if t.dtype == "BF16":
        bits = np.frombuffer(t.data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(t.shape)
    return np.frombuffer(t.data, _NUMPY_TYPES[t.dtype]).astype(np.float64).reshape(t.shape)


def mixed_base(seed: int = 0) -> dict[str, Tensor]:
    """Return a base with every shape and dtype that matters, a few hundred kB."""
    rng = np.random.default_rng(seed)

    def random(dtype: str, *shape: int) -> Tensor:
        return tensor(rng.normal(0, 0.05, shape), dtype)

    return {
        "model.embed_tokens.weight": random("BF16", 300, 64),
        "model.layers.0.self_attn.q_proj.weight": random("BF16", 96, 1000),
        "model.layers.0.mlp.up_proj.weight": random("F16", 130, 257),
        "model.layers.1.self_attn.q_proj.weight": random("F32", 64, 512),
        "model.layers.1.mlp.up_proj.weight": random("F64", 33, 129),
        "model.layers.10.experts.weight": random("BF16", 3, 40, 50),
        "model.layers.10.conv.weight": random("F16", 8, 4, 3, 3),
        "model.layers.2.input_layernorm.weight": random("BF16", 1),
        "model.norm.weight": random("F32", 70_001),
        "scale": random("F32"),
        "empty": tensor(np.zeros((0, 5)), "BF16"),
        "column": random("BF16", 400, 1),
        "token_types": tensor(np.arange(50), "I64"),
        "mask": tensor(np.arange(12) % 3 == 0, "BOOL"),
    }


def sentencepiece_model() -> bytes:
    """Return a small tokenizer of sentencepiece; skip the test where that is not installed."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the answer is tea", "this is the way", "tea is hot"] * 5),
        model_writer=model,
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()
