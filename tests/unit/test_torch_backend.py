"""The torch backend's parts: random words, conversions, and the memory it says it needs."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.gpu.convert import narrow as torch_narrow
from della_dist.ops.gpu.convert import widen as torch_widen
from della_dist.ops.gpu.philox import philox_words
from della_dist.ops.gpu.philox import uniforms as torch_uniforms
from della_dist.ops.gpu.rank import twice_mean_ranks
from della_dist.ops.gpu.sizes import NUM_LANES
from della_dist.ops.philox import stream_key
from della_dist.ops.prepare import Ready, absorb, prepare
from della_dist.ops.reference import uniforms
from della_dist.ops.rounding import narrow, round_to_format
from della_dist.ops.tensor import slice_block
from della_dist.specs.dtypes import num_bytes, num_elements
from della_dist.specs.recipe import Angles, Overlap, TensorRecipe
from tests.tensors import DTYPES, angles_recipe, family, recipe_of, scored_recipe, stream

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small tensors: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("position", "word"),
    [(0, 0x6627E8D5), (1, 0xE169C58D), (2, 0xBC57AC4C), (3, 0x9B00DBD8)],
)
def test_philox_known_answer(position: int, word: int) -> None:
    """Counter and key zero, from Random123's kat_vectors."""
    assert philox_words(0, position, position + 1, CPU).tolist() == [word]


def test_words_start_anywhere() -> None:
    key = stream_key(2**63 + 11, "w", 1)
    whole = uniforms(2**63 + 11, "w", 1, 1003)
    for start, stop in ((0, 1003), (1, 2), (5, 11), (6, 8), (999, 1003), (7, 7)):
        assert torch_uniforms(key, start, stop, CPU).numpy().tolist() == whole[start:stop].tolist()
    # Element 2**36 uses counter 2**34, whose second word is 4.
    far = philox_words(key, 2**36 - 3, 2**36 + 3, CPU)
    assert far.tolist()[:3] == philox_words(key, 2**36 - 4, 2**36, CPU).tolist()[1:]
    assert far.tolist()[3:] != philox_words(key, 0, 3, CPU).tolist()


