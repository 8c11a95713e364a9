"""The families that are trained, and how long; the process that does it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from tests.quality.merges import FEW, GRIDS
from tests.quality.model import NUM_THREADS, Size, Training
from tests.quality.study import CASES, Family, Plan, study

_SIZE = Size(hidden=128, intermediate=512, num_layers=4)
_SMALL_SIZE = Size(hidden=128, intermediate=384, num_layers=2)


def _full(name: str, size: Size, learning_rate: float) -> Plan:
    return Plan(
        name,
        size,
        Training(num_steps=350, learning_rate=3e-3),
        Training(num_steps=150, learning_rate=learning_rate),
        cases=tuple(CASES),
        grids=GRIDS,
        num_validation=192,
        num_test=384,
    )


#: Deltas of each are about twice as large as those of the one before.
FULL: Sequence[Plan] = (
    _full("gentle", _SIZE, 4e-4),
    _full("hard", _SIZE, 1.2e-3),
    _full("very hard", _SMALL_SIZE, 3e-3),
)

#: For a test.
REDUCED: Sequence[Plan] = (
    Plan(
        "small",
        _SMALL_SIZE,
        Training(num_steps=300, learning_rate=3e-3),
        Training(num_steps=150, learning_rate=8e-4),
        cases=("three skills",),
        grids=FEW,
        num_validation=192,
        num_test=384,
    ),
)


def run(plan: Plan, seed: int) -> Family:
    """Study a family, in a folder that is removed again."""
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return study(plan, seed, Path(folder), lambda what: _say(f"{plan.name}: {what}"))


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
