"""Settings and recipes refuse what the kernels could not tell from what is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from della_dist.ops import Angles, MergeSettings, Overlap, merge_arrays

BASE = np.zeros((4, 8), np.float32)
EXPERTS = [BASE + 1, BASE + 2]


@pytest.mark.parametrize("weights", [(), (1.0,), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("backend", ["numba", "torch", "reference"])
def test_one_weight_an_expert(weights: tuple[float, ...], backend: Any) -> None:
    with pytest.raises(ValueError, match=r"weights were given for 2 experts"):
        merge_arrays(MergeSettings(weights=weights), BASE, EXPERTS, backend=backend)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop": "magnitudes"},
        {"rescale": "inv"},
        {"granularity": "tensors"},
        {"on_nonfinite": "zzz"},
        {"elect": "no"},
        {"normalize": "false"},
        {"weights": (float("nan"), 1.0)},
        {"lambda_": float("inf")},
        {"weights": (1e300, 1.0)},
        {"weights": 1.0},
        {"densities": "0.5"},
        {"gammas": (1.0, 0.0)},
        {"gammas": (0.1,)},
        {"limit": 0.0, "drop": "none", "rescale": "none"},
        {"limit": 1.0},
        {"least": -1.0},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
    ],
)
def test_settings_that_are_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) + r"|must be finite"):
        MergeSettings(**{"weights": (1.0, 1.0), **wrong})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drop": "importance", "rescale": "none"}, "of one expert"),
        ({"drop": "importance", "weights": (1.0,)}, "is not rescaled"),
        ({"drop": "variance", "rescale": "none", "densities": (0.5, 0.4)}, "one density"),
        ({"drop": "variance", "rescale": "l1"}, "are not rescaled"),
        ({"drop": "none", "rescale": "none", "by_energy": True, "elect": False}, "is elected"),
        ({"drop": "random", "rescale": "none", "by_energy": True}, "is elected"),
        ({"drop": "none", "rescale": "none", "overlap": Overlap()}, "nothing is elected"),
        (
            {"drop": "random", "elect": False, "normalize": False, "overlap": Overlap()},
            "dropped by rank",
        ),
        (
            {"drop": "none", "elect": False, "normalize": False, "overlap": Overlap()},
            "nothing is rescaled",
        ),
    ],
)
def test_parts_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MergeSettings(**{"weights": (1.0, 1.0), **settings})


@pytest.mark.parametrize("wrong", [{"r": -1.0}, {"alpha": float("nan")}, {"alpha": -0.1}])
def test_overlaps_that_are_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .*at least 0"):
        Overlap(**wrong)


PLAIN: dict[str, Any] = {
    "drop": "none",
    "elect": False,
    "normalize": False,
    "rescale": "none",
}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"angles": "slerp"}, "angles is 'slerp'"),
        ({"weights": (1.0,) * 3}, "slerp cannot merge 3 experts"),
        ({"weights": (1.0,), "angles": Angles(rule="model_stock")}, "cannot merge 1 experts"),
        ({"weights": (1.0,), "angles": Angles(rule="karcher")}, None),
        *(({name: other}, "nothing is dropped, elected, normalized or rescaled")
          for name, other in (("drop", "random"), ("elect", True), ("normalize", True),
                              ("rescale", "l1"))),
    ],
)  # fmt: skip
def test_angles_go_with_nothing_else(settings: dict[str, Any], said: str | None) -> None:
    given = {"weights": (0.5, 0.5), "angles": Angles(rule="slerp"), **PLAIN, **settings}
    if said is None:
        assert MergeSettings(**given).angles == given["angles"]
        return
    with pytest.raises(ValueError, match=said):
        MergeSettings(**given)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "slurp"},
        {"eps": 0.0},
        {"eps": float("nan")},
        {"tol": 1.1},
        {"max_iter": 0},
        {"max_iter": 1.5},
        {"rule": "karcher", "by_row": True},
    ],
)
def test_angles_that_are_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is|no weights for single rows"):
        Angles(**{"rule": "nuslerp", **wrong})


@pytest.mark.parametrize("backend", ["numba", "torch", "reference"])
def test_arrays_by_angles(backend: Any) -> None:
    settings = MergeSettings(weights=(0.5, 0.5), angles=Angles(rule="slerp"), **PLAIN)
    one, other = np.array([[3.0, 0.0]], np.float32), np.array([[0.0, 4.0]], np.float32)
    merged, _ = merge_arrays(settings, None, [one, other], backend=backend)
    assert merged[0].tolist() == pytest.approx([3 * 0.5**0.5, 4 * 0.5**0.5])


def test_numbers_of_numpy_are_those_of_python() -> None:
    """Tables of probabilities are kept by them, and float32 rounds what is computed from it."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(8, 4000)).astype(np.float32)
    expert = base + rng.normal(size=base.shape).astype(np.float32) / 100
    density, epsilon = np.float32(0.7), np.float32(0.15)

    def merged(density: Any, epsilon: Any, backend: Any) -> bytes:
        settings = MergeSettings(
            weights=tuple(np.ones(1)), densities=(density,), epsilons=(epsilon,), seed=np.int64(5)
        )
        return merge_arrays(settings, base, [expert], backend=backend)[0].tobytes()

    first = merged(density, epsilon, "numba")
    assert first == merged(density, epsilon, "reference")
    assert first == merged(float(density), float(epsilon), "numba")


def test_arguments_of_merge_arrays() -> None:
    settings = MergeSettings(weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="out_dtype is 'bfloat16'"):
        merge_arrays(settings, BASE, EXPERTS, out_dtype="bfloat16")
    with pytest.raises(ValueError, match="no expert was given"):
        merge_arrays(MergeSettings(weights=()), BASE, [])
    wrong: Any
    for wrong in (BASE.tolist(), None, [1.0, 2.0]):
        with pytest.raises(ValueError, match="numpy arrays are merged, and a"):
            merge_arrays(settings, BASE, [BASE, wrong])
    with pytest.raises(ValueError, match="name must be text"):
        merge_arrays(settings, BASE, EXPERTS, name=wrong)
    for is_delta in (True, (True,), "no"):
        wrong = is_delta
        with pytest.raises(ValueError, match="is_delta is"):
            merge_arrays(settings, BASE, EXPERTS, is_delta=wrong)
    wrong = "jax"
    with pytest.raises(ValueError, match="'numba', 'torch' or 'reference'"):
        merge_arrays(settings, BASE, EXPERTS, backend=wrong)
    for wrong in (None, "della"):
        with pytest.raises(ValueError, match="must be MergeSettings"):
            merge_arrays(wrong, BASE, EXPERTS)
