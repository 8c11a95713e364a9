"""From a file, a text or a mapping to a validated configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from della_dist.config.evaluate import check_everywhere
from della_dist.config.methods import FOREIGN_METHODS, METHODS, Method
from della_dist.config.model import ExpertModel, MergeConfig
from della_dist.config.notes import make_notes
from della_dist.config.output import check_output
from della_dist.config.parameters import PARAMETERS
from della_dist.config.problem import Problem, Problems, nearest, shown
from della_dist.config.reading import read_text, read_yaml
from della_dist.config.renames import Renames, together
from della_dist.config.rescale import resolved, written_rescale
from della_dist.config.schema import TOP_KEYS, Block, Document, Model, parse_document
from della_dist.config.settings import Setting
from della_dist.config.slices import (
    Modules,
    distinct_models,
    lifted,
    module_documents,
    with_modules,
)
from della_dist.config.stages import with_stages
from della_dist.config.tokenizer import WORDS, TokenizerPolicy
from della_dist.errors import ConfigError
from della_dist.locations import place


def load_config(path: str | Path) -> MergeConfig:
    """Return the configuration of a YAML file.

    Raises
    ------
    ConfigError
        If the file cannot be read or anything in it is wrong.
    """
    return parse_config(read_text(Path(path)), str(path))


def parse_config(text: str, source: str = "the configuration") -> MergeConfig:
    """Return the configuration of a YAML text; messages call it `source`.

    Raises
    ------
    ConfigError
        If anything in it is wrong.
    """
    documents, left_out = read_yaml(text, source, TOP_KEYS)
    if len(documents) > 1:
        labels = [f"document {i}" for i in range(1, len(documents) + 1)]
        config = _loaded(lambda: with_stages(documents, labels, source, _checked), source)
    else:
        config = config_from_mapping(documents[0], source)
    notes = [f"{key}: read only where its anchors are named." for key in left_out]
    return replace(config, remarks=(*config.remarks, *notes)) if notes else config


def config_from_mapping(
    mapping: Mapping[str, Any], source: str = "the configuration"
) -> MergeConfig:
    """Return the configuration that a mapping means; messages call it `source`.

    Raises
    ------
    ConfigError
        If anything in it is wrong.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{source}: must be a mapping of keys to values (merge_method: ...), not "
            f"{shown(mapping)}."
        )
    stages = mapping.get("stages")
    if isinstance(stages, (list, tuple)) and stages:
        documents = [*stages, {key: mapping[key] for key in mapping if key != "stages"}]
        labels = [*(f"stages[{i}]" for i in range(len(stages))), ""]
        return _loaded(lambda: with_stages(documents, labels, source, _checked), source)
    return _loaded(lambda: _checked(mapping, source), source)


def _loaded(build: Callable[[], MergeConfig], source: str) -> MergeConfig:
    try:
        return build()
    except Problem as problem:
        raise ConfigError(f"{source}: {problem}") from None


def _checked(mapping: Mapping[str, Any], source: str) -> MergeConfig:
    try:
        document = parse_document(mapping)
    except Problem as problem:
        name = mapping.get("merge_method")
        if not isinstance(name, str) or name in METHODS:
            raise
        # Of another method, keys that are wrong here may be right.
        raise Problems([_no_method(name), *problem.each()]) from None
    config = _build(document, source)
    check_everywhere(config)
    return config


def _build(document: Document, source: str) -> MergeConfig:
    method = _method(document.merge_method)
    if document.tokenizer_source and document.tokenizer:
        raise Problem("tokenizer", "and `tokenizer_source` are both given; keep one of them")
    if document.allow_different_tokenizers and (document.tokenizer_source or document.tokenizer):
        raise Problem(
            "allow_different_tokenizers",
            "merges rows by position, and `tokenizer` by token; keep one of them",
        )
    document = lifted(document)
    if not document.models and "models" not in document.model_fields_set and not document.slices:
        if "slices" in document.model_fields_set:
            raise Problem("slices", "lists none; give at least one")
        if not document.modules:
            raise Problem(
                "models", "is missing, and no configuration works without it (or `slices`)"
            )
    written = written_rescale(document)
    shared = dict(document.parameters)
    if written is not None:
        where = "parameters.rescale" if document.rescale is None else "rescale"
        shared["rescale"] = resolved(written, document.merge_method, where)
    modules = module_documents(document)
    base, entries = _base_and_entries(document, modules, method)
    settle = partial(_settings, method)
    experts = tuple(
        ExpertModel(entry.model, {} if modules else settle(True, entry.parameters, shared))
        for _, entry in entries
    )
    config = MergeConfig(
        merge_method=document.merge_method,
        base_model=base,
        models=experts,
        settings=settle(False, shared),
        dtype=document.dtype,
        out_dtype=document.out_dtype,
        seed=document.seed,
        granularity=(document.granularity if "granularity" in method.uses else None) or "row",
        on_nonfinite=document.on_nonfinite,
        extra_tensors=document.extra_tensors,
        missing_tensors=document.missing_tensors,
        on_different_integers=document.on_different_integers,
        keep_fp32=document.keep_fp32,
        allow_different_tokenizers=document.allow_different_tokenizers,
        tokenizer=_tokenizer(document, base, [entry.model for _, entry in entries]),
        chat_template=None if document.chat_template == "auto" else document.chat_template,
        output=document.output,
        node_labels=document.node_labels,
        source=source,
    )
    config = replace(config, renames=_renames(document, modules, config.locations()))
    config = with_modules(config, modules, shared, settle)
    check_output(config)
    listed = [part.config for part in config.slices] or [config]
    experts = tuple(expert for part in listed for expert in part.models)
    return replace(config, remarks=make_notes(document, method, experts, written))


