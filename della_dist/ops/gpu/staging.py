"""The way of a chunk to the device and back: buffers that stay, and queues that overlap.

A lane has two slots, a buffer on the host (pinned where the device is CUDA) and one of equal size
on the device each, and three queues of work: up, compute, down. Chunks take the slots in turn.
While the device computes one chunk, the next is copied into the other slot and sent up, and what
came of the one before comes down. What orders this are events, never a wait for all of the device:

* a host buffer is written once its last copy up has ended, and read once its copy down has;
* a device buffer is written once the chunk that was there is computed and its result sent down.

Buffers are allocated once: pinning memory costs more than copying it, and a copy from memory that
is not pinned waits for the device. On the CPU device the same code runs on queues that do at once
what they are told.

Any number of threads may ask for a lane at once; each has its own for as long as it holds it, and
whoever comes when all are taken waits. Two calls of one thread do not nest.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from della_dist.errors import RunError

#: Buffers of a lane.
NUM_SLOTS = 2
#: Where parts of a slot start: at a multiple of this, as every dtype and wide loads want.
ALIGNMENT = 256


@contextlib.contextmanager
def memory_of(name: str) -> Iterator[None]:
    """Say of which tensor it is that the device has no room for.

    Raises
    ------
    RunError
        If its memory is used up.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).split(". ", maxsplit=1)[0]
        raise RunError(
            f"tensor {name}: the memory of the GPU is used up ({reason}). If others use it, too, "
            "give less --gpu-memory and run the same command again: it continues."
        ) from error


class Event(Protocol):
    """A point of a queue."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class Queue(Protocol):
    """Work that a device does in order; beside other queues, unless it waits for an event."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between host and device; the host buffer is left alone until that has ended."""

    def mark(self) -> Event:
        """Return the point after all that was given to it by now."""

    def wait(self, event: Event) -> None:
        """Let what is given to it from now on begin after an event of another queue."""

    def current(self) -> AbstractContextManager[object]:
        """Return a context in which torch computes on this queue."""


class CudaQueue:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy as soon as it is its turn, and return at once."""
        with self.current():
            to.copy_(source, non_blocking=True)

    def mark(self) -> Event:
        """Return an event; who waits for it leaves the core to others."""
        event: Event = torch.cuda.Event(blocking=True)
        event.record(self._stream)  # type: ignore[attr-defined]
        return event

    def wait(self, event: Event) -> None:
        """Wait on the device; the host goes on."""
        self._stream.wait_event(event)

    def current(self) -> AbstractContextManager[object]:
        """Return a context in which this is torch's stream, of computing and of allocating."""
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream


class _Past:
    def synchronize(self) -> None:
        """Return: it has passed."""


class HostQueue:
    """Of the CPU device: everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        del device

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        to.copy_(source)

    def mark(self) -> Event:
        """Return a point that has passed."""
        return _Past()

    def wait(self, event: Event) -> None:
        """Do nothing."""

    def current(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()


def slot_need(sizes: Sequence[int]) -> int:
    """Return the bytes of a slot that holds parts of these sizes in bytes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class Slot:
    """A buffer on the host and one on the device, and how far the chunk in them is."""

    def __init__(self, device: torch.device, num_bytes: int, computed: Event) -> None:
        self.num_bytes = num_bytes
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._used = 0
        self._computed = computed
        self._uploaded: Event = _Past()
        self._downloaded: Event = _Past()
        self._waiting: tuple[torch.Tensor, npt.NDArray[Any]] | None = None

    def upload(self, parts: Sequence[npt.NDArray[Any]], lane: Lane) -> list[torch.Tensor]:
        """Send a chunk to the device, once what was here has gone.

        Returns
        -------
        list
            The bytes of its parts there, each as it would be contiguous.
        """
        self.finish()
        self._uploaded.synchronize()
        host = self._host.numpy()
        found, start = [], 0
        for part in parts:
            bytes_here = slice(start, start + part.nbytes)
            np.copyto(host[bytes_here].view(part.dtype).reshape(part.shape), part)
            found.append(self._device[bytes_here])
            start += slot_need([part.nbytes])
        self._used = start
        lane.up.wait(self._computed)
        lane.up.copy(self._device[:start], self._host[:start])
        self._uploaded = lane.up.mark()
        lane.compute.wait(self._uploaded)
        return found

    def computed(self, lane: Lane) -> None:
        """Say that all that reads the chunk was given to the lane's queue."""
        self._computed = lane.compute.mark()

    def download(self, result: torch.Tensor, out: npt.NDArray[Any], lane: Lane) -> None:
        """Send what came of the chunk, uint8, to the host; `finish` puts it where it belongs."""
        there = slice(self._used, self._used + result.numel())
        self._device[there].copy_(result)
        self.computed(lane)
        lane.down.wait(self._computed)
        lane.down.copy(self._host[there], self._device[there])
        self._downloaded = lane.down.mark()
        self._waiting = self._host[there], out

    def finish(self) -> None:
        """Wait for what comes down, and put it where it belongs."""
        if self._waiting is not None:
            self._downloaded.synchronize()
            host, out = self._waiting
            self._waiting = None
            np.copyto(out, host.numpy())


