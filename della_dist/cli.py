"""The command line: parse, call, exit code. Everything heavy is imported when a command runs."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from della_dist.errors import OutputError, VerificationError
from della_dist.locations import check_location, is_url, local_path, masked
from della_dist.program import Commands, check_shown, failures
from della_dist.runtime.options import RunOptions, flag_of
from della_dist.version import __version__

if TYPE_CHECKING:
    from della_dist.config import MergeConfig
    from della_dist.report.summary import MergeSummary


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `RunOptions` as options.

    What is written goes to `RunOptions`, which says what is wrong with it.
    """
    for option in reversed(fields(RunOptions)):
        facts = option.metadata
        choices = facts.get("choices")
        how: dict[str, Any] = {"metavar": facts["metavar"]}
        if choices:
            how = {"metavar": f"[{'|'.join(choices)}]"}
        elif isinstance(option.default, bool):
            how = {"is_flag": True}
        elif isinstance(option.default, tuple):
            how["multiple"] = True
        command = click.option(flag_of(option), option.name, help=facts["said"], **how)(command)
    return command


def options_of(run: Mapping[str, Any]) -> RunOptions:
    """Return the options that were written."""
    given: dict[str, Any] = {}
    for option in fields(RunOptions):
        value = run.get(option.name)
        if value is None or value == ():
            continue
        if isinstance(option.default, bool):
            if value:  # a switch turns its default around
                given[option.name] = not option.default
        else:
            given[option.name] = (
                _number(value) if option.metadata["metavar"] == "INTEGER" else value
            )
    return RunOptions(**given)


def _number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:  # RunOptions says so
        return text


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
@click.option("--quiet", is_flag=True, help="Show no notes, no progress and no summary.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
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
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._say(masked(record.getMessage()))


@contextlib.contextmanager
def _events_to(say: Callable[[str], None]) -> Iterator[None]:
    """Show the log of the run on the terminal."""
    log = logging.getLogger("della_dist.run")
    handler = _Lines(say)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", required=False)
@_run_options
@click.option("--quiet", is_flag=True, help="Show nothing: the exit status tells.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def plan(config: Path, out: str | None, quiet: bool, as_json: bool, **run: Any) -> None:
    """Check all but weights and say what a merge would take; nothing is written or downloaded.

    Takes every option of merge, so that its command line is that of the plan, too.
    """
    from della_dist.config import load_config
    from della_dist.report.plan import plan_lines
    from della_dist.report.text import terminal_width
    from della_dist.runtime.describe import describe_plan

    options = options_of(run)
    described = describe_plan(load_config(config), out, options)
    if as_json:
        click.echo(json.dumps(described.to_dict()))
    elif not quiet:
        click.echo("\n".join(plan_lines(described, terminal_width(sys.stdout))))
    check_shown()


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", metavar="OUT", help="Compare the output of the merge with all models, too.")
@click.option(
    "--sample",
    metavar="SIZE",
    help="Weights to read at most, of all models together.  [default: 256MiB]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def check(config: Path, out: str | None, sample: str | None, as_json: bool) -> None:
    """Look at a sample of the weights, whether the models of CONFIG share a backbone.

    Exit status 3 where a merge would refuse one: for another backbone, or because it is damaged.
    """
    import della_dist
    from della_dist.report.check import check_lines
    from della_dist.report.text import terminal_width

    found = della_dist.check(config, out, **({} if sample is None else {"sample_bytes": sample}))
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo("\n".join(check_lines(found, terminal_width(sys.stdout))))
    check_shown()
    if found.refused:
        sys.exit(VerificationError.exit_code)


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
    from della_dist.report.summary import verify_lines
    from della_dist.runtime.verify import verify as run_verify

    summary = run_verify(out, recompute=recompute)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        click.echo("\n".join(verify_lines(summary)))
    check_shown()


@main.command()
@click.argument("space", type=click.Path(path_type=Path))
@click.argument("out")
@click.option(
    "--evaluate",
    metavar="'CMD {model}'",
    help="Command that ends its output with a line of JSON: a number, more is better, or an "
    "object with a number `score`. {model} becomes the folder of a merge.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="EXPERT=FILE",
    help="Instead of --evaluate: examples of what an expert has learnt, a JSON object a line with "
    "`prompt` and `response`, or `messages`. Scored by the loss of responses under transformers.",
)
@click.option(
    "--evaluate-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="An evaluation that takes longer has no score.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    metavar="N",
    help="How many, those of earlier runs among them.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="No trial begins later.  [default: no limit]",
)
@click.option(
    "--search-seed", type=click.IntRange(min=0), default=0, metavar="INTEGER", help="Of the trials."
)
@_run_options
@click.option("--quiet", is_flag=True, help="Show no trials and no summary.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def search(
    space: Path,
    out: str,
    evaluate: str | None,
    data: tuple[str, ...],
    evaluate_timeout: float,
    trials: int,
    timeout: float | None,
    search_seed: int,
    quiet: bool,
    as_json: bool,
    **run: Any,
) -> None:
    """Find the values that SPACE leaves open by merging and evaluating; merge the best into OUT.

    SPACE is a configuration with `{search: [low, high]}` or `{choices: [a, b]}` in the place of
    numbers and words.
    """
    from della_dist.config.space import load_space
    from della_dist.report.search import search_lines
    from della_dist.runtime.search.run import Effort, evaluation_of
    from della_dist.runtime.search.run import search as run_search

    options = options_of(run)
    found = load_space(space)
    how, identity, closing = evaluation_of(found, out, evaluate, data, evaluate_timeout, options)
    summary = run_search(
        found,
        out,
        how,
        Effort(trials, timeout),
        identity=identity,
        closing=closing,
        seed=search_seed,
        options=options,
        say=lambda line: None if quiet else click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps(summary.to_dict()))
    elif not quiet:
        click.echo("\n".join(search_lines(summary)))
    check_shown()


@main.command()
@click.argument("out")
@click.argument("other", required=False)
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the page goes.  [default: OUT/report.html; ./report.html if OUT is remote, or two]",
)
@click.option(
    "--png", type=click.Path(path_type=Path), metavar="DIR", help="Also write its pictures as PNG."
)
@failures
def report(out: str, other: str | None, to: Path | None, png: Path | None) -> None:
    """Write a page about the merge in OUT: report.html, or about OUT and OTHER."""
    from della_dist.runtime.report import report as run_report

    outs = [out] if other is None else [out, other]
    for path in run_report(outs, to=to, png=png):
        click.echo(path)
    check_shown()


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
    with _events_to(lambda line: click.echo(line, err=True)):
        run_demo(local_path(directory), click.echo)


if __name__ == "__main__":
    main()
