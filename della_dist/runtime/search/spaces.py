"""Read what is searched."""

from __future__ import annotations

from pathlib import Path

from della_dist.config import config_from_mapping
from della_dist.config.auto_space import auto_space
from della_dist.config.space import Space, read_document
from della_dist.runtime.open_plan import open_plan


def open_space(path: Path, *, auto: bool) -> Space:
    """Return the space of a YAML file.

    Parameters
    ----------
    path
        Of the file.
    auto
        Whether it is a configuration whose lambda and weights are searched.

    Raises
    ------
    ConfigError
        If the file cannot be read or anything in it is wrong.
    InputError, StorageError
        With `auto`: if a merge of it would be refused, or headers cannot be read.
    """
    document, source = read_document(path), str(path)
    if not auto:
        return Space(document, source)
    auto_space(document, source, ())  # before models are opened
    merged = open_plan(config_from_mapping(document, source)).matching.actions
    return auto_space(document, source, [name for name in merged if merged[name] == "merge"])
