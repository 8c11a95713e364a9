"""The driver: from a configuration to a finished output."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, DellaDistError, InputError, refused_as
from della_dist.locations import is_url
from della_dist.planning.build import MergePlan
from della_dist.planning.projection import memory_notes
from della_dist.report.progress import Goal, Watch, WorkerCounts
from della_dist.report.summary import MergeSummary
from della_dist.runtime.budget import budget, projected, with_remote
from della_dist.runtime.companions.carried import companion_files
from della_dist.runtime.engines.drive import Pool, drive
from della_dist.runtime.engines.local import LocalPool
from della_dist.runtime.open_plan import downloaded, open_plan
from della_dist.runtime.options import RunOptions, refuse_missing_ray
from della_dist.runtime.output.commit import Output, tidy
from della_dist.runtime.output.existing import open_output
from della_dist.runtime.task.inputs import any_remote
from della_dist.runtime.task.meter import Meter, peak_rss_bytes
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.local.bus_errors import survived
from della_dist.storage.opening import open_output_store
from della_dist.wording import listed_tensors

log = logging.getLogger("della_dist.run")


def merge(
    config: MergeConfig,
    out: str,
    options: RunOptions = RunOptions(),
    *,
    watch: Watch | None = None,
) -> MergeSummary:
    """Merge the checkpoints of `config` into `out`.

    Continues an interrupted run of the same merge. Every check that needs no tensor data comes
    before the first byte is written.

    Parameters
    ----------
    config
        The validated configuration.
    out
        The output, a directory or a URL: new, empty, or that of the same merge.
    options
        How to run it.
    watch
        Called once before the work starts; see `della_dist.report.progress.ProgressDisplay`.

    Raises
    ------
    ConfigError, InputError, OutputError
        If the merge is refused; nothing is written then.
    StorageError, RunError
        If it fails while running; the same call continues it.
    """
    started_s = time.monotonic()
    meter = Meter()
    config = options.applied_to(config)
    if options.download:
        config = downloaded(config)
    plan = open_plan(config, shard_bytes=options.shard_bytes)
    output = open_output(
        out,
        plan,
        restart=options.restart,
        verify_resumed=options.verify_resumed,
        public=options.public,
        staging=options.staging,
    )
    if not isinstance(output, Output):
        tidy(open_output_store(out, staging=options.staging), lease=options.lease)
        return MergeSummary(
            output=out,
            model_digest=output["model_digest"],
            num_tensors=output["num_tensors"],
            num_merged=output["actions"].get("merge", 0),
            num_from_base=output["actions"].get("base", 0),
            num_unstored=len(plan.ties.left_out),
            num_tasks=len(output["shards"]),
            tasks_resumed=len(output["shards"]),
            bytes_read=0,
            bytes_written=0,
            elapsed_s=time.monotonic() - started_s,
            peak_rss_bytes=peak_rss_bytes(),
            already_complete=True,
        )
    if is_url(out) or any_remote(plan):
        free_large_buffers_at_once()
    notes = (*_memory_notes(plan, out, options), *plan.notes())
    with refused_as(InputError, f"checkpoint {plan.reference.location}"):
        companions = companion_files(plan)
    resumed = len(output.committed)
    try:
        with survived(), open_pool(plan, output, options, meter) as pool:
            output.begin(lease=options.lease)
            if watch is not None:
                to_write = sum(plan.shards[i].size_bytes for i in output.remaining)
                done_bytes = plan.output_bytes - to_write
                goal = Goal(len(plan.shards), resumed, to_write, done_bytes, notes)
                watch(goal, meter.snapshot)
            drive(plan, output, pool, meter)
            peak_bytes = max(peak_rss_bytes(), pool.peak_rss_bytes)
        meter.enter("finishing")
        manifest = output.finish(companions)
    except DellaDistError as error:
        # Refused means that nothing is written. (Inputs that were changed are no refusal: what is
        # committed may be right, and the next run compares their content.)
        if error.exit_code == ConfigError.exit_code:
            output.discard_if_fresh()
        raise
    finally:
        output.close()
    _say_differing(plan, [t.name for t in output.committed.tensors() if t.action == "base"])
    done = meter.snapshot()
    workers = done.workers or WorkerCounts()
    return MergeSummary(
        output=out,
        model_digest=manifest["model_digest"],
        num_tensors=plan.num_tensors,
        num_merged=manifest["actions"].get("merge", 0),
        num_from_base=manifest["actions"].get("base", 0),
        num_unstored=len(plan.ties.left_out),
        num_tasks=len(plan.shards),
        tasks_resumed=resumed,
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        elapsed_s=time.monotonic() - started_s,
        peak_rss_bytes=peak_bytes,
        workers_lost=workers.workers_lost,
        tasks_retried=workers.tasks_retried,
        stragglers=workers.stragglers,
        notes=notes,
    )


def _say_differing(plan: MergePlan, from_base: Sequence[str]) -> None:
    """Log which integers differed; planning has said what is missing."""
    names = [name for name in from_base if plan.action(name) == "copy"]
    if names:
        log.info(
            "%s of integers not equal everywhere: taken from %s.",
            listed_tensors(names),
            plan.reference.location,
        )


def _memory_notes(plan: MergePlan, out: str, options: RunOptions) -> tuple[str, ...]:
    device = "cpu" if options.on_ray else options.device  # this machine may have no GPU then
    memory = with_remote(budget(options), plan, out)
    return memory_notes(projected(plan, memory, device))


def open_pool(plan: MergePlan, output: Output, options: RunOptions, meter: Meter) -> Pool:
    """Return the workers of the engine that `options` names, not started yet.

    Raises
    ------
    ConfigError
        If the engine cannot run.
    """
    if not options.on_ray:
        return LocalPool(plan, output, options, meter)
    refuse_missing_ray(options)
    from della_dist.runtime.engines.ray.pool import RayPool

    return RayPool(plan, output, options, meter)