def _renames(document: Document, modules: Modules, locations: Sequence[str]) -> Renames:
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


def _method(name: str) -> Method:
    if name in METHODS:
        return METHODS[name]
    raise _no_method(name)


def _no_method(name: str) -> Problem:
    ours = ", ".join(METHODS)
    if name in FOREIGN_METHODS:
        what = f"is {shown(name)}, a method of mergekit that is not here; use {ours}"
    else:
        what = f"is {shown(name)}, which is not known{nearest(name, METHODS)}"
    return Problem("merge_method", what)


def _settings(method: Method, of_experts: bool, *blocks: Block) -> dict[str, Setting[Any]]:
    """Return the parameters that have an effect: what the first block says comes first.

    Parameters
    ----------
    of_experts
        Whether those that every expert has its own of, or those of all alike.
    blocks
        That of an expert, if so, then those that hold for more.
    """
    settings = {}
    for name, parameter in PARAMETERS.items():
        if name in method.uses and parameter.of_experts == of_experts:
            default = method.defaults.get(name, parameter.default)
            written = [block[name] for block in blocks if name in block]
            if default is not None:
                written.append(Setting.constant(default))
            if written:
                settings[name] = reduce(Setting.then, written)
    return settings


def _tokenizer(
    document: Document, base: str | None, models: Sequence[str]
) -> TokenizerPolicy | None:
    """Return the policy for tokens with every model called as it is among `models`."""
    policy, where = document.tokenizer, "tokenizer.source"
    if document.tokenizer_source:
        policy, where = TokenizerPolicy(document.tokenizer_source), "tokenizer_source"
    if policy is None:
        return None
    reference = models[0] if base is None else base

    def named(written: str, where: str) -> str:
        found = [model for model in (reference, *models) if place(model) == place(written)]
        if found:
            return found[0]
        raise Problem(
            where, f"is {shown(written)}; it must be {words}one of the models that are merged"
        )

    words = "base, union, or "
    source = policy.source
    if source not in WORDS:
        source = named(source, where)
        if source == reference:
            source = "base"
        elif source in WORDS:
            raise Problem(where, f"is a folder called {source}; give it from / on")
    words = ""
    tokens = {
        token: one
        if one.model is None
        else replace(one, model=named(one.model, f"tokenizer.tokens.{token}.source"))
        for token, one in policy.tokens.items()
    }
    return replace(policy, source=source, tokens=tokens)


Entry = tuple[str, Model]


def _base_and_entries(
    document: Document, modules: Modules, method: Method
) -> tuple[str | None, list[Entry]]:
    """Return the base, and the entry of every expert with its place in the configuration.

    Where deltas to it are merged, the base itself counts for nothing among the models, as in
    mergekit: its delta is zero.
    """
    base = document.base
    if method.has_base and base is None:
        raise Problem("base_model", f"is missing; {document.merge_method} merges deltas to a base")
    if modules:
        names = distinct_models(modules, base, without_base=method.has_base)
        entries = [("slices", Model(model=name)) for name in names]
    else:
        entries = [
            (f"models[{i}]", entry)
            for i, entry in enumerate(document.models)
            if not (method.has_base and base is not None and place(entry.model) == place(base))
        ]
        _check_distinct(entries)
        if method.num_models not in (None, len(entries)) and entries:
            raise Problem(
                "models",
                f"lists {len(entries)}; {document.merge_method} takes {method.num_models}, or "
                "layers of several as `slices`",
            )
    if not entries:
        raise Problem(
            "slices" if modules else "models",
            "lists no expert; give at least one checkpoint to merge",
        )
    if not method.has_base and base is not None and place(base) == place(entries[0][1].model):
        base = None  # whose files the output has anyway
    return base, entries


def _check_distinct(entries: list[Entry]) -> None:
    seen: dict[str, str] = {}
    for path, entry in entries:
        first = seen.setdefault(place(entry.model), path)
        if first != path:
            raise Problem(
                f"{path}.model",
                f"is {shown(entry.model)}, the same checkpoint as `{first}.model`. Name each "
                "expert once, and give it a larger weight instead",
            )
