"""A merge of merges draws words of its own: nothing is kept twice because it was kept once.

Seeds are fixed: a failure is never bad luck.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist.errors import InputError
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from della_dist.specs.sources import Merged
from della_dist.storage.manifest import MANIFEST_NAME, dump_manifest
from tests.checkpoints import load_tensors, save_checkpoint, tensor, values_of
from tests.merging import config_for, run, save_family

SHAPE = (256, 1024)


def chain(folder: Path, method: str, depth: int, *, keep_manifests: bool) -> tuple[float, float]:
    """Merge one expert into its base, the result into the base again, and so on.

    Returns
    -------
    tuple
        How large the delta is in the end, along what it was, and the standard error of that.
    """
    delta = np.random.default_rng(3).normal(0, 0.01, SHAPE).astype(np.float32)
    base = save_checkpoint(folder / "base", {"w": tensor(np.zeros(SHAPE), "F32")})
    current = save_checkpoint(folder / "expert", {"w": tensor(delta, "F32")})
    for stage in range(depth):
        out = folder / f"out{stage}"
        run(config_for(base, [current], method, parameters={"density": 0.5}), out)
        if not keep_manifests:
            (out / MANIFEST_NAME).unlink()
        current = out
    exact = delta.astype(np.float64)
    error = (values_of(load_tensors(current)["w"]) - exact) * exact
    scale = np.sum(exact**2)
    return float(1 + error.sum() / scale), float(np.sqrt(np.sum(error**2)) / scale)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_unbiased_at_any_depth(tmp_path: Path, method: str, depth: int) -> None:
    factor, sigma = chain(tmp_path, method, depth, keep_manifests=True)
    assert sigma < 0.02
    assert abs(factor - 1) < 5 * sigma


@pytest.mark.parametrize(("method", "bias"), [("dare_linear", 2.00), ("della_linear", 1.62)])
def test_nobody_can_tell_without_the_manifest(tmp_path: Path, method: str, bias: float) -> None:
    """What the test above would find if all stages drew the same words."""
    factor, sigma = chain(tmp_path, method, 2, keep_manifests=False)
    assert abs(factor - bias) < 0.02
    assert abs(factor - 1) > 30 * sigma


def staged(path: Path, **changes: Any) -> None:
    """Change the manifest of an output, digest and all."""
    manifest = json.loads((path / MANIFEST_NAME).read_bytes())
    manifest.update(changes)
    kept = {key: value for key, value in manifest.items() if value is not None}
    (path / MANIFEST_NAME).write_bytes(dump_manifest(kept))


def test_the_stage_is_one_more_than_that_of_any_input(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, num_experts=2)
    plain = config_for(base, experts)
    assert open_plan(plain).stage == 0
    assert not any("itself a merge" in note for note in open_plan(plain).notes())
    out = tmp_path / "out"
    run(config_for(base, experts, "ties", parameters={"density": 0.5}), out)
    assert json.loads((out / MANIFEST_NAME).read_bytes())["stage"] == 0

    # Whatever the method and the seed, and wherever the input stands.
    for config in (config_for(base, [out], seed=9), config_for(out, experts)):
        plan = open_plan(config)
        assert plan.stage == 1
        merged = [s for t in plan.shards[0].tensors if isinstance(s := plan.source(t), Merged)]
        assert merged
        assert all(source.recipe.stage == 1 for source in merged)
        (note,) = (note for note in plan.notes() if "itself a merge" in note)
        assert note == f"{out} is itself a merge of della-dist: random words of stage 1 are drawn."
    # Methods that draw no words have nothing to say of them.
    deterministic = open_plan(config_for(base, [out], "task_arithmetic"))
    assert deterministic.stage == 1
    assert not any("itself a merge" in note for note in deterministic.notes())

    for recorded, stage in ((None, 1), (4, 5)):
        staged(out, stage=recorded)
        assert open_plan(config_for(base, [out, *experts])).stage == stage


def test_recomputing_wants_the_manifests_of_the_inputs(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, num_experts=1)
    first, second = tmp_path / "first", tmp_path / "second"
    run(config_for(base, experts, parameters={"density": 0.5}), first)
    run(config_for(base, [first], parameters={"density": 0.5}), second)
    assert json.loads((second / MANIFEST_NAME).read_bytes())["stage"] == 1
    assert verify(str(second), recompute=3).recomputed
    (first / MANIFEST_NAME).unlink()
    with pytest.raises(InputError, match="its inputs were changed: stage was 1, now 0"):
        verify(str(second), recompute=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-20], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: data.replace(b'"stage": 0', b'"stage": 7'), "is damaged"),
        (lambda data: dump_manifest({**json.loads(data), "stage": -1}), "stage -1"),
        (lambda data: dump_manifest({**json.loads(data), "stage": "1"}), "stage '1'"),
        (lambda data: dump_manifest({**json.loads(data), "stage": True}), "stage True"),
        (lambda data: dump_manifest({**json.loads(data), "stage": 2**32 - 1}), "stage 4294967295"),
        (lambda data: data + b" " * (64 << 20), "too large"),
    ],
)
def test_a_damaged_manifest_of_an_input(tmp_path: Path, change: Any, message: str) -> None:
    base, experts = save_family(tmp_path, num_experts=1)
    out = tmp_path / "out"
    run(config_for(base, experts, parameters={"density": 0.5}), out)
    manifest = out / MANIFEST_NAME
    manifest.write_bytes(change(manifest.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        open_plan(config_for(base, [out]))
    assert str(manifest) in str(caught.value)
