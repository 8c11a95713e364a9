"""Merges for tests: write a configuration, run it, and compute what must come out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from click.testing import Result

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.ops.tensor import merge_tensor
from della_dist.report.summary import MergeSummary
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.specs.sources import Merged
from tests.checkpoints import Tensor, make_experts, mixed_base, save_checkpoint


def save_family(
    folder: Path, base: Mapping[str, Tensor] | None = None, num_experts: int = 3, **how: Any
) -> tuple[Path, list[Path]]:
    """Write a base and experts of it; return where they are."""
    base = mixed_base() if base is None else base
    base_path = save_checkpoint(folder / "base", base, **how)
    experts = [
        save_checkpoint(folder / f"expert{m}", expert, **how)
        for m, expert in enumerate(make_experts(base, num_experts))
    ]
    return base_path, experts


def config_for(
    base: Path | None, experts: Sequence[Path], method: str = "della", **keys: Any
) -> MergeConfig:
    """Return the configuration of a merge with one weight a expert that differs from the others."""
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(e), "parameters": {"weight": 1.0 - 0.25 * m}}
            for m, e in enumerate(experts)
        ],
        **keys,
    }
    if base is not None:
        content["base_model"] = str(base)
    return config_from_mapping(content, "test")


def write_config(path: Path, config: MergeConfig) -> Path:
    """Write a configuration as YAML."""
    path.write_text(yaml.safe_dump(config.normalized()))
    return path


def run_process(config: Path, out: Path, *options: str) -> dict[str, Any]:
    """Merge in a process of its own; return its summary."""
    done = subprocess.run(merge_command(config, out, *options), check=True, stdout=subprocess.PIPE)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def merge_command(config: Path, out: Path, *options: str) -> list[str]:
    """Return the command of a merge in shards of 4 MB that tells its summary."""
    command = [sys.executable, "-m", "della_dist", "merge", str(config), str(out)]
    return [*command, "--shard-size", "4MB", "--quiet", "--json", *options]


def run(config: MergeConfig, out: Path | str, **options: Any) -> MergeSummary:
    """Merge on the CPU, whatever backbones the models have: most are drawn at random."""
    return merge(config, str(out), RunOptions(**{"device": "cpu", "check": False, **options}))


def assert_paragraph(result: Result, status: int, *words: str) -> None:
    """Check that a command ended with `status`, and one paragraph on stderr that has `words`."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("della-dist: ")
    assert result.stderr[:-1].isprintable()
    for word in words:
        assert word in result.stderr


def expected_tensors(config: MergeConfig) -> dict[str, bytes]:
    """Merge every floating-point tensor whole, with the reference; return the bytes by name."""
    plan = open_plan(config)
    read = {
        (c.location, name): (Path(c.location) / c.shards[e.shard].name).read_bytes()[
            e.start : e.stop
        ]
        for c in plan.inputs
        for name, e in c.tensors.items()
    }
    expected = {}
    for shard in plan.shards:
        for t in shard.tensors:
            source = plan.source(t)
            if not isinstance(source, Merged):
                expected[t.name] = read[plan.reference.location, t.name]
                continue
            parts = [Tensor("U8", (), read[c.location, t.name]).raw for c in plan.inputs]
            base = parts.pop(0) if plan.base is not None else None
            base = base if config.has_base else None
            merged, _ = merge_tensor(source.recipe, base, parts, backend="reference")
            expected[t.name] = merged.tobytes()
    return expected
