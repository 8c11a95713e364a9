"""The command line: parse, call, exit code. Everything heavy is imported when a command runs."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from della_dist.errors import OutputError
from della_dist.locations import check_location, is_url, local_path
from della_dist.program import Commands, check_shown, failures
from della_dist.report.text import parse_size
from della_dist.version import __version__
from della_dist.wording import plural

if TYPE_CHECKING:
    from della_dist.config import MergeConfig
    from della_dist.runtime.options import RunOptions
    from della_dist.runtime.run import MergeSummary
    from della_dist.runtime.verify import VerifySummary


class Size(click.ParamType[int]):
    """Bytes, as ``268435456``, ``256MiB`` or ``5GB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option(
                "--engine",
                type=click.Choice(["auto", "local", "ray"]),
                default="auto",
                help="Where the merge runs: in this process (local), or on a Ray cluster.",
            ),
            click.option(
                "--address",
                help="Ray cluster: auto, local, ray://HOST:10001 or HOST:PORT.  [default: one that "
                "runs, else one is started here]",
            ),
            click.option(
                "--locality",
                multiple=True,
                metavar="GLOB:KEY=VALUE",
                help="Ray nodes with this label have these input files on their own disks.",
            ),
            click.option(
                "--workers",
                type=int,
                help="Shards merged at once; with ray: actors.  [default: 2; as many as fit]",
            ),
            click.option(
                "--threads",
                type=int,
                help="Compute threads; with ray: of an actor.  [default: all cores; at most 8]",
            ),
            click.option(
                "--memory",
                type=Size(),
                help="Budget for buffers; with ray: of an actor.  [default: 1GiB]",
            ),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                help="Where tensors are merged.",
            ),
            click.option("--seed", type=int, help="Seed, instead of the configuration's."),
            click.option(
                "--shard-size",
                type=Size(),
                help="Largest output shard.  [default: from the output's size]",
            ),
        ]
    ):
        command = option(command)
    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="della-dist")
def main() -> None:
    """Merge very large language-model checkpoints by DELLA, DARE, TIES and task arithmetic.

    The output is the same to the byte whatever the threads, workers or memory; an interrupted merge
    continues when the same command is run again.

    Exit status: 0 done, 1 failed while running (run it again), 2 refused (wrong configuration,
    input or output), 3 verification found a difference, 4 a fault of the program (report it).
    """


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out")
@_run_options
@click.option("--restart", is_flag=True, help="Discard what an earlier run left in OUT.")
@click.option(
    "--verify-resumed",
    is_flag=True,
    help="Read the shards of an earlier run whole, and merge again those that were altered.",
)
@click.option(
    "--no-lease",
    is_flag=True,
    help="For stores without conditional writes: you see to it that one run writes to OUT.",
)
@click.option("--quiet", is_flag=True, help="Show no notes, no progress and no summary.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def merge(config: Path, out: str, quiet: bool, as_json: bool, no_lease: bool, **run: Any) -> None:
    """Merge the checkpoints that CONFIG names into OUT, a directory or a URL (s3://...)."""
    loaded = _load(config, run)
    summary = _merge(loaded, out, _options(lease=not no_lease, **run), quiet)
    if as_json:
        click.echo(json.dumps(_as_dict(summary)))
    elif not quiet:
        _print_summary(summary)


def _load(path: Path, run: dict[str, Any]) -> MergeConfig:
    """Return the configuration with what the command line says of it, taken out of `run`."""
    from della_dist.config import load_config

    seed, locality = run.pop("seed"), run.pop("locality")
    config = load_config(path)
    if seed is not None:
        config = config.with_seed(seed)
    return config.with_node_labels(locality)


def _merge(config: MergeConfig, out: str, options: RunOptions, quiet: bool) -> MergeSummary:
    from della_dist.report.progress import ProgressDisplay
    from della_dist.runtime.run import merge as run_merge

    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray prints there that a node died
        ProgressDisplay(quiet=quiet) as display,
        _events_to(display.say),
    ):
        return run_merge(config, out, options, watch=display.watch)


