"""Which token has which number, by the files of a checkpoint's tokenizer.

Only names and numbers are read, in whatever form a tokenizer has them; nothing is tokenized, and no
library is needed. Two vocabularies are compared through files of the same name, so that a form
that shifts its numbers (XLM-R's sentencepiece) shifts them on both sides.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

Vocabulary: TypeAlias = dict[int, str]
"""Token by number."""

#: Where added tokens are, beside the vocabulary itself.
ADDED_NAMES = ("added_tokens.json", "tokenizer_config.json")

_NAMES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
    "tiktoken.model",
)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")


def vocabulary_names(files: Iterable[str]) -> list[str]:
    """Return the files that hold a vocabulary, the one that loaders prefer first."""
    there = set(files)
    named = [name for name in _NAMES if name in there]
    return named + sorted(name for name in there if name.endswith((".tiktoken", ".spm")))


def read_vocabulary(name: str, data: bytes) -> Vocabulary:
    """Return the vocabulary that a file holds.

    Parameters
    ----------
    name
        One of `vocabulary_names`.
    data
        Its content.

    Raises
    ------
    ValueError
        If it is in a form that is not known here.
    """
    reader = _JSON_READERS.get(name)
    try:
        if reader is not None:
            vocabulary = reader(json.loads(data))
        elif name == "vocab.txt":
            lines = data.decode("utf-8").removesuffix("\n").split("\n")
            vocabulary = {number: line.removesuffix("\r") for number, line in enumerate(lines)}
        elif _TIKTOKEN.match(data):
            vocabulary = _tiktoken(data)
        else:
            vocabulary = dict(enumerate(_pieces(data)))
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not all(isinstance(n, int) and isinstance(t, str) for n, t in vocabulary.items()):
        raise ValueError("a token is no text, or has no number")
    return vocabulary


def added_tokens(documents: Mapping[str, Any]) -> Vocabulary:
    """Return the tokens that the parsed `ADDED_NAMES` of a checkpoint add or rename."""
    found: Vocabulary = {}
    listed = documents.get("added_tokens.json")
    if isinstance(listed, dict):
        found.update((n, t) for t, n in listed.items() if isinstance(n, int))
    config = documents.get("tokenizer_config.json")
    decoder = config.get("added_tokens_decoder") if isinstance(config, dict) else None
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and number.isdecimal():
            found[int(number)] = content
    return found


def _tokenizer(document: Any) -> Vocabulary:  # noqa: ANN401
    vocabulary = _numbered(document["model"]["vocab"])
    for token in document.get("added_tokens") or ():
        vocabulary[token["id"]] = token["content"]
    return vocabulary


def _numbered(vocab: Any) -> Vocabulary:  # noqa: ANN401
    """Return a vocabulary in either form: numbers by token, or tokens (with scores) in order."""
    if isinstance(vocab, dict):
        return {number: token for token, number in vocab.items()}
    return {n: t if isinstance(t, str) else t[0] for n, t in enumerate(vocab)}


def _tekken(document: Any) -> Vocabulary:  # noqa: ANN401
    special = document.get("special_tokens") or []
    shift = document["config"].get("default_num_special_tokens", len(special))
    vocabulary = {token["rank"]: str(token["token_str"]) for token in special}
    return vocabulary | {shift + token["rank"]: token["token_bytes"] for token in document["vocab"]}


_JSON_READERS: dict[str, Callable[[Any], Vocabulary]] = {
    "tokenizer.json": _tokenizer,
    "vocab.json": _numbered,
    "tekken.json": _tekken,
}


def _tiktoken(data: bytes) -> Vocabulary:
    vocabulary = {}
    for line in data.splitlines():
        if line:
            token, number = line.split()
            text = base64.b64decode(token, validate=True).decode("utf-8", "backslashreplace")
            vocabulary[int(number)] = text
    return vocabulary


def _pieces(data: bytes) -> Iterator[str]:
    """Yield the pieces of a sentencepiece model: field 1 of each message in field 1, in order."""
    for field, piece in _fields(data):
        if field == 1:
            texts = [text for number, text in _fields(piece) if number == 1]
            yield texts[0].decode("utf-8")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields of a protocol buffer message; of numbers, nothing.

    https://protobuf.dev/programming-guides/encoding
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(data, position)
            size = 0
        elif kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
            size = 0
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if position + size > len(data):
            raise ValueError("it is cut short")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
