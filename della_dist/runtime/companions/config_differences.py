"""In which keys two ``config.json`` describe different functions of equal tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from della_dist.wording import few

#: Keys that say where a model comes from, how it is trained, run or sampled, but not what it
#: computes; every other key counts, so that those of architectures unknown here do.
_IGNORED = re.compile(
    r"_.*|.*dropout.*|.*_pdrop|.*_dtype|dtype|.*_token|.*initializer.*|.*_cache|.*aux_loss.*"
    r"|transformers_version|unsloth_.*|auto_map|model_name|output_.*|return_dict.*"
    r"|use_return_dict|gradient_checkpointing|use_flash_attn.*|pretraining_tp|tie_word_embeddings"
    r"|quantization_config|compression_config|temperature|top_[kp]|do_sample|num_beams"
    r"|repetition_penalty|max_(new_)?length|finetuning_task|.*_layerdrop|layerdrop|torchscript"
)
#: Of what only one side states, only these are worth a word: every version of transformers writes
#: more keys than the last, with values that the older ones took for granted.
_DECIDING = frozenset(
    {
        *("model_type", "hidden_act", "rope_theta", "rope_scaling", "partial_rotary_factor"),
        *("num_key_value_heads", "sliding_window", "attention_bias", "num_experts_per_tok"),
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
        *("logit_scale", "attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    }
)
_SHOWN = 6


def config_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, of_vocabulary: bool = True
) -> list[str]:
    """Return what an expert's configuration says otherwise, as parts of a sentence.

    Parameters
    ----------
    ours, theirs
        The parsed ``config.json`` of the reference checkpoint and of the expert. Configurations
        nested in them are compared key by key too.
    of_vocabulary
        Whether the number of tokens counts; not where rows are moved to their tokens.
    """
    mine, other = dict(_flat(ours)), dict(_flat(theirs))
    differing = [
        f"{key} {_short(other[key])}, not {_short(mine[key])}"
        for key in other
        if key in mine and mine[key] != other[key] and (of_vocabulary or _last(key) != "vocab_size")
    ]
    one_sided = [
        f"{key} {_short(value)}, where the other says nothing"
        for key, value in other.items()
        if key not in mine and _last(key) in _DECIDING
    ]
    one_sided += [
        f"no {key}, where the other says {_short(value)}"
        for key, value in mine.items()
        if key not in other and _last(key) in _DECIDING
    ]
    found = differing + one_sided
    if not found:
        return []
    return [f"its config.json says {few(found, _SHOWN, separator='; ', longest=1000)}"]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys that count and their values; what is null is not stated."""
    for key, value in config.items():
        if _IGNORED.fullmatch(key) or not key.isprintable() or value is None:
            continue
        if key == "rope_parameters" and isinstance(value, dict):
            yield from _rope(value, prefix)
        elif isinstance(value, dict) and key.endswith("_config"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _rope(parameters: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield transformers 5's spelling of the rotary embedding as that of the versions before."""
    scaling = {
        k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")
    }
    for key in parameters.keys() - scaling.keys():
        yield prefix + key, parameters[key]
    if scaling != {"rope_type": "default"}:
        yield f"{prefix}rope_scaling", scaling


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _short(value: Any) -> str:  # noqa: ANN401
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
