"""Files on their way to the Hub: a few at once, a few waiting, the rest of the run held up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

#: Files sent at once: `huggingface_hub` sends the parts of one file one after another.
UPLOADS_AT_ONCE = 3
#: Files waiting or on their way; beyond that whoever brings another one waits.
MOST_WAITING = 4


class Uploads(Generic[T]):
    """Sends what it is given in threads of its own.

    Parameters
    ----------
    send
        Sends one item; returns what is to be done once it is sent, unless that is too late.
    """

    def __init__(self, send: Callable[[T], Callable[[], None]]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._num_running = 0
        self._error: BaseException | None = None
        self._is_closed = False
        self._num_threads = 0
        self._when_idle: Callable[[], None] = lambda: None

    @property
    def is_closed(self) -> bool:
        """Whether nobody waits for what is sent any more."""
        return self._is_closed

    def add(self, item: T) -> None:
        """Let `item` be sent; waits while too many are waiting.

        Raises
        ------
        Exception
            What an upload ended with.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or len(self._waiting) + self._num_running < MOST_WAITING
            )
            self._raise()
            self._waiting.append(item)
            if self._num_threads < UPLOADS_AT_ONCE:
                self._num_threads += 1
                # An interrupted run does not wait for the end of what is being sent.
                threading.Thread(target=self._run, name="upload", daemon=True).start()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what an upload ended with, if one failed."""
        with self._changed:
            self._raise()

    def finish(self) -> None:
        """Wait until everything is sent; raises as `add`."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._waiting or self._num_running))
            self._raise()

    def close(self, when_idle: Callable[[], None] = lambda: None) -> None:
        """Begin no upload any more. One that is on its way ends by itself, and leaves no note.

        Parameters
        ----------
        when_idle
            Called when none is on its way any more.
        """
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
            if self._num_running:
                self._when_idle = when_idle
                return
        when_idle()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                item = self._waiting.popleft()
                self._num_running += 1
            try:
                done = self._send(item)
                with self._changed:
                    if not self._is_closed:
                        done()
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
            finally:
                with self._changed:
                    self._num_running -= 1
                    self._changed.notify_all()
                    is_idle = self.is_closed and not self._num_running
                if is_idle:
                    self._when_idle()
