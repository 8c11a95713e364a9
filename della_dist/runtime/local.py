"""The local engine: worker threads of this process, which share one pool of compute threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from della_dist.runtime.output import Output
from della_dist.runtime.worker import Cancelled, MergeContext, merge_task


def run_local(context: MergeContext, output: Output, tasks: Sequence[int]) -> None:
    """Merge and commit `tasks`, several at a time.

    The first error stops the others as soon as they reach their next block, and is raised; tasks
    that were committed by then stay committed.
    """

    def run(index: int) -> None:
        if context.cancelled.is_set():
            raise Cancelled
        output.commit(merge_task(context, index, output.store, output.lease_token))
        context.meter.finished_task()

    with ThreadPoolExecutor(context.budget.workers, thread_name_prefix="worker") as workers:
        futures: list[Future[None]] = [workers.submit(run, index) for index in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(f.done() and f.exception() is not None for f in futures) or not all(
                f.done() for f in futures
            ):
                context.cancelled.set()
                for future in futures:
                    future.cancel()
    errors = [e for f in futures if not f.cancelled() and (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, Cancelled):
            raise error
    if errors:
        raise errors[0]
