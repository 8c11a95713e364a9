"""The output directory of one run: begun, filled shard by shard, and completed.

Shards get their names when they are complete and on the disk. Index, configuration, tokenizer and
model card follow when all of them are; the manifest is last, and then ``.della/`` goes away, where
the records of the unfinished run are (`della_dist.runtime.output.records`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from della_dist.errors import OutputError, RunError, StorageError, refused_as
from della_dist.locations import masked, short_names
from della_dist.planning.build import MergePlan
from della_dist.planning.fingerprint import fingerprint, identity
from della_dist.planning.layout import INDEX_NAME, weight_map
from della_dist.report.card import model_card
from della_dist.runtime.companions.adapter_config import ADAPTER_CONFIG_NAME, adapter_config
from della_dist.runtime.companions.carried import CarriedFile, CompanionFile, carry
from della_dist.runtime.output.committed import CommittedTasks
from della_dist.runtime.output.history import keep_check, keep_history, kept_history
from della_dist.runtime.output.records import (
    CHECK_KEY,
    EVENTS_KEY,
    FINISHING_KEY,
    PLAN_KEY,
    TASKS,
    FinishingRecord,
    dump_finishing,
    dump_run,
    dump_task,
    load_finishing,
    run_record,
    task_key,
)
from della_dist.runtime.output.removal import discard, owner
from della_dist.runtime.task.kept_factors import FACTORS
from della_dist.runtime.task.merge import TaskRecord
from della_dist.specs.dtypes import num_elements
from della_dist.specs.history import Session
from della_dist.storage.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    dump_manifest,
    file_record,
    load_manifest,
    model_digest,
)
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.store import Lease, ObjectStat, OutputStore
from della_dist.storage.tensor_table import TENSORS_NAME, dump_tensors
from della_dist.version import __version__

#: Room that the small files need, beyond the shards.
SLACK_BYTES = 8 << 20


class Output:
    """The output directory of one run.

    Made by `open_output`, which has checked that the directory may be used; nothing is written
    before `begin`.

    Parameters
    ----------
    store, plan
        Where, and what.
    committed
        Tasks of an earlier run that are kept; None if this run is the first.
    discard
        Files of an earlier run that are removed first; then this run is the first, too.
    reopened
        For an output that was complete and has lost something: which small files are its own.
    """

    def __init__(
        self,
        store: OutputStore,
        plan: MergePlan,
        committed: CommittedTasks | None = None,
        discard: Sequence[str] | None = None,
        reopened: FinishingRecord | None = None,
    ) -> None:
        self.store = store
        self.plan = plan
        self.committed = CommittedTasks() if committed is None else committed
        self._identity = identity(plan)
        self._fresh = committed is None
        self._discard = discard
        self._reopened = reopened
        self._seen = self._state()
        self._restore_root = store.remember_root()
        self._lease: Lease | None = None

    @property
    def remaining(self) -> list[int]:
        """Indexes of the tasks that are not committed yet."""
        return [i for i in range(len(self.plan.shards)) if i not in self.committed]

    @property
    def needed_bytes(self) -> int:
        """Room that is needed for what is still to be written."""
        needed = sum(self.plan.shards[i].size_bytes for i in self.remaining) + SLACK_BYTES
        if self.plan.adapter is not None and self.remaining:
            needed += self.plan.output_bytes  # of factors, until all of them are written
        return needed + sum(self.plan.companion_bytes.values())

    def check_room(self) -> None:
        """Check that the disk has room for what is still to be written.

        Raises
        ------
        StorageError
            Stating both numbers, if it has not.
        """
        needed = self.needed_bytes
        free = self.store.free_bytes()
        if free is not None and free < needed:
            raise StorageError(
                f"{self.store.location} has room for {free} bytes, but {needed} are needed for "
                f"what is still to be written ({SLACK_BYTES} of them for the records). Make room "
                "there and run the same command again, or choose another output."
            )

    def begin(self, *, lease: bool = True, check: Mapping[str, Any] | None = None) -> None:
        """Take the lock and record the plan.

        Parameters
        ----------
        lease
            Whether the store has to keep other runs out; see `Store.lock`.
        check
            What was found of the models (`della_dist.report.check.recorded`); None: nothing now.

        Raises
        ------
        OutputError
            If the output cannot be written to, or another driver is working on it, or was since it
            was looked at.
        StorageError
            If the disk has too little room.
        """
        if self._fresh and self._discard is None:
            self.check_room()
        try:
            self._take_lease(lease)
        except OutputError:
            self.close()
            self._restore_root()
            raise
        self.store.clear_staging(self.plan.companions)
        if self._discard is not None:
            discard(self.store, self._discard, self._identity)
        self.check_room()  # again, now that the leavings of an earlier run are gone
        if self._reopened is not None:
            self._reopen(self._reopened)
        else:
            if self._fresh:
                self._forget()
            # Of a run that is continued, too: its inputs may be copies now, which the next run is
            # to compare with.
            self.store.put(PLAN_KEY, dump_run(run_record(self.plan, self._identity)))
        keep_check(self.store, check)
        for record in self.committed:
            self._settle(record)

    def _take_lease(self, lease: bool) -> None:
        with refused_as(OutputError, f"the output {self.store.location}"):
            self._lease = self.store.lock(owner(), lease=lease)
        if self._state() != self._seen:
            raise OutputError(
                f"{self.store.location} was written by another run just now. Run the same command "
                "again to see where it stands."
            )

    def _state(self) -> tuple[str | None, ...]:
        """Return what changes whenever another run begins here, or completes."""
        return tuple(
            self.store.stat(key).version if self.store.exists(key) else None
            for key in (MANIFEST_NAME, PLAN_KEY)
        )

    def _forget(self) -> None:
        """Remove the records of another run, whose plan was discarded, or lost."""
        kept = (*self.store.list(f"{TASKS}/"), *self.store.list(f"{FACTORS}/"))
        for key in (FINISHING_KEY, CHECK_KEY, *kept):
            self.store.delete(key)

    def _reopen(self, finishing: FinishingRecord) -> None:
        # The manifest goes last: killed before, the next run finds the same as this one did.
        self._forget()
        self.store.put(PLAN_KEY, dump_run(run_record(self.plan, self._identity)))
        self.store.put(FINISHING_KEY, dump_finishing(finishing))
        digest = load_manifest(self.store.read(MANIFEST_NAME))["model_digest"]
        history = kept_history(self.store, digest)
        keep_check(self.store, None if history is None else history.check)
        for record in self.committed:
            self.store.put(task_key(record.index), dump_task(record))
        self.store.delete(MANIFEST_NAME)

    def commit(self, record: TaskRecord) -> None:
        """Record a task whose shard is complete; from here on no rerun repeats it.

        Raises
        ------
        RunError
            If another run has taken the output over.
        """
        assert self._lease is not None
        self._lease.check()
        self.store.put(task_key(record.index), dump_task(record))
        self.committed.add(record)
        self._settle(record)

    def _settle(self, record: TaskRecord) -> None:
        shard = record.shard
        stat = ObjectStat(shard.size_bytes, record.version)
        self.store.settle(shard.name, stat, shard.sha256)

    def finish(
        self, companions: Sequence[CarriedFile], session: Session | None = None
    ) -> dict[str, Any]:
        """Write everything but the shards, the manifest last; return the manifest.

        Parameters
        ----------
        companions
            Configuration and tokenizer files to carry over.
        session
            This run, as it stands now.

        Raises
        ------
        RunError
            If another run has taken the output over, or somebody has put files there whose names
            are needed.
        """
        assert self._lease is not None
        self._lease.check()
        plan = self.plan
        tensors = self.committed.tensors
        actions = Counter(t.action for t in tensors())
        num_parameters = sum(num_elements(t.shape) for t in tensors())
        digest = model_digest(tensors())
        files = self._index()
        inputs = short_names([c.location for c in plan.inputs])

        def experts(name: str) -> list[tuple[str, float | None]]:
            named = (inputs[i] for i in plan.experts_of(name))
            return list(zip(named, plan.densities_of(name), strict=True))

        table = dump_tensors(tensors(), experts, factored=plan.adapter is not None)
        files.append(CompanionFile(TENSORS_NAME, table))
        if plan.adapter is not None:
            files.append(CompanionFile(ADAPTER_CONFIG_NAME, adapter_config(plan)))
        card = model_card(plan, digest, tensors(), num_parameters=num_parameters)
        files.append(CompanionFile("README.md", card.encode()))
        names = [*plan.companions, *(f.name for f in files), RUN_NAME]
        kept = self._claim(names).kept
        carried = [carry(f, self.store) for f in companions]
        for file in (f for f in files if f.name not in kept):
            self.store.put(file.name, file.data)
        keep_history(self.store, digest, self.committed, session)
        manifest = {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "della_dist", "version": __version__},
            "fingerprint": fingerprint(self._identity),
            "seed": plan.config.seed,
            **self._identity,
            **({"stages": list(plan.stages)} if plan.stages else {}),
            "num_tensors": actions.total(),
            "actions": dict(sorted(actions.items())),
            "num_parameters": num_parameters,
            "shards": [_file(shard) for shard in self.committed.shards()],
            "files": [_file(r) for r in (*carried, *(file_record(f.name, f.data) for f in files))],
            "model_digest": digest,
        }
        self._lease.check()
        self.store.complete(MANIFEST_NAME, dump_manifest(manifest))
        self._lease.check()
        self.store.clear_staging(self.plan.companions)  # of attempts whose workers died
        self.store.delete_state()
        self.close()  # not before: another run may begin now
        return manifest

    def _claim(self, names: Sequence[str]) -> FinishingRecord:
        """Make the names of the small files this run's own, unless they are already."""
        found = load_finishing(self.store)
        if found is not None:
            return found
        claimed = FinishingRecord((*names, MANIFEST_NAME))
        taken = self.store.taken(claimed.files)
        if taken:
            raise RunError(
                f"{', '.join(taken)} in {self.store.location} would be overwritten: put there "
                "while the merge was running, and not by it. Move that away and run the same "
                "command again: only the last files are still to be written."
            )
        self.store.put(FINISHING_KEY, dump_finishing(claimed))
        return claimed

    def _index(self) -> list[CompanionFile]:
        if len(self.plan.shards) == 1:
            return []
        content = {
            "metadata": {"total_size": self.plan.output_bytes},
            "weight_map": weight_map(self.plan.shards),
        }
        return [CompanionFile(INDEX_NAME, (json.dumps(content, indent=2) + "\n").encode())]

    def discard_if_fresh(self) -> None:
        """Remove what this run wrote, if it began it: for inputs that turn out to be wrong.

        What is committed cannot be continued once the inputs or the configuration are mended, since
        the run is another one then. A run that was resumed is left as it is, and so is one that
        another driver has taken over.
        """
        if self._fresh and self._lease is not None and self.store.is_held(self._lease.token):
            for shard in self.plan.shards:
                self.store.delete(shard.name)
            self.store.delete_state()
            self.close()
            self._restore_root()

    @property
    def lease_token(self) -> str:
        """What workers ask the store with whether this run still has the output."""
        assert self._lease is not None
        return self._lease.token

    def keep_events(self, text: str) -> str | None:
        """Leave the events of a run that failed for people to read; return where, if that worked.

        They go away with the records, once the output is complete.
        """
        if self._lease is None:
            return None
        try:
            if not self.store.is_held(self._lease.token):  # the records are another run's
                return None
            self.store.put(EVENTS_KEY, masked(text).encode())
        except StorageError:  # the failure of the run says more
            return None
        return self.store.describe(EVENTS_KEY)

    def close(self) -> None:
        """Release the lease."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def _file(record: FileRecord) -> dict[str, Any]:
    return {"name": record.name, "size_bytes": record.size_bytes, "sha256": record.sha256}
