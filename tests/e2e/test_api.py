"""The commands as functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import della_dist
from della_dist.config import load_config
from della_dist.errors import VerificationError
from tests.merging import config_for, save_family, write_config


def test_merge_plan_verify(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    path = write_config(tmp_path / "merge.yaml", config_for(base, experts, seed=3))
    out = tmp_path / "out"
    planned = della_dist.plan(path, out, threads=1)
    assert planned["num_tasks"] == 1
    assert not out.exists()
    summary = della_dist.merge(str(path), out, threads=1, memory_bytes=64 << 20)
    assert summary.num_tensors == planned["num_tensors"]
    assert della_dist.verify(out, recompute=2).model_digest == summary.model_digest
    for same in (yaml.safe_load(path.read_text()), load_config(path)):
        assert della_dist.merge(same, out).tasks_resumed == 1
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationError):
        della_dist.verify(out)


def test_unknown_option(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="thread"):
        della_dist.merge({}, tmp_path / "out", thread=1)
