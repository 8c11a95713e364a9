"""What the README publishes is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from della_dist.ops.philox import stream_key
from della_dist.ops.reference import philox4x32

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_VECTOR = re.compile(
    r"^\| (\d+) \| (\d+) \| (\d+) \| `([^`]+)` \| (\d+) "
    r"\| `(\w{16})` \| `(\w{8})` \| ([0-9.]+) \|$",
    re.MULTILINE,
)


def test_random_words() -> None:
    vectors = _VECTOR.findall(README)
    assert len(vectors) == 5
    for seed, stage, expert, name, element, key, word, u in vectors:
        computed_key = stream_key(int(seed), name, int(expert), int(stage))
        assert f"{computed_key:016x}" == key
        c = int(element) // 4
        counter = (np.array([x], np.uint64) for x in (c & 0xFFFFFFFF, c >> 32, 0, 0))
        words = philox4x32(tuple(counter), (computed_key & 0xFFFFFFFF, computed_key >> 32))  # type: ignore[arg-type]
        computed = int(words[int(element) % 4][0])
        assert f"{computed:08x}" == word
        assert (computed >> 8) * 2.0**-24 == float(u)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_documented_options_exist() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "della_dist", "merge", "--help"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    for option in ("--memory", "--device", "--json", "--debug", "--restart", "--shard-size"):
        assert option in text
