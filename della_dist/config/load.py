"""From a file, a text or a mapping to a validated configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from della_dist.config import named
from della_dist.config.evaluate import check_everywhere
from della_dist.config.methods import METHODS, Method
from della_dist.config.model import ExpertModel, MergeConfig
from della_dist.config.notes import make_notes
from della_dist.config.output import check_output
from della_dist.config.problem import Problem, gathering, nearest, shown, together
from della_dist.config.reading import read_text, read_yaml
from della_dist.config.rescale import resolved, written_rescale
from della_dist.config.schema import (
    TOP_KEYS,
    Block,
    Document,
    parse_document,
)
from della_dist.config.settings import Setting
from della_dist.config.slices import (
    lifted,
    module_documents,
    with_modules,
)
from della_dist.config.stages import with_stages
from della_dist.errors import ConfigError


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
        name, found = mapping.get("merge_method"), problem.each()
        if not isinstance(name, str) or name in METHODS:
            raise together([*found, *_further(mapping, found, source)]) from None
        raise together([_no_method(name), *found]) from None
    config = _build(document, source)
    check_everywhere(config)
    return config


#: Keys that say what is merged, and with what.
_MATTERING = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "stages")


def _further(mapping: Mapping[str, Any], found: list[Problem], source: str) -> list[Problem]:
    """Return what else is wrong, where what was found stands under keys that may be left out."""
    wrong = {re.split(r"[.\[]", problem.where)[0] for problem in found}
    if not wrong.isdisjoint(("", *_MATTERING)) or not wrong.issubset(mapping):
        return []
    try:
        _checked({key: mapping[key] for key in mapping if key not in wrong}, source)
    except Problem as problem:
        return problem.each()
    return []


def _build(document: Document, source: str) -> MergeConfig:
    with gathering() as problems:
        with problems.at():
            method = _method(document.merge_method)
        with problems.at():
            document = lifted(document)
            named.check_listed(document)
    method = method.given(document.base)
    shared = dict(document.parameters)
    with gathering() as problems:
        with problems.at():
            named.check_tokens(document)
        with problems.at():
            written = written_rescale(document)
            if written is not None:
                where = "parameters.rescale" if document.rescale is None else "rescale"
                shared["rescale"] = resolved(written, document.merge_method, where)
        with problems.at():
            modules = module_documents(document)
            base, entries = named.base_and_entries(document, modules, method)
            tokenizer = named.tokenizer(document, base, [entry.model for _, entry in entries])
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
        tokenizer=tokenizer,
        chat_template=None if document.chat_template == "auto" else document.chat_template,
        output=document.output,
        node_labels=document.node_labels,
        source=source,
    )
    config = replace(config, renames=named.renames(document, modules, config.locations()))
    config = with_modules(config, modules, shared, settle)
    check_output(config)
    listed = [part.config for part in config.slices] or [config]
    experts = tuple(expert for part in listed for expert in part.models)
    return replace(config, remarks=make_notes(document, method, experts, written))


def _method(name: str) -> Method:
    if name in METHODS:
        return METHODS[name]
    raise _no_method(name)


def _no_method(name: str) -> Problem:
    return Problem("merge_method", f"is {shown(name)}, which is not known{nearest(name, METHODS)}")


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
    for name, parameter in method.parameters.items():
        if name in method.uses and parameter.of_experts == of_experts:
            default = method.defaults.get(name, parameter.default)
            written = [block[name] for block in blocks if name in block]
            if default is not None:
                written.append(Setting.constant(default))
            if written:
                settings[name] = reduce(Setting.then, written)
    return settings
