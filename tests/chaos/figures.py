"""What the chaos tests measured: printed, and kept for ``python -m tests.chaos``."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from della_dist.demo import make_family
from della_dist.demo.family import FamilyPaths

#: Names the file to which the figures go as well.
VARIABLE = "DELLA_CHAOS_FIGURES"


def num_kills(full: int) -> int:
    """Return how many kills a test does: a fifth of `full`, unless figures are asked for."""
    return full if os.environ.get(VARIABLE) else -(-full // 5)


def family_in_shards(folder: Path) -> FamilyPaths:
    """Make a family whose merge, in shards of a few megabytes, takes some seconds."""
    return make_family(
        folder, hidden=512, intermediate=1408, layers=6, heads=8, kv_heads=8, vocab=8000
    )


def report(what: str, **figures: float) -> None:
    """Print figures of a test, and keep them."""
    rounded = {name: round(value, 1) for name, value in figures.items()}
    print(f"\n{what}:", ", ".join(f"{name} {value}" for name, value in rounded.items()))
    path = os.environ.get(VARIABLE)
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps({"what": what, **rounded}) + "\n")


def table(path: Path) -> str:
    """Return the figures as a table in Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counts = Counter(name for row in rows for name in row)
    names = sorted(counts, key=lambda name: -counts[name])  # "what" is in every row
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|---" * len(names) + "|")
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)
