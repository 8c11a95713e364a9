"""The driver: from a configuration to a finished output."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, InputChangedError, InputError
from della_dist.locations import is_url
from della_dist.plan.build import MergePlan
from della_dist.report.progress import Goal, Snapshot, WorkerCounts
from della_dist.runtime.backend import choose_backend
from della_dist.runtime.companions import companion_files
from della_dist.runtime.drive import Pool, drive
from della_dist.runtime.existing import open_output
from della_dist.runtime.inputs import any_remote, open_plan
from della_dist.runtime.local import LocalPool
from della_dist.runtime.meter import Meter, peak_rss_bytes
from della_dist.runtime.options import RunOptions, budget, with_remote
from della_dist.runtime.output import Output, tidy
from della_dist.runtime.projection import memory_notes, project
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.opening import open_store


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a merge did."""

    output: str
    model_digest: str
    num_tensors: int
    num_tasks: int
    tasks_resumed: int
    bytes_read: int
    bytes_written: int
    elapsed_s: float
    peak_rss_bytes: int
    """Of the largest process: the driver or a worker."""
    workers_lost: int = 0
    tasks_retried: int = 0
    stragglers: int = 0
    """Tasks that were started a second time because the first attempt took long."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, as ``plan`` says; none where nothing was left to do."""


#: Called once before the work starts, with what there is to do and a look at what is done.
Watch = Callable[[Goal, Callable[[], Snapshot]], None]


def merge(
    config: MergeConfig,
    out: str,
    options: RunOptions,
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
    plan = open_plan(config, shard_bytes=options.shard_bytes)
    output = open_output(out, plan, restart=options.restart)
    if not isinstance(output, Output):
        tidy(open_store(out))
        return MergeSummary(
            output=out,
            model_digest=output["model_digest"],
            num_tensors=output["num_tensors"],
            num_tasks=len(output["shards"]),
            tasks_resumed=len(output["shards"]),
            bytes_read=0,
            bytes_written=0,
            elapsed_s=time.monotonic() - started_s,
            peak_rss_bytes=peak_rss_bytes(),
        )
    if is_url(out) or any_remote(plan):
        free_large_buffers_at_once()
    notes = (*_memory_notes(plan, out, options), *plan.notes())
    companions = companion_files(plan)
    resumed = len(output.committed)
    try:
        with open_pool(plan, output, options, meter) as pool:
            output.begin()
            if watch is not None:
                to_write = sum(plan.shards[i].size_bytes for i in output.remaining)
                done_bytes = plan.output_bytes - to_write
                goal = Goal(len(plan.shards), resumed, to_write, done_bytes, notes)
                watch(goal, meter.snapshot)
            drive(plan, output, pool, meter)
            peak_bytes = max(peak_rss_bytes(), pool.peak_rss_bytes)
        meter.enter("finishing")
        digest = output.finish(companions)
    except InputChangedError:
        raise  # what is committed may be right: the next run compares the inputs' content
    except InputError:
        output.discard_if_fresh()
        raise
    finally:
        output.close()
    done = meter.snapshot()
    workers = done.workers or WorkerCounts()
    return MergeSummary(
        output=out,
        model_digest=digest,
        num_tensors=plan.num_tensors,
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


def _memory_notes(plan: MergePlan, out: str, options: RunOptions) -> tuple[str, ...]:
    device = "cpu" if _on_ray(options) else options.device  # this machine may have no GPU then
    memory = with_remote(budget(options), plan, out)
    return memory_notes(project(plan, choose_backend(device), memory))


def _on_ray(options: RunOptions) -> bool:
    return options.engine == "ray" or (options.engine == "auto" and options.address is not None)


def open_pool(plan: MergePlan, output: Output, options: RunOptions, meter: Meter) -> Pool:
    """Return the workers of the engine that `options` names, not started yet.

    Raises
    ------
    ConfigError
        If the engine cannot run.
    """
    if _on_ray(options):
        try:
            from della_dist.runtime.ray_engine import RayPool
        except ImportError as error:
            raise ConfigError(
                f"--engine ray needs Ray, which is not installed ({error}): "
                "pip install 'della-dist[ray]'."
            ) from error
        return RayPool(plan, output, options, meter)
    if options.address is not None:
        raise ConfigError("--address is for --engine ray; leave it out, or choose that engine.")
    return LocalPool(plan, output, options, meter)
