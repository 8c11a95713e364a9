"""The page about a merge: its sums, its size, and that it is HTML with everything in it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pytest

from della_dist.report.card_pictures import CardPicture, with_pictures
from della_dist.report.check import CheckSummary, ModelCheck, PairCheck, recorded
from della_dist.report.page.deltas import deltas
from della_dist.report.page.grid import Grid, place
from della_dist.report.page.heat_map import HeatMap
from della_dist.report.page.html import page, table
from della_dist.report.page.merge import Merge, Seen, merge_page
from della_dist.report.page.pictures import Scale
from della_dist.report.page.similarity import Similarity, similarity_section
from della_dist.report.page.timeline import MOST_SESSIONS, MOST_STEPS, MOST_WORKERS, timeline
from della_dist.specs.history import History, Session, ShardRun, Spent
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


SPENT = Spent(bytes_read=100, merging_s=0.5, writing_s=0.25, committing_s=0.25)
SESSIONS = tuple(
    Session(began_s, "ray", 1000.0, 1e5, 10**12, 10**11, 0, 0, 0) for began_s in (0.0, 1e4, 2e4)
)


def cluster_shards(count: int) -> tuple[ShardRun, ...]:
    """Return shards that 1,500 workers merged in three sessions."""
    return tuple(
        ShardRun(i, i % 3, f"{i % 1500} on node {i % 90}", 1, i % 900, i % 900 + 90.5, SPENT, 50)
        for i in range(count)
    )


def check(num_models: int) -> dict[str, Any]:
    """Return what is kept of a check."""
    one = {"verdict": "same backbone", "relative_delta": 0.05}
    return {
        "models": [
            {"model": f"/m/e{i}", "reference": "/m/base", "matrix_cosine": 0.99, **one}
            for i in range(num_models)
        ],
        "pairs": [[i, j, (i - j) / num_models, 0.5] for j in range(num_models) for i in range(j)],
        "num_tensors": 3,
        "bytes_read": 1000,
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
    found = check(2)
    found["models"][0] |= dict.fromkeys(("model", "reference", "verdict"), name)
    session = Session(1e9, name, 10.0, 5.0, 100, 50, 0, 0, 0)
    shard = ShardRun(0, 0, name, 1, 1.0, 2.0, SPENT, 50)
    history = History("cd" * 32, (session,), (shard,), found)
    said = Page(merge_page(Seen(Merge(name, manifest(), tensors, history))))
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
    shards = [{"name": f"model-{i + 1:05d}.safetensors", "size_bytes": 1} for i in range(9000)]
    history = History("cd" * 32, SESSIONS, cluster_shards(9000), check(100))
    text = merge_page(Seen(Merge("/m/out", manifest(shards=shards), tensors, history)))
    assert len(text.encode()) < 5_000_000
    said = Page(text)
    assert said.elements["svg"] == said.elements["details"] == 7 + 2 + 1
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


def test_names_with_dollars_are_no_mathematics() -> None:
    names = ["cost_$5_to_$6", r"$\\frac{x}$", "$x$"]
    picture = HeatMap("x", "X", "…", names, ["0"], [[1.0], [2.0], [3.0]])
    assert all(name in picture.svg() for name in names)
    assert picture.png()


def test_nothing_is_drawn_of_what_was_kept_whole() -> None:
    both: Experts = [("math", 1.0), ("code", None)]
    names = {
        number: {one.name for one in deltas(Grid([(merged("up", *of), both)]))}
        for number, of in {
            "all": ((8, 8, 8, 1.0), (6, 6, 6, 2.0)),
            "elected": ((8, 8, 4, 1.0), (6, 6, 6, 2.0)),
            "dropped": ((8, 4, 4, 1.0), (6, 6, 6, 2.0)),
        }.items()
    }
    assert names["elected"] - names["all"] == {"influence"}
    assert names["dropped"] - names["all"] == {"kept", "influence"}


@pytest.mark.parametrize("scale", ["linear", "log", "signed"])
def test_colours_of_numbers_that_do_not_differ(scale: Scale) -> None:
    for values in ([[0.0, 0.0]], [[1e-3, 1e-3]], [[math.nan, 1e-9]], [[-0.5, 2.0]]):
        picture = HeatMap("x", "X", "…", ["math"], ["0", "1"], values, scale=scale)
        assert "math" in picture.svg()


def test_where_influence_survived() -> None:
    """From the columns of the table that measure it, added up over the tensors of a cell."""
    both: Experts = [("math", 0.5), ("code", None)]

    def measured(name: str, *experts: tuple[float, float | None], merged_l2: float) -> TensorRecord:
        stats = tuple(ExpertStats(8, 8, 8, norm, norm, cosine=cosine) for norm, cosine in experts)
        return record(name, TensorStats(8, 0, stats, merged_l2=merged_l2))

    grid = Grid(
        [
            (measured("layers.0.up.weight", (3.0, 0.5), (1.0, -1.0), merged_l2=2.0), both),
            (measured("layers.0.down.weight", (4.0, 1.0), (0.0, None), merged_l2=1.0), both),
        ]
    )
    expected = (0.5 * 3 * 2 + 1.0 * 4 * 1) / math.sqrt((3**2 + 4**2) * (2**2 + 1**2))
    assert grid.total.of("math").survived == pytest.approx(expected)
    assert grid.total.of("code").survived == -1.0
    drawn = {one.name: one for one in deltas(grid)}
    assert drawn["survived"].values == [[pytest.approx(expected)], [-1.0]]
    assert drawn["survived-1"].rows == ["up", "down"]
    assert drawn["survived-1"].values == [[0.5], [1.0]]
    assert drawn["survived-1"].limits == drawn["survived"].limits == (-1.0, 1.0)
    # A table without those columns has no such pictures.
    plain = Grid([(merged("layers.0.up.weight", (8, 4, 2, 3.0)), [("math", 0.5)])])
    assert not [one for one in deltas(plain) if one.name.startswith("survived")]


def test_throughput_and_workers_over_time() -> None:
    sessions = (
        Session(1000.0, "local", 10.0, 1.0, 0, 0, 0, 0, 0),
        Session(1050.0, "local", 20.0, 1.0, 0, 0, 0, 0, 0),
    )
    shards = (
        ShardRun(0, 0, "0", 1, 2.0, 7.0, SPENT, 50),
        ShardRun(1, 1, "0", 1, 0.0, 20.0, SPENT, 500),
        ShardRun(2, 1, "1", 1, 10.0, 19.9, SPENT, 5),
    )
    drawn = timeline(History("", sessions, shards, None))
    assert drawn is not None
    assert drawn.workers == ["worker 0", "worker 1"]
    lengths = [step.stop_s - step.start_s for step in drawn.steps]
    assert sum(lengths) == pytest.approx(30.0)
    assert len(lengths) == MOST_STEPS

    def total(rates: Sequence[float]) -> float:
        return sum(rate * length for rate, length in zip(rates, lengths, strict=True))

    assert [total(drawn.written), total(drawn.read)] == pytest.approx([555, 300])
    assert [total(row) for row in drawn.busy] == pytest.approx([25.0, 9.9])
    assert drawn.pauses == [(40, 40.0)]
    assert drawn.steps[40].session == 1
    _, numbers = drawn.numbers()
    found = list(numbers)
    assert found[0] == ["1, 0 ms", "0 B", "0 B", "0.0"]
    assert found[12][1:] == ["20 B", "10 B", "1.0"]
    assert "40 s later" in drawn.svg()


@pytest.mark.parametrize("sessions", [(), SESSIONS, (Session(0.0, "local", *[0] * 7),)])
def test_runs_of_no_duration(sessions: tuple[Session, ...]) -> None:
    shards = (ShardRun(0, 0, "0", 1, 0.0, 0.0, SPENT, 5),) if sessions else ()
    history = History("cd" * 32, sessions, shards, None)
    assert timeline(history) is None
    Page(merge_page(Seen(Merge("/m/out", manifest(), [], history))))


def test_many_sessions_and_clocks_that_were_set() -> None:
    """Bounded, whatever was recorded; a session that seems to begin in an earlier one is drawn."""
    sessions = tuple(
        Session(1000.0 + i, "ray", 10.0, 1.0, 0, 0, 0, 0, 0) for i in range(5 * MOST_SESSIONS)
    )
    shards = tuple(
        ShardRun(i, i % len(sessions), f"{i} on node 1", 1, 0.0, 1e9, SPENT, 50)
        for i in range(6 * MOST_WORKERS)
    )
    drawn = timeline(History("", sessions, shards, None))
    assert drawn is not None
    assert len(drawn.steps) <= MOST_STEPS + MOST_SESSIONS
    assert len(drawn.workers) == len(drawn.busy) == MOST_WORKERS
    assert len(drawn.pauses) == MOST_SESSIONS - 1
    assert {pause_s for _, pause_s in drawn.pauses} == {0.0}
    assert f"the latest {MOST_SESSIONS}" in drawn.says
    assert len(drawn.svg()) < 200_000


def test_numbers_of_actors_are_not_those_of_nodes() -> None:
    """A row is for one number; the node is named where it was the same all the time."""
    workers = ("10 on node 2", "10 on node 3", "9 on node 1", "9 on node 1", "2 on node 1")
    shards = tuple(
        ShardRun(i, i % 2, worker, 1, 1.0, 2.0, SPENT, 50) for i, worker in enumerate(workers)
    )
    drawn = timeline(History("", SESSIONS[:2], shards, None))
    assert drawn is not None
    assert drawn.workers == ["worker 2 on node 1", "worker 9 on node 1", "worker 10"]


@pytest.mark.parametrize(
    "change",
    [
        {"models": None},
        {"models": [1]},
        {"models": [{}]},
        {"pairs": [[0, 1]]},
        {"pairs": [["a", 1, 0.5, 0.5]]},
        {"pairs": [[0, 1, None, 0.5]]},
        {"pairs": [[math.inf, 1, 0.5, 0.5]]},
        {"bytes_read": "many"},
        {"num_tensors": None},
    ],
)
def test_no_comparison_of_models(change: dict[str, Any]) -> None:
    assert Similarity.of({**check(2), **change}) is None
    assert Similarity.of(None) is None
    assert "--no-check" in similarity_section(None)


def test_comparison_of_models() -> None:
    found = Similarity.of(check(3))
    assert found is not None
    cosines, agreement = found.pictures()
    assert cosines.values[0] == [1.0, -1 / 3, -2 / 3]
    assert cosines.values[2] == [-2 / 3, -1 / 3, 1.0]
    assert cosines.limits == (-2 / 3, 1.0)
    assert agreement.values[1] == [0.5, 1.0, 0.5]
    assert "0.333" in cosines.svg()
    alone = Similarity.of(check(1))
    assert alone is not None
    assert alone.pictures() == []
    assert "<td>5 %</td>" in similarity_section(found)
    assert "<td>?</td>" in similarity_section(found)  # what an earlier version did not keep


def test_pictures_of_a_card() -> None:
    pictures = [CardPicture("della_pictures/kept.png", "Kept [of *a*]", "Some <b>sentence</b>.")]
    card = "---\ntags: []\n---\n\n# Title\n\n## Recipe\n\n```yaml\na: 1\n```\n"
    once = with_pictures(card, pictures)
    assert once.count("![") == 1
    assert "Kept \\[of \\*a\\*\\]" in once
    assert "<b>" not in once
    assert with_pictures(once, pictures) == once
    assert "![" not in with_pictures(once, [])
    assert with_pictures("mine", pictures).startswith("mine\n\n<!-- della-dist pictures -->\n")
    for broken in (
        once.replace("<!-- /della-dist pictures -->", ""),
        once + "<!-- della-dist pictures -->",
        "<!-- /della-dist pictures -->\n<!-- della-dist pictures -->\n",
    ):
        with pytest.raises(ValueError, match="once each"):
            with_pictures(broken, pictures)


def test_what_is_kept_of_a_check() -> None:
    """Is JSON whatever the figures are, and has no credentials."""
    places = ("s3://key:secret@bucket/a", "/m/b")
    models = tuple(
        ModelCheck(place, "/m/base", "damaged", math.inf, 0.5, 0.5, 0.25, 3, 1, ())
        for place in places
    )
    pair = PairCheck(places, 0.25, 0.75, 0.99)
    summary = CheckSummary(models, (pair,), None, (), 3, 4, 1000, 0.5, ())
    kept = recorded(summary)
    assert "secret" not in json.dumps(kept, allow_nan=False)
    assert kept["pairs"] == [[0, 1, 0.25, 0.75]]
    found = Similarity.of(kept)
    assert found is not None
    assert list(found.names) == ["a", "b"]
    assert found.pairs == {(0, 1): (0.25, 0.75)}
    assert "<td>?</td>" in similarity_section(found)
