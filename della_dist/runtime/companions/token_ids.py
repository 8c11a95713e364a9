"""Numbers of tokens in ``config.json`` and ``generation_config.json``, for another's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

#: Which tokens these are is the tokenizer's affair, and its model's.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_NUMBERS = re.compile(
    r"_token_ids?$|_token_index$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$"
    r"|^(lang|task)_to_id$|^forced_decoder_ids$|^sequence_bias$"
)

Renumber = Callable[[int], int | None]
"""Returns the number that a token of the reference has in the output; None if it has none."""


def with_token_ids(
    document: Mapping[str, Any], donor: Mapping[str, Any], renumber: Renumber | None
) -> dict[str, Any]:
    """Return a document whose numbers of tokens are those of another tokenizer.

    Parameters
    ----------
    document
        Of the reference; descriptions of models inside it are treated alike.
    donor
        The document of the same name of the model that the tokenizer is of: what it says of the
        special tokens holds.
    renumber
        None where the tokens have the same numbers.

    Raises
    ------
    LookupError
        If a token is not there any more, that the model treats in its own way: its key and number.
    """
    changed: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder")):
            inner = donor.get(key)
            changed[key] = with_token_ids(value, inner if isinstance(inner, dict) else {}, renumber)
        elif key in _SPECIAL and donor.get(key) is not None:
            changed[key] = donor[key]
        elif renumber is not None and _NUMBERS.search(key):
            changed[key] = _renumbered(key, value, renumber)
        else:
            changed[key] = value
    return changed


def _renumbered(key: str, value: Any, renumber: Renumber) -> Any:  # noqa: ANN401
    if key == "sequence_bias" and value:  # tokens and numbers in several forms
        raise LookupError(f"{key} names tokens by their numbers")
    if key == "forced_decoder_ids" and isinstance(value, list):
        return [[place, _renumbered("", one, renumber)] for place, one in value]
    if isinstance(value, dict):
        return {name: _renumbered(key, inner, renumber) for name, inner in value.items()}
    if isinstance(value, list):
        numbers = [_renumbered(key, inner, renumber) for inner in value]
        return [number for number in numbers if number is not None] or None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return value
    number = renumber(value)
    if number is None and key not in _SPECIAL:
        raise LookupError(f"{key} is {value}, a token")
    return number
