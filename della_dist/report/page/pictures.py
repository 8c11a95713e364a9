"""Pictures and the numbers behind them, drawn by matplotlib.

In the page they are SVG in the colours of the page, whose text is text; in files PNG.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

#: Inches. As wide as a telephone shows without making the text smaller.
WIDTH = 4.3
ROW_HEIGHT = 0.17
#: Rows that a picture shows with names.
MOST_ROWS = 64
#: Stands for the colour of the text, which is that of the page.
INK = "#010203"

#: How numbers become colours: ``signed`` has 0 in the middle.
Scale: TypeAlias = Literal["linear", "log", "signed"]

#: In the place of a number that there is not.
NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Picture(ABC):
    """What is drawn, and the numbers behind it."""

    name: str
    """Of its file; letters, digits and hyphens."""
    title: str
    says: str
    """What is to be seen, in a sentence or two."""

    @abstractmethod
    def draw(self) -> Figure:
        """Return the figure."""

    @abstractmethod
    def numbers(self) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
        """Return the heads of the columns of a table, and its rows, the first cell naming each."""

    def svg(self) -> str:
        """Return an ``<svg>`` element whose ids are its own, hidden from screen readers."""
        out = io.StringIO()
        with _style():
            self.draw().savefig(out, format="svg", transparent=True, metadata={"Date": None})
        drawn = out.getvalue()
        drawn = drawn[drawn.index("<svg") :].rstrip()
        drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
        drawn = re.sub(r' id="([^"]*)"', rf' id="{self.name}-\1"', drawn)
        drawn = re.sub(r"url\(#([^)]*)\)", rf"url(#{self.name}-\1)", drawn)
        drawn = re.sub(r'href="#([^"]*)"', rf'href="#{self.name}-\1"', drawn)
        drawn = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", drawn)
        drawn = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", drawn)
        return drawn.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).replace(
            INK, "currentColor"
        )

    def png(self) -> bytes:
        """Return the bytes of a PNG file, dark on white, with its title."""
        out = io.BytesIO()
        with _style():
            figure = self.draw()
            figure.suptitle(self.title, fontsize=9)
            figure.savefig(out, format="png", dpi=200, facecolor="white")
        return out.getvalue()


def new_figure(height: float) -> Figure:
    """Return an empty figure, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def draw_cells(
    axes: Axes,
    values: Any,  # noqa: ANN401
    rows: Sequence[str],
    limits: tuple[float, float],
    most_named: int = MOST_ROWS,
    scale: Scale = "linear",
) -> Any:  # noqa: ANN401
    """Draw numbers as colours, with the names of the rows; return the image.

    Parameters
    ----------
    axes
        Where.
    values : float64, shape (R, C)
        NaN where there is none.
    rows
        R names.
    limits
        From which value to which colours go.
    most_named
        Rows whose names are drawn, evenly spread.
    scale
        How colours go from the one limit to the other.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    numbers = np.ma.masked_invalid(values)
    low, high = limits
    norm = Normalize(low, high)
    if scale == "log" and high > 0:
        numbers = np.ma.masked_less_equal(numbers, 0)
        norm = LogNorm(max(low, high * 1e-6), high)
    elif scale == "signed":
        most = max(abs(low), abs(high))
        norm = Normalize(-most, most)
    image = axes.imshow(
        numbers,
        aspect="auto",
        interpolation="none",
        cmap="RdBu_r" if scale == "signed" else "viridis",
        norm=norm,
    )
    every = -(-len(rows) // most_named)
    named = range(0, len(rows), every)
    axes.set_yticks(list(named), [_shortened(rows[i]) for i in named])
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def draw_scale(axes: Axes, image: AxesImage, *, is_share: bool, label: str = "") -> None:
    """Draw below the cells which colour is which number."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    bar = axes.figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label)
    is_log = isinstance(image.norm, LogNorm)
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if is_log else MaxNLocator(5))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g} %" if is_share else f"{value:.3g}")
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:12]}…{text[-15:]}"


def _style() -> Any:  # noqa: ANN401
    from matplotlib import rc_context

    return rc_context(
        {
            "text.color": INK,
            "text.parse_math": False,  # names may have dollars
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "font.size": 8,
            "font.family": "sans-serif",
            "svg.fonttype": "none",
            "svg.hashsalt": "della-dist",
            "xtick.major.size": 2,
            "ytick.major.size": 0,
        }
    )
