"""YAML, read safely: bounded size and depth, no tags, no duplicate keys.

One pass over the parser's events builds the values, without recursion. Plain scalars mean what
they mean in YAML 1.1, which mergekit uses too, except that dates stay text, and that numbers which
YAML 1.1 does not read in decimal (010 is 8, 1:30 is 90) are refused: nobody means them here.
Aliases count as what they stand for, so that a short text cannot mean a huge value.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from della_dist.config.problem import closest, shown
from della_dist.config.yaml_hints import hint
from della_dist.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
#: Scalars, lists and mappings, those that aliases stand for included.
MAX_NODES = 1 << 18
#: The key whose value, or values, a mapping takes over.
MERGE_KEY = "<<"

#: How like a known key a misspelled one is.
_LIKE = 0.8

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER: Any = yaml.resolver.Resolver()
_PREFIX = "tag:yaml.org,2002:"
#: Numbers that YAML 1.1 reads as everyone does.
_DECIMAL = re.compile(
    r"[+-]?(0|[1-9][0-9]*|[0-9]*\.[0-9]*([eE][+-][0-9]+)?|\.(inf|nan))", re.IGNORECASE
)


def read_text(path: Path) -> str:
    """Return the text of a configuration file.

    Raises
    ------
    ConfigError
        If there is no such file, it is too large, or it is not UTF-8.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; give the YAML file of the configuration.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}.") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than 1 MiB; that is no merge configuration.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); save it "
            "as UTF-8."
        ) from None


def read_yaml(
    text: str, source: str, keys: Collection[str] | None = None
) -> tuple[list[Any], list[str]]:
    """Return the values of the YAML documents in a text: mappings, lists and scalars.

    Documents that are empty count for nothing; there is one that is not.

    Parameters
    ----------
    text
        Of all documents.
    source
        What messages call it.
    keys
        Of a document, that mean something. What stands under another one and is named elsewhere,
        through its anchors, is there for that alone: such a key is left out. None: all are kept.

    Returns
    -------
    documents, left_out
        The values, and the keys that were left out.

    Raises
    ------
    ConfigError
        Naming `source` and the line.
    """
    try:
        too_long = len(text) > MAX_BYTES or len(text.encode()) > MAX_BYTES
    except UnicodeEncodeError:
        raise ConfigError(f"{source} contains characters that are not valid Unicode.") from None
    if too_long:
        raise ConfigError(f"{source} has more than 1 MiB; that is no merge configuration.")
    builder = _Builder(source)
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            builder.handle(event)
    except yaml.MarkedYAMLError as error:
        in_quotes = "quoted scalar" in str(error.context)  # which begins where it is not closed
        marks = (error.context_mark, error.problem_mark)
        mark = next(filter(None, marks if in_quotes else reversed(marks)), None)
        line = f", line {mark.line + 1}" if mark else ""
        advice = hint(str(error.problem), text.splitlines(), mark.line) if mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem}.{advice}") from None
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {detail}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {error}.") from None
    documents = [document for document in builder.documents if document is not None]
    if not documents:
        raise ConfigError(f"{source} is empty; a configuration needs at least merge_method.")
    left_out: list[str] = []
    if keys is not None:
        for i, key in sorted(builder.holders):
            # One that is like a known one is misspelled, and must not be lost.
            if closest(key, keys, _LIKE) is None:
                del builder.documents[i][key]
                left_out.append(key)
    return documents, list(dict.fromkeys(left_out))


