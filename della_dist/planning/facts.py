"""What the small documents of a checkpoint say that decides which tensors it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        has_causal_head=_has_causal_head(config),
        quant_method=_quant_method(config) or _quant_method(text),
    )


def _nested(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _boolean(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _has_causal_head(config: Mapping[str, Any]) -> bool | None:
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    ends = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
    return any(name.endswith(ends) for name in names) if names else None


def _quant_method(config: Mapping[str, Any]) -> str | None:
    for key in QUANTISATION_KEYS:
        if scheme := _nested(config, key):
            return str(scheme.get("quant_method") or scheme.get("format") or "of no stated method")
    return None


#: What model configurations call the number of layers.
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the text model: a nested one, or all."""
    key = text_key(config)
    return config if key is None else _nested(config, key)


def text_key(config: Mapping[str, Any]) -> str | None:
    """Return under which key of a config.json the text model is described; None: by all of it."""
    keys = ("text_config", "llm_config", "language_config")
    return next((key for key in keys if _nested(config, key)), None)


def num_layers(checkpoint: CheckpointIndex) -> int | None:
    """Return how many layers the config.json says that the (text) model has; None: not said."""
    text = text_config(checkpoint.documents.get("config.json", {}))
    for key in NUM_LAYERS_KEYS:
        value = text.get(key)
        if type(value) is int and value > 0:
            return value
    return None
