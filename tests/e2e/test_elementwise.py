"""Merges by mergekit's smaller methods: what each does, interrupted, continued, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist import plan
from della_dist.config import METHODS, MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, OutputError, TensorDataError
from della_dist.runtime.verify import verify
from tests.adapters import save_adapters_and_models
from tests.checkpoints import Tensor, load_tensors, save_checkpoint, tensor, values_of
from tests.interrupting import interrupt
from tests.merging import config_for, expected_tensors, run, save_family

#: Parameters, and others with which an unfinished merge must not be continued.
PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "breadcrumbs": ({"density": 0.5, "gamma": 0.2}, {"gamma": 0.3}),
    "breadcrumbs_ties": ({"density": 0.5, "gamma": 0.2}, {"density": 0.4}),
    "nearswap": ({"t": [0.001, 0.01]}, {"t": 0.001}),
    "arcee_fusion": ({}, {}),
    "sce": ({"select_topk": 0.4}, {"select_topk": [0.4, 0.5]}),
    "ram": ({"epsilon": 0.001}, {"epsilon": 0.002}),
    "ramplus_tl": ({"epsilon": 0.001}, {"r": 0.2}),
}


def configured(base: Path, experts: list[Path], method: str, **parameters: Any) -> MergeConfig:
    count = METHODS[method].num_models or 3
    given = {**PARAMETERS[method][0], **parameters}
    return config_for(base, experts[:count], method, parameters=given)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return save_family(tmp_path_factory.mktemp("family"), config={"model_type": "llama"})


@pytest.mark.parametrize("method", PARAMETERS)
def test_an_interrupted_merge_is_continued(
    family: tuple[Path, list[Path]], tmp_path: Path, method: str
) -> None:
    """To the bytes of the reference."""
    config = configured(*family, method)
    interrupt(config, tmp_path / "out", after=2, shard_bytes=100_000)
    changed = PARAMETERS[method][1]
    if changed:
        with pytest.raises(OutputError, match=rf"parameters\.({'|'.join(changed)}) was"):
            run(configured(*family, method, **changed), tmp_path / "out", shard_bytes=100_000)
    summary = run(config, tmp_path / "out", shard_bytes=100_000)
    assert summary.tasks_resumed == 2
    merged = load_tensors(tmp_path / "out")
    assert {n: t.data for n, t in merged.items()} == expected_tensors(config)
    assert len(verify(str(tmp_path / "out"), recompute=4).recomputed) == 4


@pytest.mark.parametrize("method", PARAMETERS)
def test_what_is_read_is_known(
    family: tuple[Path, list[Path]], tmp_path: Path, method: str
) -> None:
    config = configured(*family, method)
    said = plan(config)
    summary = run(config, tmp_path / "out")
    assert said.bytes_to_read <= summary.bytes_read <= said.most_bytes_to_read


@pytest.mark.parametrize("method", PARAMETERS)
def test_the_card_names_method_and_paper(
    family: tuple[Path, list[Path]], tmp_path: Path, method: str
) -> None:
    run(configured(*family, method), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"Merged by {METHODS[method].title} " in text
    assert all(f"arXiv {paper}" in text for paper in METHODS[method].papers)
    manifest = json.loads((tmp_path / "out" / "della_manifest.json").read_text())
    assert manifest["config"]["merge_method"] == method
    assert config_from_mapping(manifest["config"]).normalized() == manifest["config"]


@pytest.mark.parametrize("method", PARAMETERS)
def test_adapters_are_deltas(tmp_path: Path, method: str) -> None:
    """As their models are that they were merged into before, in F32."""
    base, given, full = save_adapters_and_models(tmp_path)
    for name, experts in (("given", given), ("full", full)):
        run(configured(base, experts, method), tmp_path / name)
    one, other, start = (load_tensors(p) for p in (tmp_path / "given", tmp_path / "full", base))
    assert one.keys() == other.keys()
    moved = apart = total = 0.0
    for name in one:
        a, b, c = (values_of(t[name]).astype(np.float64) for t in (one, other, start))
        # Roundings may take an element over a bound, and no further.
        apart += float(np.count_nonzero(np.abs(a - b) > 2e-6))
        total += a.size
        moved = max(moved, float(np.abs(a - c).max()))
    assert moved > 1e-3
    assert apart < 1e-3 * total


def saved(folder: Path, **numbers: Any) -> Path:
    """Write a checkpoint of F32 tensors, whole numbers as I64."""
    tensors: dict[str, Tensor] = {}
    for name, values in numbers.items():
        array = np.array(values)
        tensors[name] = tensor(array, "I64" if array.dtype.kind == "i" else "F32")
    return save_checkpoint(folder, tensors)


ODD: dict[str, Any] = {
    "one": 0.5,
    "empty": np.zeros((0, 3)),
    "same": [[1.5] * 40] * 3,
    "counts": [1, 2, 3],
    "row": np.linspace(-1, 1, 30),
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_odd_tensors(tmp_path: Path, method: str) -> None:
    """Scalars, tensors without elements, equal ones, integers: the base where nothing differs."""
    base = saved(tmp_path / "base", **ODD)
    experts = [saved(tmp_path / f"e{m}", **{**ODD, "row": ODD["row"] * m}) for m in range(1, 4)]
    experts[0] = saved(tmp_path / "other", **{**ODD, "one": 0.75, "same": [[1.75] * 40] * 3})
    config = configured(base, experts, method)
    run(config, tmp_path / "out")
    merged = load_tensors(tmp_path / "out")
    assert {n: t.data for n, t in merged.items()} == expected_tensors(config)
    assert values_of(merged["counts"]).tolist() == [1, 2, 3]
    alike = configured(base, [saved(tmp_path / f"s{m}", **ODD) for m in range(3)], method)
    run(alike, tmp_path / "alike")
    start = load_tensors(base)
    assert {n: t.data for n, t in load_tensors(tmp_path / "alike").items()} == {
        n: t.data for n, t in start.items()
    }


@pytest.mark.parametrize("method", PARAMETERS)
def test_infinite_numbers_are_refused_or_count_as_zero(tmp_path: Path, method: str) -> None:
    base = saved(tmp_path / "base", w=[[1.0] * 8] * 4)
    wrong = np.random.default_rng(0).normal(1, 0.1, (4, 8))
    wrong[1, 2], wrong[3, 0] = np.nan, np.inf
    experts = [saved(tmp_path / f"e{m}", w=wrong + m / 16) for m in range(3)]
    config = configured(base, experts, method)
    with pytest.raises(TensorDataError, match=r"tensor w of .*e0: 2 of the deltas"):
        run(config, tmp_path / "refused")
    parameters = PARAMETERS[method][0]
    count = METHODS[method].num_models or 3
    zero = config_for(base, experts[:count], method, parameters=parameters, on_nonfinite="zero")
    run(zero, tmp_path / "out")
    (found,) = load_tensors(tmp_path / "out").values()
    assert found.data == expected_tensors(zero)["w"]
    assert (values_of(found)[1, 2], values_of(found)[3, 0]) == (1, 1)
    assert np.isfinite(values_of(found)).all()
    assert (values_of(found) != 1).any()


# ---------------------------------------------------------------- what each method does


def merged_row(folder: Path, method: str, deltas: list[list[float]], **parameters: Any) -> Any:
    """Merge experts of one row, over a base of ones, and return what the row differs by."""
    base = saved(folder / "base", w=[[1.0] * len(deltas[0])])
    experts = [saved(folder / f"e{m}", w=[1 + np.array(d)]) for m, d in enumerate(deltas)]
    models = [{"model": str(e)} for e in experts]
    run(config_for(base, experts, method, models=models, parameters=parameters), folder / "out")
    return (values_of(load_tensors(folder / "out")["w"])[0] - 1).tolist()


def test_breadcrumbs_drop_the_smallest_and_the_largest(tmp_path: Path) -> None:
    delta = [0.125, -0.25, 0.5, -1.0, 2.0, -4.0, 0.375, 0.0, 3.0, 0.0625]
    kept = [0.125, -0.25, 0.5, -1.0, 2.0, 0, 0.375, 0, 0, 0]
    how: dict[str, Any] = {"density": 0.6, "gamma": 0.2, "weight": 0.5}
    found = merged_row(tmp_path / "one", "breadcrumbs", [delta], **how)
    assert found == [x / 2 for x in kept]
    both = merged_row(tmp_path / "two", "breadcrumbs_ties", [delta, [-x / 2 for x in delta]], **how)
    assert both == [x / 2 for x in kept]
    ties = [2.0, 2.0, 1.0, 1.0, -1.0, 0.5, 0.5, 0.5, 0.25, 0.0]
    equal = merged_row(tmp_path / "three", "breadcrumbs", [ties], density=0.4, gamma=0.2)
    assert equal == [0, 0, 1, 1, -1, 0.5, 0.5, 0.5, 0, 0]  # four, and what equals the least


def test_nearswap_goes_as_far_as_it_may(tmp_path: Path) -> None:
    delta = [0.0, 0.125, -0.25, 0.5, -4.0]
    assert merged_row(tmp_path, "nearswap", [delta], t=0.25) == [0, 0.125, -0.25, 0.25, -0.25]
    assert merged_row(tmp_path / "not", "nearswap", [delta], t=0) == [0] * 5


def test_arcee_fusion_takes_what_is_important(tmp_path: Path) -> None:
    """Beside the formula in float64: what moved the most in the row that moved the most."""
    rng = np.random.default_rng(3)
    base = rng.normal(0, 1, (6, 50)).astype(np.float32)
    moved = base + rng.normal(0, 0.1, base.shape).astype(np.float32) * np.arange(6)[:, None]
    run(
        config_for(
            saved(tmp_path / "base", w=base), [saved(tmp_path / "e", w=moved)], "arcee_fusion"
        ),
        tmp_path / "out",
    )
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) + 1e-8
            for x in (moved.astype(np.float64), base.astype(np.float64)))  # fmt: skip
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    importance = np.abs((moved - base).astype(np.float64)) * divergence
    low, middle, high = np.sort(importance.ravel())[[74, 149, 224]]
    is_taken = importance >= middle + 1.5 * (high - low)
    found = values_of(load_tensors(tmp_path / "out")["w"])
    assert 0 < is_taken.sum() < 60
    assert (found != base).tolist() == is_taken.tolist()
    assert np.abs(found - np.where(is_taken, moved, base)).max() < 1e-6


def test_what_one_model_and_the_base_make(tmp_path: Path) -> None:
    """Without its own rows arcee_fusion has no divergences: an adapter of it cannot be written."""
    for method, given in (("nearswap", {"t": 0.1}), ("arcee_fusion", {})):
        content = {"merge_method": method, "base_model": "b", "parameters": given}
        models = [{"model": "b"}, {"model": "e"}]
        assert len(config_from_mapping({**content, "models": models}).models) == 1
        both = {**content, "models": [{"model": "e"}, {"model": "f"}]}
        with pytest.raises(ConfigError, match=rf"`models` lists 2; {method} takes 1\."):
            config_from_mapping(both)
        with pytest.raises(ConfigError, match="base_model` is missing"):
            config_from_mapping({**content, "models": models, "base_model": None})
    with pytest.raises(ConfigError, match="does not go with arcee_fusion, which compares the rows"):
        config_from_mapping({**content, "models": models, "output": {"adapter": 4}})
    assert (
        config_from_mapping({**content, "models": models})
        .notes()[-1]
        .startswith("arcee_fusion: quartiles are those of all elements")
    )


def test_sce_selects_calculates_and_erases(tmp_path: Path) -> None:
    """Of eight elements at which the experts differ, the three at which they do most, and ties."""
    one = [1.0, -2.0, 0.5, 0.0, 3.0, 0.25, 0.125, 0.5, 1.0, -1.0]
    other = [-2.0, -1.0, -1.0, 0.25, 3.0, -1.0, 0.25, -1.0, 1.0, 1.0]
    found = merged_row(tmp_path, "sce", [one, other], select_topk=0.4)
    variances = np.var([one, other], axis=0)
    assert np.count_nonzero(variances) == 8
    kept = variances >= np.sort(variances)[-3]
    assert kept.sum() == 4  # int(0.4 * 8) is 3, and two are equal
    a, b = (np.where(kept, x, 0.0) for x in (one, other))
    energies = np.array([(a**2).sum(), (b**2).sum()])
    weights = energies / energies.sum()
    is_plus = a + b >= 0
    agree = [(x != 0) & ((x > 0) == is_plus) for x in (a, b)]
    total = sum(w * x * y for w, x, y in zip(weights, (a, b), agree, strict=True))
    divisor = sum(w * y for w, y in zip(weights, agree, strict=True))
    expected = np.divide(total, divisor, out=np.zeros(10), where=divisor != 0)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    everything = merged_row(tmp_path / "all", "sce", [one, other])
    assert everything[4] == pytest.approx(3.0)
    assert merged_row(tmp_path / "none", "sce", [one, other], select_topk=0) == [0] * 10
    assert merged_row(tmp_path / "alone", "sce", [one], select_topk=0.5) == [0] * 10
    assert merged_row(tmp_path / "same", "sce", [one]) == one


def test_ram_takes_the_mean_of_what_there_is(tmp_path: Path) -> None:
    deltas = [
        [1.0, 0.0, 4.0, 0.125, 0.0, -1.0],
        [0.0, 2.0, 2.0, 0.125, 0.0, 1.0],
        [0.0, 0.0, 3.0, -0.125, 0.25, 0.0],
    ]
    how: dict[str, Any] = {"epsilon": 0.125}
    plain = [1, 2, 3, 0, 0.25, 0]
    assert merged_row(tmp_path / "ram", "ram", deltas, **how) == plain
    # 2, 2 and 1 of the experts' changes are shared, 1 of each is not.
    more = merged_row(tmp_path / "more", "ramplus_tl", deltas, **how, r=0.5, alpha=1.5)
    assert more == [1.75, 3.5, 3, 0, 0.375, 0]
    assert merged_row(tmp_path / "not", "ramplus_tl", deltas, **how, r=0, alpha=1.5) == plain
    two = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.5]]
    # All changes of the first are shared: nothing of it counts more.
    assert merged_row(tmp_path / "two", "ramplus_tl", two, r=1, alpha=4) == [1, 1, 0, 1.5]
