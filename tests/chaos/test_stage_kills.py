"""A run of several documents that is killed at any instant continues with the stage it was at."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from della_dist.demo import make_family
from della_dist.storage.manifest import MANIFEST_NAME
from tests.chaos.figures import num_kills
from tests.merging import merge_command, run_process
from tests.staged import contents, document, text_of

NUM_KILLS = num_kills(12)
OPTIONS = ("--device", "cpu")
NAMES = ("one", "two")


@pytest.mark.slow
def test_kills_at_random_instants(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", layers=4, vocab=4000)
    base, (math, code, chat) = family.base, family.experts
    config = tmp_path / "merge.yaml"
    config.write_text(
        text_of(
            document([math, code], name="one", base_model=base),
            document(["one", chat], name="two", base_model=base),
            document(["two", "one", math], base_model=base),
        )
    )
    place = tmp_path / "place"
    out = place / "out"
    run_process(config, out, *OPTIONS)  # compiles the kernels, where they are not yet
    shutil.rmtree(place)
    whole, duration_s, work_after_s = timed(merge_command(config, out, *OPTIONS), place)
    expected = contents(place)
    rng = random.Random(3)
    kills = kills_after_a_stage = 0
    while kills < NUM_KILLS:
        shutil.rmtree(place, ignore_errors=True)
        made: dict[Path, int] = {}
        while kills < NUM_KILLS:
            process = subprocess.Popen(
                merge_command(config, out, *OPTIONS), stdout=subprocess.PIPE, start_new_session=True
            )
            if kills % 2:  # after a stage, however long the machine takes to come there
                wait_for_a_stage(process, place)
                patience_s = rng.uniform(0.0, 0.9) * work_after_s
            else:
                patience_s = rng.uniform(0.3, 0.9) * duration_s
            try:
                process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            assert process.stdout is not None
            process.stdout.close()
            assert process.returncode in (0, -signal.SIGKILL)
            if process.returncode == 0:
                break
            if (out / MANIFEST_NAME).exists():
                continue  # the stages may be going
            # A stage that was complete is what it was.
            assert made.items() <= complete(place).items()
            made = complete(place)
            kills_after_a_stage += bool(made)
        summary = run_process(config, out, *OPTIONS)
        assert summary["model_digest"] == whole["model_digest"]
        assert contents(place) == expected
        assert sorted(path.name for path in place.iterdir()) == ["out"]
    assert kills_after_a_stage


def timed(command: list[str], place: Path) -> tuple[dict[str, Any], float, float]:
    """Return what a run says, how long it takes, and how long it works after its first stage.

    What a process does after its last commit, of which ending is the most, is not work.
    """
    started_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        wait_for_a_stage(process, place)
        staged_s = time.monotonic()
        while not (place / "out" / MANIFEST_NAME).exists() and process.poll() is None:
            time.sleep(0.005)
        worked_s = time.monotonic()
        text, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(text), time.monotonic() - started_s, worked_s - staged_s


def wait_for_a_stage(process: subprocess.Popen[bytes], place: Path) -> None:
    """Return when there is a complete stage, or the process has ended."""
    while not complete(place) and process.poll() is None:
        time.sleep(0.005)


def complete(place: Path) -> dict[Path, int]:
    """Return when the files of complete stages were written."""
    return {
        path: path.stat().st_mtime_ns
        for manifest in (place / "out.stages").glob(f"*/{MANIFEST_NAME}")
        for path in manifest.parent.glob("[!.]*")  # what the run itself needed goes after them
    }
