"""The page about a merge: its sums, its size, and that it is HTML with everything in it."""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest

from della_dist.report.page.grid import Grid, place
from della_dist.report.page.heat_map import HeatMap
from della_dist.report.page.html import page, table
from della_dist.report.page.merge import Merge, Seen, merge_page
from della_dist.specs.statistics import ExpertStats, TensorStats
from della_dist.storage.manifest import TensorRecord
from della_dist.storage.tensor_table import Experts
from tests.sparse import trillion_shapes

_VOID = {"meta", "br", "link", "input"}


class Page(HTMLParser):
    """What a page is made of; closed elements only."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.words: list[str] = []
        self.elements: Counter[str] = Counter()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        assert max(self.ids.values(), default=1) == 1
        assert {link[1:] for link in self.links} <= self.ids.keys()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        for name, value in attrs:
            assert value is not None or name in ("defer",)
            if name == "id":
                self.ids[str(value)] += 1
            elif name in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,"))  # nothing from a network
                self.links += [value] * value.startswith("#")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def record(name: str, stats: TensorStats | None, action: str = "merge") -> TensorRecord:
    return TensorRecord(name, "BF16", (8,), "model.safetensors", 0, 16, "ab" * 32, action, stats)


def merged(name: str, *experts: tuple[int, int, int, float]) -> TensorRecord:
    """Return a tensor of 8 elements, of whose experts counts and the norm are given."""
    stats = tuple(
        ExpertStats(nonzero, kept, elected, norm, norm) for nonzero, kept, elected, norm in experts
    )
    return record(name, TensorStats(8, 2, stats))


def manifest(**more: Any) -> dict[str, Any]:
    models = [{"model": "/m/math", "parameters": {"weight": 1.0}}]
    return {
        "config": {"merge_method": "task_arithmetic", "base_model": "/m/base", "models": models},
        "inputs": [
            {"location": f"/m/{name}", "role": role, "shards": [{"size_bytes": 16}]}
            for name, role in (("base", "base"), ("math", "expert"))
        ],
        "shards": [{"name": "model.safetensors", "size_bytes": 16}],
        "num_parameters": 8,
        "num_tensors": 1,
        "model_digest": "cd" * 32,
        "seed": 0,
        "tool": {"name": "della_dist", "version": "0"},
        **more,
    }


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj", 3),
        ("model.layers.30.mlp.experts.17.up_proj.weight", "mlp.experts.*.up_proj", 30),
        ("model.layers.0.self_attn.q_proj.bias", "self_attn.q_proj.bias", 0),
        ("transformer.h.11.ln_1.weight", "transformer.h.ln_1", 11),
        ("visual.blocks.2.attn.qkv.weight", "visual.blocks.attn.qkv", 2),
        ("model.embed_tokens.weight", "model.embed_tokens", None),
        ("0", "0", 0),
    ],
)
def test_places(name: str, kind: str, layer: int | None) -> None:
    assert place(name) == (kind, layer)


def test_sums() -> None:
    both: Experts = [("math", 0.5), ("code", None)]
    grid = Grid(
        [
            (merged("layers.0.up.weight", (8, 4, 2, 3.0), (4, 4, 4, 1.0)), both),
            (merged("layers.0.up.bias", (4, 4, 4, 4.0), (0, 0, 0, 0.0)), both),
            (merged("layers.1.up.weight", (6, 3, 3, 1.0)), [("chat", 1.0)]),
            (record("layers.1.index", None, "copy"), []),
        ]
    )
    assert grid.experts == ["math", "code", "chat"]
    assert grid.kinds == ["up", "up.bias"]
    assert grid.layers == [0, 1]
    math_ = grid.total.of("math")
    assert (math_.kept, math_.to_keep, math_.elected) == (8 / 12, 6 / 12, 6 / 12)
    assert math_.root_mean_square == 5 / 4
    assert math.isnan(grid.total.of("code").to_keep)
    assert grid.total.conflicts == 6 / 24
    assert grid.total.tensors == 4
    found = grid.by_kind(lambda one: one.of("math").root_mean_square)
    assert found[0][0] == 3 / math.sqrt(8)
    assert [math.isnan(value) for row in found for value in row] == [False, True, False, True]
    assert grid.by_expert(lambda one: one.num_kept) == [[8, 0], [4, 0], [0, 3]]


def test_what_is_written_is_text() -> None:
    name = "<script>alert(1)</script>&\"'"
    picture = HeatMap("one", name, name, [name], ["0"], [[0.5]])
    tensors = [(merged(f"layers.0.{name}", (8, 4, 2, 3.0)), [(name, 0.5)])]
    said = Page(merge_page(Seen(Merge(name, manifest(), tensors))))
    assert "script" not in said.elements
    assert any(name in words for words in said.words)
    assert "script" not in Page(picture.svg()).elements
    said = Page(page(name, name, [(name, table([name], [[name, name]], label=name))], name))
    assert "".join(said.words).count(name) == 9


def test_merge_of_nothing_but_copies() -> None:
    text = merge_page(Seen(Merge("/m/out", manifest(), [(record("layers.0.w", None, "copy"), [])])))
    said = Page(text)
    assert said.elements["svg"] == 0
    assert "Kinds of tensors" in said.words


def test_hundred_thousand_tensors() -> None:
    """In five megabytes, with the numbers behind every picture."""
    shapes = trillion_shapes()
    planned: Experts = [(name, 0.5) for name in ("math", "code", "chat")]
    tensors = [
        (merged(name, *((8, 4 + i % 3, 3, 1.0 + i % 7),) * 3), planned)
        for i, name in enumerate(shapes)
    ]
    text = merge_page(Seen(Merge("/m/out", manifest(), tensors)))
    assert len(text.encode()) < 5_000_000
    said = Page(text)
    assert said.elements["svg"] == said.elements["details"] == 7
    assert "mlp.experts.*.gate_proj" in said.words
    assert "http:" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)


def test_pictures_say_what_they_show() -> None:
    picture = HeatMap("kept", "Kept", "…", ["math", "code"], ["0", "1"], [[0.5, math.nan], [1, 0]])
    assert picture.text(math.nan) == "–"  # noqa: RUF001
    assert picture.text(0.12345) == "0.123"
    share = HeatMap("kept", "Kept", "…", ["math"], ["0"], [[0.5]], is_share=True)
    assert share.text(0.12345) == "12.3 %"
    assert picture.svg() == picture.svg()
    assert "math" in picture.svg()
    assert "#010203" not in picture.svg()
