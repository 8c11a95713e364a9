"""The small files of one checkpoint, each read once, when something asks for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from della_dist.runtime.companions.small_files import digest_of, parse_json, read_json, read_small
from della_dist.runtime.companions.vocabulary import (
    ADDED_NAMES,
    SPECIAL_NAME,
    Vocabulary,
    added_tokens,
    named_tokens,
    read_vocabulary,
    vocabulary_names,
)
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store
from della_dist.storage.strict_json import paused_gc

_TEMPLATES = "additional_chat_templates"


class CheckpointFiles:
    """The small files of one checkpoint, each read once, when something asks for it.

    Parameters
    ----------
    checkpoint
        Whose files they are.
    store_of
        Returns the store of its location.
    digests
        Size and SHA-256 of those that were read before, by name.
    """

    def __init__(
        self,
        checkpoint: CheckpointIndex,
        store_of: Callable[[str], Store] = open_store,
        digests: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self.location = checkpoint.location
        self.store = store_of(checkpoint.location)
        self.names = {*checkpoint.files, *(n for n in checkpoint.folders if "." in n)}
        self.folders = checkpoint.folders
        self._digests = dict(digests or {})
        self._vocabularies: dict[str, Vocabulary | None] = {}
        self.unknown: dict[str, str] = {}
        """Why a vocabulary is in no form that is known, by the name of its file."""
        self._lock = threading.Lock()

    @property
    def vocabularies(self) -> list[str]:
        """The files that hold a vocabulary."""
        return vocabulary_names(self.names)

    @cached_property
    def documents(self) -> Mapping[str, Any]:
        """The small JSON documents that are there, parsed."""
        found = {}
        for name in ("config.json", "chat_template.json", *ADDED_NAMES, SPECIAL_NAME):
            if name in self.names:
                data = read_json(self.store, name)
                found[name] = parse_json(data, self.store.describe(name))
        return found

    @cached_property
    def added_tokens(self) -> Vocabulary:
        """The tokens that the documents add to a vocabulary, or rename."""
        return added_tokens(self.documents)

    @cached_property
    def own_added_tokens(self) -> frozenset[str]:
        """The tokens that are cut out of a text before anything else, by the tokenizer's files."""
        found = set(named_tokens(self.documents))
        if "tokenizer.json" in self.names:
            with paused_gc():
                document = json.loads(read_json(self.store, "tokenizer.json"))
            listed = document.get("added_tokens") if isinstance(document, dict) else None
            for token in listed if isinstance(listed, list) else ():
                if isinstance(token, dict) and isinstance(token.get("content"), str):
                    found.add(token["content"])
        return frozenset(found)

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name, wherever transformers looks for them."""
        found = {}
        for file in ("tokenizer_config.json", "chat_template.json"):
            document = self.documents.get(file)
            stated = document.get("chat_template") if isinstance(document, dict) else None
            if isinstance(stated, str):
                found["default"] = stated
            for entry in stated if isinstance(stated, list) else ():
                if isinstance(entry, dict):
                    found[str(entry.get("name"))] = str(entry.get("template"))
        if "chat_template.jinja" in self.names:
            found["default"] = self._text("chat_template.jinja")
        if _TEMPLATES in self.folders:
            for key in self.store.children(_TEMPLATES)[0]:
                if key.endswith(".jinja"):
                    name = key.removeprefix(f"{_TEMPLATES}/").removesuffix(".jinja")
                    found[name] = self._text(key)
        return found

    def _text(self, key: str) -> str:
        return read_small(self.store, key).decode("utf-8", "replace")

    def digest_of(self, name: str) -> tuple[int, str]:
        """Return size and SHA-256 of a file."""
        with self._lock:
            if name not in self._digests:
                self._digests[name] = digest_of(self.store, name)
            return self._digests[name]

    def forget_vocabularies(self) -> None:
        """Let go of what was read of vocabularies, which are large."""
        with self._lock:
            self._vocabularies.clear()

    def vocabulary(self, name: str) -> Vocabulary | None:
        """Return what a file says together with the added tokens; None if its form is unknown."""
        with self._lock:
            if name not in self._vocabularies:
                read = read_json if name.endswith(".json") else read_small
                data = read(self.store, name)
                try:
                    with paused_gc():
                        found = read_vocabulary(name, data, named_tokens(self.documents))
                except ValueError as error:
                    self._vocabularies[name] = None
                    self.unknown[name] = str(error)
                else:
                    is_whole = name == "tokenizer.json"
                    self._vocabularies[name] = found if is_whole else found | self.added_tokens
            return self._vocabularies[name]
