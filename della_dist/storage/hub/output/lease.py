"""The right to write to the Hub from one folder, and what goes on in a process that has it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from della_dist.storage.hub.output.uploads import Uploads
from della_dist.storage.local.lock import LocalLock


class HubLease:
    """The lock of the folder, and the uploads from it; see `della_dist.storage.store.Lease`."""

    def __init__(self, lock: LocalLock, uploads: Uploads[Any]) -> None:
        self._lock = lock
        self._uploads = uploads
        self.token = lock.token
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())

    def check(self) -> None:
        """Raise what an upload failed with."""
        self._lock.check()
        self._uploads.check()

    def release(self) -> None:
        """Begin no upload any more, and let go of the lock. Harmless when repeated."""
        # What an interrupted run is still sending may not begin to draw bars.
        self._uploads.close(self._quiet.close)
        self._lock.release()

    def __enter__(self) -> HubLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let `huggingface_hub` draw no bars, and say nothing itself: it names signed addresses.

    That a request is made again is said where the run says so.
    """
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    def set_bars(enabled: bool) -> None:
        with warnings.catch_warnings():  # that HF_HUB_DISABLE_PROGRESS_BARS comes first
            warnings.simplefilter("ignore")
            (enable_progress_bars if enabled else disable_progress_bars)()

    had_bars, verbosity = not are_progress_bars_disabled(), hub_logging.get_verbosity()
    set_bars(False)
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        set_bars(had_bars)
