"""Matrices merged as a whole: against float64, the same bytes however they are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from della_dist import RunOptions, plan, verify
from della_dist.config import MergeConfig, config_from_mapping, scalars
from della_dist.errors import ConfigError, InputError, OutputError, TensorDataError
from della_dist.planning import fingerprint
from della_dist.storage.readahead import ReadAhead, RemoteReader
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
from tests.remote import upload
from tests.same_bytes import assert_the_same_bytes
from tests.servers.ray_cluster import RAY_ENVIRONMENT, ray_cluster

MIB = 1 << 20
WEIGHTS = (1.0, 0.75, 0.5)

F64Array = npt.NDArray[np.float64]

EMBEDDING, STACK = "model.embed_tokens.weight", "model.layers.0.mlp.experts.w"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def model(dtype: str = "BF16") -> dict[str, Tensor]:
    """Return matrices of several forms, a stack of them, and vectors."""
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (200, 48),
        DOWN: (48, 160),
        UP: (160, 48),
        STACK: (3, 40, 24),
        "model.layers.0.mlp.experts.wide": (2, 6, 40),
        "model.layers.0.conv.weight": (16, 3, 2, 2),
        "model.layers.0.norm.weight": (48,),
        "model.empty": (0, 4),
        "scale": (),
    }
    return {name: tensor(rng.normal(0, 0.05, shape), dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = model()
    config = {"model_type": "llama"}
    for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
        save_checkpoint(folder / name, tensors, config=config)
    return folder


def config(folder: Path, **keys: Any) -> MergeConfig:
    return config_for(folder / "base", [folder / name for name in "abc"], "wudi", **keys)


def balanced(deltas: list[F64Array], ridge: float) -> F64Array:
    grams = [d.T @ d / np.sum(d * d) for d in deltas]
    total = sum(w * g for w, g in zip(WEIGHTS, grams, strict=True))
    total = total + ridge * np.trace(total) / len(total) * np.eye(len(total))
    product = sum(w * d @ g for w, d, g in zip(WEIGHTS, deltas, grams, strict=True))
    return np.asarray(product @ np.linalg.inv(total))


def expected(folder: Path, name: str, ridge: float, lambda_: float, *, out: bool) -> F64Array:
    base, *experts = (values_of(load_tensors(folder / n)[name]) for n in ("base", *"abc"))
    deltas = [(one - base).astype(np.float64) for one in experts]
    if base.ndim < 2 or base.size == 0:
        merged = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)) / sum(WEIGHTS)
    else:
        stack = base.shape[0] if base.ndim == 3 else 1
        rows = base.shape[0] if base.ndim != 3 else base.shape[1]
        parts = [d.reshape(stack, rows, -1) for d in deltas]
        made = [
            balanced([p[i].T for p in parts], ridge).T
            if out
            else balanced([p[i] for p in parts], ridge)
            for i in range(stack)
        ]
        merged = np.stack(made).reshape(base.shape)
    return np.asarray(base + lambda_ * merged)


@pytest.mark.parametrize("side", ["in", "out", "auto"])
@pytest.mark.parametrize("ridge", [0.05, 0.2])
def test_against_float64(folder: Path, tmp_path: Path, side: str, ridge: float) -> None:
    parameters = {"ridge": ridge, "side": side, "lambda": 0.9}
    run(config(folder, parameters=parameters, dtype="float32"), tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    base = load_tensors(folder / "base")
    for name in model():
        wanted = expected(folder, name, ridge, 0.9, out=side == "out")
        change = np.abs(wanted - values_of(base[name])).max(initial=0.0)
        assert np.abs(values_of(made[name]) - wanted).max(initial=0.0) <= 1e-3 * change + 1e-9, name


DROP = {"density": [{"filter": "mlp", "value": 0.6}, {"value": 1.0}], "epsilon": 0.1}


@pytest.mark.parametrize("parameters", [{}, DROP, {"side": "out"}], ids=["plain", "drop", "out"])
def test_the_same_bytes(
    folder: Path, tmp_path: Path, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(folder, parameters=parameters, seed=3)
    assert_the_same_bytes(wanted, tmp_path, monkeypatch)


@pytest.mark.ray
def test_on_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    once = run(config(folder), tmp_path / "once")
    with ray_cluster(1, 2) as cluster:
        summary = run(config(folder), tmp_path / "ray", engine="ray", address=cluster.address)
    assert summary.model_digest == once.model_digest


@pytest.mark.parametrize(
    "parameters",
    [
        {"density": 0.5, "epsilon": 0.1},
        {"density": 0.3, "epsilon": 0.299999},  # least probabilities of nearly nothing
        {"density": 0.05, "epsilon": 0.01, "rescale": "l1"},  # ratios that no probability tells
    ],
)
def test_the_drop_comes_first(folder: Path, tmp_path: Path, parameters: dict[str, Any]) -> None:
    """As if the experts had been pruned before: those of DELLA are what is merged."""
    run(config(folder, parameters={**parameters}, dtype="float32", seed=9), tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    base = values_of(load_tensors(folder / "base")[name]).astype(np.float64)
    pruned = []
    for m in range(3):
        weights = [{"model": str(folder / x), "parameters": {"weight": float(i == m)}}
                   for i, x in enumerate("abc")]  # fmt: skip
        alone = config_from_mapping({
            "merge_method": "della_linear", "base_model": str(folder / "base"), "models": weights,
            "parameters": {**parameters}, "dtype": "float64", "seed": 9,
        })  # fmt: skip
        run(alone, tmp_path / f"alone{m}")
        pruned.append(values_of(load_tensors(tmp_path / f"alone{m}")[name]) - base)
    assert abs(np.mean(pruned[0] != 0) - parameters["density"]) < 0.2
    wanted = base + 0.8 * balanced(pruned, 0.05)
    assert np.abs(values_of(made[name]) - wanted).max() <= 2e-3 * np.abs(wanted - base).max()


@pytest.mark.parametrize("parameters", [{}, {"density": 0.5}])
def test_matrices_of_a_stack_know_nothing_of_each_other(
    tmp_path: Path, parameters: dict[str, Any]
) -> None:
    """One of large deltas, in the primal form and in the dual: the others are as if alone."""
    rng = np.random.default_rng(3)
    shapes = {"experts": (3, 30, 24), "wide": (3, 6, 40)}
    large = {name: rng.normal(0, 0.02, shape) for name, shape in shapes.items()}
    for at in ("stacked", "alone"):
        draw = np.random.default_rng(4)
        for model in ("base", *"abc"):
            tensors = {}
            for name, shape in shapes.items():
                numbers = large[name] + (model != "base") * draw.normal(0, 1e-3, shape)
                numbers[0, 0, 0] += 1000 * (model == "a")
                if at == "stacked":
                    tensors[name] = tensor(numbers, "F32")
                else:
                    tensors |= {f"{name}.{i}": tensor(numbers[i], "F32") for i in range(3)}
            save_checkpoint(tmp_path / at / model, tensors)
        run(config(tmp_path / at, parameters=parameters, seed=2), tmp_path / at / "out")
    stacked, alone = (load_tensors(tmp_path / at / "out") for at in ("stacked", "alone"))
    for name in shapes:
        made = values_of(stacked[name])
        for i in range(1, 3):
            wanted = values_of(alone[f"{name}.{i}"])
            if parameters:  # other words are drawn: as large a change
                sizes = [np.linalg.norm(one - large[name][i]) for one in (made[i], wanted)]
                assert 0.7 < sizes[0] / sizes[1] < 1.4, (name, i)
            else:
                assert made[i].tobytes() == wanted.tobytes(), (name, i)


def test_filters_of_three_axes_are_rows_of_one_matrix(tmp_path: Path) -> None:
    """As those of four are: what the last axis is cut into makes no difference."""
    shapes = {"encoder.conv1.weight": (12, 5, 3), "flat.conv1.weight": (12, 5, 1, 3)}
    numbers = np.random.default_rng(3).normal(0, 0.02, (4, 12, 15))
    for model, values in zip(("base", *"abc"), numbers, strict=True):
        tensors = {name: tensor(values.reshape(s), "F32") for name, s in shapes.items()}
        save_checkpoint(tmp_path / model, tensors)
    for method in ("wudi", "iso_c", "tsv"):
        experts = [tmp_path / name for name in "abc"]
        made = config_for(tmp_path / "base", experts, method)
        run(made, tmp_path / method)
        merged = load_tensors(tmp_path / method)
        assert merged["encoder.conv1.weight"].data == merged["flat.conv1.weight"].data, method


def test_what_keeps_experts_below_one_another_is_refused(tmp_path: Path) -> None:
    name = "transformer.blocks.0.ffn.experts.mlp.w2"
    base = {name: tensor(np.ones((8, 4)), "F32")}
    for at, tensors in zip(("base", *"abc"), (base, *make_experts(base, 3)), strict=True):
        save_checkpoint(tmp_path / at, tensors, config={"model_type": "dbrx"})
    with pytest.raises(InputError, match="its inputs in the rows, and `wudi` cannot tell"):
        plan(config(tmp_path))


def test_models_with_inputs_as_rows(tmp_path: Path) -> None:
    """GPT-2's Conv1D and the stacks of gpt-oss: told by the type of the model."""
    rng = np.random.default_rng(1)
    base = {
        "h.0.attn.c_attn.weight": tensor(rng.normal(0, 0.05, (24, 72)), "F32"),
        "decoder.h.0.c_attn.weight": tensor(rng.normal(0, 0.05, (24, 48)), "F32"),
        "wte.weight": tensor(rng.normal(0, 0.05, (30, 24)), "F32"),
        "h.0.experts.gate_up_proj": tensor(rng.normal(0, 0.05, (2, 24, 12)), "F32"),
    }
    kinds: tuple[tuple[str, set[str], dict[str, Any]], ...] = (
        ("gpt2", {"c_attn"}, {}),
        ("gpt_oss", {"experts"}, {}),
        ("qwen3_vl_moe", {"experts"}, {}),
        ("llama", set(), {}),
        ("a_reader", {"c_attn"}, {"text_config": {"model_type": "gpt2"}}),
        ("clvp", {"c_attn"}, {}),
        ("encoder-decoder", {"decoder"}, {"decoder": {"model_type": "gpt2"}}),
    )
    for kind, turned, more in kinds:
        at = tmp_path / kind
        for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
            save_checkpoint(at / name, tensors, config={"model_type": kind, **more})
        run(config(at), at / "out")
        made = load_tensors(at / "out")
        for name, stored in base.items():
            out = any(part in name.split(".") for part in turned)
            wanted = expected(at, name, 0.05, 0.8, out=out)
            change = np.abs(wanted - values_of(stored)).max()
            assert np.abs(values_of(made[name]) - wanted).max() <= 1e-3 * change, (kind, name)