class _Builder:
    """Builds the values from events, on an explicit stack."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.documents: list[Any] = []
        self._stack: list[dict[str, Any] | list[Any]] = []
        self._keys: list[str | None] = []
        """For every open container: the key that waits for its value."""
        self._anchors: dict[str, tuple[Any, str]] = {}
        """What they stand for, and the key of the document below which that stands."""
        self._earlier: set[str] = set()
        """Anchors of the documents before."""
        self.holders: set[tuple[int, str]] = set()
        """Document and key: below those stands what an alias elsewhere means."""
        self._top_key = ""
        self._open_anchors: list[str | None] = []
        """For every open container: its own."""
        self._num_nodes = 0

    def handle(self, event: Any) -> None:  # noqa: ANN401
        if isinstance(event, yaml.DocumentStartEvent):
            self._earlier.update(self._anchors)
            self._anchors.clear()
            self._top_key = ""
        elif isinstance(event, yaml.CollectionEndEvent):
            value = self._stack.pop()
            self._keys.pop()
            if isinstance(value, dict) and MERGE_KEY in value:
                self._merge(event, value)
            self._remember(self._open_anchors.pop(), value)
        elif isinstance(event, yaml.NodeEvent):
            self._node(event)

    def _node(self, event: Any) -> None:  # noqa: ANN401
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self._error(event, f"the tag {shown(tag)} is not allowed; remove it")
        parent = self._stack[-1] if self._stack else None
        if isinstance(parent, dict) and self._keys[-1] is None:
            self._keys[-1] = self._key(event, parent)
            if len(self._stack) == 1:
                self._top_key = str(event.value)
            return
        value: Any
        size, depth = 1, 0
        if isinstance(event, yaml.AliasEvent):
            value = self._anchored(event)
            size, depth = _size_and_depth(value)
        elif isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
            self._remember(event.anchor, value)
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
            depth = 1
        self._num_nodes += size
        if self._num_nodes > MAX_NODES:
            raise self._error(event, f"more than {MAX_NODES} values, those of aliases included")
        if len(self._stack) + depth > MAX_DEPTH:
            raise self._error(event, f"nested more than {MAX_DEPTH} deep")
        if isinstance(parent, dict):
            parent[self._keys[-1] or ""] = value
            self._keys[-1] = None
        elif isinstance(parent, list):
            parent.append(value)
        else:
            self.documents.append(value)
        if isinstance(event, yaml.CollectionStartEvent):
            self._stack.append(value)
            self._keys.append(None)
            self._open_anchors.append(event.anchor)

    def _remember(self, anchor: str | None, value: Any) -> None:  # noqa: ANN401
        if anchor is not None:
            self._anchors[anchor] = value, self._top_key

    def _anchored(self, event: Any) -> Any:  # noqa: ANN401
        if event.anchor not in self._anchors:
            what = f"no value before it has the anchor &{event.anchor}"
            if event.anchor in self._earlier:
                what = (
                    f"the anchor &{event.anchor} is that of another document. Give it again in "
                    "this one, or write the documents as `stages` of one"
                )
            raise self._error(event, f"the alias *{event.anchor} stands for nothing: {what}")
        value, key = self._anchors[event.anchor]
        if key and key != self._top_key:
            self.holders.add((len(self.documents) - 1, key))
        return value

    def _merge(self, event: Any, mapping: dict[str, Any]) -> None:  # noqa: ANN401
        """Give a mapping what those behind its merge key have, and it has not itself."""
        behind = mapping.pop(MERGE_KEY)
        for other in behind if isinstance(behind, list) else [behind]:
            if not isinstance(other, dict):
                raise self._error(
                    event, f"`{MERGE_KEY}` takes over mappings, and {shown(other)} is none"
                )
            for key, value in other.items():
                mapping.setdefault(key, value)

    def _key(self, event: Any, mapping: dict[str, Any]) -> str:  # noqa: ANN401
        if not isinstance(event, yaml.ScalarEvent):
            raise self._error(event, "a key must be a word")
        key = str(event.value)
        if not key:
            raise self._error(event, "a key is empty")
        if key in mapping:
            advice = "keep one of them"
            if key.startswith("-"):
                advice = "put a space behind the dash of each"
            elif key == "model":
                advice = "begin each entry with a dash and a space, or keep one of them"
            raise self._error(event, f"the key {shown(key)} is there twice; {advice}")
        return key

    def _scalar(self, event: Any) -> Any:  # noqa: ANN401
        tag = _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
        kind = tag.removeprefix(_PREFIX)
        if kind not in ("null", "bool", "int", "float"):
            return event.value
        node = yaml.ScalarNode(tag, event.value)
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, OverflowError, IndexError):
            raise self._error(event, f"{shown(event.value)} is not a number") from None
        if kind in ("int", "float") and not _DECIMAL.fullmatch(event.value):
            raise self._error(
                event,
                f"{shown(event.value)} is {shown(value)} to YAML 1.1 readers. Write a number in "
                "decimal digits without leading zeros, and text in quotes",
            )
        return value

    def _error(self, event: Any, what: str) -> ConfigError:  # noqa: ANN401
        return ConfigError(f"{self.source}, line {event.start_mark.line + 1}: {what}.")


def _size_and_depth(value: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return of how many nodes a value consists, and how deep they are nested."""
    size, depth, level = 0, -1, [value]
    while level:
        size, depth = size + len(level), depth + 1
        containers = [node for node in level if isinstance(node, (dict, list))]
        level = [
            child
            for node in containers
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return size, depth
