"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from della_dist.report.text import format_seconds
from della_dist.wording import plural


@dataclass(frozen=True, slots=True)
class TrialSummary:
    """One trial that ended."""

    values: dict[str, Any]
    """By the names of what was searched."""
    score: float | None
    """None: there is none."""
    reason: str | None
    """Why there is none."""
    seconds: float
    """Of merging and evaluating."""


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """What a search found."""

    output: str
    config: str
    """The file of the best configuration."""
    score: float
    """Of the best trial."""
    values: dict[str, Any]
    """Of the best trial, by the names of what was searched."""
    first: float | None
    """The score of the middle of all ranges; None: it had none."""
    trials: tuple[TrialSummary, ...]
    model_digest: str
    """Of the best merge, in the output."""
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores on examples that no trial saw, by name (``base``, experts, ``middle``, ``best``, ...)
    and skill; empty where a command evaluates."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        return asdict(self)


def search_lines(summary: SearchSummary) -> list[str]:
    """Return what a person is told at the end."""
    failed = sum(one.score is None for one in summary.trials)
    seconds = sum(one.seconds for one in summary.trials)
    ended = f"{plural(len(summary.trials), 'trial')} in {format_seconds(seconds)}"
    lines = [ended + (f", {failed} of them without a score" if failed else "")]
    first = "none" if summary.first is None else f"{summary.first:.6g}"
    lines.append(f"score of the middle of all ranges  {first}")
    lines.append(f"score of the best                  {summary.score:.6g}")
    for name, value in summary.values.items():
        lines.append(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
    if summary.held_out:
        lines += _table(summary.held_out)
    else:
        lines.append(
            "A score is of what it was chosen by: try the winner on items that the search never "
            "saw."
        )
    lines += [
        f"configuration {summary.config}",
        f"merged into {summary.output} and verified, digest {summary.model_digest}",
    ]
    return lines


def _table(held_out: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the scores on what no trial saw: 0 as the base, 1 as each expert on its own."""
    skills = list(next(iter(held_out.values())))
    rows: list[Sequence[str]] = [["held out", *skills, "mean"]]
    for name, scores in held_out.items():
        mean = sum(scores.values()) / len(scores)
        rows.append([name, *(f"{scores[skill]:.3f}" for skill in skills), f"{mean:.3f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
