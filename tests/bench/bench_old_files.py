"""Files of torch.save against the same tensors in safetensors files.

The family of `bench_merge`. *bin*: the same models as ``pytorch_model.bin``. *transposed*: as that,
and all matrices stored transposed. Prints whole merges, from process start to a durable output, in
turn, and the ratio of the medians::

    python -m tests.bench.bench_old_files [--rounds 5]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from della_dist.demo import make_family
from tests.bench.bench_merge import FAMILY, timed
from tests.torch_files import convert, transposed


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the models (7 GB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        bench(Path(folder), args.rounds)


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
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(rounds + 1):
        for name, config in configs.items():
            out = folder / "out"
            command = [sys.executable, "-m", "della_dist", "merge", str(config), str(out)]
            seconds[name].append(timed([*command, "--quiet"], folder / "log").wall_s)
            shutil.rmtree(out)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, times in seconds.items():  # the first of each warms up
        print(f"{name:11}  {medians[name]:5.2f} s  {[round(s, 2) for s in times[1:]]}")
    for name in ("bin", "transposed"):
        ratio = medians["safetensors"] / medians[name]
        print(f"throughput, {name} to safetensors: {ratio:.2f}")


if __name__ == "__main__":
    main()
