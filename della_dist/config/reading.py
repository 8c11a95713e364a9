"""YAML, read safely: bounded size and depth, no tags, no aliases, no duplicate keys.

One pass over the parser's events builds the value, without recursion. Plain scalars mean what
they mean in YAML 1.1, which mergekit uses too, except that dates stay text, and that numbers which
YAML 1.1 does not read in decimal (010 is 8, 1:30 is 90) are refused: nobody means them here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from della_dist.config.problem import shown
from della_dist.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

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


def read_yaml(text: str, source: str) -> Any:  # noqa: ANN401
    """Return the value of a YAML document: mappings, lists and scalars.

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
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {detail}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {error}.") from None
    if not builder.has_document:
        raise ConfigError(f"{source} is empty; a configuration needs at least merge_method.")
    return builder.document


class _Builder:
    """Builds the value from events, on an explicit stack."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.document: Any = None
        self.has_document = False
        self._stack: list[dict[str, Any] | list[Any]] = []
        self._keys: list[str | None] = []
        """For every open container: the key that waits for its value."""

    def handle(self, event: Any) -> None:  # noqa: ANN401
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self._error(event, "anchors (&) and aliases (*) are not supported; write it out")
        if isinstance(event, yaml.DocumentStartEvent):
            if self.has_document:
                raise self._error(event, "a second document begins; there must be one only")
            self.has_document = True
        elif isinstance(event, yaml.CollectionEndEvent):
            self._stack.pop()
            self._keys.pop()
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            self._node(event)

    def _node(self, event: Any) -> None:  # noqa: ANN401
        if event.tag is not None:
            raise self._error(event, f"the tag {shown(event.tag)} is not allowed; remove it")
        parent = self._stack[-1] if self._stack else None
        if isinstance(parent, dict) and self._keys[-1] is None:
            self._keys[-1] = self._key(event, parent)
            return
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        else:
            if len(self._stack) >= MAX_DEPTH:
                raise self._error(event, f"nested more than {MAX_DEPTH} deep")
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if isinstance(parent, dict):
            parent[self._keys[-1] or ""] = value
            self._keys[-1] = None
        elif isinstance(parent, list):
            parent.append(value)
        else:
            self.document = value
        if not isinstance(event, yaml.ScalarEvent):
            self._stack.append(value)
            self._keys.append(None)

    def _key(self, event: Any, mapping: dict[str, Any]) -> str:  # noqa: ANN401
        if not isinstance(event, yaml.ScalarEvent):
            raise self._error(event, "a key must be a word")
        key = str(event.value)
        if not key:
            raise self._error(event, "a key is empty")
        if key in mapping:
            raise self._error(event, f"the key {shown(key)} is there twice; keep one of them")
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
