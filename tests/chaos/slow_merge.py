"""A merge whose tasks take long enough to be hit, and what must come out of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from della_dist.config import MergeConfig
from della_dist.demo import make_family
from della_dist.report.summary import MergeSummary
from della_dist.runtime.verify import verify
from tests.merging import config_for, run, write_config
from tests.staged import contents

MIB = 1 << 20
#: Of a task: about 0.15 s on an idle core.
SHARD_BYTES = 2_000_000
MEMORY_BYTES = 192 * MIB
#: More experts make slower tasks without more output; they are links to two checkpoints.
NUM_EXPERTS = 16


@dataclass(frozen=True)
class SlowMerge:
    """A configuration, and the output of a run that nobody disturbed."""

    config: MergeConfig
    config_path: Path
    whole: Path
    summary: MergeSummary

    def run(self, out: Path, address: str, **options: Any) -> MergeSummary:
        """Merge with the ray engine, in this process."""
        how = {"shard_bytes": SHARD_BYTES, "threads": 1, "memory_bytes": MEMORY_BYTES, **options}
        return run(self.config, out, engine="ray", address=address, **how)

    def arguments(self, out: Path, address: str) -> list[str]:
        """Return the command line that does the same."""
        return [
            *("merge", str(self.config_path), str(out), "--engine", "ray", "--address", address),
            *("--shard-size", str(SHARD_BYTES), "--threads", "1"),
            *("--memory", str(MEMORY_BYTES), "--device", "cpu", "--quiet", "--json"),
        ]

    def check(self, out: Path, summary: MergeSummary | None = None) -> None:
        """Check that an output is that of the undisturbed run, to the last byte of every file."""
        expected, found = contents(self.whole), contents(out)
        assert found.keys() == expected.keys()
        for name, data in expected.items():
            assert found[name] == data, name
        assert verify(str(out)).model_digest == self.summary.model_digest
        if summary is not None:
            assert summary.model_digest == self.summary.model_digest
            assert summary.num_tasks == self.summary.num_tasks


def make_slow_merge(folder: Path, seed: int = 0, family: Path | None = None) -> SlowMerge:
    """Make checkpoints in `folder` (or take those of a `family`) and merge them undisturbed."""
    if family is None:
        family = folder / "family"
        make_family(
            family, intermediate=1024, layers=4, kv_heads=8, vocab=1024, num_experts=2, dtype="F32"
        )
        for i in range(NUM_EXPERTS):
            source = family / ("math", "code")[i % 2]
            shutil.copytree(source, family / f"expert{i}", copy_function=os.link)
    experts = [family / f"expert{i}" for i in range(NUM_EXPERTS)]
    config = config_for(family / "base", experts, "della", parameters={"density": 0.4}, seed=seed)
    config_path = write_config(folder / f"seed{seed}.yaml", config)
    whole = folder / f"whole{seed}"
    summary = run(config, whole, shard_bytes=SHARD_BYTES)
    return SlowMerge(config, config_path, whole, summary)


def num_committed(out: Path) -> int:
    """Return how many tasks an unfinished run has recorded."""
    return len(committed(out))


def committed(out: Path) -> list[str]:
    """Return the records of an unfinished run."""
    return sorted(p.name for p in (out / ".della" / "tasks").glob("*.json"))


def start_driver(merge: SlowMerge, out: Path, address: str) -> subprocess.Popen[str]:
    """Start a driver of its own process."""
    command = [sys.executable, "-m", "della_dist", *merge.arguments(out, address)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
