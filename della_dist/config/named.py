"""The checkpoints that a document names: base, experts, whose tokens, whose names change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from della_dist.config.methods import Method
from della_dist.config.problem import Problem, gathering, meant_word, shown
from della_dist.config.renames import Renames, together
from della_dist.config.schema import Document, Model
from della_dist.config.slices import Modules, distinct_models
from della_dist.config.tokenizer import WORDS, TokenizerPolicy
from della_dist.locations import place


def check_tokens(document: Document) -> None:
    """Refuse several answers to where the rows of tokens go."""
    with gathering() as problems:
        if document.tokenizer_source and document.tokenizer:
            problems.add("tokenizer", "and `tokenizer_source` are both given; keep one of them")
        if document.allow_different_tokenizers and (
            document.tokenizer_source or document.tokenizer
        ):
            problems.add(
                "allow_different_tokenizers",
                "merges rows by position, and `tokenizer` by token; keep one of them",
            )


def check_listed(document: Document) -> None:
    """Refuse a document that does not say what is merged."""
    if not document.models and "models" not in document.model_fields_set and not document.slices:
        if "slices" in document.model_fields_set:
            raise Problem("slices", "lists none; give at least one")
        if not document.modules:
            raise Problem(
                "models", "is missing, and no configuration works without it (or `slices`)"
            )


def renames(document: Document, modules: Modules, locations: Sequence[str]) -> Renames:
    """Return what becomes of the names of each checkpoint, wherever that is said."""
    given = [(f"models[{i}].rename", m.model, m.rename) for i, m in enumerate(document.models)]
    if document.base_model is not None:
        given.append(("base_model.rename", document.base_model.model, document.base_model.rename))
    for name, slices in modules.items():
        where = "" if name is None else f"modules.{name}."
        given += [
            (f"{where}slices[{i}].sources[{j}].rename", source.model, source.rename)
            for i, part in enumerate(slices)
            for j, source in enumerate(part.sources)
        ]
    return together(given, locations)


def tokenizer(
    document: Document, base: str | None, models: Sequence[str]
) -> TokenizerPolicy | None:
    """Return the policy for tokens with every model called as it is among `models`."""
    policy, where = document.tokenizer, "tokenizer.source"
    if document.tokenizer_source:
        policy, where = TokenizerPolicy(document.tokenizer_source), "tokenizer_source"
    if policy is None:
        return None
    reference = models[0] if base is None else base

    def named(written: str) -> str:
        found = [model for model in (reference, *models) if place(model) == place(written)]
        if found:
            return found[0]
        plainly = written.removeprefix("model:")  # as older versions of mergekit have it
        known = [*WORDS, reference, *models]
        hint = f"; did you mean `{plainly}`?" if plainly in known else meant_word(written, known)
        raise Problem(
            "", f"is {shown(written)}; it must be {words}one of the models that are merged{hint}"
        )

    words = "base, union, or "
    source = policy.source
    tokens = dict(policy.tokens)
    with gathering() as problems:
        with problems.at(where):
            if source not in WORDS:
                source = named(source)
                if source == reference:
                    source = "base"
                elif source in WORDS:
                    raise Problem("", f"is a folder called {source}; give it from / on")
        words = ""
        for token, one in policy.tokens.items():
            with problems.at(f"tokenizer.tokens.{token}.source"):
                if one.model is not None:
                    tokens[token] = replace(one, model=named(one.model))
    return replace(policy, source=source, tokens=tokens)


Entry = tuple[str, Model]


def base_and_entries(
    document: Document, modules: Modules, method: Method
) -> tuple[str | None, list[Entry]]:
    """Return the base, and the entry of every expert with its place in the configuration.

    Where deltas to it are merged, the base itself counts for nothing among the models, as in
    mergekit: its delta is zero.
    """
    base = document.base
    with gathering() as problems:
        if method.has_base and base is None:
            problems.add(
                "base_model", f"is missing; {document.merge_method} merges deltas to a base"
            )
        if method.base_among == "first" and base is None:
            problems.add(
                "base_model",
                f"is missing; {document.merge_method} goes from it, one of both models, to the "
                "other",
            )
        with problems.at():
            entries = _entries(document, modules, method)
    if not method.has_base and base is not None and place(base) == place(entries[0][1].model):
        base = None  # whose files the output has anyway
    return base, entries


def _entries(document: Document, modules: Modules, method: Method) -> list[Entry]:
    base = document.base
    if modules:
        names = distinct_models(modules, base, without_base=method.has_base)
        entries = [("slices", Model(model=name)) for name in names]
        if base is not None and method.base_among == "first":
            entries = _with_base(entries, base, method)
    else:
        entries = [
            (f"models[{i}]", entry)
            for i, entry in enumerate(document.models)
            if not (method.has_base and base is not None and place(entry.model) == place(base))
        ]
        _check_distinct(entries)
        if base is not None and method.base_among is not None:
            entries = _with_base(entries, base, method)
        if entries and (wrong := method.wrong_number(len(entries))) is not None:
            slices = ", or layers of several as `slices`" * method.passes_through
            listed = "with the base, has" if method.base_among else "lists"
            raise Problem(
                "models", f"{listed} {len(entries)}; {document.merge_method} takes {wrong}{slices}"
            )
    if not entries:
        raise Problem(
            "slices" if modules else "models",
            "lists no expert; give at least one checkpoint to merge",
        )
    return entries


def _with_base(entries: list[Entry], base: str, method: Method) -> list[Entry]:
    """Return the entries with that of the base, which mergekit adds where none is listed."""
    listed = [entry for entry in entries if place(entry[1].model) == place(base)]
    others = [entry for entry in entries if place(entry[1].model) != place(base)]
    if method.base_among == "first":
        return [*(listed or [("base_model", Model(model=base))]), *others]
    return entries if listed else [*entries, ("base_model", Model(model=base))]


def _check_distinct(entries: list[Entry]) -> None:
    seen: dict[str, str] = {}
    with gathering() as problems:
        for path, entry in entries:
            first = seen.setdefault(place(entry.model), path)
            if first != path:
                problems.add(
                    f"{path}.model",
                    f"is {shown(entry.model)}, the same checkpoint as `{first}.model`. Name each "
                    "expert once, and give it a larger weight instead",
                )
