"""Merges by weights that follow from angles: adapters, interruptions, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist import plan
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import OutputError, TensorDataError
from della_dist.runtime.verify import verify
from tests.adapters import save_adapter, save_adapters_and_models, save_llama
from tests.checkpoints import Tensor, load_tensors, save_checkpoint, tensor, values_of
from tests.interrupting import interrupt
from tests.merging import config_for, run, save_family

METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nuslerp": {"nuslerp_flatten": False},
    "multislerp": {"normalize_weights": False},
    "karcher": {"max_iter": 4},
    "model_stock": {"filter_wise": True},
}


def configured(base: Path, experts: list[Path], method: str, **parameters: Any) -> MergeConfig:
    count = {"slerp": 1, "nuslerp": 2}.get(method, 3)
    return config_for(base, experts[:count], method, parameters={**METHODS[method], **parameters})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return save_family(tmp_path_factory.mktemp("family"), config={"model_type": "llama"})


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_merge_is_continued(
    family: tuple[Path, list[Path]], tmp_path: Path, method: str
) -> None:
    config = configured(*family, method)
    whole = run(config, tmp_path / "whole", shard_bytes=100_000)
    interrupt(config, tmp_path / "out", after=2, shard_bytes=100_000)
    other: dict[str, dict[str, Any]] = {
        "slerp": {"t": 0.4},
        "nuslerp": {"nuslerp_flatten": True},
        "multislerp": {"eps": 0.1},
        "karcher": {"max_iter": 5},
        "model_stock": {"filter_wise": False},
    }
    changed = other[method]
    with pytest.raises(OutputError, match=rf"parameters\.({'|'.join(changed)}) was"):
        run(configured(*family, method, **changed), tmp_path / "out", shard_bytes=100_000)
    summary = run(config, tmp_path / "out", shard_bytes=100_000)
    assert summary.tasks_resumed == 2
    assert summary.model_digest == whole.model_digest
    assert len(verify(str(tmp_path / "out"), recompute=4).recomputed) == 4


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_is_known(
    family: tuple[Path, list[Path]], tmp_path: Path, method: str
) -> None:
    config = configured(*family, method)
    said = plan(config)
    summary = run(config, tmp_path / "out")
    assert summary.bytes_read == said.bytes_to_read == said.most_bytes_to_read
    whole = plan(configured(*family, method, nuslerp_flatten=True, filter_wise=False))
    twice = method in ("nuslerp", "model_stock")  # of whole tensors; of rows, once
    assert (whole.bytes_to_read > 1.9 * said.bytes_to_read) == twice


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "model_stock"])
def test_adapters_are_deltas(tmp_path: Path, method: str) -> None:
    """As their models are that they were merged into before, which are rounded a little."""
    base, given, full = save_adapters_and_models(tmp_path)
    for name, experts in (("given", given), ("full", full)):
        run(configured(base, experts, method), tmp_path / name)
    one, other = (load_tensors(tmp_path / name) for name in ("given", "full"))
    assert one.keys() == other.keys()
    start = load_tensors(base)
    moved = 0.0
    for name in one:
        a, b, c = (values_of(t[name]).astype(np.float64) for t in (one, other, start))
        assert np.abs(a - b).max() < 2e-6, name
        moved = max(moved, float(np.abs(a - c).max()))
    assert moved > 1e-3


def test_slerp_of_a_model_and_its_adapter(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    save_adapter(base, tmp_path / "a")
    content = {
        "merge_method": "slerp",
        "base_model": str(base),
        "models": [{"model": f"{base}+{tmp_path / 'a'}"}],
        "parameters": {"t": 1},
    }
    run(config_from_mapping(content), tmp_path / "out")
    whole = {"merge_method": "passthrough", "models": content["models"]}
    run(config_from_mapping(whole), tmp_path / "full")
    ends = (load_tensors(tmp_path / name) for name in ("out", "full"))
    assert {n: t.data for n, t in next(ends).items()} == {n: t.data for n, t in next(ends).items()}


def three(folder: Path, *experts: list[float]) -> tuple[Path, list[Path]]:
    """Write a base of zeros and experts that have these numbers, in one tensor."""

    def saved(name: str, numbers: list[float]) -> Path:
        tensors: dict[str, Tensor] = {"w": tensor(np.array([numbers]), "F32")}
        return save_checkpoint(folder / name, tensors)

    base = saved("base", [0.0] * len(experts[0]))
    return base, [saved(f"e{m}", numbers) for m, numbers in enumerate(experts)]


def test_directions_that_cancel_are_named(tmp_path: Path) -> None:
    base, experts = three(tmp_path, [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0])
    config = config_for(
        base, experts, "multislerp", parameters={"weight": 1.0}, models=[
            {"model": str(e)} for e in experts
        ],
    )  # fmt: skip
    with pytest.raises(TensorDataError, match="tensor 'w': the weighted directions of the experts"):
        run(config, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_infinite_numbers_are_refused_or_count_as_zero(tmp_path: Path) -> None:
    base, experts = three(tmp_path, [1.0, float("nan")], [0.0, 1.0], [0.0, 0.0])
    for method in ("multislerp", "nuslerp"):
        config = configured(base, experts, method)
        with pytest.raises(TensorDataError, match=r"tensor w of .*e0: 1 of the deltas"):
            run(config, tmp_path / f"{method}-refused")
    config = config_for(base, experts[:2], "nuslerp", on_nonfinite="zero", models=[
        {"model": str(e)} for e in experts[:2]
    ])  # fmt: skip
    run(config, tmp_path / "out")
    (found,) = load_tensors(tmp_path / "out").values()
    assert values_of(found).ravel().tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_the_card_names_method_and_paper(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    for method, said in (
        ("model_stock", "Model Stock ([arXiv 2403.19522]"),
        ("karcher", "the Karcher mean ([arXiv 2603.04972]"),
        ("slerp", "spherical interpolation with"),
    ):
        out = tmp_path / method
        run(configured(*family, method), out)
        assert f"Merged by {said}" in (out / "README.md").read_text()
        manifest = json.loads((out / "della_manifest.json").read_text())
        assert method in json.dumps(manifest)
