"""Models of other vocabularies against the same models taken for ones of equal vocabularies.

The family of `bench_merge`, with 16,000 tokens. *added*: each expert has ten tokens that no other
has, and all come into the output. *moved*: the tokens of one expert lie in the opposite order. All
rows are real; only which tokens they are differs. Prints whole merges, from process start to a
durable output, in turn, and the ratio of the medians::

    python -m tests.bench.bench_vocabularies [--rounds 5]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from della_dist.demo import make_family
from della_dist.demo.tokenizer import SPECIAL_TOKENS
from tests.bench.bench_merge import FAMILY
from tests.bench.in_turn import compare, in_scratch, parser

ADDED = 10


def set_tokens(path: Path, tokens: Sequence[str]) -> None:
    """Give a model a tokenizer with these tokens."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]}
    document = {"version": "1.0", "added_tokens": [], "model": model}
    (path / "tokenizer.json").write_text(json.dumps(document))


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, 3).parse_args()
    in_scratch(options, lambda folder: bench(folder, options.rounds))


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
    set_tokens(family.base, tokens)
    config = family.config_path.with_name("union.yaml")
    config.write_text(yaml.safe_dump({**content, "tokenizer_source": "union"}))

    def prepare(name: str) -> None:
        for path, mine in zip(family.experts, vocabularies[name], strict=True):
            set_tokens(path, mine)

    compare(dict.fromkeys(vocabularies, config), folder, rounds, prepare)


if __name__ == "__main__":
    main()