def test_which_matrices_are_of_few_rows_is_said(folder: Path, tmp_path: Path) -> None:
    noted = "; ".join(plan(config(folder)).notes)
    assert "wudi: 3 matrices of fewer rows, of all experts together, than inputs" in noted
    assert "adapters" not in noted
    large = tmp_path / "large"
    for name in ("base", *"abc"):
        save_checkpoint(large / name, {"w": tensor(np.zeros((1, 1 << 20)), "BF16")})
    with pytest.raises(ConfigError, match="all experts' deltas, 3 x 1048576 numbers, and a matrix"):
        plan(config(large), options=RunOptions(memory_bytes=32 * MIB))


def test_what_does_not_fit_is_refused_with_the_number(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    for name in ("base", *"abc"):
        save_checkpoint(large / name, {"w": tensor(np.zeros((1000, 3000)), "BF16")})
    with pytest.raises(ConfigError, match=r"--memory is 64 MiB, and merging w takes 5\d\d MiB: .*"):
        run(config(large), tmp_path / "out", memory_bytes=64 * MIB)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="3000 x 3000 numbers"):
        plan(config(large), options=RunOptions(memory_bytes=64 * MIB))
    assert run(config(folder), tmp_path / "small", memory_bytes=32 * MIB).num_merged == 9


