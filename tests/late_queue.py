"""A device that copies as late as it may: what is read before it was waited for is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from della_dist.ops.gpu.staging import Event


class LateQueue:
    """Of a device that copies as late as it may: once somebody waits for what comes after."""

    def __init__(self, device: torch.device) -> None:
        del device
        self._todo: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self._todo.append((to, source))

    def mark(self) -> Event:
        return _LateEvent(self._come_to, len(self._todo))

    def wait(self, event: Event) -> None:
        event.synchronize()  # torch computes here and now

    def current(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def _come_to(self, end: int) -> None:
        for to, source in self._todo[self._done : end]:
            to.copy_(source)
        self._done = max(self._done, end)


class _LateEvent:
    def __init__(self, come_to: Callable[[int], None], end: int) -> None:
        self._come_to, self._end = come_to, end

    def synchronize(self) -> None:
        self._come_to(self._end)
