"""Look at models before a merge, and at merges."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from della_dist.cli.options import folders
from della_dist.errors import VerificationError
from della_dist.program import check_shown, failures


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="OUT",
    shell_complete=folders,
    help="Compare the output of the merge with all models, too.",
)
@click.option(
    "--sample",
    metavar="SIZE",
    help="Weights to read at most, of all models together.  [default: 256MiB]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@failures
def check(config: Path, out: str | None, sample: str | None, quiet: bool, as_json: bool) -> None:
    """Look at a sample of the weights, whether the models of CONFIG share a backbone.

    Exit status 3 where a merge would refuse one: for another backbone, or because it is damaged.
    """
    import della_dist
    from della_dist.report.check import check_lines
    from della_dist.report.text import terminal_width

    found = della_dist.check(config, out, **({} if sample is None else {"sample_bytes": sample}))
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    elif not quiet:
        click.echo("\n".join(check_lines(found, terminal_width(sys.stdout))))
    check_shown()
    if found.refused:
        sys.exit(VerificationError.exit_code)


@click.command()
@click.argument("out", shell_complete=folders)
@click.argument("other", required=False, shell_complete=folders)
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the page goes.  [default: OUT/report.html; ./report.html if OUT is remote, or two]",
)
@click.option(
    "--png", type=click.Path(path_type=Path), metavar="DIR", help="Also write its pictures as PNG."
)
@click.option("--card", is_flag=True, help="Put the main pictures into the model card of OUT.")
@failures
def report(
    out: str, other: str | None, to: Path | None, png: Path | None, card: bool, quiet: bool
) -> None:
    """Write a page about the merge in OUT: report.html, or about OUT and OTHER."""
    from della_dist.runtime.report import report as run_report

    outs = [out] if other is None else [out, other]
    for path in run_report(outs, to=to, png=png, card=card):
        if not quiet:
            click.echo(path)
    check_shown()


@click.command()
@click.argument("base", shell_complete=folders)
@click.argument("experts", nargs=-1, required=True, shell_complete=folders)
@click.option(
    "--sample",
    metavar="SIZE",
    help="Weights to read at most, of all models together.  [default: 256MiB]",
)
@failures
def init(base: str, experts: tuple[str, ...], sample: str | None, quiet: bool) -> None:
    """Look at EXPERTS of BASE, and write a configuration for merging them on stdout.

    Commented, with the reasons for its method and parameters: della-dist init BASE A B > merge.yaml
    """
    del quiet  # the configuration is what it is asked for
    import della_dist
    from della_dist.report.proposal import proposal
    from della_dist.runtime.check import refuse
    from della_dist.runtime.options import RunOptions

    models = [{"model": one, "parameters": {"weight": 1.0}} for one in experts]
    config = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
    found = della_dist.check(config, **({} if sample is None else {"sample_bytes": sample}))
    refuse(found, RunOptions())
    click.echo(proposal(base, found), nl=False)
    check_shown()
