"""Search values of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from della_dist.cli.options import folders, options_of, run_options
from della_dist.program import check_shown, failures, logged


@click.command()
@click.argument("space", type=click.Path(path_type=Path))
@click.argument("out", shell_complete=folders)
@click.option(
    "--auto",
    is_flag=True,
    help="SPACE is a configuration that leaves nothing open: lambda and the weights of its experts "
    "are searched, in attention, MLP and the rest each; itself comes first.",
)
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
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
@logged
def search(
    space: Path,
    out: str,
    auto: bool,
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
    from della_dist.report.search import search_lines
    from della_dist.runtime.search.run import Effort
    from della_dist.runtime.search.run import search as run_search
    from della_dist.runtime.search.scoring import scoring_of
    from della_dist.runtime.search.spaces import open_space

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    options = options_of(run)
    found = open_space(space, auto=auto)
    scoring = scoring_of(found.config(found.first), evaluate, data, evaluate_timeout)
    effort = Effort(trials, timeout)
    summary = run_search(found, out, scoring, effort, seed=search_seed, options=options, say=say)
    if as_json:
        click.echo(json.dumps(summary.to_dict()))
    elif not quiet:
        click.echo("\n".join(search_lines(summary)))
    check_shown()
