"""Hostile and broken inputs: every module registers its cases in `CASES`."""

from tests.hostile import (
    companions,
    configs,
    indexes,
    options,
    outputs,
    pickles,
    shards,
    tensors,
    values,
)
from tests.hostile.situation import CASES, Case, Situation

__all__ = [
    "CASES",
    "Case",
    "Situation",
    "companions",
    "configs",
    "indexes",
    "options",
    "outputs",
    "pickles",
    "shards",
    "tensors",
    "values",
]
