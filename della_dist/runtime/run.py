"""The driver: from a configuration to a finished output."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, DellaDistError, InputError, refused_as
from della_dist.locations import HUB_PREFIX, is_url
from della_dist.planning.balance_notes import form_notes
from della_dist.planning.build import MergePlan
from della_dist.planning.projection import memory_notes, task_bytes_to_read
from della_dist.report.adapter_card import kept_energy
from della_dist.report.check import CheckSummary, recorded
from della_dist.report.progress import Goal, Watch, WorkerCounts
from della_dist.report.run_events import MergeEnded, Planned, RunStarted
from della_dist.report.run_log import tell
from della_dist.report.summary import MergeSummary
from della_dist.runtime.budget import budget, projected, with_remote
from della_dist.runtime.check import check_before
from della_dist.runtime.companions.carried import companion_files
from della_dist.runtime.engines.drive import Pool, drive
from della_dist.runtime.engines.local import LocalPool
from della_dist.runtime.open_plan import downloaded
from della_dist.runtime.options import RunOptions, refuse_missing_ray
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.removal import remove, tidy
from della_dist.runtime.stages.chain import Chain, Link
from della_dist.runtime.stages.leavings import is_there, remove_stage
from della_dist.runtime.stages.places import stages_root
from della_dist.runtime.stages.sole import sole_run
from della_dist.runtime.task.blas import one_blas_thread
from della_dist.runtime.task.inputs import any_remote
from della_dist.runtime.task.meter import Meter, peak_rss_bytes
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.local.bus_errors import survived
from della_dist.storage.opening import open_output_store
from della_dist.version import __version__
from della_dist.wording import few, listed_tensors

log = logging.getLogger("della_dist.run")


def merge(
    config: MergeConfig,
    out: str,
    options: RunOptions = RunOptions(),
    *,
    watch: Watch | None = None,
) -> MergeSummary:
    """Merge the checkpoints of `config` into `out`.

    Continues an interrupted run of the same merge. Every check that needs no tensor data, and that
    of a sample of it, comes before the first byte is written.

    Parameters
    ----------
    config
        The validated configuration.
    out
        The output, a directory or a URL: new, empty, or that of the same merge.
    options
        How to run it.
    watch
        Called once before the work starts; see `della_dist.report.display.ProgressDisplay`. Of
        several documents, once before the work of each.

    Raises
    ------
    ConfigError, InputError, OutputError
        If the merge is refused; nothing is written then.
    StorageError, RunError
        If it fails while running; the same call continues it.
    """
    started_s = time.monotonic()
    config = options.applied_to(config)
    if options.download:
        names = [str(stage.name) for stage in config.stages]
        stages = tuple(downloaded(stage, names) for stage in config.stages)
        config = replace(downloaded(config, names), stages=stages)
    tell(
        RunStarted(
            output=out,
            merge_method=config.merge_method,
            num_merges=len(config.stages) + 1,
            engine="ray" if options.on_ray else "local",
            seed=config.seed,
            version=__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
    )
    chain = Chain(config, out, options)
    checks = {link.number: check_before(link, options) for link in chain.to_do()}
    if config.stages and (chain.to_do() or any(is_there(link) for link in chain.stages)):
        summary = _merge_all(chain, config, out, options, watch, checks)
    else:
        summary = _merge_one(chain.last, options, watch, checks)
    summary = replace(summary, elapsed_s=_since(started_s))
    tell(MergeEnded("", summary.to_dict()))
    return summary


def _since(started_s: float) -> float:
    return time.monotonic() - started_s


def _merge_all(
    chain: Chain,
    config: MergeConfig,
    out: str,
    options: RunOptions,
    watch: Watch | None,
    checks: Mapping[int, CheckSummary | None],
) -> MergeSummary:
    """Make the stages that are needed, then the output; then remove the stages.

    Each is an output of its own, which a later run goes on with, or finds complete.
    """
    with sole_run(out, options.staging, lease=options.lease) as lock:
        if chain.rests_on_earlier() and not options.restart:
            # Read whole, once: nothing could find a damaged stage when it is removed.
            chain = Chain(config, out, replace(options, verify_resumed=True))
        if options.restart:  # all at once: nothing of an earlier run is taken for one of this
            # What a branch of the Hub holds is replaced by the commit.
            on_hub = out.startswith(HUB_PREFIX)
            for link in reversed(chain.stages if on_hub else chain.links):
                remove(open_output_store(str(link.location)), link.plan, lease=options.lease)
            options = replace(options, restart=on_hub)
            chain = Chain(config, out, options)
        to_do = {link.number for link in chain.to_do()}
        stages: list[MergeSummary] = []
        try:
            for link in chain.stages:
                if link.number not in to_do and not link.is_complete:
                    continue
                opened = chain.reopened(link)
                summary = _merge_one(opened, options, watch, checks, chain.label(link))
                lock.check()
                chain.made(opened, summary.model_digest)
                stages.append(replace(summary, name=link.name))
                tell(MergeEnded(link.name, stages[-1].to_dict()))
            last_link = chain.reopened(chain.last)
            last = _merge_one(last_link, options, watch, checks, chain.label(last_link))
            lock.check()
        except DellaDistError:
            if stages:
                log.warning(
                    "complete, and kept in %s for the same command to go on from: %s.",
                    stages_root(out, options.staging),
                    few([stage.name for stage in stages]),
                )
            raise
        if not options.keep_stages:
            for link in reversed(chain.stages):
                remove_stage(link, lease=options.lease)
    done = (*stages, last)
    return replace(
        last,
        stages=tuple(stages),
        stages_in=stages_root(out, options.staging) if options.keep_stages else None,
        bytes_read=sum(one.bytes_read for one in done),
        bytes_written=sum(one.bytes_written for one in done),
        peak_rss_bytes=max(one.peak_rss_bytes for one in done),
    )


def _merge_one(
    link: Link,
    options: RunOptions,
    watch: Watch | None,
    checks: Mapping[int, CheckSummary | None],
    label: str = "",
) -> MergeSummary:
    """Run one merge, or go on with it, or find that it is complete.

    Parameters
    ----------
    checks
        What was found of the models, by number of the merge; None: they were not looked at.
    """
    started_s = time.monotonic()
    meter = Meter()
    plan, output, out = link.plan, link.found, link.location
    assert output is not None
    assert out is not None
    if not isinstance(output, Output):
        staging = None if link.name else options.staging
        tidy(open_output_store(out, staging=staging), lease=options.lease)
        return MergeSummary(
            output=out,
            model_digest=output["model_digest"],
            num_tensors=output["num_tensors"],
            num_merged=output["actions"].get("merge", 0),
            num_from_base=output["actions"].get("base", 0),
            num_unstored=len(plan.ties.left_out),
            num_factors=output["actions"].get("factor", 0),
            num_tasks=len(output["shards"]),
            tasks_resumed=len(output["shards"]),
            bytes_read=0,
            bytes_written=0,
            elapsed_s=_since(started_s),
            peak_rss_bytes=peak_rss_bytes(),
            already_complete=True,
        )
    if is_url(out) or any_remote(plan) or plan.config.method.is_balanced:
        free_large_buffers_at_once()
    check = checks.get(link.number)
    said = () if check is None else check.notes
    notes = (*_memory_notes(plan, out, options), *plan.notes(), *form_notes(plan), *said)
    with refused_as(InputError, f"checkpoint {plan.reference.location}"):
        companions = companion_files(plan)
    resumed = len(output.committed)
    try:
        with survived(), one_blas_thread(plan), open_pool(plan, output, options, meter) as pool:
            output.begin(lease=options.lease, check=None if check is None else recorded(check))
            to_do = [plan.shards[i] for i in output.remaining]
            to_write = sum(shard.size_bytes for shard in to_do)
            tell(
                Planned(
                    stage=link.name,
                    output=out,
                    num_tensors=plan.num_tensors,
                    num_tasks=len(plan.shards),
                    tasks_resumed=resumed,
                    bytes_to_read=sum(task_bytes_to_read(plan, shard) for shard in to_do),
                    bytes_to_write=to_write,
                    notes=notes,
                )
            )
            if watch is not None:
                done_bytes = plan.output_bytes - to_write
                goal = Goal(len(plan.shards), resumed, to_write, done_bytes, notes, label)
                watch(goal, meter.snapshot)
            drive(plan, output, pool, meter)
            peak_bytes = max(peak_rss_bytes(), pool.peak_rss_bytes)
        meter.enter("finishing")
        manifest = output.finish(companions, meter.session(pool.engine, pool.cpu_s))
    except DellaDistError as error:
        # Refused means that nothing is written. (Inputs that were changed are no refusal: what is
        # committed may be right, and the next run compares their content.)
        if error.exit_code == ConfigError.exit_code:
            output.discard_if_fresh()
        raise
    finally:
        output.close()
    _say_differing(plan, [t.name for t in output.committed.tensors() if t.action == "base"])
    adapter = plan.adapter
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
        elapsed_s=_since(started_s),
        peak_rss_bytes=peak_bytes,
        workers_lost=workers.workers_lost,
        tasks_retried=workers.tasks_retried,
        stragglers=workers.stragglers,
        num_factors=manifest["actions"].get("factor", 0),
        energy=None if adapter is None else kept_energy(adapter, output.committed.tensors()),
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
    memory = with_remote(budget(options), plan, out, elsewhere=options.on_ray)
    if options.on_ray:  # the GPU of this machine is for its actor
        options = replace(options, device="cpu", gpu_memory=None)
    return memory_notes(projected(plan, memory, options))


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
