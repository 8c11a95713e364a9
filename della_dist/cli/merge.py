"""Merge, say what a merge would take, verify what it made; the demo does all of it."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from della_dist.cli.options import folders, options_of, run_options
from della_dist.errors import OutputError
from della_dist.locations import check_location, is_url, local_path
from della_dist.program import check_shown, failures, log_option, logged
from della_dist.runtime.options import RunOptions

if TYPE_CHECKING:
    from della_dist.config import MergeConfig
    from della_dist.report.summary import MergeSummary


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", shell_complete=folders)
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
@logged
def merge(config: Path, out: str, quiet: bool, as_json: bool, **run: Any) -> None:
    """Merge the checkpoints that CONFIG names into OUT: a directory, s3://..., hf://user/name."""
    from della_dist.config import load_config
    from della_dist.report.summary import merge_lines

    options = options_of(run)
    if quiet and options.download:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    summary = _merge(load_config(config), out, options, quiet)
    if as_json:
        click.echo(json.dumps(summary.to_dict()))
    elif not quiet:
        click.echo("\n".join(merge_lines(summary)))


def _merge(config: MergeConfig, out: str, options: RunOptions, quiet: bool) -> MergeSummary:
    from della_dist.report.display import ProgressDisplay
    from della_dist.report.run_log import lines_to
    from della_dist.runtime.run import merge as run_merge

    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray prints there that a node died
        ProgressDisplay(quiet=quiet) as display,
        lines_to(display.say),
    ):
        return run_merge(config, out, options, watch=display.watch)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", required=False, shell_complete=folders)
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@log_option
@failures
def plan(
    config: Path, out: str | None, quiet: bool, as_json: bool, log_json: str | None, **run: Any
) -> None:
    """Check all but weights and say what a merge would take; nothing is written or downloaded.

    Takes every option of merge, so that its command line is that of the plan, too.
    """
    from della_dist.config import load_config
    from della_dist.report.plan import plan_lines
    from della_dist.report.run_log import check_json_lines
    from della_dist.report.text import terminal_width
    from della_dist.runtime.describe import describe_plan

    if log_json is not None:
        check_json_lines(log_json)
    options = options_of(run)
    described = describe_plan(load_config(config), out, options)
    if as_json:
        click.echo(json.dumps(described.to_dict()))
    elif not quiet:
        click.echo("\n".join(plan_lines(described, terminal_width(sys.stdout))))
    check_shown()


@click.command()
@click.argument("out", shell_complete=folders)
@click.option(
    "--recompute",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also recompute N random tensors from the inputs and compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def verify(out: str, recompute: int, quiet: bool, as_json: bool) -> None:
    """Check every byte of OUT against its manifest."""
    from della_dist.report.summary import verify_lines
    from della_dist.runtime.verify import verify as run_verify

    summary = run_verify(out, recompute=recompute)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    elif not quiet:
        click.echo("\n".join(verify_lines(summary)))
    check_shown()


@click.command()
@click.argument("directory", default="demo", metavar="[DIR]", shell_complete=folders)
@failures
@logged
def demo(directory: str, quiet: bool) -> None:
    """Make a small model family in DIR (default: demo), merge it, and verify the result."""
    from della_dist.demo.run import run_demo

    try:
        check_location(directory)
    except ValueError as error:
        raise OutputError(f"the directory {error}.") from None
    if is_url(directory):
        raise OutputError(f"{directory} is a URL; the demo is made in a local directory.")
    run_demo(local_path(directory), (lambda line: None) if quiet else click.echo, quiet=quiet)
