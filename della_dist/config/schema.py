"""The shape of a configuration document, and one paragraph for what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from della_dist.config import scalars
from della_dist.config.base import Base, parse_base
from della_dist.config.chat_templates import CHAT_TEMPLATES, syntax_error
from della_dist.config.methods import METHODS
from della_dist.config.output import OutputForm, parse_output
from della_dist.config.parameters import PARAMETERS, parameter_keys
from della_dist.config.problem import (
    Problem,
    closest,
    gathering,
    meant_word,
    nearest,
    shown,
    together,
)
from della_dist.config.renames import Rename, parse_renames
from della_dist.config.settings import Setting, parse_setting
from della_dist.config.tokenizer import TokenizerPolicy, parse_tokenizer
from della_dist.config.yaml_hints import meant
from della_dist.mergekit_options import MERGEKIT_OPTIONS

Location = Annotated[str, PlainValidator(scalars.location)]
Dtype = Annotated[str | None, PlainValidator(scalars.parse_dtype)]
ErrorOrBase = Annotated[Literal["error", "base"], PlainValidator(scalars.one_of("error", "base"))]


def _optional(parse: Callable[[object], str]) -> Callable[[object], str | None]:
    return lambda raw: None if raw is None else parse(raw)


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"must be a word, not {shown(raw)}")  # noqa: TRY004
    return str(raw)


def _chat_template(raw: object) -> str | None:
    """Return the template that is meant; ``auto`` as it is, None where none is given."""
    if raw is None or raw == "auto":
        return None if raw is None else "auto"
    if isinstance(raw, str) and raw in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[raw]
    if isinstance(raw, str) and ("{%" in raw or "{{" in raw):
        if (wrong := syntax_error(raw)) is not None:
            raise ValueError(f"is a jinja template that cannot be read: {wrong}")
        return raw
    raise ValueError(
        f"is {shown(raw)}; it must be auto (that of the base), {', '.join(CHAT_TEMPLATES)}, or "
        f"the text of a jinja template{meant_word(raw, ('auto', *CHAT_TEMPLATES))}"
    )


#: The parameters of one block by name: those that are written down.
Block = dict[str, Setting[Any]]


def _parameters(raw: object, info: ValidationInfo, *, of_expert: bool) -> Block:
    """Return what a block of parameters says, as the method understands it."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ValueError(  # noqa: TRY004
            f"must be a mapping of keys to values, not {shown(raw)}{meant(raw)}"
        )
    meanings = info.context or PARAMETERS
    keys = parameter_keys(of_expert=of_expert, meanings=meanings)
    block: Block = {}
    with gathering() as problems:
        for key, value in raw.items():
            with problems.at(f".{key}"):
                if key not in keys:
                    shared = parameter_keys(of_expert=False, meanings=meanings)
                    raise UnknownParameter("", _unknown_parameter(key, keys, shared))
                name, parse = keys[key]
                other = meanings[name].other
                if name in block and other is not None:
                    twice = f"`{name}` and `{other.key}` (= {other.meaning})"
                    raise Problem("", f"is given twice: {twice} say the same; keep one of them")
                block[name] = parse_setting(value, parse)
    return block


