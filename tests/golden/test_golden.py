"""Bytes that no change of the code may change, unless `OUTPUT_VERSION` says so.

The inputs are made by integer arithmetic, so that they are the same everywhere. The digests were
computed once by the reference, and have been reproduced by every backend since.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops.tensor import merge_tensor
from della_dist.planning.fingerprint import OUTPUT_VERSION
from della_dist.specs.recipe import Angles, MergeSettings, Overlap, TensorRecipe

SHAPE = (37, 1031)

DIGESTS = {
    "della": "4f8d3e8abd5a265460ccbc7d4c4da0832b02c518cae9c63ef8295f3b0ef2c302",
    "della by tensor": "529dbd36024293bda626d2dfe4dccf5662ee23b36cf1419a116bc46bf0f54fb2",
    "della_linear, l1": "5c767984ea252491a0d540f04ff2843adc86f4c214040bc4f1ccc0fcc0fab6e2",
    "dare_ties": "acc225d73ac81a2b23da4c18e0ad4f91e6b8eb58b80fcb231f7e3cbcd4ba7195",
    "ties": "e0acbdf8fb1efff8cbda5f2821000e41314b5c404b28aadc3f43b8fe18f8f5e8",
    "breadcrumbs, l1": "00837a96839bdfd5fdc82fdfbe25305f184836db5a394084e5d68606ab2f7ee6",
    "breadcrumbs_ties": "e1bfa77d555994b3f151f9ed28211dab5f77cbb9940908543a609a82efda84e1",
    "nearswap": "4f5719a4661f81b9716c8dd2748adf17d2b1f72bffed19762d0e3652a6e858ec",
    "arcee_fusion": "75148148818550fec9206133efc37d1ad9985751a08fd91ab363912fb71d8b57",
    "sce": "edc0a66e6e3c4da02edb62b0a9cbd25b2dd715bf59fea6f296c12bf7a9959a29",
    "ramplus_tl": "f120a7cb8ea02097b5f283faeb18eb6533cbade964957077471d7b3be9826b32",
    "slerp": "13c0fce8602e52b3e8f06c0d6c5296aa260fc8d0170c97f32e206e550f42bc90",
    "nuslerp, by rows": "63f1273a42f7dd1f1cf86ed1ff1723e73ecf18cc0cc109cb2f517e3adbda9da8",
    "multislerp": "3140a607240b2721ca429212027769e4c067f19f82c3c93b8c336513800a0b1a",
    "karcher": "baab25ec781c3c7c7fa2d2ebe7aa8869723ad0683d93a5489b0c52086ab87174",
    "model_stock": "38f5038fa3dfadc541cce9d3552ee909f21e6bf175bff1d8cb36b18ebd648f22",
    "model_stock, by rows": "7b28db1da56cbdc56e3ff13d4a6969fa167256b98ee4f8a80fcb48a1b7382e11",
    "task_arithmetic": "12ec964239357e5d9cfc6d79328b98a30dc513a6fc93afd6ec6e18a40ac6b0a9",
}

PLAIN: dict[str, Any] = {"drop": "none", "elect": False, "normalize": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "della": {"drop": "magprune", "rescale": "inverse"},
    "della by tensor": {"drop": "magprune", "rescale": "inverse", "granularity": "tensor"},
    "della_linear, l1": {"drop": "magprune", "rescale": "l1", "elect": False},
    "dare_ties": {"drop": "random", "rescale": "inverse", "normalize": False},
    "ties": {"drop": "magnitude"},
    "breadcrumbs, l1": {
        "drop": "outliers",
        "gammas": (0.1, 0.02, 0.3),
        "elect": False,
        "rescale": "l1",
        "normalize": False,
    },
    "breadcrumbs_ties": {"drop": "outliers", "gammas": (0.1, 0.02, 0.3), "normalize": False},
    "task_arithmetic": {"drop": "none", "elect": False, "normalize": False},
    "nearswap": {**PLAIN, "limit": 0.0005},
    "arcee_fusion": {**PLAIN, "drop": "importance"},
    "sce": {"drop": "variance", "by_energy": True},
    "ramplus_tl": {**PLAIN, "drop": "threshold", "least": 0.0005, "overlap": Overlap(0.1, 0.5)},
    "slerp": {**PLAIN, "angles": Angles(rule="slerp")},
    "nuslerp, by rows": {**PLAIN, "angles": Angles(rule="nuslerp", by_row=True)},
    "multislerp": {**PLAIN, "angles": Angles(rule="multislerp")},
    "karcher": {**PLAIN, "angles": Angles(rule="karcher")},
    "model_stock": {**PLAIN, "angles": Angles(rule="model_stock")},
    "model_stock, by rows": {**PLAIN, "angles": Angles(rule="model_stock", by_row=True)},
}

#: What keeps all, or not by a density.
DENSE = ("none", "importance", "threshold")
#: Of methods that take other numbers of experts: the first weights only.
WEIGHTS = (1.0, 0.75, -0.25)
NUM_EXPERTS = {"nearswap": 1, "arcee_fusion": 1, "slerp": 2, "nuslerp, by rows": 2}


def bits(stream: int) -> npt.NDArray[np.uint16]:
    """Return bf16 bit patterns: magnitudes near 0.02; experts are a few ulps from the base."""
    i = np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint64)
    base = (i * 2_654_435_761) >> 7
    pattern = 0x3C00 + base % 0x100 + ((base >> 9) & 1) * 0x8000
    if stream:
        # The minimum of two steps makes small changes frequent and large ones rare.
        one, two = (((i + stream * 77_003) * k) >> 11 for k in (40_503_000_11, 2_246_822_519))
        step = np.minimum(one % 24, two % 60)
        pattern = np.where((one >> 8) & 1, pattern + step, pattern - step)
    return pattern.astype(np.uint16)


def recipe(name: str) -> TensorRecipe:
    settings: dict[str, Any] = {
        "elect": True,
        "rescale": "none",
        "normalize": True,
        "granularity": "row",
        **SETTINGS[name],
    }
    magprune = settings["drop"] == "magprune"
    count = NUM_EXPERTS.get(name, 3)
    return TensorRecipe(
        name="model.layers.0.mlp.down_proj.weight",
        shape=SHAPE,
        base_dtype="BF16",
        expert_dtypes=("BF16",) * count,
        out_dtype="BF16",
        settings=MergeSettings(
            lambda_=0.9,
            on_nonfinite="error",
            seed=2024,
            weights=WEIGHTS[:count],
            densities=(1.0 if settings["drop"] in DENSE else 0.4,) * count,
            epsilons=(0.25 if magprune else 0.0,) * count,
            **settings,
        ),
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("name", DIGESTS)
def test_bytes(name: str, backend: Any) -> None:
    count = NUM_EXPERTS.get(name, 3)
    base, *experts = (bits(stream).view(np.uint8) for stream in range(1 + count))
    merged, stats = merge_tensor(recipe(name), base, experts, backend=backend)
    assert OUTPUT_VERSION == 4  # the digests are those of version 1: what changed is elsewhere
    assert hashlib.sha256(merged.tobytes()).hexdigest() == DIGESTS[name]
    assert all(e.num_nonzero > 30_000 for e in stats.experts)
