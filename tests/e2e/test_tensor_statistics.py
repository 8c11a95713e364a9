"""The statistics of every tensor, computed again from the files that were read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from della_dist.config import config_from_mapping
from della_dist.ops.reference import uniforms
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.checkpoints import (
    Tensor,
    load_tensors,
    make_experts,
    save_checkpoint,
    save_lora,
    tensor,
    values_of,
)
from tests.merging import config_for, run

Floats = npt.NDArray[np.floating[Any]]
Booleans = npt.NDArray[np.bool_]

WEIGHTS = (1.0, 0.75, 0.5)
SEED = 7
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
HIGH = "model.layers.1.self_attn.o_proj.weight"
WIDE = "model.layers.1.self_attn.k_proj.weight"
NORM, DOUBLE = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts of a base, with NaN, copies, and a tensor alike in all."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        UP: ("BF16", (70, 48)),
        DOWN: ("F16", (33, 129)),
        HIGH: ("BF16", (90, 20)),
        WIDE: ("BF16", (6, 200)),
        NORM: ("F32", (48,)),
        DOUBLE: ("F64", (20, 30)),
        "scale": ("BF16", ()),
        "same": ("BF16", (4, 4)),
        "empty": ("BF16", (0, 4)),
    }
    base = {
        name: tensor(rng.normal(0, 0.05, shape), dtype) for name, (dtype, shape) in shapes.items()
    }
    experts = make_experts(base, 3)
    for expert in experts:
        expert["same"] = base["same"]
    experts[1][NORM] = base[NORM]
    spoiled = values_of(experts[2][DOWN]).copy()
    spoiled[3, :5] = np.nan
    spoiled[0, 0] = np.inf
    experts[2][DOWN] = tensor(spoiled, "F16")
    config = {"model_type": "llama"}  # which axis inputs are
    for name, tensors in zip(["base", *"abc"], [base, *experts], strict=True):
        save_checkpoint(folder / name, tensors, config=config)
    return folder


def magprune(delta: Floats, name: str, m: int) -> tuple[Booleans, Floats]:
    """Keep 0.5, with an epsilon of 0.2, by the ranks of each row."""
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim else delta.reshape(1, 1)
    p: Floats = np.empty(rows.shape)
    for row, into in zip(np.abs(rows), p, strict=True):
        below = (row[:, None] > row).sum(axis=1)
        equal = (row[:, None] == row).sum(axis=1)
        into[:] = 0.3 + 0.4 * (below + (equal - 1) / 2) / max(len(row) - 1, 1)
    if rows.shape[-1] == 1:
        p[:] = 0.5
    p = p.astype(np.float32).reshape(delta.shape)
    return uniforms(SEED, name, m, delta.size).reshape(delta.shape) < p, p


def trim(delta: Floats, name: str, m: int) -> tuple[Booleans, Floats]:
    """Keep the largest 0.5 of a tensor."""
    least = np.sort(np.abs(delta).reshape(-1))[-max(1, int(0.5 * delta.size))]
    return np.abs(delta) >= least, np.ones(delta.shape)


def keep(delta: Floats, name: str, m: int) -> tuple[Booleans, Floats]:
    return np.ones(delta.shape, np.bool_), np.ones(delta.shape)


#: What is kept, whether signs are elected, and the configuration.
CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "della": (magprune, True, {"density": 0.5, "epsilon": 0.2}),
    "ties": (trim, True, {"density": 0.5}),
    "task_arithmetic": (keep, False, {"lambda": 0.6}),
    "linear": (keep, False, {}),
    "nuslerp": (keep, False, {}),
    "nearswap": (keep, False, {"t": 0.001}),
    "iso_c": (keep, False, {}),
    "wudi": (keep, False, {"side": "out"}),
    "tsv": (magprune, False, {"density": 0.5, "epsilon": 0.2}),
}


def difference(one: Tensor, other: Tensor | None, *, wide: bool) -> Floats:
    """Return what a tensor has that another has not, as the merge computes it, or the tensor."""
    number = np.float64 if wide else np.float32
    start = 0 if other is None else values_of(other).astype(number)
    return np.asarray(values_of(one).astype(number) - start)


def statistics(
    name: str,
    base: Tensor | None,
    experts: Sequence[Tensor],
    out: Tensor,
    case: tuple[Any, bool, dict[str, Any]],
) -> dict[str, Any]:
    """Return the row of a tensor."""
    kept_of, elects, parameters = case
    wide = "F64" in {t.dtype for t in experts}
    given = [difference(t, base, wide=wide) for t in experts]
    deltas = [np.where(np.isfinite(d), d, d.dtype.type(0)) for d in given]
    merged = difference(out, base, wide=wide).astype(np.float64)
    merged = np.where(np.isfinite(merged), merged, 0.0)
    parts, kept = [], []
    for m, delta in enumerate(deltas):
        kept_m, p = kept_of(delta, name, m) if delta.size else keep(delta, name, m)
        kept.append(kept_m & (delta != 0))
        part = delta.dtype.type(WEIGHTS[m]) * (delta / p.astype(delta.dtype))
        parts.append(np.where(kept_m, part, delta.dtype.type(0)))
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    signs = [(part != 0) & ((part > 0) == (total >= 0)) for part in parts]
    plus, minus = np.any([p > 0 for p in parts], axis=0), np.any([p < 0 for p in parts], axis=0)
    rows = []
    for m, delta in enumerate(deltas):
        exact = delta.astype(np.float64)
        norms = np.linalg.norm(exact) * np.linalg.norm(merged)
        rows.append(
            {
                "expert": "abc"[m],
                "density": parameters.get("density", 1.0),
                "num_nonfinite": int(np.count_nonzero(~np.isfinite(given[m]))),
                "num_nonzero": int(np.count_nonzero(delta)),
                "num_kept": int(np.count_nonzero(kept[m])),
                "num_elected": int(np.count_nonzero(signs[m] if elects else kept[m])),
                "delta_l2": float(np.linalg.norm(exact)),
                "delta_max_abs": float(np.abs(exact).max(initial=0)),
                "cosine": float(np.sum(exact * merged) / norms) if norms else None,
            }
        )
    return {
        "num_elements": merged.size,
        "num_conflicts": int(np.count_nonzero(plus & minus)),
        "merged_l2": float(np.linalg.norm(merged)),
        "merged_max_abs": float(np.abs(merged).max(initial=0)),
        "experts": rows,
    }


def assert_close(found: Any, expected: Any, where: str, rel: float = 1e-12) -> None:
    """Check that counts and names are equal, and other numbers but for how they are rounded."""
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}", rel)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{where}.{i}", rel)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=rel, abs_tol=rel), (where, found, expected)
    else:
        assert found == expected, where


def table(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of what was merged."""
    rows = pq.read_table(out / TENSORS_NAME).to_pylist()
    return {row["name"]: row for row in rows if row["num_elements"] is not None}


