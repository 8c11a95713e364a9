"""What ``config.json`` says of layers by their number, for an output that is made of slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from della_dist.planning.facts import NUM_LAYERS_KEYS

#: The layers that are of another kind, by number.
_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs"),
    "attn_layer_indices",
)
#: The first so many layers are of another kind.
_FIRST = ("first_k_dense_replace",)
#: Every so many layers one is of another kind.
_PERIODS = (
    "sliding_window_pattern",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "attn_layer_period",
    "expert_layer_period",
    "full_attention_interval",
    "global_attn_every_n_layers",
)
#: The same where the configuration says nothing, in the code of transformers 5.24.
_DEFAULT_PERIODS = {
    **{"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4, "gpt_oss": 2},
    **{"llama4_text": 4, "qwen3_next": 4, "olmo3": 4, "exaone4": 4},
}
#: Lists that have as many entries by chance.
_OF_NO_LAYER = ("token_id", "token_ids", "architectures")
#: Layers behind the last, which predict further tokens: slices have none.
_PREDICTION = ("num_nextn_predict_layers", "mtp_num_hidden_layers")

#: The configuration of the (text) model that a layer comes from, and the number it has there.
Layer = tuple[Mapping[str, Any], int]


def sliced_config(text: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """Return what a configuration of a (text) model becomes with these layers.

    Parameters
    ----------
    text
        The ``config.json`` of the output, or what is nested in it for the text.
    layers
        Of the output, in their order.
    """
    count = next((text[key] for key in NUM_LAYERS_KEYS if type(text.get(key)) is int), None)
    content = dict(text)
    for key, value in text.items():
        if key in NUM_LAYERS_KEYS and value == count:
            content[key] = len(layers)
        elif key in _PREDICTION and type(value) is int:
            content[key] = 0
        elif key in _NUMBERS and isinstance(value, list):
            content[key] = [i for i, (own, n) in enumerate(layers) if n in _list(own, key, value)]
        elif key in _FIRST and type(value) is int:
            content[key] = sum(1 for _ in _leading(key, layers))
        elif isinstance(value, list) and len(value) == count and not key.endswith(_OF_NO_LAYER):
            content[key] = [_of_layer(own, key, n, value) for own, n in layers]
        elif isinstance(value, str) and key.endswith("pattern") and len(value) == count:
            content[key] = "".join(_of_layer(own, key, n, value) for own, n in layers)
    if count is None:
        content["num_hidden_layers"] = len(layers)
    return content


def says_by_layer(text: Mapping[str, Any]) -> bool:
    """Return whether a configuration lists its layers, so that `sliced_config` can follow."""
    count = next((text[key] for key in NUM_LAYERS_KEYS if type(text.get(key)) is int), None)
    lists = (v for k, v in text.items() if not k.endswith(_OF_NO_LAYER) and isinstance(v, list))
    return any(key in text for key in (*_NUMBERS, *_FIRST, *_PERIODS)) or any(
        len(value) == count for value in lists
    )


def config_notes(text: Mapping[str, Any], layers: Sequence[Layer]) -> Iterator[str]:
    """Yield what a configuration can no longer say of its layers."""
    periods = {key: text.get(key) for key in _PERIODS}
    if text.get("layer_types") is None and not any(periods.values()):
        periods["model_type"] = _DEFAULT_PERIODS.get(str(text.get("model_type")))
    for key, period in periods.items():
        if type(period) is int and period > 1:
            moved = [i for i, (_, n) in enumerate(layers) if i % period != n % period]
            if moved:
                yield _note(key, moved)
    for key in _FIRST:
        if type(text.get(key)) is int:
            leading = sum(1 for _ in _leading(key, layers))
            first = [n < own.get(key, 0) for own, n in layers]
            moved = [i for i, is_first in enumerate(first) if is_first != (i < leading)]
            if moved:
                yield _note(key, moved)


def _note(key: str, moved: Sequence[int]) -> str:
    return (
        f"config.json: `{key}` says by the number of a layer of which kind it is, and that is no "
        f"longer so for layer {moved[0]}"
        + (f" and {len(moved) - 1} more. " if len(moved) > 1 else ". ")
        + "The model will take them for others: take slices that keep the pattern."
    )


def _leading(key: str, layers: Sequence[Layer]) -> Iterator[int]:
    for own, n in layers:
        if n >= own.get(key, 0):
            return
        yield n


def _list(own: Mapping[str, Any], key: str, default: list[Any]) -> list[Any]:
    value = own.get(key)
    return value if isinstance(value, list) else default


def _of_layer(own: Mapping[str, Any], key: str, number: int, default: Any) -> Any:  # noqa: ANN401
    """Return what a model says of one of its layers, or else the model whose files are taken."""
    value = own.get(key)
    if isinstance(value, type(default)) and number < len(value):
        return value[number]
    return default[number % len(default)]