def lora(folder: Path, into: Path, seed: int) -> dict[str, F64Array]:
    """Write an adapter of rank 2 of the base; return the deltas that it makes."""
    rng = np.random.default_rng(seed)
    factors, deltas = {}, {}
    for name in (UP, DOWN, EMBEDDING):
        rows, cols = values_of(load_tensors(folder / "base")[name]).shape
        a, b = rng.normal(0, 0.1, (2, cols)), rng.normal(0, 0.1, (rows, 2))
        factors[name.removesuffix(".weight")] = (a, b)
        deltas[name] = 3.0 * b @ a
    a, b = rng.normal(0, 0.1, (6, 24)), rng.normal(0, 0.1, (40, 6))  # of three experts
    factors[STACK.removesuffix(".w")] = (a, b)
    deltas[STACK] = np.stack([3.0 * b[:, g::3] @ a[2 * g : 2 * g + 2] for g in range(3)])
    save_lora(into, factors, rank=2, alpha=6, target_parameters=["experts.w"])
    return deltas


def test_an_adapter_of_a_decoder_whose_inputs_are_rows(tmp_path: Path) -> None:
    """Of a square matrix, whose shape does not tell; added by any method."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.1, (2, 16)), rng.normal(0, 0.1, (16, 2))
    module = "decoder.transformer.h.0.attn.c_proj"
    base = {f"{module}.weight": tensor(np.zeros((16, 16)), "F32")}
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    save_checkpoint(tmp_path / "base", base, config=config)
    save_lora(tmp_path / "l", {module: (a, b)}, 2, 2, fan_in_fan_out=True)
    added = [Path(f"{tmp_path / 'base'}+{tmp_path / 'l'}")]
    run(config_for(tmp_path / "base", added, "task_arithmetic"), tmp_path / "out")
    made = values_of(load_tensors(tmp_path / "out")[f"{module}.weight"])
    assert np.allclose(made, (b @ a).T, atol=1e-6)


@pytest.mark.parametrize(
    ("number", "says"), [(np.nan, "The adapter is damaged"), (1e30, "of the deltas of elements")]
)
def test_damaged_adapters(folder: Path, tmp_path: Path, number: float, says: str) -> None:
    """Numbers that are none, and finite ones whose products are not."""
    rows, cols = values_of(load_tensors(folder / "base")[UP]).shape
    for name, first in (("a", 0.1), ("b", number)):
        a, b = np.full((2, cols), 0.1), np.full((rows, 2), 0.1)
        a[0, 0] = b[0, 0] = first
        save_lora(tmp_path / name, {UP.removesuffix(".weight"): (a, b)}, rank=2, alpha=6)
    models = [Path(f"{folder / 'base'}+{tmp_path / name}") for name in "ab"]
    with pytest.raises(TensorDataError, match=says):
        run(config_for(folder / "base", models, "wudi", dtype="float32"), tmp_path / "out")


@pytest.mark.parametrize("form", ["in", "out", "adapters"])
def test_what_is_read_ahead_is_what_is_used(
    folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every form: nothing that was asked of a store is left, and nothing else is asked."""
    models, keys = [folder / name for name in "abc"], {"side": form}
    if form == "adapters":
        for m in range(2):
            lora(folder, tmp_path / f"lora{m}", m)
        models, keys = [tmp_path / f"lora{m}" for m in range(2)], {}
    root = f"memory://ahead-{form}"
    base = upload(folder / "base", f"{root}/base")
    there = [upload(model, f"{root}/{m}") for m, model in enumerate(models)]
    if form == "adapters":
        there = [f"{base}+{one}" for one in there]
    content = {
        "merge_method": "wudi",
        "base_model": base,
        "models": [{"model": one} for one in there],
        "parameters": keys,
        "dtype": "float32",
    }
    left, unplanned = [], []
    close, prefetch = ReadAhead.close, ReadAhead.prefetch

    def look(self: ReadAhead) -> None:
        left.append((list(self._planned), list(self._plan)))
        close(self)

    def draw(self: ReadAhead, reader: RemoteReader, start: int, stop: int) -> None:
        with self._lock:
            while (reader, start, stop) not in self._planned and self._draw():
                pass
            if (reader, start, stop) not in self._planned:
                unplanned.append((start, stop))
        prefetch(self, reader, start, stop)

    monkeypatch.setattr(ReadAhead, "close", look)
    monkeypatch.setattr(ReadAhead, "prefetch", draw)
    run(config_from_mapping(content), tmp_path / "out", workers=1)
    assert left[0] == ([], [])
    assert unplanned == []


