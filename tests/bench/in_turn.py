"""Merges of several configurations in turn, each in a process of its own: what benchmarks share."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.bench.bench_merge import timed


def parser(doc: str | None, gigabytes: float) -> argparse.ArgumentParser:
    """Return what reads the options of a benchmark that needs a folder of that size."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n", maxsplit=1)[0])
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--scratch", type=Path, help=f"folder for the models ({gigabytes:g} GB)")
    return found


def in_scratch(options: argparse.Namespace, bench: Callable[[Path], None]) -> None:
    """Run a benchmark in a folder that is removed again."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        bench(Path(folder))


def compare(
    configs: Mapping[str, Path],
    folder: Path,
    rounds: int,
    prepare: Callable[[str], None] = lambda name: None,
) -> None:
    """Merge in turn and print seconds, and the throughput of all others to the first.

    Parameters
    ----------
    configs
        Configurations by name.
    folder
        For outputs, one at a time.
    rounds
        How often each is merged; once more before, to warm up.
    prepare
        Called before each merge, with the name of its configuration.
    """
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(rounds + 1):
        for name, config in configs.items():
            prepare(name)
            out = folder / "out"
            command = [sys.executable, "-m", "della_dist", "merge", str(config), str(out)]
            seconds[name].append(timed([*command, "--quiet"], folder / "log").wall_s)
            shutil.rmtree(out)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:12} {medians[name]:5.2f} s  {[round(s, 2) for s in times[1:]]}")
    first, *others = configs
    for name in others:
        print(f"throughput, {name} to {first}: {medians[first] / medians[name]:.2f}")
