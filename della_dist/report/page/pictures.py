"""Pictures of numbers in rows and columns, drawn by matplotlib.

In the page they are SVG in the colours of the page, whose text is text; in files PNG.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della_dist.report.page.grid import span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Inches. As wide as a telephone shows without making the text smaller.
WIDTH = 4.3
ROW_HEIGHT = 0.17
#: Rows that a picture shows with names; others only the table has.
MOST_ROWS = 64
#: Stands for the colour of the text, which is that of the page.
_INK = "#010203"

#: In the place of a number that there is not.
NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Picture:
    """A value of every row in every column, as colours."""

    name: str
    """Of its file; letters, digits and hyphens."""
    title: str
    says: str
    """What is to be seen, in a sentence or two."""
    rows: Sequence[str]
    columns: Sequence[str]
    """The numbers of layers; or what else."""
    values: Sequence[Sequence[float]]
    """NaN where there is none."""
    is_share: bool = False
    """Whether values are shares of 1, shown in percent."""
    limits: tuple[float, float] | None = None
    """From which value to which colours go; None: from the least to the largest."""

    def text(self, value: float) -> str:
        """Return a value as a person reads it."""
        if not math.isfinite(value):
            return NOTHING
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.3g}"

    def svg(self) -> str:
        """Return an ``<svg>`` element whose ids are its own, hidden from screen readers."""
        out = io.StringIO()
        with _style():
            self._figure().savefig(out, format="svg", transparent=True, metadata={"Date": None})
        drawn = out.getvalue()
        drawn = drawn[drawn.index("<svg") :].rstrip()
        drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
        drawn = re.sub(r' id="([^"]*)"', rf' id="{self.name}-\1"', drawn)
        drawn = re.sub(r"url\(#([^)]*)\)", rf"url(#{self.name}-\1)", drawn)
        drawn = re.sub(r'href="#([^"]*)"', rf'href="#{self.name}-\1"', drawn)
        drawn = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", drawn)
        drawn = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", drawn)
        return drawn.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).replace(
            _INK, "currentColor"
        )

    def save(self, folder: Path) -> Path:
        """Write a PNG file, dark on white, into a folder; return its path."""
        path = folder / f"{self.name}.png"
        with _style():
            figure = self._figure()
            figure.suptitle(self.title, fontsize=9)
            figure.savefig(path, format="png", dpi=200, facecolor="white")
        return path

    def _figure(self) -> Figure:
        import numpy as np
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        rows = self.rows[:MOST_ROWS]
        values = np.ma.masked_invalid(np.asarray(self.values, dtype=np.float64)[: len(rows)])
        height = ROW_HEIGHT * len(rows) + 1.0
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        low, high = self.limits or span(self.values)
        image = axes.imshow(
            values, aspect="auto", interpolation="none", cmap="viridis", vmin=low, vmax=high
        )
        axes.set_yticks(range(len(rows)), [_shortened(row) for row in rows])
        if len(self.columns) <= 6:
            axes.set_xticks(range(len(self.columns)), self.columns)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(self._column))
            axes.set_xlabel("layer")
        for side in axes.spines.values():
            side.set_visible(False)
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.xaxis.set_major_locator(MaxNLocator(5))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: self._tick(value)))
        return figure

    def _column(self, position: float, _: int) -> str:
        index = round(position)
        return self.columns[index] if 0 <= index < len(self.columns) else ""

    def _tick(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.is_share else f"{value:.3g}"


def _shortened(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:12]}…{text[-15:]}"


def _style() -> Any:  # noqa: ANN401
    from matplotlib import rc_context

    return rc_context(
        {
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "font.size": 8,
            "font.family": "sans-serif",
            "svg.fonttype": "none",
            "svg.hashsalt": "della-dist",
            "xtick.major.size": 2,
            "ytick.major.size": 0,
        }
    )
