"""The reduced check: experts learn, merges load, and wudi keeps more than task arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from della_dist.config.methods import METHODS
from tests.quality.merges import FEW

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality")]


@pytest.fixture(scope="module")
def family() -> dict[str, Any]:
    """The check in a process of its own, whose threads are its own."""
    command = [sys.executable, "-m", "tests.quality", "--reduced", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (family,) = json.loads(ended.stdout)["families"]
    assert isinstance(family, dict)
    return family


def test_experts_learn(family: dict[str, Any]) -> None:
    for name, trained in family["experts"].items():
        base, expert = trained["base"], trained["expert"]
        assert expert["loss"] < 0.6 * base["loss"], name
        if base["answers"] is not None:
            assert expert["answers"] > base["answers"] + 0.2, name
        assert 0.03 < trained["relative_delta"] < 0.15, name


def test_what_is_said_of_the_models(family: dict[str, Any]) -> None:
    verdicts = {trained["verdict"] for trained in family["experts"].values()}
    assert (verdicts, family["stranger"]) == ({"same backbone"}, "another backbone")


def test_merges_keep_skills(family: dict[str, Any]) -> None:
    """Those of every method; transformers has loaded each, and knew all of its tensors."""
    best: dict[str, float] = {}
    (tried,) = family["cases"].values()
    for merged in tried:
        method, loss = merged["settings"]["method"], merged["test"]["loss"]
        best[method] = max(best.get(method, loss), loss)
    assert best.keys() == {grid.method for grid in FEW if grid.method in METHODS}
    assert all(0.2 < loss < 1.1 for loss in best.values()), best
    # `wudi` at its default, the others at the best that the grid has on the very test items.
    assert best["wudi"] > best["task_arithmetic"] + 0.03, best
