"""Matrices merged by their singular values: against float64, and the same bytes everywhere."""

from __future__ import annotations

import platform
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from della_dist import RunOptions, merge, plan, verify
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, OutputError, TensorDataError, VerificationError
from della_dist.planning.balance_memory import balance_size
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime import open_plan
from della_dist.specs.sources import Balanced
from tests.checkpoints import (
    Tensor,
    load_tensors,
    make_experts,
    save_checkpoint,
    save_lora,
    tensor,
    values_of,
)
from tests.interrupting import interrupt
from tests.merging import config_for, run
from tests.same_bytes import assert_the_same_bytes
from tests.servers.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from tests.unit.test_spectral import PLAINLY

MIB = 1 << 20
WEIGHTS = (1.0, 0.75, 0.5)
UP = "model.layers.0.mlp.up_proj.weight"
METHODS = ["iso_c", "tsv"]

F64Array = npt.NDArray[np.float64]


def model(dtype: str = "BF16") -> dict[str, Tensor]:
    """Return matrices of several forms, one of a single row or column, a stack, and vectors."""
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (300, 48),
        "model.layers.0.mlp.down_proj.weight": (48, 160),
        UP: (160, 48),
        "model.layers.0.mlp.experts.w": (3, 40, 24),
        "model.layers.0.conv.weight": (16, 3, 2, 2),
        "model.layers.0.shared_expert_gate.weight": (1, 70),
        "model.layers.0.column": (70, 1),
        "model.layers.0.norm.weight": (48,),
        "model.empty": (0, 4),
        "scale": (),
    }
    return {name: tensor(rng.normal(0, 0.05, shape), dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = model()
    for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
        save_checkpoint(folder / name, tensors, config={"model_type": "llama"})
    return folder


def config(folder: Path, method: str, **keys: Any) -> MergeConfig:
    return config_for(folder / "base", [folder / name for name in "abc"], method, **keys)


def expected(folder: Path, method: str, name: str, lambda_: float) -> F64Array:
    base, *experts = (
        values_of(load_tensors(folder / n)[name]).astype(np.float64) for n in ("base", *"abc")
    )
    deltas = [one - base for one in experts]
    if base.ndim < 2 or base.size == 0:
        merged = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)) / sum(WEIGHTS)
    else:
        stack = base.shape[0] if base.ndim == 3 else 1
        rows = base.shape[0] if base.ndim != 3 else base.shape[1]
        parts = [d.reshape(stack, rows, -1) for d in deltas]
        made = [PLAINLY[method]([part[i] for part in parts], WEIGHTS) for i in range(stack)]
        merged = np.stack(made).reshape(base.shape)
    return np.asarray(base + lambda_ * merged)


