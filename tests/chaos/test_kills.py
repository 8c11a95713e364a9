"""A merge that is killed at any instant continues, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.chaos.figures import family_in_shards, num_kills
from tests.merging import merge_command, run_process
from tests.staged import contents

NUM_KILLS = num_kills(30)
NUM_ADAPTER_KILLS = num_kills(8)
WORKERS = 2
OPTIONS = ("--workers", str(WORKERS))


def num_committed(out: Path) -> int:
    return len(list((out / ".della" / "tasks").glob("*.json")))


@pytest.mark.slow
def test_kills_at_random_instants(tmp_path: Path) -> None:
    family = family_in_shards(tmp_path / "family")
    config = family.config_path
    # Compiles the kernels, where they are not yet.
    run_process(config, tmp_path / "first", *OPTIONS)
    started_s = time.monotonic()
    whole = run_process(config, tmp_path / "whole", *OPTIONS)
    duration_s = time.monotonic() - started_s
    rng = random.Random(20)
    kills = 0
    outputs = 0
    while kills < NUM_KILLS:
        out = tmp_path / f"out{outputs}"
        outputs += 1
        committed = 0
        while kills < NUM_KILLS:
            process = subprocess.Popen(
                merge_command(config, out, *OPTIONS), stdout=subprocess.PIPE, start_new_session=True
            )
            try:
                # From the first imports to past the end; most instants lie within the merging.
                process.wait(timeout=rng.uniform(0.3, 1.1) * duration_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            assert process.stdout is not None
            output = process.stdout.read()
            process.stdout.close()
            if process.returncode == 0:
                summary = json.loads(output)
                assert summary["tasks_resumed"] == committed
                break
            assert process.returncode == -signal.SIGKILL
            # Nothing that was committed is lost, and no more than one shard a worker was begun.
            now = num_committed(out)
            finished = (out / "della_manifest.json").exists()
            assert now >= committed or finished
            assert len(list((out / ".della" / "tmp").glob("*.safetensors.*"))) <= WORKERS
            committed = whole["num_tasks"] if finished else now
        summary = run_process(config, out, *OPTIONS)
        assert summary["model_digest"] == whole["model_digest"]
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_kills_while_an_adapter_is_made(tmp_path: Path) -> None:
    """It is one file: what is made of its matrices is kept, and nothing of it is left."""
    family = family_in_shards(tmp_path / "family")
    said = yaml.safe_load(family.config_path.read_text())
    config = tmp_path / "adapter.yaml"
    config.write_text(yaml.safe_dump({**said, "output": {"adapter": 4}}))
    run_process(config, tmp_path / "first", *OPTIONS)
    started_s = time.monotonic()
    whole = run_process(config, tmp_path / "whole", *OPTIONS)
    duration_s = time.monotonic() - started_s
    expected = contents(tmp_path / "whole")
    rng = random.Random(4)
    out = tmp_path / "out"
    kept: set[Path] = set()
    for _ in range(NUM_ADAPTER_KILLS):
        with subprocess.Popen(
            merge_command(config, out, *OPTIONS), stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                process.wait(timeout=rng.uniform(0.4, 0.9) * duration_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0 or (out / "della_manifest.json").exists():
            assert run_process(config, out, *OPTIONS)["model_digest"] == whole["model_digest"]
            assert contents(out) == expected
            shutil.rmtree(out)
            kept = set()
            continue
        now = set((out / ".della" / "factors").glob("*"))
        assert kept <= now or (out / "adapter_model.safetensors").exists()
        kept = now
    summary = run_process(config, out, *OPTIONS)
    assert summary["model_digest"] == whole["model_digest"]
    assert contents(out) == expected