@pytest.mark.parametrize("side", ["in", "out"])
def test_adapters(folder: Path, tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of low rank: no delta is formed, and the bytes are the same however they are cut."""
    deltas = [lora(folder, tmp_path / f"lora{m}", m) for m in range(3)]
    models = [Path(f"{folder / 'base'}+{tmp_path / f'lora{m}'}") for m in range(3)]
    wanted = config_for(folder / "base", models, "wudi", parameters={"side": side}, dtype="float32")
    assert_the_same_bytes(wanted, tmp_path / "runs", monkeypatch)
    noted = "; ".join(plan(wanted).notes)
    # Of those that none changes, the ranks are 0.
    assert "9 matrices that only adapters change" in noted
    assert "dual" not in noted
    made, base = load_tensors(tmp_path / "runs/once"), load_tensors(folder / "base")
    for name in model():
        change = values_of(made[name]) - values_of(base[name])
        if name not in deltas[0]:
            assert not change.any()
            continue
        parts = [one[name].reshape(-1, *one[name].shape[-2:]) for one in deltas]
        merged = [
            balanced([p[i].T for p in parts], 0.05).T
            if side == "out"
            else balanced([p[i] for p in parts], 0.05)
            for i in range(len(parts[0]))
        ]
        expected = 0.8 * np.stack(merged).reshape(change.shape)
        # Sums with the base are rounded to float32.
        assert np.abs(change - expected).max() <= 1e-6 * np.abs(expected).max() + 2e-8, name


def test_an_adapter_beside_a_model(folder: Path, tmp_path: Path) -> None:
    """Its delta is formed: it is as the model that it makes."""
    lora(folder, tmp_path / "lora", 0)
    adapter = Path(f"{folder / 'base'}+{tmp_path / 'lora'}")
    whole = {"merge_method": "passthrough", "models": [{"model": str(adapter)}], "dtype": "float32"}
    run(config_from_mapping(whole), tmp_path / "whole")
    made = []
    for i, first in enumerate((adapter, tmp_path / "whole")):
        both = config_for(folder / "base", [first, folder / "b"], "wudi", dtype="float32")
        run(both, tmp_path / str(i))
        made.append(values_of(load_tensors(tmp_path / str(i))[UP]))
    assert np.abs(made[0] - made[1]).max() < 1e-4 * np.abs(made[0]).max()


def test_what_another_version_of_it_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither continued nor recomputed: matrices of few rows, or very many, were others."""
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "METHOD_VERSIONS", {})
        interrupt(config(folder), tmp_path / "begun", after=1, shard_bytes=20_000)
        run(config(folder), tmp_path / "done")
    with pytest.raises(OutputError, match="the definition of the method was null, now 3"):
        run(config(folder), tmp_path / "begun", shard_bytes=20_000)
    with pytest.raises(InputError, match="whose bytes this version does not reproduce"):
        verify(tmp_path / "done", recompute=1)