@pytest.mark.parametrize("method", METHODS)
def test_against_float64(folder: Path, tmp_path: Path, method: str) -> None:
    made_by = config(folder, method, parameters={"lambda": 0.9}, dtype="float32")
    run(made_by, tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    base = load_tensors(folder / "base")
    for name in model():
        wanted = expected(folder, method, name, 0.9)
        change = np.abs(wanted - values_of(base[name])).max(initial=0.0)
        assert np.abs(values_of(made[name]) - wanted).max(initial=0.0) <= 1e-5 * change + 1e-8, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_other_dtypes(tmp_path: Path, method: str, dtype: str) -> None:
    base = model(dtype)
    for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
        save_checkpoint(tmp_path / name, tensors)
    run(config(tmp_path, method, dtype="float64"), tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    for name, stored in base.items():
        wanted = expected(tmp_path, method, name, 1.0)
        change = np.abs(wanted - values_of(stored)).max(initial=0.0)
        allowed = (1e-10 if dtype == "F64" else 1e-5) * change
        assert np.abs(values_of(made[name]) - wanted).max(initial=0.0) <= allowed, name


@pytest.mark.parametrize("method", METHODS)
def test_transposed_matrices(folder: Path, tmp_path: Path, method: str) -> None:
    """Nothing tells inputs from outputs: the bytes are those of the others, turned."""
    run(config(folder, method), tmp_path / "out")
    for name in ("base", *"abc"):
        turned = {
            key: tensor(values_of(one).T, one.dtype)
            for key, one in load_tensors(folder / name).items()
            if one.dtype == "BF16" and len(one.shape) == 2
        }
        save_checkpoint(tmp_path / name, turned)
    run(config(tmp_path, method), tmp_path / "turned")
    straight, turned = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "turned")
    assert len(turned) == 6
    for key, one in turned.items():
        assert np.array_equal(values_of(one).T, values_of(straight[key])), key


DROP = {"density": [{"filter": "mlp", "value": 0.6}, {"value": 1.0}], "epsilon": 0.1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parameters", [{}, DROP], ids=["plain", "drop"])
def test_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    method: str,
    parameters: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = config(folder, method, parameters=parameters, seed=3)
    assert_the_same_bytes(wanted, tmp_path, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_larger_matrix_do_not_show(tmp_path: Path, method: str) -> None:
    """One step of all rows where there is room, many where there is not."""
    rng = np.random.default_rng(7)
    shapes = {"tall": (6000, 150), "wide": (150, 6000)}
    base = {name: tensor(rng.normal(0, 0.05, shape), "BF16") for name, shape in shapes.items()}
    for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
        save_checkpoint(tmp_path / name, tensors)
    wanted = config(tmp_path, method)
    once = run(wanted, tmp_path / "once", memory_bytes=2048 * MIB, threads=1)
    small = run(wanted, tmp_path / "small", memory_bytes=48 * MIB, threads=2)
    assert small.model_digest == once.model_digest


@pytest.mark.ray
def test_on_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, unless a worker's LAPACK computes by other kernels than the driver's."""
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with ray_cluster(1, 2) as cluster:
        on_ray: dict[str, Any] = {"engine": "ray", "address": cluster.address, "threads": 2}
        for method in METHODS:
            once = run(config(folder, method), tmp_path / f"{method}-local")
            summary = run(config(folder, method), tmp_path / f"{method}-ray", **on_ray)
            assert summary.model_digest == once.model_digest
        kernels = "Nehalem" if platform.machine() == "x86_64" else "ARMV8"
        monkeypatch.setenv("OPENBLAS_CORETYPE", kernels)  # of the next node's processes
        cluster.add_node(num_cpus=3)
        on_ray["threads"] = 3  # only that one has
        out = tmp_path / "refused"
        with pytest.raises(ConfigError, match=rf"is another kind .* processor is .* {kernels} the"):
            run(config(folder, "tsv"), out, **on_ray)
        assert not (out / "della_manifest.json").exists()
        # Other methods have the same bytes there.
        once = run(config(folder, "wudi"), tmp_path / "wudi-local")
        summary = run(config(folder, "wudi"), tmp_path / "wudi-ray", **on_ray)
        assert summary.model_digest == once.model_digest


@pytest.mark.parametrize("method", METHODS)
def test_the_drop_comes_first(folder: Path, tmp_path: Path, method: str) -> None:
    """As if the experts had been pruned before: those of DELLA are what is merged."""
    parameters = {"density": 0.5, "epsilon": 0.1}
    wanted = config(folder, method, parameters={**parameters}, dtype="float32", seed=9)
    run(wanted, tmp_path / "out")
    base = values_of(load_tensors(folder / "base")[UP]).astype(np.float64)
    pruned = []
    for m in range(3):
        weights = [{"model": str(folder / x), "parameters": {"weight": float(i == m)}}
                   for i, x in enumerate("abc")]  # fmt: skip
        alone = config_from_mapping({
            "merge_method": "della_linear", "base_model": str(folder / "base"), "models": weights,
            "parameters": {**parameters}, "dtype": "float64", "seed": 9,
        })  # fmt: skip
        run(alone, tmp_path / f"alone{m}")
        pruned.append(values_of(load_tensors(tmp_path / f"alone{m}")[UP]) - base)
    assert 0.3 < np.mean(pruned[0] == 0) < 0.7
    merged = PLAINLY[method](pruned, WEIGHTS)
    made = values_of(load_tensors(tmp_path / "out")[UP]) - base
    assert np.abs(made - merged).max() <= 1e-4 * np.abs(merged).max()


def test_what_does_not_fit_is_refused_with_the_number(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    for name in ("base", *"abc"):
        save_checkpoint(large / name, {"w": tensor(np.zeros((1500, 1500)), "BF16")})
    with pytest.raises(ConfigError, match=r"--memory is 64 MiB, and merging w takes 2\d\d MiB: .*"):
        run(config(large, "iso_c"), tmp_path / "out", memory_bytes=64 * MIB)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="the singular values of a matrix of 1500 x 1500 numbers"):
        plan(config(large, "iso_c"), options=RunOptions(memory_bytes=64 * MIB))


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_the_base_or_damaged(folder: Path, tmp_path: Path, method: str) -> None:
    for name in "ab":
        save_checkpoint(tmp_path / name, load_tensors(folder / "base"))
    unchanged = config_for(folder / "base", [tmp_path / name for name in "ab"], method)
    run(unchanged, tmp_path / "out")
    assert load_tensors(tmp_path / "out") == load_tensors(folder / "base")
    broken = load_tensors(folder / "a")
    values = values_of(broken[UP]).astype(np.float64)
    values[3, 4], values[5, 6] = np.nan, np.inf
    broken[UP] = tensor(values, "BF16")
    save_checkpoint(tmp_path / "broken", broken)
    damaged = [tmp_path / "broken", folder / "b"]
    with pytest.raises(TensorDataError, match=r"broken: 2 of the deltas .* are NaN or infinite"):
        run(config_for(folder / "base", damaged, method), tmp_path / "refused")
    run(config_for(folder / "base", damaged, method, on_nonfinite="zero"), tmp_path / "zeroed")
    assert np.isfinite(values_of(load_tensors(tmp_path / "zeroed")[UP])).all()


@pytest.mark.parametrize("method", METHODS)
def test_adapters(folder: Path, tmp_path: Path, method: str) -> None:
    """Of low rank: what rounding leaves of the other directions is not made as large as they."""
    rng = np.random.default_rng(2)
    base = values_of(load_tensors(folder / "base")[UP]).astype(np.float64)
    deltas = []
    for m in range(3):
        a, b = rng.normal(0, 0.1, (4, 48)), rng.normal(0, 0.1, (160, 4))
        save_lora(tmp_path / f"lora{m}", {UP.removesuffix(".weight"): (a, b)}, rank=4, alpha=8)
        deltas.append(2.0 * b @ a)
    models = [Path(f"{folder / 'base'}+{tmp_path / f'lora{m}'}") for m in range(3)]
    run(config_for(folder / "base", models, method, dtype="float32"), tmp_path / "out")
    made = values_of(load_tensors(tmp_path / "out")[UP]) - base
    merged = PLAINLY[method](deltas, WEIGHTS)
    assert np.abs(made - merged).max() <= 1e-4 * np.abs(merged).max()
    assert np.linalg.matrix_rank(merged, tol=1e-6) == 12


@pytest.mark.parametrize("method", METHODS)
def test_machines_of_another_kind(
    folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan and card say what is promised, and no run goes on where digits would be others."""
    wanted = config(folder, method)
    planned = plan(wanted)
    assert any("LAPACK" in note and "machines of one kind" in note for note in planned.notes)
    run(wanted, tmp_path / "out")
    assert "the same bytes on machines of one kind" in (tmp_path / "out/README.md").read_text()
    interrupt(wanted, tmp_path / "again", after=1, shard_bytes=20_000)
    other = {"numpy": "9.9.9", "lapack": "other 1", "processor": "another"}
    monkeypatch.setattr(open_plan, "arithmetic", lambda: other)
    with pytest.raises(OutputError, match=r"numpy, on which the last digits .* was .* now .9.9.9"):
        run(wanted, tmp_path / "again", shard_bytes=20_000)
    assert len(verify(tmp_path / "out", recompute=3).recomputed) == 3
    monkeypatch.setattr("della_dist.runtime.verify.digest_tensor", lambda *given: "0" * 64)
    with pytest.raises(VerificationError, match=r"another kind of machine \(.*9\.9\.9"):
        verify(tmp_path / "out", recompute=3)


def test_stages_of_another_kind(folder: Path, tmp_path: Path) -> None:
    """What is merged of such a merge says so as well."""
    stage = {"name": "first", **config(folder, "tsv").normalized()}
    models = [{"model": "first"}, {"model": str(folder / "c")}]
    linear = {"merge_method": "linear", "models": models}
    written = tmp_path / "merge.yaml"
    written.write_text("---\n".join(yaml.safe_dump(one) for one in (stage, linear)))
    merge(str(written), str(tmp_path / "out"), RunOptions(device="cpu"))
    assert "the same bytes on machines of one kind" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_what_lapack_does_not_find(
    folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object, **keys: object) -> None:
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    with pytest.raises(TensorDataError, match=r"tensor model\..*: LAPACK finds no singular values"):
        run(config(folder, method), tmp_path / "out")


def test_as_many_are_decomposed_at_once_as_there_is_room_for(tmp_path: Path) -> None:
    for name in ("base", *"abc"):
        save_checkpoint(tmp_path / name, {"w": tensor(np.zeros((600, 500)), "BF16")})
    planned = open_plan.open_plan(config(tmp_path, "tsv"))
    source = planned.source(planned.shards[0].tensors[0])
    assert isinstance(source, Balanced)
    found = []
    for threads, allowed in ((1, 1024), (2, 1024), (8, 1024), (8, 130)):
        budget = MemoryBudget(allowed * MIB, workers=1, threads=threads)
        size = balance_size(source, lambda recipe, elements: 0, budget)
        assert size.projected_mem <= budget.block_mem
        found.append(size.together)
    assert found == [1, 2, 3, 2]


@pytest.mark.parametrize(("memory", "at_once"), [(512 * MIB, 2), (56 * MIB, 1)])
def test_workers_decompose_at_once_where_there_is_room(
    tmp_path: Path, memory: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK has one thread for a matrix: another core need not wait. Memory stays as planned."""
    rng = np.random.default_rng(6)
    base = {name: tensor(rng.normal(0, 0.05, (400, 400)), "BF16") for name in ("one", "two")}
    for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
        save_checkpoint(tmp_path / name, tensors)
    wanted = config(tmp_path, "iso_c")
    expected = run(wanted, tmp_path / "expected", workers=1)
    decompose, running, most, changed = np.linalg.svd, [0], [0], threading.Condition()

    def counted(*given: Any, **keys: Any) -> Any:
        with changed:
            running[0] += 1
            most[0] = max(most[0], running[0])
            changed.notify_all()
            changed.wait_for(lambda: most[0] == 2, timeout=10 if at_once == 2 else 0.5)
        try:
            return decompose(*given, **keys)
        finally:
            with changed:
                running[0] -= 1

    monkeypatch.setattr(np.linalg, "svd", counted)
    options: dict[str, Any] = {"threads": 2, "memory_bytes": memory, "shard_bytes": 350_000}
    planned = plan(wanted, options=RunOptions(**options))
    summary = run(wanted, tmp_path / "out", **options)
    assert planned.num_tasks == 2
    assert summary.model_digest == expected.model_digest
    assert most[0] == at_once
    alone = plan(wanted, options=RunOptions(**options, workers=1))
    assert (planned.buffers_mem > 1.5 * alone.buffers_mem) == (at_once == 2)
    assert planned.buffers_mem <= memory