@pytest.mark.parametrize("method", CASES)
def test_every_column(folder: Path, tmp_path: Path, method: str) -> None:
    count = {"nearswap": 1, "nuslerp": 2}.get(method, 3)
    names, case = "abc"[:count], CASES[method]
    base = None if method == "linear" else folder / "base"
    config = config_for(
        base,
        [folder / name for name in names],
        method,
        parameters=case[2],
        seed=SEED,
        on_nonfinite="zero",
    )
    run(config, tmp_path / "out", memory_bytes=64 << 20)
    start = {} if base is None else load_tensors(base)
    experts, out = [load_tensors(folder / name) for name in names], load_tensors(tmp_path / "out")
    rows = table(tmp_path / "out")
    assert rows.keys() == out.keys()
    for name, row in rows.items():
        expected = statistics(
            name, start.get(name), [one[name] for one in experts], out[name], case
        )
        assert_close(row, expected, name)
    assert rows[DOWN]["experts"][-1]["num_nonfinite"] == (6 if count == 3 else 0)
    assert base is None or rows["same"]["experts"][0]["cosine"] is None
    cosines = [e["cosine"] for e in rows[UP]["experts"]]
    assert all(0.1 < cosine <= 1 for cosine in cosines)
    assert len(set(cosines)) == count
    assert count == 1 or rows[DOWN]["num_conflicts"] > 0


