"""A configuration of every method of the table, for tests of what all of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from della_dist.config import METHODS

#: What the others leave at its default, where that would do nothing to small models.
PARAMETERS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.002},
    "sce": {"select_topk": 0.4},
    "breadcrumbs": {"density": 0.6, "gamma": 0.2},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.2},
    "nuslerp": {"nuslerp_flatten": False},
    **{
        name: {"density": 0.5}
        for name, method in METHODS.items()
        if method.drop in ("magprune", "random", "magnitude") and not method.is_balanced
    },
}


#: Those that take any number of models.
OF_MANY = [name for name, method in METHODS.items() if method.num_models is None]


def number_of(method: str, most: int) -> int:
    """Return how many models besides its base a method takes, of so many."""
    how = METHODS[method]
    # The base is one of the two.
    return 1 if how.base_among == "first" else how.num_models or most


def document_of(
    method: str, base: Path, models: Sequence[object], name: str | None = None, **keys: Any
) -> dict[str, Any]:
    """Return a document of some of the models, the first ones, with weights that differ."""
    how = METHODS[method]
    used = models[: number_of(method, len(models))]
    weighted = "weight" in how.uses
    return {
        **({} if name is None else {"name": name}),
        "merge_method": method,
        **({"base_model": str(base)} if how.has_base or how.base_among == "first" else {}),
        "models": [
            {
                "model": str(model),
                **({"parameters": {"weight": 1 / (1 + m)}} if weighted else {}),
            }
            for m, model in enumerate(used)
        ],
        **({"parameters": PARAMETERS[method]} if method in PARAMETERS else {}),
        **keys,
    }
