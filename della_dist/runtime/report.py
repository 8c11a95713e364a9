"""Make the page about a finished merge, or about two."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from della_dist.errors import ConfigError, OutputError
from della_dist.locations import is_url, local_path
from della_dist.report.search import SEARCH_NAME, load_kept
from della_dist.runtime.output.finished import open_finished
from della_dist.storage.tensor_table import TENSORS_NAME, load_table

PAGE_NAME = "report.html"


def report(
    outs: Sequence[str], *, to: str | os.PathLike[str] | None = None, png: Path | None = None
) -> list[Path]:
    """Write the page about one output, or about two and their differences.

    Parameters
    ----------
    outs
        One finished output or two, in any store.
    to
        Where the page goes. None: into the output, or into this folder where that is remote or two
        are compared.
    png
        A folder for the pictures of one output as PNG files; None: no such files.

    Returns
    -------
    list
        The files that were written, the page first.

    Raises
    ------
    ConfigError
        If matplotlib is not installed, or pictures of two outputs are asked for.
    OutputError
        If an output is not finished, what it keeps of a search is damaged, or a file cannot be
        written.
    VerificationError
        If its manifest or its table is damaged.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "report draws with matplotlib, which is not installed: "
            "pip install 'della-dist[report]'."
        )
    if png is not None and len(outs) > 1:
        raise ConfigError(
            "--png: pictures are of one output. Leave --png out, or the second output."
        )
    from della_dist.report.page.compared import compared_page
    from della_dist.report.page.grid import Grid
    from della_dist.report.page.merge import Merge, merge_page, pictures
    from della_dist.report.page.trials import trial_pictures

    merges = []
    for out in outs:
        store, manifest = open_finished(out)
        found = store.read(SEARCH_NAME) if store.exists(SEARCH_NAME) else None
        search = None if found is None else load_kept(found, manifest["model_digest"])
        merges.append(Merge(out, manifest, load_table(store.read(TENSORS_NAME)), search))
    text = merge_page(merges[0]) if len(merges) == 1 else compared_page(*merges)
    is_here = len(outs) > 1 or is_url(outs[0])
    path = Path(to) if to is not None else Path("." if is_here else local_path(outs[0])) / PAGE_NAME
    try:
        path.write_text(text, encoding="utf-8")
        if png is None:
            return [path]
        png.mkdir(parents=True, exist_ok=True)
        drawn = pictures(Grid(merges[0].tensors))
        if merges[0].search is not None:
            drawn += trial_pictures(merges[0].search)
        return [path, *(one.save(png) for one in drawn)]
    except OSError as error:
        raise OutputError(f"the report cannot be written: {error}.") from error
