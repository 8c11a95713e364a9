"""From a file, a text or a mapping to a validated configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from della_dist.config.methods import FOREIGN_METHODS, METHODS, Method
from della_dist.config.model import ExpertModel, MergeConfig
from della_dist.config.notes import make_notes
from della_dist.config.problem import Problem, nearest, shown
from della_dist.config.reading import read_text, read_yaml
from della_dist.config.schema import Document, ExpertParameters, Parameters, parse_document
from della_dist.config.settings import Setting
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
    return config_from_mapping(read_yaml(text, source), source)


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
    try:
        config = _build(parse_document(mapping), source)
        config.check_everywhere()
    except Problem as problem:
        raise ConfigError(f"{source}: {problem}") from None
    return config


def _build(document: Document, source: str) -> MergeConfig:
    method = _method(document.merge_method)
    shared = document.parameters or Parameters()
    if document.tokenizer_source and document.tokenizer:
        raise Problem("tokenizer", "and `tokenizer_source` are both given; keep one of them")
    base, entries = _base_and_entries(document, method)
    _check_distinct(entries)
    uses = method.uses
    experts = []
    shared_density = _density(shared, "parameters")
    shared_epsilon = _epsilon(shared, "parameters")
    for where, model, own in entries:
        density = _chain(_density(own, where), shared_density)
        epsilon = _chain(_epsilon(own, where), shared_epsilon)
        weight = _chain(own.weight, shared.weight)
        experts.append(
            ExpertModel(
                model=model,
                weight=_or_default(weight, 1.0),
                density=density if "density" in uses else None,
                epsilon=epsilon if "epsilon" in uses else None,
            )
        )
    written_rescale = _written_rescale(document, shared)
    return MergeConfig(
        merge_method=document.merge_method,
        base_model=base,
        models=tuple(experts),
        normalize=_or_default(shared.normalize, method.normalize),
        rescale=_rescale(
            written_rescale,
            document.merge_method,
            "parameters.rescale" if document.rescale is None else "rescale",
        ),
        lambda_=_or_default(shared.lambda_ if method.has_base else None, 1.0),
        dtype=document.dtype,
        out_dtype=document.out_dtype,
        seed=document.seed,
        granularity=(document.granularity if "granularity" in uses else None) or "row",
        on_nonfinite=document.on_nonfinite,
        extra_tensors=document.extra_tensors,
        missing_tensors=document.missing_tensors,
        on_different_integers=document.on_different_integers,
        keep_fp32=document.keep_fp32,
        allow_different_tokenizers=document.allow_different_tokenizers,
        node_labels=document.node_labels,
        source=source,
        remarks=make_notes(document, method, tuple(experts), written_rescale),
    )


def _method(name: str) -> Method:
    if name in METHODS:
        return METHODS[name]
    ours = ", ".join(METHODS)
    if name in FOREIGN_METHODS:
        raise Problem(
            "merge_method", f"is {shown(name)}, a method of mergekit that is not here; use {ours}"
        )
    raise Problem("merge_method", f"is {shown(name)}, which is not known{nearest(name, METHODS)}")


Entry = tuple[str, str, ExpertParameters]


def _base_and_entries(document: Document, method: Method) -> tuple[str | None, list[Entry]]:
    """Return the base, and for every expert: where its parameters are, its place, and them."""
    base = document.base_model
    if method.has_base and base is None:
        raise Problem("base_model", f"is missing; {document.merge_method} merges deltas to a base")
    entries = []
    for i, entry in enumerate(document.models):
        if method.has_base and base is not None and place(entry.model) == place(base):
            if entry.parameters is not None and entry.parameters.model_fields_set:
                raise Problem(
                    f"models[{i}].parameters",
                    f"are given for the base itself: its delta is zero, so {shown(entry.model)} "
                    "can be listed only without parameters",
                )
            continue
        parameters = entry.parameters or ExpertParameters()
        entries.append((f"models[{i}].parameters", entry.model, parameters))
    if not entries:
        raise Problem("models", "lists no expert; give at least one checkpoint to merge")
    if not method.has_base and base is not None and place(base) != place(entries[0][1]):
        raise Problem(
            "base_model",
            f"has no part in {document.merge_method}, an average of `models`. Remove it; config "
            "and tokenizer are taken from the first model",
        )
    return (base if method.has_base else None), entries


def _check_distinct(entries: list[Entry]) -> None:
    seen: dict[str, str] = {}
    for where, model, _ in entries:
        path = where.removesuffix(".parameters")
        first = seen.setdefault(place(model), path)
        if first != path:
            raise Problem(
                f"{path}.model",
                f"is {shown(model)}, the same checkpoint as `{first}.model`. Name each expert "
                "once, and give it a larger weight instead",
            )


def _density(parameters: ExpertParameters, where: str) -> Setting[float] | None:
    if parameters.density is not None and parameters.drop_rate is not None:
        raise Problem(where, "has both `density` and `drop_rate` (= 1 - density); keep one of them")
    return parameters.density or parameters.drop_rate


def _epsilon(parameters: ExpertParameters, where: str) -> Setting[float] | None:
    if parameters.epsilon is not None and parameters.window_size is not None:
        raise Problem(where, "has both `epsilon` and `window_size` (= 2 epsilon); keep one of them")
    return parameters.epsilon or parameters.window_size


def _chain(own: Setting[float] | None, shared: Setting[float] | None) -> Setting[float] | None:
    return shared if own is None else own.then(shared)


def _or_default(setting: Setting[Any] | None, default: float | bool | str) -> Setting[Any]:
    last: Setting[Any] = Setting.constant(default)
    return last if setting is None else setting.then(last)


def _written_rescale(document: Document, shared: Parameters) -> Setting[str] | None:
    if document.rescale is None:
        return shared.rescale
    if shared.rescale is not None:
        raise Problem("rescale", "is also given as `parameters.rescale`; keep one of them")
    return Setting.constant(document.rescale)


def _rescale(written: Setting[str] | None, name: str, where: str) -> Setting[str]:
    method = METHODS[name]

    def resolve(value: str) -> str:
        if value == "inverse" and method.rescale_true != "inverse":
            raise Problem(
                where,
                f"is inverse, but {name} has no keep probability to divide by; use "
                + ("l1 or none" if method.drop != "none" else "none"),
            )
        if value == "false":
            return "none"
        return method.rescale_true if value == "true" else value

    if written is None:
        return Setting.constant(method.rescale)
    resolved = written.map(resolve)
    return _or_default(resolved if method.drop != "none" else None, method.rescale)
