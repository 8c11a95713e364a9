"""Make the page about a finished merge, or about two."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from della_dist.errors import ConfigError, OutputError
from della_dist.locations import HUB_PREFIX, is_url, local_path
from della_dist.report.card_pictures import CHOSEN, FOLDER, CardPicture, with_pictures
from della_dist.report.search import SEARCH_NAME, load_kept
from della_dist.runtime.output.finished import open_finished
from della_dist.runtime.output.history import kept_history
from della_dist.runtime.output.records import CARD_NAME
from della_dist.storage.opening import open_output_store
from della_dist.storage.store import OutputStore
from della_dist.storage.tensor_table import TENSORS_NAME, load_table
from della_dist.wording import few

if TYPE_CHECKING:
    from della_dist.report.page.pictures import Picture

PAGE_NAME = "report.html"


def report(
    outs: Sequence[str],
    *,
    to: str | os.PathLike[str] | None = None,
    png: Path | None = None,
    card: bool = False,
) -> list[str]:
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
    card
        Whether the main pictures are put into the model card of one output, as files beside it.

    Returns
    -------
    list
        Where the files are that were written, the page first.

    Raises
    ------
    ConfigError
        If matplotlib is not installed, or pictures of two outputs are asked for.
    OutputError
        If an output is not finished, what it keeps of a search is damaged, a file cannot be
        written, or pictures cannot be put into its card.
    StorageError
        If that or a picture beside it cannot be written.
    VerificationError
        If its manifest or its table is damaged.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "report draws with matplotlib, which is not installed: "
            "pip install 'della-dist[report]'."
        )
    for option, is_given in (("--png", png is not None), ("--card", card)):
        if is_given and len(outs) > 1:
            raise ConfigError(
                f"{option}: pictures are of one output. Leave {option} out, or the second output."
            )
    if card and outs[0].startswith(HUB_PREFIX):
        raise ConfigError(
            f"--card: {outs[0]} is on the Hub, where report writes nothing. Download it, run "
            f"report on the folder, and upload {CARD_NAME} and the folder {FOLDER} from there."
        )
    from della_dist.report.page.compared import compared_page
    from della_dist.report.page.merge import Merge, Seen, merge_page

    merges = []
    for out in outs:
        store, manifest = open_finished(out)
        history = kept_history(store, manifest["model_digest"])
        found = store.read(SEARCH_NAME) if store.exists(SEARCH_NAME) else None
        search = None if found is None else load_kept(found, manifest["model_digest"])
        tensors = load_table(store.read(TENSORS_NAME))
        merges.append(Merge(out, manifest, tensors, history, search))
    seen = Seen(merges[0]) if len(merges) == 1 else None
    in_card = _prepared(outs[0], seen.pictures) if card and seen is not None else None
    text = compared_page(*merges) if seen is None else merge_page(seen)
    is_here = len(outs) > 1 or is_url(outs[0])
    path = Path(to) if to is not None else Path("." if is_here else local_path(outs[0])) / PAGE_NAME
    try:
        path.write_text(text, encoding="utf-8")
        written = [str(path)]
        if png is not None and seen is not None:
            png.mkdir(parents=True, exist_ok=True)
            for picture in seen.pictures:
                file = png / f"{picture.name}.png"
                file.write_bytes(picture.png())
                written.append(str(file))
    except OSError as error:
        raise OutputError(f"the report cannot be written: {error}.") from error
    return written if in_card is None else [*written, *_written(*in_card)]


def _prepared(out: str, pictures: Sequence[Picture]) -> tuple[OutputStore, dict[str, bytes]]:
    """Return the store of an output, and by key what is to be written there: the card last.

    Raises
    ------
    OutputError
        If that cannot be done.
    """
    chosen = sorted(
        (picture for picture in pictures if picture.name in CHOSEN),
        key=lambda picture: CHOSEN.index(picture.name),
    )
    if not chosen:
        raise OutputError(f"--card: nothing was merged in {out}, so that there are no pictures.")
    store = open_output_store(out)
    keys = {f"{FOLDER}/{picture.name}.png": picture for picture in chosen}
    if links := store.links([*keys, CARD_NAME]):
        raise OutputError(
            f"--card: {out} has links where it would be written ({few(links)}): what they point to "
            "would be changed. Replace them by files."
        )
    if not store.exists(CARD_NAME):
        raise OutputError(
            f"--card: {out} has no {CARD_NAME}. The same merge makes it again; or write one."
        )
    try:
        text = with_pictures(
            store.read(CARD_NAME).decode(),
            [CardPicture(key, picture.title, picture.says) for key, picture in keys.items()],
        )
    except ValueError as error:  # of text that is not UTF-8, too
        raise OutputError(
            f"--card: {store.describe(CARD_NAME)} cannot be used: {error}. Mend it."
        ) from error
    files = {key: picture.png() for key, picture in keys.items()}
    return store, {**files, CARD_NAME: text.encode()}


def _written(store: OutputStore, files: Mapping[str, bytes]) -> list[str]:
    """Write files into an output; return where they are."""
    for key, data in files.items():
        store.put(key, data)
    return [store.describe(key) for key in files]
