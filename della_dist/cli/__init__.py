"""The command line: parse, call, exit code. Everything heavy is imported when a command runs."""

from __future__ import annotations

import click

from della_dist.cli.look import check, init, report
from della_dist.cli.merge import demo, merge, plan, verify
from della_dist.cli.search import search
from della_dist.program import Commands
from della_dist.version import __version__


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="della-dist")
def main() -> None:
    """Merge very large language-model checkpoints by DELLA, TIES, WUDI and twenty others.

    The output is the same to the byte whatever the threads, workers or memory; an interrupted merge
    continues when the same command is run again.

    Every command takes -q (errors alone), -v (every step, worker and shard) and --debug (that,
    tracebacks, and what led to a failure). Colours obey NO_COLOR; with TERM=dumb, or where stderr
    is no terminal, progress is a line now and then.

    Exit status: 0 done, 1 failed while running (run it again), 2 refused (wrong configuration,
    input or output), 3 verification found a difference, 4 a fault of the program (report it).
    """


for _command in (merge, init, check, plan, verify, search, report, demo):
    main.add_command(_command)
