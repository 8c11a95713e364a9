"""Planning a made-up 1 T-parameter merge: 100,000 tensors in 200 shards, a base and 8 experts.

Prints the wall time and peak memory of ``della-dist plan``::

    python -m tests.bench.bench_plan
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.bench_merge import MIB, PeakMemory
from tests.sparse import link_checkpoint, save_configuration, save_sparse, trillion_shapes


def main() -> None:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_sparse(folder / "base", trillion_shapes(), num_shards=200)
        experts = [link_checkpoint(base, folder / f"expert{m}") for m in range(8)]
        config = save_configuration(folder / "merge.yaml", base, experts)
        started_s = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "della_dist", "plan", str(config)])
        peak = PeakMemory(process.pid)
        process.wait()
        wall_s = time.monotonic() - started_s
        print(f"\nplanned in {wall_s:.1f} s, peak memory {peak.get() / MIB:.0f} MiB")
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
