"""The ``tokenizer`` block: whose tokens the output has, and where their rows come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from della_dist.config import scalars
from della_dist.config.problem import Problem, check_keys, gathering, meant_word, shown

#: Sources that are words, whatever else is called so.
WORDS = ("base", "union")

#: The largest vocabularies have some 260,000 tokens.
MAX_PADDING = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where the rows of one token come from in models that do not have it."""

    model: str | None
    """Location of a model; None: the rows are zero."""
    token: str | int | None = None
    """The token of `model` whose rows they are, or its number; None: the same token."""
    force: bool = False
    """Whether also in models that have the token."""


@dataclass(frozen=True, slots=True)
class TokenizerPolicy:
    """Whose tokens the output has; rows of embeddings and heads are moved to where they belong."""

    source: str = "base"
    """``base`` (the first model where there is none), ``union``, or the location of a model."""
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    """What the number of rows is made a multiple of."""

    def with_locations(self, where: Callable[[str], Any]) -> TokenizerPolicy:
        """Return the same policy with every model named as `where` says."""
        return replace(
            self,
            source=self.source if self.source in WORDS else where(self.source),
            tokens={
                token: one if one.model is None else replace(one, model=where(one.model))
                for token, one in self.tokens.items()
            },
        )

    def normalized(self) -> dict[str, Any]:
        """Return the block as a canonical JSON-able mapping, which `parse_tokenizer` reads."""
        block: dict[str, Any] = {"source": self.source}
        if self.tokens:
            block["tokens"] = {t: _plain(self.tokens[t]) for t in sorted(self.tokens)}
        if self.pad_to_multiple_of is not None:
            block["pad_to_multiple_of"] = self.pad_to_multiple_of
        return block


def _plain(one: TokenSource) -> dict[str, Any]:
    source: Any = {"kind": "zero"}
    if one.model is not None:
        source = one.model
        if one.token is not None:
            key = "token_id" if isinstance(one.token, int) else "token"
            source = {"kind": "model_token", "model": one.model, key: one.token}
    return {"source": source, **({"force": True} if one.force else {})}


def parse_tokenizer(raw: object) -> TokenizerPolicy | None:
    """Return the policy that a ``tokenizer`` block means; None where it says nothing.

    Raises
    ------
    Problem
        At the place inside the block.
    ValueError
        If it is no block.
    """
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(f"must be a mapping (source: ...), not {shown(raw)}")  # noqa: TRY004
    source, multiple = "union", None  # as in mergekit
    found: dict[str, TokenSource] = {}
    with gathering() as problems:
        with problems.at():
            check_keys(raw, ("source", "tokens", "pad_to_multiple_of"))
        with problems.at(".source"):
            if raw.get("source") is not None:
                source = scalars.location(raw["source"])
        with problems.at(".tokens"):
            if raw.get("tokens") is not None:
                found = _tokens(raw["tokens"])
        with problems.at(".pad_to_multiple_of"):
            if raw.get("pad_to_multiple_of") is not None:
                multiple = _whole(raw["pad_to_multiple_of"], 1, MAX_PADDING)
    return TokenizerPolicy(source, found, multiple)


def _tokens(raw: object) -> dict[str, TokenSource]:
    if not isinstance(raw, Mapping):
        raise Problem("", f"must be a mapping of tokens, not {shown(raw)}")
    found = {}
    with gathering() as problems:
        for token, one in raw.items():
            if not isinstance(token, str):
                problems.add("", f"has the token {shown(token)}; write it in quotes, as text")
            elif not token or any("\ud800" <= letter <= "\udfff" for letter in token):
                problems.add("", f"has the token {shown(token)}, which is no text")
            else:
                with problems.at(f".{token}"):
                    found[token] = _token_source(one)
    return found


def _token_source(raw: object) -> TokenSource:
    if not isinstance(raw, Mapping):
        raise Problem("", f"must be a mapping (source: ...), not {shown(raw)}")
    with gathering() as problems:
        with problems.at():
            check_keys(raw, ("source", "force"))
        with problems.at(".source"):
            if raw.get("source") is None:
                raise Problem("", "is missing: a model, `kind: zero` or `kind: model_token`")
            source = _row_source(raw["source"])
        with problems.at(".force"):
            force = scalars.switch(raw.get("force", False))
    return replace(source, force=force)


def _row_source(raw: object) -> TokenSource:
    if not isinstance(raw, Mapping) or "kind" not in raw:
        return TokenSource(scalars.location(raw))
    kind = raw["kind"]
    if kind == "zero":
        check_keys(raw, ("kind",))
        return TokenSource(None)
    if kind != "model_token":
        hint = meant_word(kind, ("zero", "model_token"))
        raise Problem(".kind", f"is {shown(kind)}; it must be zero or model_token{hint}")
    token, number = raw.get("token"), raw.get("token_id")
    with gathering() as problems:
        with problems.at():
            check_keys(raw, ("kind", "model", "token", "token_id"))
        with problems.at(".model"):
            if "model" not in raw:
                raise Problem("", "is missing: whose token is meant")
            model = scalars.location(raw["model"])
        if (token is None) == (number is None):
            problems.add("", "must have either `token` or `token_id`")
        elif number is not None:
            with problems.at(".token_id"):
                token = _whole(number, 0, (1 << 31) - 1)
        elif not isinstance(token, str):
            problems.add(".token", f"is {shown(token)}; write it in quotes, as text")
    return TokenSource(model, token)


def _whole(raw: object, least: int, most: int) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not least <= raw <= most:
        raise Problem("", f"is {shown(raw)}; it must be a whole number of {least} to {most}")
    return raw