class _Lines(logging.Handler):
    """Shows what happens to workers and tasks, a line each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._say(record.getMessage())


@contextlib.contextmanager
def _events_to(say: Callable[[str], None]) -> Iterator[None]:
    """Show the log of the run on the terminal."""
    log = logging.getLogger("della_dist.run")
    handler = _Lines(say)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _options(**run: Any) -> RunOptions:
    from della_dist.runtime.options import RunOptions

    memory = run.pop("memory")
    if memory is not None:
        run["memory_bytes"] = memory
    return RunOptions(shard_bytes=run.pop("shard_size"), **run)


def _as_dict(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in type(value).__dataclass_fields__}


def _print_summary(summary: MergeSummary) -> None:
    from della_dist.report.text import format_bytes, format_mem, format_seconds

    resumed = summary.tasks_resumed
    if summary.already_complete:
        click.echo(f"{summary.output} is complete already; nothing was done.")
    else:
        kept = f", {resumed} of them kept from an earlier run" if resumed else ""
        click.echo(
            f"merged {_tensor_counts(summary)} into {plural(summary.num_tasks, 'shard')}{kept}"
        )
        click.echo(f"output  {summary.output}")
        click.echo(
            f"took    {format_seconds(summary.elapsed_s)}, read "
            f"{format_bytes(summary.bytes_read)}, wrote {format_bytes(summary.bytes_written)}, "
            f"peak memory {format_mem(summary.peak_rss_bytes)}"
        )
    click.echo(f"digest  {summary.model_digest}")


def _tensor_counts(summary: MergeSummary) -> str:
    """Return how many tensors of the model are in the output, and how they came there."""
    count, merged, unstored = summary.num_tensors, summary.num_merged, summary.num_unstored
    parts = [f"{merged} merged"]
    if copied := count - merged:
        parts.append(f"{copied} copied")
    if summary.num_from_base:
        parts.append(f"{summary.num_from_base} of them not equal or missing in some expert")
    if unstored:
        parts.append(f"{unstored} tied and unstored")
    return f"{count} of {count + unstored} tensors ({', '.join(parts)})"


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", required=False)
@_run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def plan(config: Path, out: str | None, as_json: bool, **run: Any) -> None:
    """Check everything and say what a merge would take; nothing is merged or written."""
    from della_dist.report.plan import plan_lines
    from della_dist.report.text import terminal_width
    from della_dist.runtime.describe import describe_plan

    loaded = _load(config, run)
    described = describe_plan(loaded, out, _options(**run))
    if as_json:
        click.echo(json.dumps(described))
    else:
        click.echo("\n".join(plan_lines(described, terminal_width(sys.stdout))))
    check_shown()


@main.command()
@click.argument("out")
@click.option(
    "--recompute",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also recompute N random tensors from the inputs and compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def verify(out: str, recompute: int, as_json: bool) -> None:
    """Check every byte of OUT against its manifest."""
    from della_dist.runtime.verify import verify as run_verify

    summary = run_verify(out, recompute=recompute)
    if as_json:
        click.echo(json.dumps(_as_dict(summary)))
    else:
        _print_verified(summary)
    check_shown()


def _print_verified(summary: VerifySummary) -> None:
    from della_dist.report.text import format_bytes, format_seconds

    click.echo(
        f"{summary.output}: {summary.num_files} files, {summary.num_tensors} tensors, "
        f"{format_bytes(summary.bytes_read)} are as written ({format_seconds(summary.elapsed_s)})"
    )
    for name in summary.edited:
        click.echo(f"{name} was edited since; it is no part of what is verified")
    if summary.recomputed:
        click.echo(f"recomputed {len(summary.recomputed)} tensors from the inputs: equal")
    click.echo(f"digest  {summary.model_digest}")


@main.command()
@click.argument("directory", default="demo", metavar="[DIR]")
@failures
def demo(directory: str) -> None:
    """Make a small model family in DIR (default: demo), merge it, and verify the result."""
    from della_dist.demo.run import run_demo

    try:
        check_location(directory)
    except ValueError as error:
        raise OutputError(f"the directory {error}.") from None
    if is_url(directory):
        raise OutputError(f"{directory} is a URL; the demo is made in a local directory.")
    run_demo(local_path(directory), click.echo)


if __name__ == "__main__":
    main()