class UnknownParameter(Problem):
    """A key that nothing has; said before other problems, which may follow from it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


Renamed = Annotated[tuple[Rename, ...], PlainValidator(parse_renames)]


class Model(_Strict):
    """``models[]``."""

    model: Location
    rename: Renamed = ()
    parameters: Annotated[Block, PlainValidator(partial(_parameters, of_expert=True))] = Field(
        default_factory=dict
    )


class Source(_Strict):
    """``slices[].sources[]``."""

    model: Location
    layer_range: Annotated[tuple[int, int], PlainValidator(scalars.layer_range)]
    rename: Renamed = ()
    parameters: Annotated[Block, PlainValidator(partial(_parameters, of_expert=True))] = Field(
        default_factory=dict
    )


def _not_empty(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    # After the sources: of one that is wrong, only that is said.
    if not sources:
        raise ValueError("is empty; list at least one")
    return sources


class SliceDocument(_Strict):
    """``slices[]``."""

    base_model: Annotated[str | None, PlainValidator(_optional(scalars.location))] = None
    sources: Annotated[tuple[Source, ...], AfterValidator(_not_empty)]
    parameters: Annotated[Block, PlainValidator(partial(_parameters, of_expert=False))] = Field(
        default_factory=dict
    )


class ModuleDocument(_Strict):
    """``modules.NAME``."""

    models: tuple[Model, ...] = ()
    slices: tuple[SliceDocument, ...] = ()
    parameters: Annotated[Block, PlainValidator(partial(_parameters, of_expert=False))] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _has_one_of_both(self) -> ModuleDocument:
        if bool(self.models) == bool(self.slices):
            given = "gives both" if self.models else "gives neither"
            raise ValueError(f"{given} `slices` and `models`; it takes one of them")
        return self


def _named(raw: object) -> object:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(
            f"must be a mapping of the names of modules to their `slices`, not {shown(raw)}"
        )
    for name in raw:
        if not isinstance(name, str):
            raise ValueError(f"names {shown(name)}, which is no word; write it in quotes")  # noqa: TRY004
    return dict(sorted(raw.items()))  # what a mapping means does not hang on its order


class Document(_Strict):
    """The whole configuration."""

    name: Annotated[str | None, PlainValidator(_optional(_text))] = None
    stages: tuple[Any, ...] = ()
    """Documents of their own, which are taken out before this one is looked at."""
    merge_method: Annotated[str, PlainValidator(_text)]
    base_model: Annotated[Base | None, PlainValidator(parse_base)] = None
    models: tuple[Model, ...] = ()
    slices: tuple[SliceDocument, ...] = ()
    modules: Annotated[dict[str, ModuleDocument], BeforeValidator(_named)] = Field(
        default_factory=dict
    )
    parameters: Annotated[Block, PlainValidator(partial(_parameters, of_expert=False))] = Field(
        default_factory=dict
    )
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: Annotated[str | None, PlainValidator(_optional(scalars.location))] = None
    tokenizer: Annotated[TokenizerPolicy | None, PlainValidator(parse_tokenizer)] = None
    chat_template: Annotated[str | None, PlainValidator(_chat_template)] = None
    output: Annotated[OutputForm | None, PlainValidator(parse_output)] = None
    seed: Annotated[int, PlainValidator(scalars.seed)] = 0
    granularity: Annotated[
        Literal["row", "tensor"] | None, PlainValidator(scalars.one_of("row", "tensor"))
    ] = None
    rescale: Annotated[str | None, PlainValidator(scalars.rescale)] = None
    on_nonfinite: Annotated[
        Literal["error", "zero"], PlainValidator(scalars.one_of("error", "zero"))
    ] = "error"
    node_labels: Annotated[Mapping[str, str], PlainValidator(scalars.node_labels)] = Field(
        default_factory=dict
    )
    extra_tensors: Annotated[
        Literal["error", "ignore"], PlainValidator(scalars.one_of("error", "ignore"))
    ] = "error"
    missing_tensors: ErrorOrBase = "error"
    on_different_integers: ErrorOrBase = "error"
    keep_fp32: Annotated[
        Literal["auto", "none"], PlainValidator(scalars.one_of("auto", "none"))
    ] = "auto"
    allow_different_tokenizers: Annotated[bool, PlainValidator(scalars.switch)] = False

    @property
    def base(self) -> str | None:
        """Where the base is."""
        return None if self.base_model is None else self.base_model.model


def parse_document(mapping: Mapping[str, object]) -> Document:
    """Return the document that a mapping means.

    Raises
    ------
    Problem
        All that is wrong: unknown keys before missing ones before wrong values.
    """
    # As in YAML where all entries of a list are comments.
    given = {k: v for k, v in mapping.items() if v is not None or k not in _LISTS}
    try:
        method = METHODS.get(str(given.get("merge_method")))
        meanings = None if method is None else method.parameters
        return Document.model_validate(given, context=meanings)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    found = [(one, problem) for one in errors for problem in _translate(one).each()]
    raise together([problem for _, problem in sorted(found, key=lambda pair: _order(*pair))])


def _order(error: ErrorDetails, problem: Problem) -> int:
    if isinstance(problem, UnknownParameter):
        return 0
    return {"extra_forbidden": 0, "invalid_key": 0, "missing": 1}.get(error["type"], 2)


def _translate(error: ErrorDetails) -> Problem:
    """Return what pydantic found, in our words."""
    where, kind = _path(error["loc"]), error["type"]
    advice = _LACKED.get(where.rpartition(".")[2], "")
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown_key(error["loc"])
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Problem):
        return cause.inside(where)
    if cause is not None:
        return Problem(where, str(cause))
    messages = {
        "missing": f"is missing, and no configuration works without it{advice}",
        "model_type": (
            f"must be a mapping of keys to values, not {shown(error['input'])}"
            f"{meant(error['input']) or _entry(error)}"
        ),
        "string_unicode": "has a key that is no text: half of a surrogate pair stands in it",
        "tuple_type": f"must be a list, not {shown(error['input'])}{meant(error['input'])}",
    }
    return Problem(where, messages.get(kind, f"is wrong: {error['msg']}"))


def _entry(error: ErrorDetails) -> str:
    """Return what to write where the text of an entry is meant as the location of a model."""
    where, text = error["loc"][-2:-1], error["input"]
    is_location = where in (("models",), ("sources",)) and isinstance(text, str)
    return f"; write `- model: {text}`" if is_location and text.isprintable() else ""


def _path(loc: Iterable[int | str]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _unknown_key(loc: tuple[int | str, ...]) -> Problem:
    key = str(loc[-1])
    where = f"{_path(loc[:-1])}.{key}".removeprefix(".")
    if key in _PARAMETER_KEYS:
        return Problem(where, f"is a parameter; write it as `parameters.{key}`")
    if key in TOP_KEYS:
        return Problem(where, f"does not belong here; write `{key}` at the top level")
    advice = MERGEKIT_OPTIONS.get("--" + key.replace("_", "-"))
    if advice is not None:
        advice = advice.replace("--seed", "`seed`")  # which is a key, too
        return Problem(where, f"is an option of mergekit's command line, and no key; {advice}")
    if (advice := _ELSEWHERE.get((*_kind(loc), key))) is not None:
        return Problem(where, f"does not belong here; {advice}")
    known = TOP_KEYS if len(loc) == 1 else _KEYS_BELOW.get(_kind(loc), _MODEL_KEYS)
    message = nearest(key, known)
    if len(loc) == 1 and closest(key, known) is None:
        parameter = closest(key, _PARAMETER_KEYS)
        message = f"; did you mean `parameters.{parameter}`?" if parameter else message
    return Problem(where, f"is no known key{message}")


def _kind(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the lists in which a key stands, those of a module as those at the top level."""
    lists = tuple(part for part in loc[:-1] if isinstance(part, str))
    return (lists[2:] or ("modules",)) if lists[:1] == ("modules",) else lists