def test_a_ridge_that_is_too_small(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller than any that may be given."""
    monkeypatch.setattr(scalars, "LEAST_RIDGE", 0)
    again = save_checkpoint(tmp_path / "again", load_tensors(folder / "a"))
    both, small = [folder / "a", again], {"ridge": 1e-30}
    twice = config_for(folder / "base", both, "wudi", parameters=small)
    with pytest.raises(TensorDataError, match=r"not positive definite: its `ridge` is too small"):
        run(twice, tmp_path / "out")


def test_experts_that_are_the_base_or_damaged(folder: Path, tmp_path: Path) -> None:
    same = config_for(folder / "base", [folder / "base"], "linear")
    assert same.models
    for name in "ab":
        save_checkpoint(tmp_path / name, load_tensors(folder / "base"))
    unchanged = config_for(folder / "base", [tmp_path / name for name in "ab"], "wudi")
    run(unchanged, tmp_path / "out")
    assert load_tensors(tmp_path / "out") == load_tensors(folder / "base")
    broken = load_tensors(folder / "a")
    values = values_of(broken["model.layers.0.mlp.up_proj.weight"]).astype(np.float64)
    values[3, 4] = np.nan
    broken["model.layers.0.mlp.up_proj.weight"] = tensor(values, "BF16")
    save_checkpoint(tmp_path / "broken", broken)
    damaged = [tmp_path / "broken", folder / "b"]
    with pytest.raises(TensorDataError, match=r"broken: 1 of the deltas .* are NaN or infinite"):
        run(config_for(folder / "base", damaged, "wudi"), tmp_path / "refused")
    zeroed = config_for(folder / "base", damaged, "wudi", on_nonfinite="zero")
    run(zeroed, tmp_path / "zeroed")
    made = values_of(load_tensors(tmp_path / "zeroed")["model.layers.0.mlp.up_proj.weight"])
    assert np.isfinite(made).all()
