"""A whole merge, from process start to a durable output: della-dist and mergekit 0.1.5 in turn.

Both merge the same family by DELLA: a Llama-shaped base and three experts of 238 M parameters in
bf16 (hidden 1024, intermediate 2816, 16 layers, vocabulary 16000), with the files in the page
cache. Prints wall time, CPU time and peak memory of every run, the medians, and the ratios; and
how far the merge is from the time it takes just to read the inputs and write the output.

Each runs from an environment of its own, with what it depends on and nothing else. mergekit's is
made on the first run where none is given, ours is made anew::

    python -m tests.bench.bench_merge [--rounds 3] [--mergekit VENV] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from della_dist.demo import make_family
from della_dist.runtime.task.meter import high_water_bytes

MERGEKIT = "mergekit==0.1.5"
FAMILY: dict[str, Any] = {
    "hidden": 1024,
    "intermediate": 2816,
    "layers": 16,
    "heads": 16,
    "kv_heads": 16,
    "vocab": 16000,
}
MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """One run of a program."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


class PeakMemory:
    """The peak resident set of a process, looked up until somebody has waited for its end.

    Not `wait4`'s, which begins with what this process held when it started the other.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._bytes = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # it is gone
            while True:
                self._bytes = max(self._bytes, high_water_bytes(self._pid))
                time.sleep(0.01)

    def get(self) -> int:
        """Return the peak, in bytes; what came in the last 10 ms may be missing."""
        self._thread.join()
        return self._bytes


def timed(command: list[str], log: Path) -> Run:
    """Run a command and measure it, its children included where they are waited for."""
    with log.open("wb") as output:
        started_s = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = PeakMemory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-4000:]}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, peak.get())


def read_and_write(inputs: list[Path], output_bytes: int, out: Path) -> float:
    """Return the seconds that reading the inputs and writing the output's size durably takes."""
    buffer = bytearray(8 * MIB)
    started_s = time.monotonic()
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with out.open("wb", buffering=0) as file:
        written = 0
        while written < output_bytes:
            written += file.write(memoryview(buffer)[: output_bytes - written])
        os.fsync(file.fileno())
    out.unlink()
    return time.monotonic() - started_s


def install_ours(venv: Path) -> Path:
    """Make an environment with the package as a user installs it; return its command."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    return venv / "bin" / "della-dist"


def install_mergekit(venv: Path) -> None:
    """Make an environment with mergekit, if it is not there yet."""
    if (venv / "bin" / "mergekit-yaml").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet"]
    # The torch of our own environment first: a bare `torch` is the largest build there is.
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, MERGEKIT], check=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, help="environment that has mergekit")
    parser.add_argument("--scratch", type=Path, help="folder for the models (3 GB)")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    venv = args.mergekit or Path(tempfile.gettempdir()) / "mergekit-0.1.5"
    if not args.skip_mergekit:
        install_mergekit(venv)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        results = bench(Path(folder), venv, args.rounds, skip_mergekit=args.skip_mergekit)
    if args.json:
        print(json.dumps(results))
    else:
        show(results)


def bench(folder: Path, venv: Path, rounds: int, *, skip_mergekit: bool) -> dict[str, object]:
    """Make the family and run the programs in turn."""
    family = make_family(folder / "family", **FAMILY)
    inputs = [*sorted(family.base.glob("*.safetensors"))]
    for expert in family.experts:
        inputs += sorted(expert.glob("*.safetensors"))
    config = folder / "merge.yaml"
    experts = "\n".join(
        f"  - model: {e}\n    parameters: {{weight: 1.0, density: 0.7, epsilon: 0.2}}"
        for e in family.experts
    )
    config.write_text(
        f"merge_method: della\nbase_model: {family.base}\nmodels:\n{experts}\n"
        "dtype: bfloat16\nparameters: {lambda: 1.0, normalize: true}\n"
    )
    ours = [str(install_ours(folder / "ours")), "merge", str(config)]
    theirs = [str(venv / "bin" / "mergekit-yaml"), str(config)]
    quiet = {"mergekit": [], "della-dist": ["--quiet"]}
    # Once unmeasured: compiles and caches the kernels, warms the page cache.
    timed([*ours, str(folder / "warm"), "--quiet"], folder / "log")
    output_bytes = sum(p.stat().st_size for p in (folder / "warm").glob("*.safetensors"))
    shutil.rmtree(folder / "warm")
    runs: dict[str, list[Run]] = {"della-dist": [], "mergekit": []}
    floor = []
    for _ in range(rounds):
        for name, command in (("mergekit", theirs), ("della-dist", ours)):
            if name == "mergekit" and skip_mergekit:
                continue
            out = folder / "out"
            runs[name].append(timed([*command, str(out), *quiet[name]], folder / "log"))
            shutil.rmtree(out)
            os.sync()
        floor.append(read_and_write(inputs, output_bytes, folder / "floor"))
    return {
        "runs": {k: [asdict(r) for r in v] for k, v in runs.items()},
        "read_and_write_s": floor,
        "input_bytes": sum(p.stat().st_size for p in inputs),
        "output_bytes": output_bytes,
    }


def show(results: dict[str, object]) -> None:
    """Print medians and ratios."""
    runs: dict[str, list[dict[str, float]]] = results["runs"]  # type: ignore[assignment]
    medians = {
        name: {k: statistics.median(r[k] for r in rs) for k in ("wall_s", "cpu_s", "peak_bytes")}
        for name, rs in runs.items()
        if rs
    }
    print(f"{'':12} {'wall':>9} {'CPU':>9} {'peak memory':>13}   every wall time")
    for name, m in medians.items():
        every = ", ".join(f"{r['wall_s']:.2f}" for r in runs[name])
        print(
            f"{name:12} {m['wall_s']:7.2f} s {m['cpu_s']:7.2f} s "
            f"{m['peak_bytes'] / MIB:9.0f} MiB   {every}"
        )
    mine = medians["della-dist"]
    if "mergekit" in medians:
        other = medians["mergekit"]
        print(
            f"{'ratio':12} {other['wall_s'] / mine['wall_s']:7.1f} x "
            f"{other['cpu_s'] / mine['cpu_s']:7.1f} x "
            f"{mine['peak_bytes'] / other['peak_bytes']:11.2f} x"
        )
    floor: list[float] = results["read_and_write_s"]  # type: ignore[assignment]
    median = statistics.median(floor)
    print(
        f"reading the inputs and writing the output alone: {median:.2f} s; "
        f"the merge takes {mine['wall_s'] / median:.1f} times that"
    )


if __name__ == "__main__":
    main()
