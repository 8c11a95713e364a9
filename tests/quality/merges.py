"""The methods that are compared, with their settings; merges go through the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import della_dist
from della_dist import RunOptions
from della_dist.config.methods import METHODS
from della_dist.report.check import Verdict
from tests.quality.model import NUM_THREADS


@dataclass(frozen=True, slots=True)
class Grid:
    """Settings of a method that are tried."""

    method: str
    lambdas: Sequence[float]
    densities: Sequence[float] = (1.0,)


#: What is compared; methods that the engine does not have are left out.
GRIDS: Sequence[Grid] = (
    Grid("task_arithmetic", (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)),
    Grid("ties", (0.8, 1.0, 1.2, 1.6), (0.2, 0.5)),
    Grid("della", (0.4, 0.6, 0.8, 1.0, 1.2), (0.5, 0.8)),
    Grid("wudi", (0.6, 0.8, 1.0, 1.2)),
    Grid("tsv", (0.6, 0.8, 1.0, 1.2)),
    Grid("iso_c", (0.6, 0.8, 1.0, 1.2, 1.6)),
)

#: The same for a minute.
FEW: Sequence[Grid] = (
    Grid("task_arithmetic", (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)),
    Grid("ties", (0.8, 1.2), (0.2, 0.5)),
    Grid("della", (0.8,), (0.5, 0.8)),
    Grid("wudi", (METHODS["wudi"].lambda_,)),
)


@dataclass(frozen=True, slots=True, order=True)
class Settings:
    """A method with its parameters."""

    method: str
    lambda_: float
    density: float

    def __str__(self) -> str:
        parts = [f"lambda {self.lambda_:g}"]
        if self.density != 1:
            parts.append(f"density {self.density:g}")
        return ", ".join(parts)


def settings_of(grids: Sequence[Grid]) -> Iterator[Settings]:
    """Yield what grids hold, of the methods that there are."""
    for grid in grids:
        if grid.method in METHODS:
            for lambda_, density in itertools.product(grid.lambdas, grid.densities):
                yield Settings(grid.method, lambda_, density)


def merge(base: Path, experts: Sequence[Path], settings: Settings, out: Path) -> str:
    """Merge experts with equal weights into `out`; return the digest of the model."""
    parameters: dict[str, Any] = {"lambda": settings.lambda_}
    if settings.density != 1:
        parameters["density"] = settings.density
    config = {
        "merge_method": settings.method,
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    options = RunOptions(engine="local", device="cpu", threads=NUM_THREADS)
    return della_dist.merge(config, out, options).model_digest


def check(base: Path, models: Sequence[Path]) -> dict[str, Verdict]:
    """Return what is said of each model before a merge, by name."""
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in models],
    }
    return {Path(one.model).name: one.verdict for one in della_dist.check(config).models}
