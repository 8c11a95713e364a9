"""One run at a time makes and removes the stages of an output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from della_dist.errors import OutputError, StorageError, refused_as
from della_dist.locations import is_url, local_path
from della_dist.runtime.output.records import PLAN_KEY
from della_dist.runtime.output.removal import owner
from della_dist.runtime.stages.places import stages_root
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.opening import open_output_store
from della_dist.storage.store import Lease


@contextlib.contextmanager
def sole_run(out: str, staging: str | None = None, *, lease: bool) -> Iterator[Lease]:
    """Hold the folder of the stages of a merge into `out`; remove it in the end if it is empty.

    Each output has a lock of its own while it is written; this one keeps others from removing a
    stage that is complete and still to be read.

    Parameters
    ----------
    out
        The output of the last merge.
    staging, lease
        See `della_dist.storage.opening.open_output_store` and `Store.lock`.

    Raises
    ------
    OutputError
        If another run has it, or it cannot be written.
    """
    root = stages_root(out, staging)
    store = open_output_store(root)
    is_new = not is_url(root) and not local_path(root).exists()
    restore = store.remember_root()
    with refused_as(OutputError, f"the folder {root} for stages"):
        lock = store.lock(owner(), lease=lease)
    try:
        with lock:
            if store.exists(PLAN_KEY) or store.exists(MANIFEST_NAME):
                raise OutputError(
                    f"{root} is where the stages of {out} would lie, and the output of another "
                    "merge lies there. Choose another output."
                )
            try:
                yield lock
            finally:
                with contextlib.suppress(StorageError):  # leavings of no consequence
                    store.delete_state()
    finally:
        if is_new:
            restore()