class Lane:
    """Two slots and the queues between them; of one thread at a time."""

    def __init__(
        self, device: torch.device, slot_bytes: int, new_queue: Callable[[torch.device], Queue]
    ) -> None:
        self.up, self.compute, self.down = (new_queue(device) for _ in range(3))
        self._device = device
        self._slots = self._new_slots(slot_bytes)
        self._own = self._slots
        self._turn = 0

    def _new_slots(self, num_bytes: int) -> list[Slot]:
        with self.compute.current():  # whose allocator may give out what it still reads
            return [Slot(self._device, num_bytes, self.compute.mark()) for _ in range(NUM_SLOTS)]

    def fit(self, num_bytes: int) -> None:
        """See to it that a chunk of so many bytes fits; until `settle`, if it is a large one."""
        if num_bytes > self._slots[0].num_bytes:
            self._slots = self._new_slots(num_bytes)

    def chunks(
        self, parts_of: Callable[[int, int], Sequence[npt.NDArray[Any]]], num: int, step: int
    ) -> Iterator[tuple[int, int, Slot, list[torch.Tensor]]]:
        """Yield chunk after chunk: from where, to where, its slot, and its parts on the device.

        Parameters
        ----------
        parts_of
            Returns elements ``start`` to ``stop`` on the host, or their bytes.
        num
            Of elements.
        step
            Elements of a chunk.
        """
        for start in range(0, num, step):
            stop = min(start + step, num)
            slot = self._slots[self._turn]
            self._turn = (self._turn + 1) % NUM_SLOTS
            yield start, stop, slot, slot.upload(parts_of(start, stop), self)
            slot.computed(self)

    def settle(self) -> None:
        """Wait until all that was asked for is on the host; give large slots back."""
        for slot in self._slots[self._turn :] + self._slots[: self._turn]:
            slot.finish()
            slot.computed(self)  # whoever stopped between two chunks has not said so
        if self._slots is not self._own:
            self.compute.mark().synchronize()
            self._slots = self._own


class Staging:
    """The lanes of one device.

    Parameters
    ----------
    device
        Where to.
    num_lanes
        How many threads have one at once.
    slot_bytes
        Of each slot of a lane, which are made when they are first needed, and stay.
    new_queue
        Returns a queue of the device.
    """

    def __init__(
        self,
        device: torch.device,
        num_lanes: int,
        slot_bytes: int,
        new_queue: Callable[[torch.device], Queue] | None = None,
    ) -> None:
        self._new_queue = new_queue or (CudaQueue if device.type == "cuda" else HostQueue)
        self._device, self.slot_bytes = device, slot_bytes
        self._allowed = threading.BoundedSemaphore(num_lanes)
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._large = threading.Lock()

    @contextlib.contextmanager
    def lane(self, chunk_bytes: int, *, is_large: bool = False) -> Iterator[Lane]:
        """Hand out a lane; at the end, all that was asked for has arrived.

        Parameters
        ----------
        chunk_bytes
            That a slot holds at most (`slot_need`).
        is_large
            Whether no other large chunk may be on the device meanwhile.
        """
        with self._large if is_large else contextlib.nullcontext(), self._allowed:
            with self._lock:
                lane = self._free.pop() if self._free else None
            lane = lane or Lane(self._device, self.slot_bytes, self._new_queue)
            try:
                lane.fit(chunk_bytes)
                with lane.compute.current():
                    yield lane
            finally:  # a lane whose device has failed is not handed out again
                lane.settle()
                with self._lock:
                    self._free.append(lane)
