"""Factors that a task has made, kept among the records of the run until its shard is committed.

An adapter is one file, and so one task, which takes as long as a whole merge and longer: what it
has made of single matrices survives when it is killed. They go away with the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
from blake3 import blake3

from della_dist.ops.factoring import Factors
from della_dist.specs.factoring import Factoring
from della_dist.specs.statistics import TensorStats
from della_dist.storage.manifest import stats_from_json, stats_to_json
from della_dist.storage.store import STATE_PREFIX, OutputStore

FACTORS = f"{STATE_PREFIX}factors"

#: What takes fewer operations is made again sooner than it is kept.
KEPT_OPERATIONS = 10**9


class KeptFactors:
    """The factors that are kept in an output; what is there when a task begins counts.

    Parameters
    ----------
    store
        Of the output, whose records are those of the same plan.
    check
        Raises if an input is no longer what was planned: nothing of it is kept.
    """

    def __init__(self, store: OutputStore, check: Callable[[], None]) -> None:
        self._store = store
        self._check = check
        self._there = frozenset(store.list(f"{FACTORS}/"))

    def has(self, name: str) -> bool:
        """Return whether those of a matrix are there."""
        return _key(name) in self._there

    def load(self, name: str, how: Factoring) -> tuple[Factors, TensorStats] | None:
        """Return those of a matrix with what was measured; None if there are none, or damaged."""
        if not self.has(name):
            return None
        head, _, data = self._store.read(_key(name)).partition(b"\n")
        try:
            said = json.loads(head)
            if said["blake3"] != blake3(data).hexdigest():
                return None
            stats = stats_from_json(said["stats"])
            numbers = np.frombuffer(data, np.float32)
            cut = how.rows * how.rank
            left_RK = numbers[:cut].reshape(how.rows, how.rank)
            right_KC = numbers[cut:].reshape(how.rank, how.cols)
        except (ValueError, KeyError, TypeError):
            return None
        if stats.norm is None or stats.energy is None:
            return None
        return Factors(left_RK, right_KC, stats.norm, stats.energy), stats

    def save(self, name: str, how: Factoring, factors: Factors, stats: TensorStats) -> None:
        """Keep those of a matrix, if making them took long."""
        if how.operations < KEPT_OPERATIONS:
            return
        self._check()
        data = factors.left_RK.tobytes() + factors.right_KC.tobytes()
        said = {"stats": stats_to_json(stats), "blake3": blake3(data).hexdigest()}
        self._store.put(_key(name), json.dumps(said).encode() + b"\n" + data)


def _key(name: str) -> str:
    """Return where the factors of a matrix are kept."""
    return f"{FACTORS}/{hashlib.sha256(name.encode()).hexdigest()[:32]}"
