"""Merges of 8 to 64 experts of one base: time, memory and open files, and whether they are linear.

The experts are three, under so many names (hard links: what is measured is the engine, from files
that the system has in memory). Prints, for every method, seconds from process start, the peak of
the memory that is not of files, and the most files that were open at once::

    python -m tests.bench.bench_experts [--methods della,ties] [--memory 256MiB]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from della_dist.config.methods import METHODS
from della_dist.demo import make_family
from tests.bench.bench_merge import MIB, timed

COUNTS = (8, 16, 32, 64)
#: For methods that hold a matrix of every expert, and of every thread.
BALANCED_MEMORY = "4GiB"
FAMILY: dict[str, Any] = {
    "hidden": 512,
    "intermediate": 1408,
    "layers": 6,
    "heads": 8,
    "kv_heads": 8,
    "vocab": 8000,
}


class OpenFiles:
    """The most files that child processes of this one had open at once, looked at often."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.is_set():
            for task in Path("/proc/self/task").iterdir():
                with contextlib.suppress(OSError):
                    for child in (task / "children").read_text().split():
                        count = sum(1 for _ in Path(f"/proc/{child}/fd").iterdir())
                        self.most = max(self.most, count)
            time.sleep(0.005)

    def stop(self) -> int:
        """Return how many."""
        self._stop.set()
        self._thread.join()
        return self.most


def main() -> None:
    """Run the benchmark."""
    many = [name for name, method in METHODS.items() if method.num_models is None]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--methods", default=",".join(many))
    parser.add_argument("--memory", default="256MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench(Path(folder), options.methods.split(","), options.memory)


def bench(folder: Path, methods: list[str], memory: str) -> None:
    """Merge and print."""
    family = make_family(folder / "family", **FAMILY)
    experts = [folder / f"expert{number}" for number in range(max(COUNTS))]
    for number, expert in enumerate(experts):
        shutil.copytree(family.experts[number % len(family.experts)], expert, copy_function=os.link)
    size = sum(path.stat().st_size for path in family.base.glob("*.safetensors"))
    print(f"models of {size / MIB:.0f} MiB, memory {memory}: seconds / peak MiB / open files")
    print(f"{'':16}" + "".join(f"{count:>20}" for count in COUNTS) + "   seconds an expert")
    for method in methods:
        cells, seconds = [], []
        given = BALANCED_MEMORY if METHODS[method].is_balanced else memory
        for count in COUNTS:
            has_base = METHODS[method].has_base
            content = {
                "merge_method": method,
                **({"base_model": str(family.base)} if has_base else {}),
                "models": [{"model": str(expert)} for expert in experts[:count]],
            }
            config = folder / "merge.yaml"
            config.write_text(yaml.safe_dump(content))
            out = folder / "out"
            command = [sys.executable, "-m", "della_dist", "merge", str(config), str(out)]
            files = OpenFiles()
            run = timed([*command, "--quiet", "--memory", given], folder / "log")
            most = files.stop()
            shutil.rmtree(out)
            cells.append(f"{run.wall_s:.1f} / {run.peak_bytes / MIB:.0f} / {most}")
            seconds.append(run.wall_s)
        step = (seconds[-1] - seconds[0]) / (COUNTS[-1] - COUNTS[0])
        print(
            f"{method:16}" + "".join(f"{cell:>20}" for cell in cells) + f"   {step:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