def _unknown_parameter(key: object, known: Iterable[str], shared: Iterable[str]) -> str:
    """Return what is wrong with a key, of those `known` here and those `shared` by all experts."""
    if key in _PARAMETER_KEYS and key not in shared:
        name, _ = _PARAMETER_KEYS[str(key)]
        return f"belongs to another meaning of `{name}` than it has with this method; leave it out"
    if key in _PARAMETER_KEYS:
        return f"holds for all experts alike; write it as `parameters.{key}`"
    if key in TOP_KEYS:
        return f"does not belong here; write `{key}` at the top level"
    if str(key).isdigit():
        return "is no known key: a number with a decimal point is meant, not with a comma"
    return f"is no known key{nearest(key, known)}"


TOP_KEYS = list(Document.model_fields)
_MODEL_KEYS = list(Model.model_fields)
_KEYS_BELOW = {
    ("modules",): list(ModuleDocument.model_fields),
    ("slices",): list(SliceDocument.model_fields),
    ("slices", "sources"): list(Source.model_fields),
}
_PARAMETER_KEYS = parameter_keys(of_expert=False)
_LISTS = ("models", "slices", "modules")
#: Key -> how an entry that lacks it is written.
_LACKED = {
    "model": ": write the path or id of the checkpoint, `model: org/name`",
    "layer_range": ": write the first layer and the one after the last, `layer_range: [0, 16]`",
}
_SOURCES = "write `slices: [{sources: [{model: ..., layer_range: [...]}]}]`"
#: Lists and key -> what is meant, where keys of others are more like it.
_ELSEWHERE = {
    ("sources",): _SOURCES,
    ("slices", "model"): _SOURCES,
    ("slices", "layer_range"): _SOURCES,
    ("models", "layer_range"): _SOURCES,
}