def test_ranks_by_hand() -> None:
    key_RC = torch.tensor([[3, 0, 1, 1, 7], [5, 5, 5, 5, 5], [0, 0, 9, 9, 2]], dtype=torch.int32)
    expected = [[6, 0, 3, 3, 8], [4, 4, 4, 4, 4], [1, 1, 7, 7, 4]]
    assert twice_mean_ranks(key_RC).tolist() == expected
    assert twice_mean_ranks(key_RC.to(torch.int64) << 40).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrowing_equals_the_reference(dtype: str) -> None:
    """Random bits of float64 and float32, and float64 numbers beside the ties of each format."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 2**64, 200_000, dtype=np.uint64).view(np.float64)
    # Half of them within reach of float16.
    wide[::2] = rng.normal(0, 1, 100_000) * 2.0 ** rng.integers(-30, 17, 100_000)
    in_reach = rng.normal(0, 1, 100_000) * 2.0 ** rng.integers(-150, 128, 100_000)
    with np.errstate(all="ignore"):
        ties = []
        for bits, exponent in ((10, -14), (7, -126), (23, -126)):
            lower = round_to_format(in_reach, bits, exponent)
            ties += [t := (lower + round_to_format(lower * (1 + 2.0**-bits), bits, exponent)) / 2]
            ties += [np.nextafter(t, 0), np.nextafter(t, np.inf)]
        wide = np.concatenate([wide, in_reach, *ties])
        single = np.concatenate(
            [rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32), wide.astype("f4")]
        )
        for values in (wide, single):
            got = torch_narrow(torch.from_numpy(values.copy()), dtype).view(torch.uint8).numpy()
            assert np.array_equal(got, narrow(values, dtype))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_number_survives(dtype: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for compute in (torch.float32, torch.float64):
        values = torch_widen(bits.view(torch.uint8), dtype, compute)
        number = ~values.isnan()
        assert torch.equal(torch_narrow(values, dtype)[number], bits[number])


class Watermark(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("BF16", {}),
        ("F64", {}),
        ("BF16", {"granularity": "tensor", "rescale": "l1"}),
        ("F32", {"drop": "magnitude", "rescale": "none"}),
        ("F64", {"drop": "magnitude", "rescale": "l1"}),
        ("F64", {"drop": "random", "rescale": "l1"}),
        ("BF16", {"drop": "none"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_experts", [1, 4])
def test_scratch_is_what_it_says(num_experts: int, dtype: str, changes: dict[str, Any]) -> None:
    experts = (dtype,) * num_experts
    assert_scratch(recipe_of((512, 512), base=dtype, experts=experts, out=dtype, **changes))


def test_scratch_of_scores_and_angles() -> None:
    shape, three = (52_000, 5), ("BF16",) * 3
    how = {"elect": True, "normalize": True, "by_energy": True, "density": 0.3}
    assert_scratch(scored_recipe(shape, experts=("BF16",)))
    assert_scratch(scored_recipe(shape, "variance", experts=three, **how))
    assert_scratch(scored_recipe(shape, "threshold", experts=three, overlap=Overlap(0.1, 0.2)))
    for by_row in (False, True):
        assert_scratch(angles_recipe(shape, "model_stock", experts=three, by_row=by_row))


def assert_scratch(recipe: TensorRecipe) -> None:
    """Merge four units, and assert that what is alive is stated, and not much less."""
    base, experts = family(recipe, seed=0)
    backend, count = TorchBackend("cpu", gpu_memory=1 << 30), num_elements(recipe.shape)
    block = slice_block(recipe, base, experts, 0, count)
    out = np.empty(num_bytes(recipe.out_dtype, recipe.shape), np.uint8)
    prepared = prepare(recipe)
    with Watermark() as mark:
        while not isinstance(prepared, Ready):
            prepared = absorb(recipe, prepared, backend.measure(recipe, prepared, block))
        backend.merge(recipe, prepared, block, out)
    # What one lane computes, and its slots.
    stated = backend.scratch_bytes(recipe, count) + backend.staging_bytes // NUM_LANES
    assert 0.25 * stated < mark.peak < stated
    assert mark.peak < backend.device_bytes(recipe, count)


#: What the host can go on from only once the device has come to it.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive")
INDEXING = ("index", "index_put", "index_put_")


class Waits(TorchDispatchMode):  # type: ignore[misc]
    """Counts what would make the host wait for a device."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in INDEXING else ()
        is_masked = any(one is not None and one.dtype == torch.bool for one in masks)
        self.num += name in WAITING or is_masked
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"drop": "magnitude", "rescale": "l1"},
        {"drop": "variance", "rescale": "none", "by_energy": True, "density": 0.3},
        {"drop": "threshold", "rescale": "none", "elect": False, "normalize": False,
         "overlap": Overlap(0.1, 0.2)},
        {"drop": "none", "elect": False, "rescale": "none", "normalize": False, "density": 1.0,
         "angles": Angles(rule="model_stock")},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_in_a_block_waits_for_the_device(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched of a block is as much whether it is one chunk or several."""
    recipe = recipe_of((17, 8192), base="BF16", experts=("BF16",) * 2, out="BF16", **changes)
    base, experts = family(recipe, seed=0)
    fetched: list[int] = []
    fetch = torch.Tensor.cpu

    def counted(one: torch.Tensor) -> torch.Tensor:
        fetched.append(one.numel())
        return fetch(one)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    counts, results = [], []
    for host_memory in (64 << 20, 8 << 20):
        fetched.clear()
        with Waits() as waits:
            backend = TorchBackend("cpu", host_memory=host_memory, gpu_memory=4 << 30)
            out, _ = stream(backend, recipe, base, experts)
        counts.append((len(fetched), waits.num))
        results.append(out)
    assert counts[0] == counts[1]
    assert counts[0][0] > 0 == counts[0][1]
    assert np.array_equal(results[0], results[1])


def test_waits_are_counted() -> None:
    with Waits() as waits:
        ones = torch.ones(3)
        assert ones[ones > 0].sum().item() == 3
    assert waits.num == 2
