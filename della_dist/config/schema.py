"""The shape of a configuration document, and one paragraph for what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails

from della_dist.config import scalars
from della_dist.config.problem import Problem, closest, nearest, shown
from della_dist.config.settings import Setting, parse_setting


def _setting(scalar: Callable[[object], Any]) -> PlainValidator:
    return PlainValidator(partial(parse_setting, scalar=scalar))


NumberSetting = Annotated[Setting[float] | None, _setting(scalars.number)]
DensitySetting = Annotated[Setting[float] | None, _setting(scalars.density)]
DropRateSetting = Annotated[Setting[float] | None, _setting(scalars.drop_rate)]
EpsilonSetting = Annotated[Setting[float] | None, _setting(scalars.epsilon)]
WindowSetting = Annotated[Setting[float] | None, _setting(scalars.window_size)]
SwitchSetting = Annotated[Setting[bool] | None, _setting(scalars.switch)]
RescaleSetting = Annotated[Setting[str] | None, _setting(scalars.rescale)]
Location = Annotated[str, PlainValidator(scalars.location)]
Dtype = Annotated[str | None, PlainValidator(scalars.parse_dtype)]


def _optional_location(raw: object) -> str | None:
    return None if raw is None else scalars.location(raw)


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"must be a word, not {shown(raw)}")  # noqa: TRY004
    return raw


def _base_tokenizer(raw: object) -> str:
    if raw is None or raw == "base":
        return "base"
    raise ValueError(
        f"is {shown(raw)}; only `base` is supported: the output gets the tokenizer of the base"
    )


def _tokenizer(raw: object) -> str | None:
    if raw is None:
        return None
    if isinstance(raw, Mapping) and raw.get("source") == "base":
        others = [key for key in raw if key != "source" and raw[key] is not None]
        if not others:
            return "base"
        raise Problem(f".{others[0]}", "is not supported: the tokenizer of the base is kept as is")
    raise ValueError("can only be `{source: base}`: the output gets the tokenizer of the base")


def _chat_template(raw: object) -> None:
    if raw is None or raw == "auto":
        return
    raise ValueError(
        f"can only be `auto`, not {shown(raw)}: the output gets the chat template of the base"
    )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ExpertParameters(_Strict):
    """``models[].parameters``."""

    weight: NumberSetting = None
    density: DensitySetting = None
    drop_rate: DropRateSetting = None
    epsilon: EpsilonSetting = None
    window_size: WindowSetting = None
    int8_mask: SwitchSetting = None


class Parameters(ExpertParameters):
    """``parameters``."""

    normalize: SwitchSetting = None
    rescale: RescaleSetting = None
    lambda_: NumberSetting = Field(default=None, alias="lambda")


class Model(_Strict):
    """``models[]``."""

    model: Location
    parameters: ExpertParameters | None = None


class Document(_Strict):
    """The whole configuration."""

    merge_method: Annotated[str, PlainValidator(_text)]
    base_model: Annotated[str | None, PlainValidator(_optional_location)] = None
    models: tuple[Model, ...]
    parameters: Parameters | None = None
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: Annotated[str | None, PlainValidator(_base_tokenizer)] = None
    tokenizer: Annotated[str | None, PlainValidator(_tokenizer)] = None
    chat_template: Annotated[None, PlainValidator(_chat_template)] = None
    seed: Annotated[int, PlainValidator(scalars.seed)] = 0
    granularity: Annotated[Literal["row", "tensor"] | None, PlainValidator(scalars.granularity)] = (
        None
    )
    rescale: Annotated[str | None, PlainValidator(scalars.rescale)] = None
    on_nonfinite: Annotated[Literal["error", "zero"], PlainValidator(scalars.on_nonfinite)] = (
        "error"
    )
    node_labels: Annotated[Mapping[str, str], PlainValidator(scalars.node_labels)] = Field(
        default_factory=dict
    )
    extra_tensors: Annotated[Literal["error", "ignore"], PlainValidator(scalars.extra_tensors)] = (
        "error"
    )
    missing_tensors: Annotated[Literal["error", "base"], PlainValidator(scalars.error_or_base)] = (
        "error"
    )
    on_different_integers: Annotated[
        Literal["error", "base"], PlainValidator(scalars.error_or_base)
    ] = "error"
    keep_fp32: Annotated[Literal["auto", "none"], PlainValidator(scalars.keep_fp32)] = "auto"
    allow_different_tokenizers: Annotated[bool, PlainValidator(scalars.switch)] = False


def parse_document(mapping: Mapping[str, object]) -> Document:
    """Return the document that a mapping means.

    Raises
    ------
    Problem
        The first thing that is wrong: unknown keys before missing ones before wrong values.
    """
    try:
        return Document.model_validate(dict(mapping))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    order = {"extra_forbidden": 0, "invalid_key": 0, "missing": 1}
    first = min(problems, key=lambda p: order.get(p["type"], 2))
    raise _translate(first)


def _translate(error: ErrorDetails) -> Problem:
    """Return what pydantic found, in our words."""
    where, kind = _path(error["loc"]), error["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown_key(error["loc"])
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Problem):
        return cause.inside(where)
    if cause is not None:
        return Problem(where, str(cause))
    messages = {
        "missing": "is missing, and no configuration works without it",
        "model_type": f"must be a mapping of keys to values, not {shown(error['input'])}",
        "tuple_type": f"must be a list, not {shown(error['input'])}",
    }
    return Problem(where, messages.get(kind, f"is wrong: {error['msg']}"))


def _path(loc: Iterable[int | str]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _unknown_key(loc: tuple[int | str, ...]) -> Problem:
    key = str(loc[-1])
    where = f"{_path(loc[:-1])}.{key}".removeprefix(".")
    if where in ("slices", "modules"):
        return Problem(where, "is not supported; list whole checkpoints under `models`")
    in_parameters = len(loc) > 1 and loc[-2] == "parameters"
    if key in _PARAMETER_KEYS:
        why = "holds for all experts alike" if in_parameters else "is a parameter"
        return Problem(where, f"{why}; write it as `parameters.{key}`")
    if key in _TOP_KEYS:
        return Problem(where, f"does not belong here; write `{key}` at the top level")
    if in_parameters:
        known = _PARAMETER_KEYS if len(loc) == 2 else _EXPERT_KEYS
    else:
        known = _TOP_KEYS if len(loc) == 1 else _MODEL_KEYS
    message = nearest(key, known)
    if len(loc) == 1 and closest(key, known) is None:
        parameter = closest(key, _PARAMETER_KEYS)
        message = f"; did you mean `parameters.{parameter}`?" if parameter else message
    return Problem(where, f"is no known key{message}")


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


_TOP_KEYS = _keys(Document)
_MODEL_KEYS = _keys(Model)
_PARAMETER_KEYS = _keys(Parameters)
_EXPERT_KEYS = _keys(ExpertParameters)
