"""The ``tokenizer`` block: whose tokens the output has, and where their rows come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from della_dist.config import scalars
from della_dist.config.problem import Problem, nearest, shown

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
    _known_keys(raw, ("source", "tokens", "pad_to_multiple_of"))
    source, tokens, padding = (raw.get(k) for k in ("source", "tokens", "pad_to_multiple_of"))
    if not isinstance(tokens, Mapping | None):
        raise Problem(".tokens", f"must be a mapping of tokens, not {shown(tokens)}")
    return TokenizerPolicy(
        "union" if source is None else _location(source, ".source"),  # as in mergekit
        {_token(t): _token_source(one, f".tokens.{t}") for t, one in (tokens or {}).items()},
        None if padding is None else _whole(padding, ".pad_to_multiple_of", 1, MAX_PADDING),
    )


def _known_keys(raw: Mapping[Any, object], known: tuple[str, ...], where: str = "") -> None:
    for key in raw:
        if key not in known:
            raise Problem(f"{where}.{key}", f"is no known key{nearest(key, known)}")


def _location(raw: object, where: str) -> str:
    if isinstance(raw, Mapping):  # as mergekit writes a model at length
        _known_keys(raw, ("model",), where)
        inner = raw.get("model")
        if isinstance(inner, Mapping):
            _known_keys(inner, ("path",), f"{where}.model")
            inner = inner.get("path")
        raw = inner
    try:
        return scalars.location(raw)
    except ValueError as error:
        raise Problem(where, str(error)) from None


def _token(raw: object) -> str:
    if not isinstance(raw, str):
        raise Problem(".tokens", f"has the token {shown(raw)}; write it in quotes, as text")
    if not raw or any("\ud800" <= letter <= "\udfff" for letter in raw):
        raise Problem(".tokens", f"has the token {shown(raw)}, which is no text")
    return raw


def _token_source(raw: object, where: str) -> TokenSource:
    if not isinstance(raw, Mapping):
        raise Problem(where, f"must be a mapping (source: ...), not {shown(raw)}")
    _known_keys(raw, ("source", "force"), where)
    if raw.get("source") is None:
        raise Problem(f"{where}.source", "is missing: a model, `kind: zero` or `kind: model_token`")
    try:
        force = scalars.switch(raw.get("force", False))
    except ValueError as error:
        raise Problem(f"{where}.force", str(error)) from None
    return replace(_row_source(raw["source"], f"{where}.source"), force=force)


def _row_source(raw: object, where: str) -> TokenSource:
    if not isinstance(raw, Mapping) or "kind" not in raw:
        return TokenSource(_location(raw, where))
    kind = raw["kind"]
    if kind == "zero":
        _known_keys(raw, ("kind",), where)
        return TokenSource(None)
    if kind != "model_token":
        raise Problem(f"{where}.kind", f"is {shown(kind)}; it must be zero or model_token")
    _known_keys(raw, ("kind", "model", "token", "token_id"), where)
    if "model" not in raw:
        raise Problem(f"{where}.model", "is missing: whose token is meant")
    model = _location(raw["model"], f"{where}.model")
    token, number = raw.get("token"), raw.get("token_id")
    if (token is None) == (number is None):
        raise Problem(where, "must have either `token` or `token_id`")
    if number is not None:
        return TokenSource(model, _whole(number, f"{where}.token_id", 0, (1 << 31) - 1))
    if not isinstance(token, str):
        raise Problem(f"{where}.token", f"is {shown(token)}; write it in quotes, as text")
    return TokenSource(model, token)


def _whole(raw: object, where: str, least: int, most: int) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not least <= raw <= most:
        raise Problem(where, f"is {shown(raw)}; it must be a whole number of {least} to {most}")
    return raw
