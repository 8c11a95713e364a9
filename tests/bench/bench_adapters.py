"""Adapters of rank 64 against whole experts in bf16: what forming the deltas costs.

The family of `bench_merge`; each adapter changes every matrix of its layers. Prints whole merges by
DELLA, from process start to a durable output, in turn, and the ratio of the medians::

    python -m tests.bench.bench_adapters [--rounds 5] [--rank 64]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from della_dist.demo import make_family
from della_dist.storage.checkpoint import open_checkpoint
from tests.bench.bench_merge import FAMILY
from tests.bench.in_turn import compare, in_scratch, parser
from tests.checkpoints import Tensor, save_file, tensor


def save_adapter(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """Write an adapter that changes every matrix of the layers of a model."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, entry in open_checkpoint(str(base)).tensors.items():
        if ".layers." in name and len(entry.shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, cols = entry.shape
            for part, shape in (("A", (rank, cols)), ("B", (rows, rank))):
                numbers = rng.normal(0, 0.01, shape)
                tensors[f"{module}.lora_{part}.weight"] = tensor(numbers, "BF16")
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    folder.mkdir()
    save_file(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Run the benchmark."""
    reading = parser(__doc__, 2.5)
    reading.add_argument("--rank", type=int, default=64)
    options = reading.parse_args()
    in_scratch(options, lambda folder: bench(folder, options.rounds, options.rank))


def bench(folder: Path, rounds: int, rank: int) -> None:
    """Merge and print."""
    family = make_family(folder / "family", **FAMILY)
    content = yaml.safe_load(family.config_path.read_text())
    configs = {"whole": family.config_path, "adapters": family.config_path.with_name("lora.yaml")}
    for number, model in enumerate(content["models"]):
        adapter = save_adapter(family.base, folder / f"adapter{number}", rank, number)
        model["model"] = f"{family.base}+{adapter}"
    configs["adapters"].write_text(yaml.safe_dump(content))
    compare(configs, folder, rounds)


if __name__ == "__main__":
    main()