def factors_of(folder: Path, m: int) -> dict[str, tuple[Any, Any]]:
    """Return A and B of an adapter of rank 2."""
    rng = np.random.default_rng(m)
    shapes = {name: values_of(t).shape for name, t in load_tensors(folder / "base").items()}
    return {
        name.removesuffix(".weight"): (
            rng.normal(0, 0.1, (2, shapes[name][1])),
            rng.normal(0, 0.1, (shapes[name][0], 2)),
        )
        for name in (UP, WIDE, HIGH)
    }


@pytest.mark.parametrize("method", ["task_arithmetic", "wudi"])
def test_adapters(folder: Path, tmp_path: Path, method: str) -> None:
    """They are merged without ever being rounded to models, and compared so."""
    every = [factors_of(folder, m) for m in range(2)]
    for m, factors in enumerate(every):
        save_lora(tmp_path / f"lora{m}", factors, rank=2, alpha=6)
    models = [Path(f"{folder / 'base'}+{tmp_path / f'lora{m}'}") for m in range(2)]
    run(config_for(folder / "base", models, method, dtype="float32"), tmp_path / "out")
    base, out, rows = (
        load_tensors(folder / "base"),
        load_tensors(tmp_path / "out"),
        table(tmp_path / "out"),
    )
    for module in every[0]:
        name = f"{module}.weight"
        merged = difference(out[name], base[name], wide=False).astype(np.float64)
        deltas = [3.0 * b @ a for a, b in (factors[module] for factors in every)]
        expected = {
            "merged_l2": float(np.linalg.norm(merged)),
            "experts": [
                {
                    "num_nonzero": delta.size,
                    "num_kept": delta.size,
                    "delta_l2": float(np.linalg.norm(delta)),
                    "delta_max_abs": float(np.abs(delta).max()),
                    "cosine": float(
                        np.sum(delta * merged) / np.linalg.norm(delta) / np.linalg.norm(merged)
                    ),
                }
                for delta in deltas
            ],
        }
        assert_close(rows[name], expected, name, rel=1e-5)
        assert 0.3 < rows[name]["experts"][0]["cosine"] < 0.99
    # None of them changes it, so that no angle is there.
    assert [e["cosine"] for e in rows[DOWN]["experts"]] == [None, None]
    assert rows[DOWN]["merged_l2"] == 0


def test_adapters_that_are_only_added_up(folder: Path, tmp_path: Path) -> None:
    """No delta is formed: there is nothing to be measured but the norm."""
    every = [factors_of(folder, m) for m in range(2)]
    for m, factors in enumerate(every):
        save_lora(tmp_path / f"lora{m}", factors, rank=2, alpha=6)
    models = [Path(f"{folder / 'base'}+{tmp_path / f'lora{m}'}") for m in range(2)]
    config = config_for(folder / "base", models, "task_arithmetic", output={"adapter": 4})
    run(config, tmp_path / "out")
    rows = table(tmp_path / "out")
    assert len(rows) == 2 * len(every[0])
    for row in rows.values():
        assert (row["merged_l2"], row["merged_max_abs"], row["experts"]) == (None, None, [])
        assert row["norm"] > 0


def test_an_adapter_that_is_written(folder: Path, tmp_path: Path) -> None:
    """Of a matrix that is factored it is the merged delta that counts, not what factors keep."""
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in "ab"],
        "output": {"adapter": 3},
    }
    base = load_tensors(folder / "base")
    for name in ("base", "a", "b"):
        tensors = {UP: load_tensors(folder / name)[UP]}
        save_checkpoint(tmp_path / name, tensors, config={"model_type": "llama"})
    content["base_model"] = str(tmp_path / "base")
    content["models"] = [{"model": str(tmp_path / name)} for name in "ab"]
    run(config_from_mapping(content, "test"), tmp_path / "out")
    deltas = [difference(load_tensors(folder / n)[UP], base[UP], wide=True) for n in "ab"]
    merged = deltas[0] + deltas[1]
    size = float(np.linalg.norm(merged))
    cosines = [float(np.sum(d * merged) / np.linalg.norm(d) / size) for d in deltas]
    rows = table(tmp_path / "out")
    assert len(rows) == 2
    for name, row in rows.items():
        expected = {
            "norm": size,
            "merged_l2": size,
            "merged_max_abs": float(np.abs(merged).max()),
            "experts": [{"cosine": cosine} for cosine in cosines],
        }
        assert_close(row, expected, name, rel=1e-6)
        assert row["energy"] < 0.9
