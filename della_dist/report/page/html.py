"""An HTML page with everything in it: no network, light and dark, readable without pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from della_dist.report.page.pictures import Picture

_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b626b; --line: #d9dce0; --back: #fff;
  --card: #f6f7f9; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb5; --line: #3a4048;
  --back: #15181c; --card: #1e2227; --accent: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main, header, nav { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; } section > h3 { margin: 1.2rem 0 .3rem; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--back); padding: .3rem .6rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
p.says, figcaption p { color: var(--soft); margin: .2rem 0 .6rem; }
.figures { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; }
.table { overflow-x: auto; max-height: 24rem; }
.table.whole { max-height: none; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; } tbody th, .text { text-align: left; }
thead th { position: sticky; top: 0; background: var(--card); }
summary { cursor: pointer; color: var(--accent); margin-top: .5rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; font-size: .85rem; }
code { overflow-wrap: anywhere; }
footer { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: var(--soft); }
"""


def page(title: str, says: str, sections: Sequence[tuple[str, str]], foot: str) -> str:
    """Return a whole page.

    Parameters
    ----------
    title, says
        What it is about, as plain text.
    sections
        Headings as plain text, and what stands below each as HTML.
    foot
        What it was made by, as plain text.
    """
    ids = [f"part-{i + 1}" for i in range(len(sections))]
    links = "".join(
        f'<li><a href="#{anchor}">{escape(heading)}</a></li>'
        for anchor, (heading, _) in zip(ids, sections, strict=True)
    )
    parts = "\n".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(heading)}</h2>\n'
        f"{content}</section>"
        for anchor, (heading, content) in zip(ids, sections, strict=True)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<a class="skip" href="#{ids[0]}">Skip to the content</a>
<header><h1>{escape(title)}</h1><p class="says">{escape(says)}</p></header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>
{parts}
</main>
<footer>{escape(foot)}</footer>
</body>
</html>
"""


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    label: str,
    texts: int = 1,
    whole: bool = False,
) -> str:
    """Return a table that scrolls by itself where it is too wide.

    Parameters
    ----------
    heads
        Of its columns.
    rows
        Of plain text; the first of each names it.
    label
        What it is a table of, for those who do not see it.
    texts
        So many columns are words, the others numbers.
    whole
        Whether it is shown in its whole height.
    """
    head = "".join(
        f'<th scope="col" class="text">{escape(cell)}</th>'
        if i < texts
        else f'<th scope="col">{escape(cell)}</th>'
        for i, cell in enumerate(heads)
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td class="text">{escape(cell)}</td>' if i < texts else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(row[1:], start=1)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table{" whole" if whole else ""}" role="region" tabindex="0" '
        f'aria-label="{escape(label)}">\n<table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n"
    )


def figures(pictures: Iterable[Picture]) -> str:
    """Return pictures beside each other, and behind each a table of its numbers."""
    return f'<div class="figures">\n{"".join(map(_figure, pictures))}</div>\n'


def _figure(picture: Picture) -> str:
    heads, rows = picture.numbers()
    numbers = table(heads, rows, label=f"{picture.title}: numbers")
    return (
        f'<figure id="{picture.name}"><figcaption><h3>{escape(picture.title)}</h3>'
        f"<p>{escape(picture.says)}</p></figcaption>\n{picture.svg()}\n"
        f"<details><summary>Numbers of “{escape(picture.title)}”</summary>\n"
        f"{numbers}</details></figure>\n"
    )
