"""Run every benchmark, or those that are named: ``python -m tests.bench [NAME...]``.

From the repository's root. Each is a module of its own, with more options.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

#: The modules are ``tests.bench.bench_*``.
BENCHMARKS = {
    "kernel": "kernels",
    "plan": "planning",
    "simulator": "clusters, simulated",
    "merge": "a whole merge",
    "vocabularies": "models of other vocabularies",
    "adapters": "adapters",
    "old_files": "files of torch.save",
    "experts": "many experts",
    "matrices": "methods on whole matrices",
    "parity": "what differs from mergekit",
    "reading": "reading from a store",
    "ray": "Ray",
    "search": "a search",
    "gpu": "a GPU",
}

parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
parser.add_argument(
    "--skip-mergekit", action="store_true", help="install no mergekit to compare with"
)
options = parser.parse_args()
if unknown := set(options.names) - set(BENCHMARKS):
    parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
for name in options.names or BENCHMARKS:
    if name == "parity" and options.skip_mergekit:
        continue
    more = ["--skip-mergekit"] if name == "merge" and options.skip_mergekit else []
    print(f"\n== {BENCHMARKS[name]}", flush=True)
    subprocess.run([sys.executable, "-m", f"tests.bench.bench_{name}", *more], check=True)
