"""What stages leave beside an output that is complete."""

from __future__ import annotations

import logging

from della_dist.errors import OutputError, StorageError, VerificationError
from della_dist.runtime.output.removal import remove
from della_dist.runtime.stages.chain import Link
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.opening import open_output_store

log = logging.getLogger("della_dist.run")


def is_there(link: Link) -> bool:
    """Return whether there is something of the output of a stage."""
    store = open_output_store(str(link.location))
    return store.exists(MANIFEST_NAME) or store.has_state()


def remove_stage(link: Link, *, lease: bool) -> None:
    """Remove the output of a stage that nothing needs any more.

    What was merged of it is done whatever happens to it: a failure is said, and no more.
    """
    try:
        remove(open_output_store(str(link.location)), link.plan, lease=lease)
    except (StorageError, OutputError, VerificationError) as error:
        log.warning("the stage in %s could not be removed: %s", link.location, error)
