"""What the small documents of a checkpoint say that decides which tensors it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from della_dist.config.modules import DECODER, ENCODER, VISION
from della_dist.specs.checkpoint import CheckpointIndex

#: Keys under which a quantisation is described.
QUANTISATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint's config.json says that decides which tensors it has, and what they are."""

    tie: bool | None = None
    """Its own ``tie_word_embeddings``; None: not given."""
    text_tie: bool | None = None
    """The one of its ``text_config``."""
    is_encoder_decoder: bool = False
    has_causal_head: bool | None = None
    """Whether it is a causal language model, by the name of its class; None: not said."""
    has_masked_head: bool = False
    """Whether it predicts masked tokens, by the name of its class."""
    quant_method: str | None = None
    """Of its ``quantization_config``, or that of its ``text_config``; None: has none."""

    @property
    def ties_head(self) -> bool | None:
        """Whether a model without a stored head has its embedding as head; None: not said.

        Some architectures take the outer key, some the inner one, and some either.
        """
        if self.tie or self.text_tie:
            return True
        return None if self.tie is None else False


def model_facts(checkpoint: CheckpointIndex) -> ModelFacts:
    """Return what the config.json of a checkpoint says; nothing where it has none."""
    config = checkpoint.documents.get("config.json", {})
    text = _nested(config, "text_config")
    return ModelFacts(
        tie=_boolean(config, "tie_word_embeddings"),
        text_tie=_boolean(text, "tie_word_embeddings"),
        is_encoder_decoder=_boolean(config, "is_encoder_decoder") or False,
        has_causal_head=_has_head(config, _CAUSAL),
        has_masked_head=bool(_has_head(config, _MASKED)),
        quant_method=_quant_method(config) or _quant_method(text),
    )


def _nested(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _boolean(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


# What the names of classes end in that have such a head.
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
_MASKED = ("ForMaskedLM", "ForPreTraining")


def _has_head(config: Mapping[str, Any], ends: tuple[str, ...]) -> bool | None:
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    return any(name.endswith(ends) for name in names) if names else None


def _quant_method(config: Mapping[str, Any]) -> str | None:
    for key in QUANTISATION_KEYS:
        if scheme := _nested(config, key):
            return str(scheme.get("quant_method") or scheme.get("format") or "of no stated method")
    return None


#: What model configurations call the number of layers.
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

#: The same where one configuration describes both, the first that is there first.
_SIDE_KEYS = {
    ENCODER: (
        *("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"),
        *("num_layers", "num_hidden_layers"),
    ),
    DECODER: ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
}
#: What is said of the layers of an encoder without its name (LED).
_OF_ENCODER = ("attention_window",)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the text model: a nested one, or all."""
    return nested(config, text_key(config))


def text_key(config: Mapping[str, Any]) -> str | None:
    """Return under which key of a config.json the text model is described; None: by all of it."""
    keys = ("text_config", "llm_config", "language_config")
    return next((key for key in keys if _nested(config, key)), None)


def nested(config: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """Return what a configuration has under a key, or all of it where that is None."""
    return config if key is None else _nested(config, key)


def stack_key(config: Mapping[str, Any], stack: str) -> str | None:
    """Return under which key of a config.json a stack of layers is described; None: by all."""
    if stack == VISION:
        return "vision_config"
    if stack in _SIDE_KEYS and _nested(config, stack):
        return stack
    return text_key(config)


def count_keys(config: Mapping[str, Any], stack: str) -> tuple[str, ...]:
    """Return what a config.json may call the number of layers of a stack."""
    if stack == VISION:
        return (*NUM_LAYERS_KEYS, "depth")
    if stack not in _SIDE_KEYS:
        return NUM_LAYERS_KEYS
    if stack_key(config, stack) == stack:
        return (f"{stack}_layers", *NUM_LAYERS_KEYS)
    return _SIDE_KEYS[stack]


def described(config: Mapping[str, Any], stack: str) -> dict[str, Any]:
    """Return what a config.json says of one stack of layers, and perhaps of more than layers.

    Where one configuration describes an encoder and a decoder, only what is of the one that is
    meant: its number of layers, which several keys may state, is the same in all of them.
    """
    key = stack_key(config, stack)
    content = dict(nested(config, key))
    if stack not in _SIDE_KEYS or key == stack:
        return content
    counts = _SIDE_KEYS[stack]
    if stack == DECODER and all(content.get(key) is None for key in counts):
        content["num_decoder_layers"] = content.get("num_layers")  # as T5 takes it
    count = next((content[key] for key in counts if _is_count(content.get(key))), None)
    stated = {key: count for key in counts if content.get(key) is not None}
    others = _OF_ENCODER if stack == ENCODER else ()
    own = {k: v for k, v in content.items() if k in others or f"_{stack}_" in f"_{k}"}
    return own | stated


def num_layers(checkpoint: CheckpointIndex, stack: str) -> int | None:
    """Return how many layers the config.json says that a stack has; None: not said."""
    config = checkpoint.documents.get("config.json", {})
    said = described(config, stack)
    return next((said[k] for k in count_keys(config, stack) if _is_count(said.get(k))), None)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
