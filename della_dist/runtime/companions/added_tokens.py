"""The files of a tokenizer that gets tokens of others, as `tokenizers` and transformers read them.

What was an added token stays one: it is cut out of a text before anything else. Any other goes into
the vocabulary of the model; without merges that make it, BPE never will, but its row has its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from della_dist.errors import InputError

Document = Mapping[str, Any]

_SWITCHES = ("single_word", "lstrip", "rstrip", "normalized", "special")


class AddedTokens:
    """Tokens that a tokenizer gets, with what other tokenizers say of them.

    Parameters
    ----------
    numbers
        Number by token, behind all that the tokenizer has.
    others
        The ``tokenizer.json`` of other tokenizers, parsed; the first that has a token tells. They
        are large, and drawn one after another.
    """

    def __init__(self, numbers: Mapping[str, int], others: Iterable[Document]) -> None:
        switches: dict[str, dict[str, bool]] = {}
        scores: dict[str, float] = {}
        for document in others:
            for token in document.get("added_tokens") or ():
                of_token = {key: bool(token.get(key, False)) for key in _SWITCHES}
                switches.setdefault(token["content"], of_token)
            for token, score in _scored(document["model"]["vocab"]):
                if token in numbers:
                    scores.setdefault(token, score)
            del document  # before the next is drawn
        self._numbers = numbers
        self._scores = {t: s for t, s in scores.items() if t not in switches}
        # What no tokenizer has is cut out of a text as it is written.
        plain = dict.fromkeys(_SWITCHES, False)
        self._switches = {t: switches.get(t, plain) for t in numbers if t not in self._scores}

    def in_tokenizer(self, document: Document, where: str) -> bytes:
        """Return a ``tokenizer.json`` with these tokens; messages call it `where`.

        Raises
        ------
        InputError
            If it cannot have a token at its number.
        """
        added = list(document.get("added_tokens") or ())
        new: list[dict[str, Any]] = [
            {"id": self._numbers[token], "content": token, **switches}
            for token, switches in self._switches.items()
        ]
        model = dict(document["model"])
        if self._scores:
            # Numbers of added tokens that the vocabulary lacks follow from its size, which grows.
            everything = {token["content"]: token["id"] for token in (*added, *new)}
            everything |= {token: self._numbers[token] for token in self._scores}
            model["vocab"] = self._grown(model["vocab"], everything, where)
        listed = sorted((*added, *new), key=lambda token: int(token["id"]))
        return as_bytes({**document, "model": model, "added_tokens": listed})

    def in_config(self, document: Document) -> bytes:
        """Return a ``tokenizer_config.json`` that lists these tokens, if it lists any."""
        decoder = document.get("added_tokens_decoder")
        if not isinstance(decoder, dict):
            return as_bytes(document)
        new = {str(self._numbers[t]): {"content": t, **s} for t, s in self._switches.items()}
        return as_bytes({**document, "added_tokens_decoder": {**decoder, **new}})

    def in_added_tokens(self, document: Document) -> bytes:
        """Return an ``added_tokens.json`` with these tokens."""
        return as_bytes({**document, **{token: self._numbers[token] for token in self._switches}})

    def _grown(self, vocab: Any, numbers: Mapping[str, int], where: str) -> Any:  # noqa: ANN401
        """Return the vocabulary of a tokenizer's model with more tokens, in the form it has."""
        if isinstance(vocab, dict):
            return {**vocab, **{t: n for t, n in numbers.items() if t not in vocab}}
        grown = [list(entry) for entry in vocab]
        there = {entry[0] for entry in grown}
        least = min((entry[1] for entry in grown), default=0.0)
        for token, number in sorted(numbers.items(), key=lambda item: item[1]):
            if token in there:
                continue
            if number != len(grown):
                raise InputError(
                    f"{where}: its tokens have numbers with a gap before {number}, so that none "
                    "can be added behind. Take `tokenizer_source: base`, or another model's."
                )
            grown.append([token, self._scores.get(token, least)])
        return grown


def _scored(vocab: Any) -> Iterable[tuple[str, float]]:  # noqa: ANN401
    if isinstance(vocab, dict):
        return ((token, 0.0) for token in vocab)
    return ((token, score) for token, score in vocab)


def as_bytes(document: Document) -> bytes:
    """Return a JSON document as it is written here."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
