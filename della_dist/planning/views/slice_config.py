"""What ``config.json`` says of layers by their number, for an output that is made of slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: The layers that are of another kind, by number.
_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs"),
    *("attn_layer_indices", "fullatt_block_indexes"),
)
#: The first so many layers are of another kind.
_FIRST = ("first_k_dense_replace",)
#: Every so many layers one is of another kind.
_PERIODS = (
    "sliding_window_pattern",
    "decoder_sparse_step",
    "encoder_sparse_step",
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
_OF_NO_LAYER = ("token_id", "token_ids", "architectures", "_size")
#: States that another model reads, by how many layers are behind them, or before their end.
_STATES = ("vision_feature_layer", "vision_feature_layers", "select_layer", "feature_layers")
#: Layers whose output it reads, by their number.
_READ = ("deepstack_visual_indexes", "intermediate_layers_indices", "out_indices")
#: How many layers of a stack are of another kind, spread over all of them.
_SPREAD = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")
#: Layers behind the last, which predict further tokens: slices have none.
_PREDICTION = ("num_nextn_predict_layers", "mtp_num_hidden_layers")

#: What the configuration of the model that a layer comes from says of its stack, and the number
#: that it has there.
Layer = tuple[Mapping[str, Any], int]


def sliced_config(
    text: Mapping[str, Any], layers: Sequence[Layer], counts: Sequence[str]
) -> dict[str, Any]:
    """Return what a configuration of a stack of layers becomes with these layers.

    Parameters
    ----------
    text
        What the ``config.json`` of the output says of the stack.
    layers
        Of the output, in their order.
    counts
        Keys that may say how many there are.
    """
    count = _count(text, counts)
    content = dict(text)
    for key, value in text.items():
        if key in counts and value == count:
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


def sliced_heads(heads: object, layers: Sequence[Layer]) -> list[list[int]]:
    """Return attention heads, each named by its layer and number, with the layers' new numbers."""
    pairs = heads if isinstance(heads, list) else []
    return [
        [i, pair[1]]
        for i, (_, n) in enumerate(layers)
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and pair[0] == n
    ]


def _count(text: Mapping[str, Any], counts: Sequence[str]) -> int | None:
    return next((text[key] for key in counts if type(text.get(key)) is int), None)


def says_by_layer(text: Mapping[str, Any], counts: Sequence[str]) -> bool:
    """Return whether a configuration lists its layers, so that `sliced_config` can follow."""
    count = _count(text, counts)
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


def what_is_lost(
    text: Mapping[str, Any], config: Mapping[str, Any], layers: Sequence[Layer]
) -> Iterator[str]:
    """Yield the keys of a configuration that would mean other layers than they do, and why.

    Parameters
    ----------
    text
        What it says of the stack.
    config
        All of it, where other parts say which outputs of layers of the stack they read.
    layers
        Of the output, in their order.
    """
    kept = next((i for i, (_, n) in enumerate(layers) if i != n), len(layers))
    for key in (*_STATES, *_READ):
        value = text.get(key, config.get(key))
        last = kept if key in _STATES else kept - 1
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and not -len(layers) - 1 <= number <= last:
                yield f"`{key}` is about layer {number}, which is no longer the same"
                break
    for key in _SPREAD:
        if type(text.get(key)) is int:
            yield f"`{key}` spreads layers of another kind over all of them"


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
