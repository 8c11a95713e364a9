"""The files of a tokenizer that gets tokens of others, as `tokenizers` and transformers read them.

What was an added token stays one: it is cut out of a text before anything else. Any other goes into
the vocabulary of the model; without merges that make it, BPE never will, but its row has its place.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from della_dist.errors import InputError
from della_dist.runtime.companions.vocabulary import library_numbers, model_vocabulary

Document = Mapping[str, Any]

#: Keys of special tokens that are no token of the beginning, the end and so on: of transformers
#: before 5, whose newer versions read it as well, and since.
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SWITCHES = ("single_word", "lstrip", "rstrip", "normalized", "special")


class AddedTokens:
    """Tokens that a tokenizer gets, with what other tokenizers say of them.

    Parameters
    ----------
    numbers
        Number by token of the whole vocabulary of the output.
    added
        Those of its tokens that the tokenizer has not got.
    others
        ``tokenizer.json`` and ``tokenizer_config.json`` of other tokenizers, parsed; the first that
        has a token tells. They are large, and drawn one after another.
    own
        The tokens that are added ones in the tokenizer itself. Of its other tokens, those that are
        added ones elsewhere become so. None: no token of its own changes.
    """

    def __init__(
        self,
        numbers: Mapping[str, int],
        added: Sequence[str],
        others: Iterable[tuple[Document, Document]],
        own: Container[str] | None = None,
    ) -> None:
        if halves := [token for token in added if not _is_text(token)]:
            raise ValueError(f"{halves[0]!r} is half a character")
        switches: dict[str, dict[str, bool]] = {}
        scores: dict[str, float] = {}
        wanted = set(added)
        for document, config in others:
            for token in (*(document.get("added_tokens") or ()), *_listed(config)):
                of_token = {key: bool(token.get(key, False)) for key in _SWITCHES}
                switches.setdefault(token["content"], of_token)
            for token, score in _scored(document["model"]["vocab"], wanted):
                scores.setdefault(token, score)
            del document, config  # before the next are drawn
        self._numbers = numbers
        self._scores = {t: s for t, s in scores.items() if t not in switches}
        # What no tokenizer has is cut out of a text as it is written.
        plain = dict.fromkeys(_SWITCHES, False)
        self._switches = {t: switches.get(t, plain) for t in added if t not in self._scores}
        if own is not None:
            taken = (t for t in switches if t in numbers and t not in own)
            self._switches |= {t: switches[t] for t in taken if t not in wanted}

    @property
    def changes_nothing(self) -> bool:
        """Whether the tokenizer stays as it is."""
        return not self._switches and not self._scores

    def in_tokenizer(self, document: Document, config: Document, where: str) -> bytes:
        """Return a ``tokenizer.json`` with these tokens; messages call it `where`.

        Tokens that only `config`, its ``tokenizer_config.json``, knows of come into it, too.

        Raises
        ------
        InputError
            If it cannot have a token at its number.
        """
        there = [dict(token) for token in document.get("added_tokens") or ()]
        named = {token["content"]: token for token in _listed(config)}
        vocab = model_vocabulary(document)
        known = {*vocab, *(token["content"] for token in there), *self._switches, *self._scores}
        beside = [token for token in self._numbers if token not in known]
        plain = {**dict.fromkeys(_SWITCHES, False), "special": True}
        new = [
            *(
                {"content": t, **{k: named.get(t, plain).get(k, False) for k in _SWITCHES}}
                for t in beside
            ),
            *({"content": token, **switches} for token, switches in self._switches.items()),
        ]
        added = [{**one, "id": self._numbers[one["content"]]} for one in (*there, *new)]
        added.sort(key=lambda token: int(token["id"]))
        model = dict(document["model"])
        numbers = {**vocab, **{token: self._numbers[token] for token in self._scores}}
        found = library_numbers(numbers, [token["content"] for token in added])
        if found != self._numbers:
            # Numbers of added tokens that the vocabulary lacks follow from its size: they are told.
            model["vocab"] = self._grown(model["vocab"], self._numbers, where)
        elif self._scores:
            model["vocab"] = self._grown(model["vocab"], numbers, where)
        return as_bytes({**document, "model": model, "added_tokens": added})

    def in_config(self, document: Document, special: Document) -> bytes:
        """Return a ``tokenizer_config.json`` that lists these tokens, where it lists any.

        Parameters
        ----------
        document
            What it says so far.
        special
            What ``special_tokens_map.json`` says, which is read where this one says nothing.
        """
        document = self._with_special(document, special)
        decoder = document.get("added_tokens_decoder")
        if not isinstance(decoder, dict):
            return as_bytes(document)
        new = {str(self._numbers[t]): {"content": t, **s} for t, s in self._switches.items()}
        old = {
            str(self._numbers.get(one["content"], number)): one
            for number, one in decoder.items()
            if isinstance(one, dict) and "content" in one
        }
        return as_bytes({**document, "added_tokens_decoder": {**old, **new}})

    def in_special(self, document: Document) -> bytes:
        """Return a ``special_tokens_map.json`` that lists these tokens, if it lists any."""
        lists = any(isinstance(document.get(key), list) for key in _SPECIAL_LISTS)
        return as_bytes(self._with_special(document, {}) if lists else document)

    def _with_special(self, document: Document, otherwise: Document) -> Document:
        """Return a document whose lists of special tokens have those of these tokens, too."""
        new = [token for token, switches in self._switches.items() if switches["special"]]
        if not new:
            return document
        for said in (document, otherwise):
            lists = {k: [*said[k], *new] for k in _SPECIAL_LISTS if isinstance(said.get(k), list)}
            if lists:
                return {**document, **lists}
        return {**document, _SPECIAL_LISTS[0]: new}

    def in_added_tokens(self, document: Document) -> bytes:
        """Return an ``added_tokens.json`` with these tokens."""
        old = {token: self._numbers.get(token, number) for token, number in document.items()}
        return as_bytes({**old, **{token: self._numbers[token] for token in self._switches}})

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


def _listed(config: Document) -> list[Document]:
    decoder = config.get("added_tokens_decoder")
    listed = decoder.values() if isinstance(decoder, dict) else ()
    return [token for token in listed if isinstance(token, dict) and "content" in token]


def _is_text(token: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in token)


def _scored(vocab: Any, wanted: Container[str]) -> Iterable[tuple[str, float]]:  # noqa: ANN401
    """Return those of a model's vocabulary that are wanted, in its order, and their scores."""
    if isinstance(vocab, dict):
        return [(token, 0.0) for token in vocab if token in wanted]
    return [(token, score) for token, score in vocab if token in wanted]


def as_bytes(document: Document) -> bytes:
    """Return a JSON document as it is written here."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half surrogates, which only an escape can stand for
        return (json.dumps(document, indent=2) + "\n").encode()
