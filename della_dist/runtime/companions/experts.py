"""What the files of the experts say otherwise than those that the output takes over.

Tensors that fit by name and shape may still mean something else: by another configuration, or
because the rows of the embedding belong to other tokens. The first is said, one note an expert; the
second is refused, unless the configuration allows it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from della_dist.config.chat_templates import turn_tokens
from della_dist.errors import InputError, refused_as
from della_dist.planning.build import MergePlan
from della_dist.runtime.companions.config_differences import config_differences
from della_dist.runtime.companions.small_files import (
    FILES_AT_ONCE,
    digest_of,
    parse_json,
    read_json,
    read_small,
    size_of,
)
from della_dist.runtime.companions.vocabulary import (
    ADDED_NAMES,
    Vocabulary,
    added_tokens,
    read_vocabulary,
    vocabulary_names,
)
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store
from della_dist.storage.strict_json import paused_gc
from della_dist.wording import plural

_TEMPLATES = "additional_chat_templates"
_SHOWN = 3


def compare_files(
    plan: MergePlan, store_of: Callable[[str], Store] = open_store
) -> tuple[str, ...]:
    """Return one note for every expert whose files differ in what they mean.

    Parameters
    ----------
    plan
        Of the merge.
    store_of
        Returns the store of a checkpoint's location.

    Raises
    ------
    InputError
        If a file of an expert that is looked at cannot be read, or the expert has other tokens at
        the same numbers and the configuration does not allow that.
    """
    reference = _Files(plan.reference, store_of)
    known = {n: (plan.companion_bytes[n], plan.companions[n]) for n in plan.companions}
    tokenizer = reference if plan.tokenizer is plan.reference else _Files(plan.tokenizer, store_of)
    others = [c for c in plan.experts if c is not plan.reference]
    if plan.tokenizer is not plan.reference and (plan.base is None or plan.config.has_base):
        others.insert(0, plan.reference)
    template = plan.config.chat_template

    def compare(checkpoint: CheckpointIndex) -> list[str]:
        expert = _Files(checkpoint, store_of)
        with refused_as(InputError, f"checkpoint {expert.location}"):
            tokens = []
            if checkpoint is not plan.tokenizer and plan.has_rows_of(checkpoint):
                is_allowed = plan.config.allow_different_tokenizers
                tokens = _tokens(tokenizer, expert, known, is_allowed=is_allowed)
            _refuse_other_tokens(plan, expert, tokens)
            if checkpoint is plan.reference:
                return tokens
            templates = [] if template else _chat_templates(tokenizer, expert)
            return [*_config(reference, expert), *tokens, *templates]

    for files in (reference, tokenizer):  # before several threads ask for them
        _ = files.documents, files.chat_templates
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # remote files take round trips
        found = list(pool.map(compare, others))
    files_of = reference.location
    if tokenizer is not reference:
        files_of += f", those of the tokenizer of {tokenizer.location}"
    return (
        *_turns(tokenizer, template),
        *(
            f"{expert.location}: {'; '.join(parts)}. The output's files are those of {files_of}."
            for expert, parts in zip(others, found, strict=True)
            if parts
        ),
    )


def _refuse_other_tokens(plan: MergePlan, expert: _Files, found: Sequence[str]) -> None:
    """Refuse vocabularies of which the output's is to be made, unless they are all the same."""
    source = plan.config.tokenizer_source
    if found and source != "base":
        raise InputError(
            f"checkpoint {expert.location} has another vocabulary than {plan.tokenizer.location} "
            f"({'; '.join(found)}). `tokenizer_source: {source}` needs one vocabulary of all "
            "models: rows of embeddings are not moved to other tokens. Take models with the same "
            "tokenizer, or leave it out to keep that of the base."
        )


def _turns(reference: _Files, template: str | None) -> Iterator[str]:
    """Yield that the template of the configuration marks turns by what are no tokens."""
    marks = () if template is None else turn_tokens(template)
    if not marks or not reference.vocabularies:
        return
    vocabulary = reference.vocabulary(reference.vocabularies[0])
    missing = [] if vocabulary is None else [t for t in marks if t not in set(vocabulary.values())]
    if missing:
        yield (
            f"chat_template: it marks turns by {', '.join(missing)}, which are no tokens of "
            f"{reference.location}: the model will see them in pieces."
        )


