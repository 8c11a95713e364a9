"""The streamed pipeline equals the plain whole-tensor reference, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import load_tensors, tensor
from tests.merging import config_for, expected_tensors, run, save_family

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("della", {"parameters": {"density": 0.3, "epsilon": 0.2}}),
    ("della", {"parameters": {"density": 0.5, "normalize": False, "lambda": 0.7}}),
    ("della", {"parameters": {"density": 0.6}, "granularity": "tensor"}),
    ("della", {"parameters": {"density": 0.6}, "rescale": "l1"}),
    ("della", {"parameters": {"density": 1.0}}),
    ("della_linear", {"parameters": {"density": 0.4}, "rescale": "none"}),
    ("dare_ties", {"parameters": {"density": 0.1}}),
    ("dare_linear", {"parameters": {"density": 0.7}}),
    ("ties", {"parameters": {"density": 0.2}}),
    ("ties", {"parameters": {"density": 0.45}, "rescale": "l1"}),
    ("breadcrumbs", {"parameters": {"density": 0.2, "gamma": 0.1}}),
    ("breadcrumbs_ties", {"parameters": {"density": 0.45, "gamma": 0.02}, "rescale": "l1"}),
    ("task_arithmetic", {"parameters": {"lambda": -0.5}}),
    ("linear", {}),
]


#: Of methods whose weights follow from angles: how many experts they are given, a base or none.
ANGLES: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("slerp", 1, True, {"t": [0.2, 0.9]}),
    ("nuslerp", 2, False, {}),
    ("nuslerp", 2, True, {"nuslerp_flatten": False}),
    ("multislerp", 3, False, {"normalize_weights": False}),
    ("multislerp", 2, True, {"eps": 0.01}),
    ("karcher", 3, False, {"max_iter": 3}),
    ("model_stock", 3, True, {}),
    ("model_stock", 2, True, {"filter_wise": True}),
]


@pytest.mark.parametrize(("method", "count", "has_base", "parameters"), ANGLES)
def test_weights_of_angles_equal_reference(
    tmp_path: Path, method: str, count: int, has_base: bool, parameters: dict[str, Any]
) -> None:
    base, experts = save_family(tmp_path, num_experts=count, num_shards=2)
    config = config_for(base if has_base else None, experts, method, parameters=parameters)
    run(config, tmp_path / "out", memory_bytes=32 << 20, shard_bytes=200_000)
    merged = load_tensors(tmp_path / "out")
    assert {n: t.data for n, t in merged.items()} == expected_tensors(config)


@pytest.mark.parametrize(("method", "keys"), METHODS, ids=lambda v: v if isinstance(v, str) else "")
def test_output_equals_reference(tmp_path: Path, method: str, keys: dict[str, Any]) -> None:
    base, experts = save_family(tmp_path, num_shards=2)
    config = config_for(None if method == "linear" else base, experts, method, **keys)
    run(config, tmp_path / "out", memory_bytes=32 << 20, shard_bytes=200_000)
    merged = load_tensors(tmp_path / "out")
    expected = expected_tensors(config)
    assert merged.keys() == expected.keys()
    for name, data in expected.items():
        assert merged[name].data == data, name


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_out_dtype(tmp_path: Path, out_dtype: str) -> None:
    base, experts = save_family(tmp_path)
    config = config_for(base, experts, out_dtype=out_dtype)
    run(config, tmp_path / "out")
    merged = load_tensors(tmp_path / "out")
    for name, data in expected_tensors(config).items():
        assert merged[name].data == data, name
    assert merged["token_types"].dtype == "I64"
    assert merged["scale"].dtype == {"float16": "F16", "bfloat16": "BF16"}.get(
        out_dtype, f"F{out_dtype[-2:]}"
    )


def test_one_expert_and_eight(tmp_path: Path) -> None:
    for count in (1, 8):
        folder = tmp_path / str(count)
        base, experts = save_family(folder, num_experts=count)
        config = config_for(base, experts, parameters={"density": 0.5})
        run(config, folder / "out")
        merged = load_tensors(folder / "out")
        for name, data in expected_tensors(config).items():
            assert merged[name].data == data, name


def test_large_rows_are_cut_at_units(tmp_path: Path) -> None:
    # Rows of 70,000 elements and a vector of 3 M: several blocks at the smallest budget.
    values = tensor([[0.25] * 70_000] * 40, "BF16")
    vector = tensor([0.5] * 3_000_000, "BF16")
    base, experts = save_family(tmp_path, {"rows": values, "vector": vector}, num_experts=2)
    config = config_for(base, experts, "dare_ties", parameters={"density": 0.5})
    run(config, tmp_path / "out", memory_bytes=32 << 20)
    merged = load_tensors(tmp_path / "out")
    for name, data in expected_tensors(config).items():
        assert merged[name].data == data, name
