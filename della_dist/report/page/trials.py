"""What the page says of the search that found the configuration of a merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from della_dist.report.page.html import figures, table
from della_dist.report.page.pictures import NOTHING, WIDTH, Picture
from della_dist.report.search import held_out_rows
from della_dist.wording import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Values that are drawn; others only the table has.
MOST_VALUES = 24
#: To be seen on white and on black.
_POINT, _LINE, _SOFT = "#3f8fd2", "#d97b29", "#8f959c"
_HEIGHT = 2.4
#: Of a part of a picture, two of which stand beside each other.
_PART_HEIGHT = 1.25


@dataclass(frozen=True, slots=True)
class TrialPicture(Picture):
    """Scores of trials, drawn beside something, and the numbers of all."""

    rows: Sequence[str] = ()
    """The numbers of the trials."""
    columns: Sequence[str] = ()
    values: Sequence[Sequence[Any]] = ()
    """In each row what stands in the columns: numbers or words, None where there is nothing."""
    scores: Sequence[float] = ()
    """Of the trials; NaN where there is none."""

    def text(self, value: Any) -> str:  # noqa: ANN401
        """Return a value as a person reads it."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return NOTHING
        return f"{value:.4g}" if _is_number(value) else str(value)

    def numbers(self) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
        """Return the heads of the columns of a table, and its rows."""
        rows = zip(self.rows, self.values, strict=True)
        return ("trial", *self.columns), ([name, *map(self.text, row)] for name, row in rows)


class ScoreOfTrials(TrialPicture):
    """The score of every trial, and the best so far."""

    __slots__ = ()

    def draw(self) -> Figure:
        """Return the figure."""
        from matplotlib.ticker import MaxNLocator

        figure = _figure(_HEIGHT)
        axes = figure.add_subplot()
        trials = range(1, len(self.scores) + 1)
        low, high = _shown(self.scores)
        # Far below, where no good trial is, a score tells only that it is low.
        axes.plot(trials, [max(score, low) for score in self.scores], "o", color=_POINT, ms=3)
        axes.step(trials, best_so_far(self.scores), where="post", color=_LINE, lw=1.2)
        failed = [i for i, score in zip(trials, self.scores, strict=True) if math.isnan(score)]
        axes.plot(failed, [low] * len(failed), "x", color=_SOFT, ms=4)
        margin = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("trial")
        axes.set_ylabel("score")
        _bare(axes)
        return figure


class ScoreByValue(TrialPicture):
    """The score of every trial against each of the values that it tried."""

    __slots__ = ()

    def draw(self) -> Figure:
        """Return the figure."""
        from matplotlib.ticker import MaxNLocator

        labels = self.columns[1 : MOST_VALUES + 1]
        num_rows = -(-len(labels) // 2)
        figure = _figure(_PART_HEIGHT * num_rows + 0.2)
        low, high = _shown(self.scores)
        margin = 0.05 * (high - low) or 1.0
        best = max(range(len(self.scores)), key=lambda i: _or_least(self.scores[i]))
        shown = [max(score, low) for score in self.scores]
        for i, label in enumerate(labels):
            axes = figure.add_subplot(num_rows, 2, i + 1)
            column = [row[i + 1] for row in self.values]
            if not all(map(_is_number, column)):
                column = list(map(str, column))
            axes.plot(column, shown, "o", color=_POINT, ms=2.5)
            axes.plot(column[best : best + 1], shown[best : best + 1], "o", color=_LINE, ms=4.5)
            axes.set_ylim(low - margin, high + margin)
            axes.set_title(label if len(label) <= 34 else f"{label[:14]}…{label[-19:]}", fontsize=7)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            if all(map(_is_number, column)):
                axes.xaxis.set_major_locator(MaxNLocator(4))
            _bare(axes)
        return figure


def trial_pictures(search: Mapping[str, Any]) -> list[Picture]:
    """Return the pictures of the trials of a search, as its output keeps them."""
    trials, labels = search["trials"], search["labels"]
    rows = [str(i + 1) for i in range(len(trials))]
    scores = [math.nan if one["score"] is None else float(one["score"]) for one in trials]
    best = best_so_far(scores)
    failed = sum(math.isnan(score) for score in scores)
    crosses = " A cross is a trial without a score." if failed else ""
    return [
        ScoreOfTrials(
            "trials",
            "Score of each trial",
            "Points are trials in their order, the line is the best so far. Scores far below the "
            f"others stand at the lower edge.{crosses}",
            rows=rows,
            columns=["score", "best so far", "seconds", "why there is no score"],
            values=[
                [score, so_far, one["seconds"], one["reason"]]
                for one, score, so_far in zip(trials, scores, best, strict=True)
            ],
            scores=scores,
        ),
        ScoreByValue(
            "values",
            "Score against each value",
            "Each point is a trial, the large one the best. A value matters where points rise to "
            "one side, or to a peak; where they are a cloud, it does not.",
            rows=rows,
            columns=["score", *labels.values()],
            values=[
                [score, *(one["values"][name] for name in labels)]
                for one, score in zip(trials, scores, strict=True)
            ],
            scores=scores,
        ),
    ]


def search_section(search: Mapping[str, Any]) -> str:
    """Return what the page says of a search, as HTML."""
    trials = search["trials"]
    failed = sum(one["score"] is None for one in trials)
    first = "no score" if search["first"] is None else f"{search['first']:.4g}"
    says = (
        f"{plural(len(trials), 'trial')} of {plural(len(search['labels']), 'value')}"
        f"{f', {failed} of them without a score' if failed else ''}. What was tried first had "
        f"{first}, the best {search['score']:.4g}: a score is of what it was chosen by."
    )
    found = f'<p class="says">{escape(says)}</p>\n'
    if search["held_out"]:
        head, *rows = held_out_rows(search["held_out"])
        found += table(["on what no trial saw", *head[1:]], rows, label="Held out", whole=True)
        found += '<p class="says">0 is the base, 1 each expert on its own skill.</p>\n'
    return found + figures(trial_pictures(search))


def best_so_far(scores: Sequence[float]) -> list[float]:
    """Return the best score up to each trial; NaN before the first that there is."""
    best, found = math.nan, []
    for score in scores:
        if not score <= best and not math.isnan(score):
            best = score
        found.append(best)
    return found


def _shown(scores: Sequence[float]) -> tuple[float, float]:
    """Return from which score to which is drawn: not what lies far below the better half."""
    known = sorted(score for score in scores if not math.isnan(score))
    if not known:
        return 0.0, 1.0
    middle, best = known[len(known) // 2], known[-1]
    return max(known[0], best - 3 * (best - middle)) if best > middle else known[0], best


def _or_least(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis="y", color=_SOFT, alpha=0.3, lw=0.5)
