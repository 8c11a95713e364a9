"""What is looked at of models that are too large to be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import della_dist
from della_dist.config import config_from_mapping, load_config
from della_dist.planning.build import MergePlan
from della_dist.planning.sampling import (
    BLOCK_ELEMENTS,
    MOST_TENSORS,
    Sample,
    kind_of,
    sampled,
)
from della_dist.runtime.open_plan import open_plan
from della_dist.specs.dtypes import num_elements
from tests.sparse import link_checkpoint, llama_shapes, save_configuration, save_sparse

MIB = 1 << 20
#: 70 B parameters, 724 tensors.
SHAPES = llama_shapes(hidden=8192, intermediate=28672, layers=80, vocab=32000)
NUM_SHARDS, NUM_EXPERTS = 30, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    base = save_sparse(folder / "base", SHAPES, num_shards=NUM_SHARDS)
    experts = [link_checkpoint(base, folder / f"expert{m}") for m in range(NUM_EXPERTS)]
    return save_configuration(folder / "merge.yaml", base, experts)


@pytest.fixture(scope="module")
def plan(config: Path) -> MergePlan:
    return open_plan(load_config(config), with_content=False)


def bytes_of(samples: tuple[Sample, ...]) -> int:
    return sum(s.num_elements for s in samples) * 2 * (1 + NUM_EXPERTS)


@pytest.mark.parametrize("budget", [MIB, 4 * MIB, 16 * MIB, 256 * MIB])
def test_as_much_as_is_allowed_of_everything(plan: MergePlan, budget: int) -> None:
    samples = sampled(plan, budget)
    assert samples == sampled(plan, budget)
    assert 0.8 * budget < bytes_of(samples) <= budget
    kinds = {kind_of(name) for name in SHAPES}
    assert {s.kind for s in samples} == kinds
    if budget >= 4 * MIB:
        files = {file for s in samples for file in s.files}
        of_model = {entry.shard for entry in plan.experts[0].tensors.values()}
        assert files == {(i, shard) for i in range(1 + NUM_EXPERTS) for shard in of_model}
    layers = sorted({int(s.layer.rpartition(".")[2]) for s in samples if s.layer})
    assert max(b - a for a, b in pairwise([-1, *layers, 80])) <= 320 * MIB // (8 * budget) + 2


def test_blocks_of_a_sample(plan: MergePlan) -> None:
    total: dict[str, float] = {}
    for s in sampled(plan, 256 * MIB):
        assert s.spans[0][0] >= 0
        assert s.spans[-1][1] <= num_elements(s.shape)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(s.spans))
        assert s.is_matrix == (len(s.shape) == 2)
        if s.is_matrix:
            assert {stop - start for start, stop in s.spans} == {BLOCK_ELEMENTS}
            assert len(s.spans) > 1
        else:
            assert s.spans == ((0, 8192),)
        total[s.kind] = total.get(s.kind, 0) + s.weight * s.num_elements
    for kind, count in total.items():
        assert count == pytest.approx(
            sum(num_elements(shape) for name, shape in SHAPES.items() if kind_of(name) == kind)
        )


def test_no_more_is_read(config: Path) -> None:
    found = della_dist.check(config, sample_bytes=2 * MIB)
    assert MIB < found.bytes_read <= 2 * MIB
    assert found.num_compared == len(SHAPES)
    assert {model.verdict for model in found.models} == {"copy"}  # all of them are zeros


def test_small_models_are_read_whole(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (300, 500), "b": (200_001,), "c": (), "d": (0, 3)}
    paths = [str(save_sparse(tmp_path / name, shapes)) for name in ("base", "expert")]
    content: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": paths[0],
        "models": [{"model": paths[1]}],
    }
    samples = sampled(open_plan(config_from_mapping(content)), MIB * 4)
    assert {s.name: s.num_elements for s in samples} == {"a": 150_000, "b": 200_001, "c": 1}
    assert all(s.spans[0][0] == 0 and s.weight == 1 for s in samples)
    assert all(a[1] == b[0] for s in samples for a, b in pairwise(s.spans))


def test_kinds() -> None:
    assert (
        kind_of("model.layers.12.mlp.experts.3.w1.weight")
        == "model.layers.*.mlp.experts.*.w1.weight"
    )
    assert kind_of("h.0.ln_1.weight") == "h.*.ln_1.weight"
    assert kind_of("1.x2.3") == "*.x2.*"


def test_views_count_as_what_they_are_views_of(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        tensors = {f"layers.{i}.weight": torch.zeros(1024, 512).T for i in range(8)}
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
    content: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "expert")}],
    }
    samples = sampled(open_plan(config_from_mapping(content)), 9 * MIB)
    assert [len(s.spans) for s in samples] == [1, 1]  # of each, 2 MiB of every model


def test_many_small_tensors(tmp_path: Path) -> None:
    """A part of them, of all kinds: each that is looked at takes memory."""
    shapes = {
        f"model.layers.{i // 100}.mlp.experts.{i % 100}.{kind}.weight": (4, 4)
        for i in range(1500)
        for kind in ("up_proj", "down_proj")
    }
    base = save_sparse(tmp_path / "base", shapes, num_shards=3)
    experts = [link_checkpoint(base, tmp_path / f"expert{m}") for m in range(2)]
    config = save_configuration(tmp_path / "merge.yaml", base, experts)
    samples = sampled(open_plan(load_config(config), with_content=False), 256 * MIB)
    assert len(samples) == MOST_TENSORS < len(shapes)
    kinds = [s.kind for s in samples]
    assert abs(kinds.count(kinds[0]) - MOST_TENSORS // 2) <= 1
    assert {file[1] for s in samples for file in s.files} == {0, 1, 2}
