"""What people meant who wrote a text that is no YAML: slips that the parser names in its words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from della_dist.config.problem import shown

#: Of a line, how much is looked at.
_LONGEST = 1000
_NO_SPACE = re.compile(r"\s*(?:- )?[A-Za-z_]+:[^\s/:]")
_NO_DASH_SPACE = re.compile(r"\s*-[A-Za-z_]+:")
_SPECIAL = re.compile(r"(?:^|[:\[{,-]\s+)([%@`])")
_TWO_COLONS = re.compile(r"[^'\"]*?:\s[^'\"{\[]*?:(\s|$)")


def hint(problem: str, lines: Sequence[str], line: int) -> str:
    """Return a sentence that says what to change; empty if nothing is known.

    Parameters
    ----------
    problem
        In the words of the parser.
    lines
        Of the text.
    line
        Where the parser stopped, from 0.
    """
    here = lines[line][:_LONGEST] if line < len(lines) else ""
    above = next((text[:_LONGEST] for text in reversed(lines[:line]) if text.strip()), "")
    near = (here, above)
    unspaced = [text.strip() for text in near if _NO_SPACE.match(text)]
    special = _SPECIAL.search(here)
    known = (
        (here.lstrip().startswith("```"), "Remove the lines of ```, which no YAML has."),
        ("\t" in here[: len(here) - len(here.lstrip())], "Indent by spaces, not by tabs."),
        (
            "escape character" in problem,
            "A backslash means something in double quotes: write the text in single ones.",
        ),
        (
            "end of stream" in problem or "scanning a quoted scalar" in problem,
            "A quote is opened and not closed.",
        ),
        (
            "expected key" in problem and any(text.rstrip()[-1:] == "," for text in near),
            "Remove the comma at the end of the line.",
        ),
        ("',' or" in problem, "A { or [ is opened and not closed, or a comma is missing."),
        (
            any("\xa0" in text for text in near),
            "There is a no-break space near it, as pages have: type plain spaces.",
        ),
        (unspaced, f"Put a space behind the colon of {shown(''.join(unspaced[:1]))}."),
        (any(map(_NO_DASH_SPACE.match, near)), "Put a space behind the dash."),
        (special, f"Write a text that begins with {special and special[1]} in quotes."),
        (
            "mapping values" in problem and _TWO_COLONS.match(here),
            "Write a text with a colon in it in quotes, or a mapping as {key: value}.",
        ),
        (
            any(what in problem for what in ("mapping values", "expected '-'", "expected key")),
            "Look at the indentation: the keys of one mapping begin in the same column, as do the "
            "dashes of one list.",
        ),
    )
    return next((f" {sentence}" for applies, sentence in known if applies), "")


def meant(value: object) -> str:
    """Return a sentence that says what to change where a value of another kind is wanted."""
    if isinstance(value, str) and _NO_SPACE.match(value):
        return f"; put a space behind the colon of {shown(value)}"
    if isinstance(value, dict):
        if any(isinstance(key, str) and key.startswith("-") for key in value):
            return "; put a space behind the dash"
        return "; begin every entry with a dash and a space"
    return ""
