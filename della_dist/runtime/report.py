"""Make the page about a finished merge, or about two."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from della_dist.errors import ConfigError, OutputError
from della_dist.locations import is_url, local_path
from della_dist.runtime.output.finished import open_finished
from della_dist.runtime.output.history import kept_history
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
        If an output is not finished, or a file cannot be written.
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
    from della_dist.report.page.merge import Merge, Seen, merge_page

    merges = []
    for out in outs:
        store, manifest = open_finished(out)
        tensors = load_table(store.read(TENSORS_NAME))
        history = kept_history(store, manifest["model_digest"])
        merges.append(Merge(out, manifest, tensors, history))
    seen = Seen(merges[0]) if len(merges) == 1 else None
    text = compared_page(*merges) if seen is None else merge_page(seen)
    is_here = len(outs) > 1 or is_url(outs[0])
    path = Path(to) if to is not None else Path("." if is_here else local_path(outs[0])) / PAGE_NAME
    try:
        path.write_text(text, encoding="utf-8")
        written = [path]
        if png is not None and seen is not None:
            png.mkdir(parents=True, exist_ok=True)
            for picture in seen.pictures:
                written.append(png / f"{picture.name}.png")
                written[-1].write_bytes(picture.png())
    except OSError as error:
        raise OutputError(f"the report cannot be written: {error}.") from error
    return written