class _Files:
    """The small files of one checkpoint, each read once, when something asks for it."""

    def __init__(self, checkpoint: CheckpointIndex, store_of: Callable[[str], Store]) -> None:
        self.location = checkpoint.location
        self.store = store_of(checkpoint.location)
        self.names = {*checkpoint.files, *(n for n in checkpoint.folders if "." in n)}
        self.folders = checkpoint.folders
        self._vocabularies: dict[str, Vocabulary | None] = {}
        self._lock = threading.Lock()

    @property
    def vocabularies(self) -> list[str]:
        """The files that hold a vocabulary."""
        return vocabulary_names(self.names)

    @cached_property
    def documents(self) -> Mapping[str, Any]:
        """The small JSON documents that are there, parsed."""
        found = {}
        for name in ("config.json", "chat_template.json", *ADDED_NAMES):
            if name in self.names:
                data = read_json(self.store, name)
                found[name] = parse_json(data, self.store.describe(name))
        return found

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

    def vocabulary(self, name: str) -> Vocabulary | None:
        """Return what a file says together with the added tokens; None if its form is unknown."""
        with self._lock:
            if name not in self._vocabularies:
                read = read_json if name.endswith(".json") else read_small
                data = read(self.store, name)
                try:
                    with paused_gc():
                        found = read_vocabulary(name, data)
                except ValueError:
                    self._vocabularies[name] = None
                else:
                    self._vocabularies[name] = found | added_tokens(self.documents)
            return self._vocabularies[name]


def _config(reference: _Files, expert: _Files) -> list[str]:
    ours, theirs = (files.documents.get("config.json") for files in (reference, expert))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return []
    return config_differences(ours, theirs)


def _tokens(
    reference: _Files, expert: _Files, known: Mapping[str, tuple[int, str]], *, is_allowed: bool
) -> list[str]:
    """Compare the vocabularies; parses none of them where the files are equal.

    `known` has size and digest of the reference's files.
    """
    for name in expert.vocabularies:  # although another file may be the one that is compared
        size_of(expert.store, name)
    there = reference.vocabularies
    common = [name for name in there if name in expert.vocabularies]
    if not common:
        if not there or not expert.vocabularies:
            return []
        return [f"its tokenizer was not compared (it has {expert.vocabularies[0]}, not {there[0]})"]
    name = common[0]
    is_as_large = size_of(expert.store, name) == known[name][0]
    equal_files = is_as_large and digest_of(expert.store, name) == known[name]
    if equal_files and added_tokens(reference.documents) == added_tokens(expert.documents):
        return []
    ours, theirs = reference.vocabulary(name), expert.vocabulary(name)
    if ours is None or theirs is None:
        return [] if equal_files else [f"its {name} is another, in a form that is not compared"]
    if ours == theirs:
        return []
    differing = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])
    parts = []
    if differing:
        shown = "; ".join(
            f"{n}: {_short(theirs[n])}, not {_short(ours[n])}" for n in differing[:_SHOWN]
        )
        count = f"{len(differing):,} of {len(ours.keys() & theirs.keys()):,}"
        if not is_allowed:
            raise InputError(
                f"checkpoint {expert.location} has other tokens than {reference.location}: "
                f"{count} numbers mean different ones ({shown}). Rows of the embedding that "
                "belong to different tokens would be merged. Take experts with the same "
                "tokenizer, or write `allow_different_tokenizers: true` to merge by position."
            )
        parts.append(
            f"{count} numbers mean other tokens ({shown}), whose rows are merged by position as "
            "allow_different_tokenizers says"
        )
    for mine, other, who in ((theirs, ours, "it"), (ours, theirs, reference.location)):
        if alone := sorted(mine.keys() - other.keys()):
            shown = ", ".join(f"{n}: {_short(mine[n])}" for n in alone[:_SHOWN])
            more = ", ..." if len(alone) > _SHOWN else ""
            parts.append(f"{plural(len(alone), 'token')} only {who} has ({shown}{more})")
    return parts


def _chat_templates(reference: _Files, expert: _Files) -> list[str]:
    ours, theirs = reference.chat_templates, expert.chat_templates
    only = [name for name in theirs if name not in ours]
    other = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    parts = []
    if only:
        parts.append(f"only it has {_templates(only)}")
    if other:
        parts.append(f"it has another version of {_templates(other)}")
    return parts


def _templates(names: Iterable[str]) -> str:
    if set(names) == {"default"}:
        return "the chat template"
    return f"the chat templates {', '.join(map(_short, sorted(names)))}"


def _short(token: str) -> str:
    return repr(token if len(token) <= 24 else f"{token[:24]}...")
