"""Run every benchmark: ``python -m tests.bench [--skip-mergekit]``, from the repository's root."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = {
    "kernels": ["tests.bench.bench_kernel"],
    "planning": ["tests.bench.bench_plan"],
    "clusters, simulated": ["tests.bench.bench_simulator"],
    "a whole merge": ["tests.bench.bench_merge", *sys.argv[1:]],
    "reading from a store": ["tests.bench.bench_reading"],
    "Ray": ["tests.bench.bench_ray"],
}

for title, command in BENCHMARKS.items():
    print(f"\n== {title}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
