"""Numbers as a person reads and writes them."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable
from fractions import Fraction
from typing import TextIO

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that ``268435456``, ``256MiB`` or ``5GB`` means.

    Raises
    ------
    ValueError
        With the end of a sentence about it.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write 256MiB, 5GB or a number of bytes")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    size = int(Fraction(number) * (1024 if binary else 1000) ** power)
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is more than any machine has")
    return size


def format_bytes(count: float) -> str:
    """Return a byte count with a decimal unit: ``476.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < (999.5 if unit == "B" else 999.95):  # it is not rounded up to 1000
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_mem(count: int) -> str:
    """Return an amount of memory with a binary unit: ``256 MiB``."""
    if 0 < count < 1 << 20:
        return "under 1 MiB"
    if count < 1 << 30:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{count / (1 << 30):.1f} GiB"


def format_seconds(seconds: float) -> str:
    """Return a duration: ``4.2 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def note_lines(notes: Iterable[str], width: int | None) -> list[str]:
    """Return notes as they are shown, each with its head.

    Parameters
    ----------
    notes
        A sentence or two each.
    width
        Columns of the terminal, where lines are broken between words; None: one line a note.
    """
    lines = []
    for note in notes:
        head, text = "note    ", printable(note)
        lines += (
            [head + text]
            if width is None
            else textwrap.wrap(
                text,
                max(width, 20),
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,  # paths stay whole, so that they can be copied
                break_on_hyphens=False,
            )
        )
    return lines


def printable(text: str) -> str:
    """Return `text` on one line, whatever names of tensors and files have put into it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that `stream` is; None if it is none."""
    if not stream.isatty():
        return None
    try:
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80


def format_share(share: float) -> str:
    """Return a share with so many digits that what is lost can be seen, and never rounded away."""
    if share > 1 - 1e-12:  # of float64 sums
        return "100 %"
    digits = 2 if share < 0.99 else min(8, 1 - math.floor(math.log10(100 * (1 - share))))
    down = math.floor(round(100 * share * 10**digits, 4))  # 99.996 is not 99.9959...
    return f"{down / 10**digits:.{digits}f} %"
