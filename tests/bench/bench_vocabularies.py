"""Models of other vocabularies against the same models taken for ones of equal vocabularies.

The family of `bench_merge`, with 16,000 tokens. *added*: each expert has ten tokens that no other
has, and all come into the output. *moved*: the tokens of one expert lie in the opposite order. All
rows are real; only which tokens they are differs. Prints whole merges, from process start to a
durable output, in turn, and the ratio of the medians::

    python -m tests.bench.bench_vocabularies [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from della_dist.demo import make_family
from della_dist.demo.tokenizer import SPECIAL_TOKENS
from tests.bench.bench_merge import FAMILY, timed

ADDED = 10


def set_tokens(path: Path, tokens: Sequence[str]) -> None:
    """Give a model a tokenizer with these tokens."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]}
    document = {"version": "1.0", "added_tokens": [], "model": model}
    (path / "tokenizer.json").write_text(json.dumps(document))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the models (3 GB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        bench(Path(folder), args.rounds)


def bench(folder: Path, rounds: int) -> None:
    """Merge and print."""
    family = make_family(folder / "family", **FAMILY)
    content = yaml.safe_load(family.config_path.read_text())
    tokens = [*SPECIAL_TOKENS, *(f"token{i}" for i in range(FAMILY["vocab"]))][: FAMILY["vocab"]]
    own = [[f"<{m} {i}>" for i in range(ADDED)] for m in range(len(family.experts))]
    vocabularies = {
        "equal": [tokens] * len(own),
        "added": [tokens[:-ADDED] + mine for mine in own],
        "moved": [*[tokens] * (len(own) - 1), tokens[::-1]],
    }
    seconds: dict[str, list[float]] = {name: [] for name in vocabularies}
    set_tokens(family.base, tokens)
    for _ in range(rounds + 1):
        for name, of_experts in vocabularies.items():
            for path, mine in zip(family.experts, of_experts, strict=True):
                set_tokens(path, mine)
            config = family.config_path.with_name(f"{name}.yaml")
            config.write_text(yaml.safe_dump({**content, "tokenizer_source": "union"}))
            out = folder / "out"
            command = [sys.executable, "-m", "della_dist", "merge", str(config), str(out)]
            seconds[name].append(timed([*command, "--quiet"], folder / "log").wall_s)
            shutil.rmtree(out)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, times in seconds.items():  # the first of each warms up
        print(f"{name}  {medians[name]:5.2f} s  {[round(s, 2) for s in times[1:]]}")
    for name in ("added", "moved"):
        print(f"throughput, {name} to equal: {medians['equal'] / medians[name]:.2f}")


if __name__ == "__main__":
    main()
