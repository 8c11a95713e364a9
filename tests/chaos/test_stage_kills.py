"""A run of several documents that is killed at any instant continues with the stage it was at."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from della_dist.demo import make_family
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
    started_s = time.monotonic()
    whole = run_process(config, out, *OPTIONS)
    duration_s = time.monotonic() - started_s
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
            earliest = 0.3
            if kills % 2:  # anywhere after a stage, however long the machine takes to come there
                earliest = 0.0
                while not complete(place) and process.poll() is None:
                    time.sleep(0.01)
            try:
                process.wait(timeout=rng.uniform(earliest, 0.9) * duration_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            assert process.stdout is not None
            process.stdout.close()
            assert process.returncode in (0, -signal.SIGKILL)
            if process.returncode == 0:
                break
            if (out / "della_manifest.json").exists():
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


def complete(place: Path) -> dict[Path, int]:
    """Return when the files of complete stages were written."""
    return {
        path: path.stat().st_mtime_ns
        for manifest in (place / "out.stages").glob("*/della_manifest.json")
        for path in manifest.parent.glob("*.*")
    }
