"""What was found, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.quality.model import NUM_THREADS
from tests.quality.scores import Measured, Score
from tests.quality.study import Family, Merged


def print_families(console: Console, families: Sequence[Family], wall_s: float) -> None:
    """Print the experts, the best merge of each method, and one method at every lambda."""
    for family in families:
        _print_experts(console, family)
        for case in family.cases:
            _print_best(console, family, case)
    _print_lambdas(console, families, "wudi")
    cpu_s = sum(family.cpu_s for family in families)
    console.print(
        f"{wall_s:.0f} s, {cpu_s:.0f} s of processors; {len(families)} processes with "
        f"{NUM_THREADS} thread each"
    )


def _print_experts(console: Console, family: Family) -> None:
    millions = family.num_parameters / 1e6
    table = Table(title=f"{family.name}: {millions:.2f} M parameters, test items", min_width=60)
    for heading in ("expert", "delta", "base: loss, exact", "expert: loss, exact", "check"):
        table.add_column(heading, justify="left" if heading in ("expert", "check") else "right")
    for name, trained in family.experts.items():
        delta, does = f"{trained.relative_delta:.1%}", (_does(trained.base), _does(trained.expert))
        table.add_row(name, delta, *does, trained.verdict)
    table.add_row("drawn for itself", "", "", "", family.stranger)
    console.print(table)


def _does(measured: Measured) -> str:
    exact = "" if measured.answers is None else f", {measured.answers:.0%}"
    return f"{measured.loss:.3f}{exact}"


def _print_best(console: Console, family: Family, case: str) -> None:
    table = Table(title=f"{family.name}, {case}: scores on test items")
    table.add_column("method", no_wrap=True)
    table.add_column("settings", no_wrap=True)
    for heading in ("loss", "answers", *family.cases[case][0].test.tasks):
        table.add_column(heading, justify="right")
    for method in dict.fromkeys(one.settings.method for one in family.cases[case]):
        best = family.best(case, method)
        table.add_row(method, str(best.settings), *_scores(best.test))
    console.print(table)


def _scores(score: Score) -> list[str]:
    return [f"{one:.2f}" for one in (score.loss, score.answers, *score.tasks.values())]


def _print_lambdas(console: Console, families: Sequence[Family], method: str) -> None:
    found: dict[str, list[Merged]] = {
        f"{family.name}, {case}": [one for one in tried if one.settings.method == method]
        for family in families
        for case, tried in family.cases.items()
    }
    lambdas = [one.settings.lambda_ for one in next(iter(found.values()))]
    table = Table(title=f"{method} at every lambda: loss score, test items")
    table.add_column("models", no_wrap=True)
    for lambda_ in lambdas:
        table.add_column(f"{lambda_:g}", justify="right")
    for name, tried in found.items():
        table.add_row(name, *(f"{one.test.loss:.2f}" for one in tried))
    worst = [min(tried[k].test.loss for tried in found.values()) for k in range(len(lambdas))]
    table.add_row("the worst of them", *(f"{one:.2f}" for one in worst))
    console.print(table)
