"""Train families of small models, merge them, and print what is kept: ``python -m tests.quality``.

From the repository's root. It takes some minutes on two cores; ``--reduced`` takes one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console

from tests.quality.model import NUM_THREADS
from tests.quality.plans import FULL, REDUCED, run
from tests.quality.tables import print_families


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality", description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="one small family, few settings")
    parser.add_argument("--seed", type=int, default=0, help="of weights and items of training")
    parser.add_argument("--json", action="store_true", help="print one object; tables go to stderr")
    options = parser.parse_args()
    started = time.monotonic()
    plans = REDUCED if options.reduced else FULL
    # Families share nothing: the seed of each is its own.
    seeds = [1000 * options.seed + number for number in range(len(plans))]
    if len(plans) == 1:
        families = [run(plans[0], seeds[0])]
    else:
        spawning = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(plans), mp_context=spawning) as pool:
            families = list(pool.map(run, plans, seeds))
    wall_s = time.monotonic() - started
    print_families(Console(stderr=options.json), families, wall_s)
    if options.json:
        found = {
            "seed": options.seed,
            "threads": NUM_THREADS,
            "wall_s": wall_s,
            "families": [dataclasses.asdict(family) for family in families],
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
