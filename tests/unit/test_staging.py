"""The way of chunks to the device and back: two slots in turn, many threads, the same buffers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from della_dist.ops.blocks import U8Array
from della_dist.ops.gpu import staging
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.gpu.sizes import NUM_LANES
from della_dist.ops.gpu.staging import ALIGNMENT, Event, Lane, Slot, Staging, slot_need
from della_dist.ops.reference import merge_whole
from tests.late_queue import LateQueue
from tests.tensors import angles_recipe, assert_like_reference, family, recipe_of, stream

CPU = torch.device("cpu")
MIB = 1 << 20


def add_one(lane: Lane, data: U8Array, out: U8Array, step: int) -> None:
    """Add 1 to every byte by way of the device; the parts are halves of a chunk."""

    def parts(start: int, stop: int) -> list[U8Array]:
        middle = (start + stop) // 2
        return [data[start:middle], data[middle:stop]]

    for start, stop, slot, there in lane.chunks(parts, data.size, step):
        slot.download(torch.cat(there) + 1, out[start:stop], lane)


@pytest.mark.parametrize("queue", [staging.HostQueue, LateQueue])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40, 41])
def test_chunks_come_back(queue: Callable[[torch.device], staging.Queue], count: int) -> None:
    stage = Staging(CPU, 1, slot_need([4, 4, 8]), queue)
    data = np.arange(count, dtype=np.uint8)
    for _ in range(3):  # an odd number of chunks leaves the other slot's turn
        out = np.zeros_like(data)
        with stage.lane(slot_need([4, 4, 8])) as lane:
            add_one(lane, data, out, 8)
        assert out.tolist() == (data + 1).tolist()


@pytest.mark.gpu
def test_chunks_come_back_from_a_gpu() -> None:
    """Several lanes at once, each chunk larger than what a copy does in no time."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    stage = Staging(torch.device("cuda"), 3, 4 * MIB)
    random = np.random.default_rng(0)

    def call(number: int) -> bool:
        data = random.integers(0, 255, 9 * MIB + number, np.uint8)
        out = np.zeros_like(data)
        with stage.lane(2 * MIB) as lane:
            add_one(lane, data, out, MIB)
        return np.array_equal(out, data + 1)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(24)))


def test_a_slot_is_read_before_it_is_written_again() -> None:
    """With late copies, the result of a chunk is there when its slot has its next turn."""
    stage = Staging(CPU, 1, slot_need([8, 8]), LateQueue)
    data, out = np.arange(32, dtype=np.uint8), np.zeros(32, np.uint8)
    with stage.lane(1) as lane:
        for i, (start, stop, slot, there) in enumerate(
            lane.chunks(lambda a, b: [data[a:b]], 32, 8)
        ):
            slot.download(there[0] + 1, out[start:stop], lane)
            assert not out[start:].any()  # on its way
            assert out[: max(0, 8 * (i - 1))].all()
    assert out.all()


def test_parts_are_aligned() -> None:
    assert slot_need([1, ALIGNMENT, ALIGNMENT + 1]) == 4 * ALIGNMENT
    stage = Staging(CPU, 1, 4 * ALIGNMENT)
    with stage.lane(1) as lane:
        for *_, there in lane.chunks(lambda a, b: [np.zeros(1, np.uint8)] * 2, 1, 1):
            assert there[1].data_ptr() - there[0].data_ptr() == ALIGNMENT


def test_who_stops_in_the_middle_leaves_a_lane_that_works() -> None:
    stage = Staging(CPU, 1, slot_need([4, 4, 8]), LateQueue)
    data, out = np.arange(40, dtype=np.uint8), np.zeros(40, np.uint8)

    def stop_at_the_second() -> None:
        with stage.lane(1) as lane:
            for start, stop, slot, there in lane.chunks(lambda a, b: [data[a:b]], 40, 8):
                slot.download(there[0] + 1, out[start:stop], lane)
                if start:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_at_the_second()
    with stage.lane(1) as lane:
        add_one(lane, data, out, 8)
    assert out.tolist() == (data + 1).tolist()


def count_slots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that the size of every slot that is made joins."""
    made: list[int] = []
    begin = Slot.__init__

    def counted(self: Slot, device: torch.device, num_bytes: int, computed: Event) -> None:
        made.append(num_bytes)
        begin(self, device, num_bytes, computed)

    monkeypatch.setattr(Slot, "__init__", counted)
    return made


def test_buffers_stay_and_large_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_slots(monkeypatch)
    stage = Staging(CPU, 2, 64)
    for _ in range(5):
        with stage.lane(64):
            pass
    assert made == [64, 64]
    with stage.lane(4096, is_large=True) as lane:
        data, out = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
        add_one(lane, data, out, 100)
    assert out.tolist() == (data + 1).tolist()
    assert made == [64, 64, 4096, 4096]
    with stage.lane(64) as again:
        assert again is lane
    assert made == [64, 64, 4096, 4096]


def test_large_chunks_are_computed_one_at_a_time() -> None:
    stage = Staging(CPU, 4, 64)
    inside, most, lock = 0, 0, threading.Lock()
    barrier = threading.Barrier(4)

    def call() -> None:
        nonlocal inside, most
        barrier.wait()
        with stage.lane(1, is_large=True):
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(call) for _ in range(4)]:
            done.result()
    assert most == 1


@pytest.mark.parametrize("queue", [staging.HostQueue, LateQueue])
def test_threads_of_one_backend(
    monkeypatch: pytest.MonkeyPatch, queue: Callable[[torch.device], staging.Queue]
) -> None:
    """More of them than lanes, of recipes and numbers of chunks that differ."""
    monkeypatch.setattr(staging, "HostQueue", queue)
    made = count_slots(monkeypatch)
    torch.set_num_threads(1)
    backend = TorchBackend("cpu", host_memory=8 * MIB)
    recipes = [
        recipe_of((33, 8192), base="BF16", experts=("BF16",) * 2, out="BF16", drop="random"),
        recipe_of((3, 65536), base="F32", experts=("F32",), out="BF16", drop="none"),
        recipe_of((5, 40), base="BF16", experts=("F64",), out="F32"),
        recipe_of((140_000,), base=None, experts=("F16",) * 2, out="F16", drop="magnitude"),
        angles_recipe((3, 70_001), "slerp", experts=("BF16", "BF16"), out="BF16"),
    ]
    inputs = [family(recipe, seed) for seed, recipe in enumerate(recipes)]
    wanted = [merge_whole(r, *given)[0] for r, given in zip(recipes, inputs, strict=True)]
    numbers = [*range(len(recipes))] * 2
    barrier = threading.Barrier(2 * NUM_LANES)

    def merge(which: int) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(0.1)
        out, _ = stream(backend, recipes[which], *inputs[which])
        return np.array_equal(out, wanted[which])

    with ThreadPoolExecutor(2 * NUM_LANES) as pool:
        assert all(pool.map(merge, numbers))
    assert len(made) <= 2 * NUM_LANES
    assert set(made) == {MIB}


@pytest.mark.parametrize("drop", ["magprune", "magnitude"])
def test_the_backend_with_late_copies(monkeypatch: pytest.MonkeyPatch, drop: str) -> None:
    monkeypatch.setattr(staging, "HostQueue", LateQueue)
    recipe = recipe_of((25, 16384), base="BF16", experts=("BF16",) * 2, out="BF16", drop=drop)
    backend = TorchBackend("cpu", host_memory=4 * MIB)
    assert_like_reference(backend, recipe, *family(recipe, seed=1))
