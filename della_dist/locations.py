"""Where checkpoints and outputs are: local paths, and URLs of object stores.

A location is a path, ``file:///path``, ``hf://org/name@revision`` on the Hugging Face Hub, or
``scheme://bucket/prefix`` of anything that fsspec knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from della_dist.errors import InputError

_SCHEME = "[A-Za-z][A-Za-z0-9+.-]*"
_URL = re.compile(rf"({_SCHEME})://(.*)", re.DOTALL)
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}

_SCHEMES = "s3a?|gs|gcs|az|abfss?|adl|hf|https?|ftp|sftp|ssh|hdfs|webhdfs|memory|file|oss|cos"
#: No URL, but meant to be one: ``s3:/b``, ``s3;//b``, ``://b`` of any scheme; ``s3:b``, ``s3//b``.
_MISSPELLED = (
    re.compile(r"([^/\\:;]*)[:;][:;\s]*[/\\][:;/\\\s]*(.*)", re.DOTALL),
    re.compile(rf"({_SCHEMES})\s*(?:[:;]|[/\\]{{2}})[:;/\\\s]*(.*)", re.DOTALL | re.IGNORECASE),
)
#: Somewhere in a text, what may be a user name: scheme, what follows it, the name.
_USER = re.compile(
    rf"(?:([a-z][\w+.-]*)?(\s?[:;]+(?:\s?[/\\]+)?)|\b({_SCHEMES})(\s?[/\\]{{2,}}))"
    r"""([^\s'"]+)@""",
    re.IGNORECASE,
)
_QUERY = re.compile(r"""([:;]\s?[/\\]+[^\s'"?#]*)(?:(\?)[^\s'"]*=|(\#))[^\s'"]+""")
_PARAMETER = re.compile(
    r"""([;&][\w-]*(?:token|signature|secret|key|password|credential|sig)[\w-]*=)[^\s'"&;]+""",
    re.IGNORECASE,
)
#: ``simplecache::s3://bucket``, or a URL behind a path.
_CHAINED = re.compile(rf"^{_SCHEME}::|[/\\:]{_SCHEME}:[/\\]{{2}}")
#: A repository of the Hub as configurations name it: ``org/name``, ``org/name@revision``.
_HUB_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([^\s@:?#]+))?", re.ASCII)
HUB_PREFIX = "hf://"
_HUB_PAGES = ("huggingface.co", "www.huggingface.co", "hf.co")
#: Longer than a location; the patterns above would take for ever with such a word.
_LONG = re.compile(r"""([^\s'"]{1000,})""")


def is_url(location: str) -> bool:
    """Return whether `location` is in an object store (or another remote file system)."""
    match = _URL.match(location)
    return match is not None and match[1].lower() != "file"


def model_and_adapters(location: str) -> tuple[str, ...]:
    """Return the model and the adapters that a location names: ``base+adapter+adapter``.

    Local paths that exist may have a ``+`` in them, and the longest is meant. Otherwise what stands
    behind a ``+`` is an adapter if it is a path from ``/``, ``./``, ``../`` or ``~`` on, or a URL;
    or ``org/name`` behind another one, or behind a word (the name of a stage).
    """
    return tuple(_chain(location.split("+"))) if "+" in location else (location,)


def _chain(pieces: list[str]) -> list[str]:
    for count in range(len(pieces), 0, -1):
        path = "+".join(pieces[:count])
        if path and not is_url(path) and os.path.lexists(_expanded(path)):
            return [path, *(_chain(pieces[count:]) if count < len(pieces) else ())]
    head, count = pieces[0], 1
    while count < len(pieces) and not (head and _is_adapter(pieces[count], head)):
        head, count = f"{head}+{pieces[count]}", count + 1
    return [head, *(_chain(pieces[count:]) if count < len(pieces) else ())]


def _is_adapter(text: str, before: str) -> bool:
    if text.startswith(("/", "./", "../", "~")) or is_url(text) or os.path.lexists(text or "."):
        return bool(text)
    if text.lower().startswith("file://"):
        return True
    # Behind a repository, or a single word: the name of a stage.
    is_model = hub_repository(before) is not None or not re.search(r"[/\\]", before)
    return is_model and hub_repository(text) is not None


def _expanded(path: str) -> Path:
    try:
        return local_path(path)
    except RuntimeError:  # there is no such home directory
        return Path(path)


def of_parts(location: str, change: Callable[[str], str]) -> str:
    """Return a location with its model and each adapter changed."""
    return "+".join(map(change, model_and_adapters(location)))


def hub_repository(location: str) -> tuple[str, str | None] | None:
    """Return repository and revision (None: not given) that a location names on the Hub.

    Parameters
    ----------
    location
        ``hf://org/name@revision``, or without ``hf://``; then it may be a local path as well.

    Returns
    -------
    tuple or None
        None if it is nothing of the Hub.
    """
    found = _HUB_ID.fullmatch(location.removeprefix(HUB_PREFIX).rstrip("/"))
    return None if found is None else (found[1], found[2])


def scheme(url: str) -> str:
    """Return the scheme of a URL, in lower case."""
    return url.partition("://")[0].lower()


def check_location(location: str) -> None:
    """Refuse what is neither a path nor a URL: the empty text, and URLs that are misspelled.

    A directory whose name looks like one is reached by a path with a slash before: ``./s3:/name``.

    Raises
    ------
    ValueError
        What is wrong with it. The message never shows what may be a credential.
    """
    if not location.strip() or "\0" in location:
        raise ValueError(f"is {location!r}, which names no directory")
    if is_url(location):
        check_url(location)
        return
    if location.startswith("~"):
        try:
            Path(location).expanduser()
        except RuntimeError:
            raise ValueError(f"is {location!r}, and there is no such home directory") from None
    text = location.strip(" \t\r\n'\"")
    found = next((m for pattern in _MISSPELLED if (m := pattern.match(text))), None)
    if found is None and _CHAINED.search(text):
        raise ValueError(
            "has a URL behind something else, as in `simplecache::s3://...`. Write the URL of the "
            "store alone, or for a local directory its path without double slashes"
        )
    # file:///path is right, and a single letter before the colon is a drive of Windows.
    if found is None or len(found[1]) == 1 or location.lower().startswith("file:///"):
        return
    name = re.sub(r"[^a-z0-9+.-]", "", found[1].lower())
    rest = found[2].replace("\\", "/")
    user, _, rest = rest.rpartition("@")  # a secret key may have slashes
    rest = ("***@" if user else "") + rest.partition("?")[0]
    if name == "file":
        right = "file:///" + rest.removeprefix("localhost/")
    else:
        right = f"{name or 'scheme'}://{rest}"
    raise ValueError(
        f"looks like a URL that is misspelled. Write {right}, or for a local directory its path "
        "from / or ./ on"
    )


def masked(text: str) -> str:
    """Return `text` without what may be a credential in a URL, however that is spelled."""

    def hide(found: re.Match[str]) -> str:
        name, mark = found[1] or found[3] or "", found[2] or found[4]
        if ":" not in found[5] and _ALIASES.get(name.lower(), name.lower()) == "az":
            return found[0]
        pieces = [piece.removeprefix(HUB_PREFIX) for piece in found[5].split("+")]
        if name.lower().rpartition("+")[2] == "hf" and all(map(_HUB_ID.fullmatch, pieces)):
            return found[0]  # what follows is a revision
        return f"{name}{mark}***@"

    parts = _LONG.split(text)
    parts[::2] = [_masked_rest(_USER.sub(hide, part)) for part in parts[::2]]
    parts[1::2] = [_masked_long(part) for part in parts[1::2]]
    return "".join(parts)


def _masked_rest(text: str) -> str:
    hidden = _QUERY.sub(lambda found: f"{found[1]}{found[2] or found[3]}***", text)
    return _PARAMETER.sub(r"\1***", hidden)


def _masked_long(word: str) -> str:
    user, at, rest = word.rpartition("@")
    if "?" in user:  # a secret key with that in it, or a query with an @ in it
        return "***"
    path, mark, _ = rest.partition("?")
    return (at and "***@") + path + (mark and "?***")


def check_url(url: str) -> None:
    """Refuse a URL that cannot be a directory of a store.

    Raises
    ------
    ValueError
        What is wrong with it. The message never shows what may be a credential.
    """
    match = _URL.fullmatch(url)
    assert match is not None
    authority, _, path = match[2].partition("/")
    # az://container@account.host is the one use of @ that names a place. A secret key may have a
    # slash, and so a colon that is followed by no port may begin one.
    cut = "@" in path and re.search(":[^0-9]|:[0-9]+[^0-9]", authority) is not None
    at = "@" in authority and _ALIASES.get(match[1].lower(), match[1].lower()) != "az"
    if at or cut:
        raise ValueError(
            f"is a {match[1]}:// URL with a user name or password in it. Credentials belong in the "
            "environment, a profile, or fsspec's configuration"
        )
    if "::" in match[2]:
        raise ValueError(
            f"is a {match[1]}:// URL with another one in it. Write the URL of the store alone"
        )
    if "?" in match[2] or "#" in match[2]:
        raise ValueError(
            f"is a {match[1]}:// URL with a query (? or #), which no directory has. Give the URL "
            "of the directory alone; credentials belong in the environment"
        )
    if not authority and match[1].lower() != "memory":
        raise ValueError(f"is {masked(url)!r}, a URL without a bucket or host")
    if match[1].lower() in ("http", "https") and authority.lower() in _HUB_PAGES:
        name = "/".join(path.split("/")[:2])
        raise ValueError(f"is a page of the Hugging Face Hub. Write {HUB_PREFIX}{name}")
    if match[1].lower() == "hf" and hub_repository(url) is None:
        raise ValueError(
            f"is {masked(url)!r}; a model on the Hub is hf://org/name or hf://org/name@revision"
        )
    if ".." in match[2].split("/"):
        raise ValueError(f"is {masked(url)!r}; a URL cannot go up with '..'")


def local_path(location: str) -> Path:
    """Return the path that a location which is no URL names; ``~`` is expanded."""
    if location.lower().startswith("file://"):
        location = location[len("file://") :]
    return Path(location).expanduser()


def place(location: str, *, follow_links: bool = False, is_output: bool = False) -> str:
    """Return a form of `location` in which two spellings of one place are equal.

    Parameters
    ----------
    location
        A path or URL.
    follow_links
        Also see through links of the local file system, which reads it.
    is_output
        Whether it is one place, whatever is in its name.
    """
    if not is_output and len(found := model_and_adapters(location)) > 1:
        return "+".join(place(part, follow_links=follow_links) for part in found)
    hub = None if is_output else hub_repository(location)
    if hub and (is_url(location) or not absolute_path(local_path(location)).exists()):
        return HUB_PREFIX + (hub[0] if hub[1] in (None, "main") else f"{hub[0]}@{hub[1]}")
    if is_url(location):
        name = scheme(location)
        parts = [part for part in location.partition("://")[2].split("/") if part not in ("", ".")]
        return f"{_ALIASES.get(name, name)}://{'/'.join(parts)}"
    path = absolute_path(local_path(location))
    return str(path.resolve()) if follow_links else os.path.normpath(path)


def absolute(location: str) -> str:
    """Return `location` in a form that means the same in every working directory."""
    if len(model_and_adapters(location)) > 1:
        return of_parts(location, absolute)
    return location if is_url(location) else str(absolute_path(local_path(location)))


def absolute_path(path: Path) -> Path:
    """Return a path from the root on.

    Raises
    ------
    InputError
        If it is relative, and the current directory was removed.
    """
    try:
        return path.absolute()
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is relative, and the current directory does not exist any more. Change to one "
            "that does, or give the path from / on."
        ) from error


def short_names(locations: Sequence[str]) -> list[str]:
    """Return names for `locations` that hold on other machines too, different where they can be.

    A folder of the Hugging Face cache is called as its repository, anything else by its last part,
    with those before it where several would be called the same.
    """
    choices = [_names(location) for location in locations]
    lengths = [0] * len(choices)
    while True:
        names = [mine[length] for mine, length in zip(choices, lengths, strict=True)]
        longer = [
            length + (names.count(name) > 1 and length + 1 < len(mine))
            for mine, length, name in zip(choices, lengths, names, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def _names(location: str) -> list[str]:
    """Return the names of a location, the shortest first."""
    chain = model_and_adapters(location)
    if len(chain) > 1:
        choices = [_names(part) for part in chain]
        longest = max(map(len, choices))
        return ["+".join(c[min(i, len(c) - 1)] for c in choices) for i in range(longest)]
    url = is_url(location)
    if url and (found := hub_repository(location)) is not None:
        return [found[0], "@".join(part for part in found if part is not None)]
    folders = place(location).partition("://" if url else "/")[2].split("/")
    for i, folder in enumerate(folders):
        if folder.startswith("models--"):
            repository = folder.removeprefix("models--").replace("--", "/")
            return [repository, "@".join((repository, *folders[i + 2 : i + 3]))]
    names = ["/".join(folders[i:]) for i in reversed(range(len(folders)))]
    return [*names, location] if url else names


def overlap(output: str, checkpoint: str) -> bool:
    """Return whether an output and a checkpoint, or an adapter of it, lie within each other."""
    a = place(output, follow_links=True, is_output=True)
    for part in model_and_adapters(checkpoint):
        b = place(part, follow_links=True)
        if a == b or a.startswith(f"{b.rstrip('/')}/") or b.startswith(f"{a.rstrip('/')}/"):
            return True
    return False
