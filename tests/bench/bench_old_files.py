"""Files of torch.save against the same tensors in safetensors files.

The family of `bench_merge`. *bin*: the same models as ``pytorch_model.bin``. *transposed*: as that,
and all matrices stored transposed. Prints whole merges, from process start to a durable output, in
turn, and the ratio of the medians::

    python -m tests.bench.bench_old_files [--rounds 5]
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from della_dist.demo import make_family
from tests.bench.bench_merge import FAMILY
from tests.bench.in_turn import compare, in_scratch, parser
from tests.torch_files import convert, transposed


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, 7).parse_args()
    in_scratch(options, lambda folder: bench(folder, options.rounds))


def bench(folder: Path, rounds: int) -> None:
    """Merge and print."""
    family = make_family(folder / "family", **FAMILY)
    content = yaml.safe_load(family.config_path.read_text())
    configs = {"safetensors": family.config_path}
    for name, stored in (("bin", lambda tensor: tensor), ("transposed", transposed)):
        moved = folder / name
        for path in (family.base, *family.experts):
            convert(Path(shutil.copytree(path, moved / path.name)), stored=stored)
        content["base_model"] = str(moved / family.base.name)
        for model, path in zip(content["models"], family.experts, strict=True):
            model["model"] = str(moved / path.name)
        configs[name] = moved / "merge.yaml"
        configs[name].write_text(yaml.safe_dump(content))
    compare(configs, folder, rounds)


if __name__ == "__main__":
    main()
