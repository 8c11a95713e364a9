"""The pictures of a merge in its model card, which model hubs show from files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Folder of the files, beside the card.
FOLDER = "della_pictures"
#: Of all that there are, those that say most to whoever gets the model.
CHOSEN = ("cosines", "sizes", "survived", "influence", "conflicts")

_BEGIN, _END = "<!-- della-dist pictures -->", "<!-- /della-dist pictures -->"
_BEFORE = "## Recipe\n"
_MARKDOWN = re.compile(r"([\\`*_\[\]<>!#|])")


@dataclass(frozen=True, slots=True)
class CardPicture:
    """One picture of a card."""

    path: str
    """Relative to the card."""
    title: str
    says: str
    """What is to be seen."""


def with_pictures(card: str, pictures: Iterable[CardPicture]) -> str:
    """Return a card with these pictures, in the place of those that it has from an earlier time.

    They come before the recipe, or last where there is none.

    Raises
    ------
    ValueError
        If something is left of earlier ones, but not where they begin and where they end.
    """
    section = "\n".join(
        [
            _BEGIN,
            "## The merge in pictures",
            "",
            *(line for picture in pictures for line in _lines(picture)),
            _END,
        ]
    )
    marks = card.count(_BEGIN), card.count(_END)
    if marks == (0, 0):
        head, heading, rest = card.partition(f"\n{_BEFORE}")
        if not heading:
            return f"{card.rstrip()}\n\n{section}\n"
        return f"{head.rstrip()}\n\n{section}\n{heading}{rest}"
    head, _, rest = card.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if marks != (1, 1) or not end:
        raise ValueError(f"pictures begin with the line {_BEGIN} and end with {_END}, once each")
    return f"{head}{section}{tail}"


def _lines(picture: CardPicture) -> list[str]:
    title, says = (_MARKDOWN.sub(r"\\\1", text) for text in (picture.title, picture.says))
    return [f"**{title}.** {says}", "", f"![{title}]({picture.path})", ""]
