"""Numbers in rows and columns, as colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from della_dist.report.page.grid import span
from della_dist.report.page.pictures import (
    MOST_ROWS,
    NOTHING,
    ROW_HEIGHT,
    Picture,
    Scale,
    draw_cells,
    draw_scale,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Rows and columns of a table of pairs that have their names and numbers drawn; of more, both are
#: numbered, and the numbers are in the table alone.
MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class HeatMap(Picture):
    """A value of every row in every column, as colours."""

    rows: Sequence[str]
    columns: Sequence[str]
    """The numbers of layers; or, of pairs, the same as the rows."""
    values: Sequence[Sequence[float]]
    """NaN where there is none."""
    is_share: bool = False
    """Whether values are shares of 1, shown in percent."""
    limits: tuple[float, float] | None = None
    """From which value to which colours go; None: from the least to the largest."""
    scale: Scale = "linear"
    """``log`` where sizes differ by much; ``signed`` where 0 is in the middle."""
    is_of_pairs: bool = False
    """Whether columns are what the rows are."""

    def text(self, value: float) -> str:
        """Return a value as a person reads it."""
        if not math.isfinite(value):
            return NOTHING
        if self.is_share:
            return f"{100 * value:.1f} %"
        return f"{round(value, 3) + 0.0:.3f}" if self.is_of_pairs else f"{value:.3g}"

    def numbers(self) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
        """Return all values."""
        return ["", *self.columns], (
            [name, *map(self.text, values)]
            for name, values in zip(self.rows, self.values, strict=True)
        )

    def draw(self) -> Figure:
        """Return the figure."""
        import numpy as np
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        rows = list(self.rows[:MOST_ROWS])  # others only the table has
        values = np.asarray(self.values, dtype=np.float64)[: len(rows)]
        is_numbered = self.is_of_pairs and len(rows) > MOST_NAMED
        if is_numbered:
            rows = [f"{name} {i + 1}" for i, name in enumerate(rows)]
        is_written = self.is_of_pairs and not is_numbered
        figure = new_figure((2 if is_written else 1) * ROW_HEIGHT * len(rows) + 1.0)
        axes = figure.add_subplot()
        limits = self.limits or span(self.values)
        image = draw_cells(axes, values, rows, limits, scale=self.scale)
        if is_written:
            axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right", rotation_mode="anchor")
            for (i, j), value in np.ndenumerate(values):
                if math.isfinite(value):
                    dark = image.norm(value) < 0.6  # viridis ends in yellow
                    color = "white" if dark else "black"
                    axes.text(j, i, self.text(value), ha="center", va="center", color=color)
        elif len(self.columns) <= 6:
            axes.set_xticks(range(len(self.columns)), self.columns)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(self._column))
            if not self.is_of_pairs:
                axes.set_xlabel("layer")
        draw_scale(axes, image, is_share=self.is_share)
        return figure

    def _column(self, position: float, _: int) -> str:
        index = round(position)
        if not 0 <= index < len(self.columns):
            return ""
        return str(index + 1) if self.is_of_pairs else self.columns[index]
