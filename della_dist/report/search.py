"""What a search found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from della_dist.errors import OutputError
from della_dist.report.text import format_seconds
from della_dist.wording import plural

#: How rows are called that are no models.
_ROWS = {"first": "what was tried first", "best": "best found"}

#: What is kept of a search in its output, for its report.
SEARCH_NAME = "della_search.json"


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
    """The score of the values that were tried first; None: it had none."""
    trials: tuple[TrialSummary, ...]
    model_digest: str
    """Of the best merge, in the output."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What a person calls what was searched, by its names."""
    held_out: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Scores on examples that no trial saw, by name (``base``, experts, ``first``, ``best``, ...)
    and skill; empty where a command evaluates."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        return asdict(self)

    def kept(self) -> dict[str, Any]:
        """Return what goes into the output: nothing of where it lies."""
        found = self.to_dict()
        del found["output"], found["config"]
        return found


def load_kept(data: bytes, model_digest: str) -> Mapping[str, Any] | None:
    """Return what an output keeps of its search; None if it is of other weights than these.

    Raises
    ------
    OutputError
        If it is damaged.
    """
    try:
        kept = json.loads(data)
        if kept["model_digest"] != model_digest:  # merged anew since then, without a search
            return None
        is_whole = _is_whole(kept)
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
    ) as error:
        raise _damaged() from error
    if not is_whole:
        raise _damaged()
    return dict(kept)


def _is_whole(kept: Mapping[str, Any]) -> bool:
    """Tell whether all is there, and of its kind; may raise what wrong kinds raise."""
    labels, trials, held_out = kept["labels"], kept["trials"], kept["held_out"]
    rows = list(held_out.values())
    return (
        all(isinstance(label, str) for label in labels.values())
        and isinstance(trials, list)
        and all(_is_trial(one, labels.keys()) for one in trials)
        and any(one["score"] is not None for one in trials)
        and _is_number(kept["score"])
        and (kept["first"] is None or _is_number(kept["first"]))
        and all(row.keys() == rows[0].keys() for row in rows)
        and all(one is None or _is_number(one) for row in rows for one in row.values())
    )


def _is_trial(one: Mapping[str, Any], names: KeysView[str]) -> bool:
    values, score, reason = one["values"], one["score"], one["reason"]
    return (
        names <= values.keys()
        and all(not isinstance(value, (list, dict)) for value in values.values())
        and (score is None or _is_number(score))
        and (reason is None or isinstance(reason, str))
        and _is_number(one["seconds"])
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _damaged() -> OutputError:
    return OutputError(
        f"{SEARCH_NAME} is damaged. Run the search again, which writes it anew, or remove it."
    )


def search_lines(summary: SearchSummary) -> list[str]:
    """Return what a person is told at the end."""
    failed = sum(one.score is None for one in summary.trials)
    seconds = sum(one.seconds for one in summary.trials)
    ended = f"{plural(len(summary.trials), 'trial')} in {format_seconds(seconds)}"
    lines = [ended + (f", {failed} of them without a score" if failed else "")]
    first = "none" if summary.first is None else f"{summary.first:.6g}"
    lines.append(f"score of what was tried first  {first}")
    lines.append(f"score of the best               {summary.score:.6g}")
    for name, value in summary.values.items():
        label = summary.labels.get(name, name)
        lines.append(
            f"  {label}: {value:.4g}" if isinstance(value, float) else f"  {label}: {value}"
        )
    if summary.held_out:
        lines += _table(summary.held_out)
        if better := list(_better(summary.held_out)):
            lines.append(
                f"On these items {' and '.join(better)} did better than the best found: take more "
                "trials, or wider ranges; or merge that."
            )
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


def held_out_rows(held_out: Mapping[str, Mapping[str, float | None]]) -> list[list[str]]:
    """Return a head and a row for each of what was compared; the last column is the mean."""
    skills = list(next(iter(held_out.values())))
    rows = [["held out", *skills, "mean"]]
    for name, scores in held_out.items():
        found = [scores[skill] for skill in skills]
        rows.append([_ROWS.get(name, name), *map(_score, (*found, _mean(scores)))])
    return rows


def _better(held_out: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    """Yield which other merges have a higher mean than what was found."""
    best = _mean(held_out["best"])
    for name, scores in held_out.items():
        other = _mean(scores)
        is_merge = name == "first" or name.startswith("task arithmetic")
        if is_merge and best is not None and other is not None and other > best:
            yield _ROWS.get(name, name)


def _mean(scores: Mapping[str, float | None]) -> float | None:
    known = [score for score in scores.values() if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _table(held_out: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the scores on what no trial saw: 0 as the base, 1 as each expert on its own."""
    rows = held_out_rows(held_out)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
