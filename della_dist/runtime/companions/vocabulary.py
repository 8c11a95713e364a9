"""Which token has which number, by the files of a checkpoint's tokenizer.

Only names and numbers are read, in whatever form a tokenizer has them; nothing is tokenized, and no
library is needed. Two vocabularies are compared through files of the same name, so that a form
that shifts its numbers (XLM-R's sentencepiece) shifts them on both sides.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Vocabulary: TypeAlias = dict[int, str]
"""Token by number."""

#: Where added tokens are, beside the vocabulary itself.
ADDED_NAMES = ("added_tokens.json", "tokenizer_config.json")
SPECIAL_NAME = "special_tokens_map.json"

_NAMES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
    "tiktoken.model",
)
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)

#: No vocabulary has as many tokens.
MAX_NUMBER = 1 << 24
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")


def vocabulary_names(files: Iterable[str]) -> list[str]:
    """Return the files that hold a vocabulary, the one that loaders prefer first."""
    there = set(files)
    named = [name for name in _NAMES if name in there]
    return named + sorted(name for name in there if name.endswith((".tiktoken", ".spm")))


def read_vocabulary(name: str, data: bytes, named: Sequence[str] = ()) -> Vocabulary:
    """Return the vocabulary that a file holds.

    Parameters
    ----------
    name
        One of `vocabulary_names`.
    data
        Its content.
    named
        Tokens that a ``tokenizer.json`` gets when it is read (`named_tokens`).

    Raises
    ------
    ValueError
        If it is in a form that is not known here.
    """
    reader = _JSON_READERS.get(name)
    try:
        if name == "tokenizer.json":
            vocabulary = _tokenizer(json.loads(data), named)
        elif reader is not None:
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
    if not (set(map(type, vocabulary)) <= {int} and set(map(type, vocabulary.values())) <= {str}):
        raise ValueError("a token is no text, or has no number")
    for number in (min(vocabulary, default=0), max(vocabulary, default=0)):
        if not 0 <= number < MAX_NUMBER:
            raise ValueError(f"{vocabulary[number]!r} has the number {number}")
    return vocabulary


def library_numbers(vocab: Mapping[str, int], added: Iterable[str]) -> dict[str, int]:
    """Return the number of every token of a ``tokenizer.json``, as the tokenizers library has it.

    What stands beside an added token there counts for nothing: one that is in the vocabulary has
    its number, any other the next behind all before.

    Parameters
    ----------
    vocab
        Of the model.
    added
        Contents of ``added_tokens``, in their order.
    """
    numbers, last = dict(vocab), -1
    for token in added:
        if token not in numbers:
            numbers[token] = last + 1 if last >= len(vocab) else len(vocab)
        last = max(last, numbers[token])
    return numbers


def named_tokens(documents: Mapping[str, Any]) -> list[str]:
    """Return tokens that documents beside a ``tokenizer.json`` name, in transformers' order.

    Those that the file lacks get numbers behind all others when transformers reads it, whatever
    number stands beside them.
    """
    by_number = added_tokens(documents)
    found = [by_number[number] for number in sorted(by_number)]
    stated: dict[str, Any] = {}
    for name in (ADDED_NAMES[1], SPECIAL_NAME):  # where both name a token, the latter's holds
        document = documents.get(name)
        if isinstance(document, dict):
            stated |= {key: document[key] for key in _SPECIAL if key in document}
    for key in _SPECIAL:
        found += _contents(stated.get(key))
    return list(dict.fromkeys(found))


def _contents(value: Any) -> list[str]:  # noqa: ANN401
    """Return the tokens that a value names: one, or a list of them, or a mapping."""
    if isinstance(value, dict) and "content" not in value:
        value = list(value.values())
    found = []
    for token in value if isinstance(value, list) else [value]:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found.append(content)
    return found


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


def model_vocabulary(document: Any) -> dict[str, int]:  # noqa: ANN401
    """Return number by token of the model of a parsed ``tokenizer.json``."""
    vocab = document["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}


def _tokenizer(document: Any, named: Sequence[str]) -> Vocabulary:  # noqa: ANN401
    added = [token["content"] for token in document.get("added_tokens") or ()]
    vocab = model_vocabulary(document)
    there = {*vocab, *added}
    numbers = library_numbers(vocab, (*added, *(token for token in named if token not in there)))
    vocabulary = {number: token for token, number in numbers.items()}
    if len(vocabulary) < len(numbers):
        twice = next(t for t, n in numbers.items() if vocabulary[n] != t)
        raise ValueError(f"{twice!r} has the number of another token")
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
    pieces = {shift + token["rank"]: token["token_bytes"] for token in document["vocab"]}
    size = document["config"].get("default_vocab_size", MAX_NUMBER)  # more may be listed
    return vocabulary | {number: piece for number, piece in pieces.items() if number < size}


_JSON_READERS: dict[str, Callable[[Any], Vocabulary]] = {
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
