"""Checkpoints that are all headers: the data are holes of sparse files, which read as zeros."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from della_dist.storage.header import build_header

Shapes = Mapping[str, tuple[int, ...]]


def llama_shapes(
    hidden: int, intermediate: int, layers: int, vocab: int, kv_rows: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama-shaped model; without `kv_rows`, every head has its own."""
    rows = {"k": kv_rows or hidden, "v": kv_rows or hidden}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows.get(name, hidden), hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def save_sparse(path: Path, shapes: Shapes, num_shards: int = 1, dtype: str = "BF16") -> Path:
    """Write a checkpoint whose data take no room on the disk."""
    path.mkdir(parents=True)
    names = list(shapes)
    step = -(-len(names) // num_shards)
    weight_map = {}
    for i in range(num_shards):
        mine = names[i * step : (i + 1) * step]
        shard = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        header, placed = build_header([(n, dtype, shapes[n]) for n in mine], {"format": "pt"})
        with (path / shard).open("wb") as file:
            file.write(header)
            file.truncate(placed[-1].stop if placed else len(header))
        weight_map.update(dict.fromkeys(mine, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def link_checkpoint(source: Path, path: Path) -> Path:
    """Make another checkpoint of the same files."""
    path.mkdir()
    for file in source.iterdir():
        os.link(file, path / file.name)
    return path


def trillion_shapes() -> dict[str, tuple[int, ...]]:
    """Return 100,000 tensors of a mixture of experts, 1.02e12 parameters in all."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128_000, 7168)}
    for layer in range(100):
        for expert in range(333):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes[f"{prefix}.gate_proj.weight"] = (1430, 7168)
            shapes[f"{prefix}.up_proj.weight"] = (1430, 7168)
            shapes[f"{prefix}.down_proj.weight"] = (7168, 1430)
    for layer in range(99):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (7168,)
    return shapes


def save_configuration(
    path: Path, base: Path | str, experts: Iterable[Path | str], method: str = "della"
) -> Path:
    """Write a configuration for sparse checkpoints."""
    models = "".join(f"  - model: {e}\n    parameters: {{weight: 1.0}}\n" for e in experts)
    path.write_text(
        f"merge_method: {method}\nbase_model: {base}\nmodels:\n{models}"
        "parameters: {density: 0.5}\n"
    )
    return path
