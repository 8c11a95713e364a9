"""What is tried next follows from the seed, the trials before, and how many are chosen at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from della_dist.config.auto_space import LAMBDAS, auto_space
from della_dist.config.space import TIED_TRIALS, Space
from della_dist.report.search import SearchSummary, search_lines
from della_dist.runtime.search.evaluators import Evaluation, Outcome
from della_dist.runtime.search.trials import Trials


@pytest.fixture(scope="module")
def space() -> Space:
    """Return what ``--auto`` opens of two experts, one of which is negated."""
    models = [
        {"model": f"/m/{name}", "parameters": {"weight": weight}}
        for name, weight in (("math", 0.5), ("code", -0.8))
    ]
    document = {"merge_method": "task_arithmetic", "base_model": "/m/base", "models": models}
    return auto_space(document, "merge.yaml", ["l.0.self_attn.q", "l.0.mlp.up", "norm"])


def tried(space: Space, path: Path, count: int, at_once: int, seed: int = 0) -> list[list[float]]:
    """Return the values of some trials, in order."""
    trials = Trials(path, space, {"seed": seed})
    trials.at_once = at_once
    while len(trials.ended) < count:
        for one in trials.begin()[: count - len(trials.ended)]:
            values = [float(value or 0) for value in one.values.values()]
            trials.end(one, Outcome(0.1, Evaluation(-sum((v - 0.7) ** 2 for v in values), {})))
    return [list(one.params.values()) for one in trials.ended]


def test_lambda_then_weights_then_kinds(space: Space, tmp_path: Path) -> None:
    num_tied = 1 + len(LAMBDAS) + TIED_TRIALS * 3
    found = tried(space, tmp_path / "journal", num_tied + 3, 1)
    assert found[0] == [0.5] * 3 + [-0.8] * 3 + [1.0]
    assert found[1 : 1 + len(LAMBDAS)] == [[*found[0][:-1], times] for times in LAMBDAS]
    for math, b, c, code, e, f, _ in found[1 + len(LAMBDAS) : num_tied]:
        assert (b, c, e, f) == pytest.approx((math, math, code, code), abs=1e-15)
        assert 0 <= math <= 1
        assert -1.6 <= code <= 0
    assert len({one[0] for one in found[1 + len(LAMBDAS) : num_tied]}) == TIED_TRIALS * 3
    for math, b, c, code, e, f, _ in found[num_tied:]:
        assert len({math, b, c}) == len({code, e, f}) == 3


def test_as_many_at_once(space: Space, tmp_path: Path) -> None:
    """They know nothing of each other; how often a search goes on has no effect."""
    one, four = (tried(space, tmp_path / f"{k}", 20, k) for k in (1, 4))
    assert one[:10] == four[:10]  # random ones
    assert one != four
    for count in (3, 4, 11, 14):
        assert tried(space, tmp_path / "in parts", count, 4) == four[:count]
    assert tried(space, tmp_path / "in parts", 20, 4) == four
    assert tried(space, tmp_path / "seed", 20, 4, 1)[10:] != four[10:]


def test_what_did_better_than_the_best_is_said() -> None:
    """On items that no trial saw; the base and the experts are no merges."""
    scores: dict[str, dict[str, float | None]] = {
        "base": {"a": 0.0, "b": 0.0},
        "math": {"a": 2.0, "b": 2.0},
        "task arithmetic, lambda 1": {"a": 0.9, "b": 0.9},
        "first": {"a": 0.9, "b": None},
        "best": {"a": 0.7, "b": 1.0},
    }
    found = SearchSummary("OUT", "best.yaml", 1.0, {}, None, (), "ab", held_out=scores)
    (said,) = (line for line in search_lines(found) if "did better" in line)
    assert said.startswith("On these items task arithmetic, lambda 1 did better than the best")
    scores["best"]["a"] = 0.8
    assert not any("did better" in line for line in search_lines(found))
