"""What the merge changes in the model's ``config.json``, so that the output loads as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from della_dist.config.modules import DECODER, ENCODER
from della_dist.errors import InputError
from della_dist.planning.build import MergePlan
from della_dist.planning.facts import (
    QUANTISATION_KEYS,
    count_keys,
    described,
    model_facts,
    stack_key,
    text_key,
)
from della_dist.planning.ties import ends_in
from della_dist.planning.views.slice_config import sliced_config
from della_dist.runtime.companions.token_ids import with_token_ids

#: Heads that are all that ``tie_word_embeddings`` is about.
_CAUSAL_HEADS = ("lm_head.weight", "embed_out.weight")

_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


#: What states the number of tokens; and the two models of an encoder and a decoder.
_SIZES = ("vocab_size", "decoder_vocab_size")
_SIDES = ("encoder", "decoder")


def output_config(plan: MergePlan, data: bytes) -> bytes:
    """Return the ``config.json`` of the output, made from that of the reference checkpoint.

    It states the layers where they are slices, the output's dtype where the merge sets one, that a
    head is no longer tied, and no quantisation that the tensors do not have; what needs no change
    keeps its bytes.
    """
    dtype = plan.config.output_dtype
    has_own_head = any(ends_in(head, _CAUSAL_HEADS) for head in plan.ties.untied)
    # With an encoder, the key is also about its embedding, and (in T5) about a scale of the output;
    # the head loads as its own all the same, because both are stored and differ.
    unties = has_own_head and not model_facts(plan.reference).is_encoder_decoder
    is_leftover = model_facts(plan.reference).quant_method is not None
    is_own_tokenizer = plan.tokenizer is plan.reference and plan.alignment is None
    is_as_it_is = dtype is None and not unties and not is_leftover and not plan.config.slices
    if is_as_it_is and is_own_tokenizer:
        return data
    config = json.loads(data)
    if plan.tokenizer is not plan.reference:
        donor = plan.tokenizer.documents.get("config.json", {})
        config = renumbered(plan, config, donor, "config.json")
    if plan.alignment is not None:
        _set_vocab_size(config, plan.alignment.stored_rows[0], plan.alignment.num_rows)
    if is_as_it_is and config == json.loads(data):
        return data
    if plan.config.slices:
        config = _of_slices(plan, config)
    if dtype is not None:
        name = _TORCH_NAMES[dtype]
        _set_dtype(config, name)
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = name
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    if unties:
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    for key in QUANTISATION_KEYS if is_leftover else ():
        config.pop(key, None)
        text.pop(key, None)
    return (json.dumps(config, indent=2) + "\n").encode()


def _of_slices(plan: MergePlan, config: dict[str, Any]) -> dict[str, Any]:
    for stack, layers in plan.layers().items():
        if stack == ENCODER:  # the decoder may have as many layers because that has them
            config = _with(config, DECODER, described(config, DECODER))
        changed = sliced_config(described(config, stack), layers, count_keys(config, stack))
        config = _with(config, stack, changed)
    return config


def _with(config: Mapping[str, Any], stack: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other words about a stack of layers."""
    key = stack_key(config, stack)
    return {**config, **said} if key is None else {**config, key: {**config[key], **said}}


def renumbered(
    plan: MergePlan, document: Mapping[str, Any], donor: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Return a document with the numbers that tokens have in the tokenizer of another model.

    Parameters
    ----------
    document, donor
        The document `name` of the reference, and of the model that the tokenizer is of.
    """
    renumber = None if plan.alignment is None else plan.alignment.number_of
    try:
        return with_token_ids(document, donor, renumber)
    except LookupError as error:
        raise InputError(
            f"{name} of {plan.reference.location}: {error.args[0]}, which the tokenizer of "
            f"{plan.tokenizer.location} may lack, or number otherwise. Take "
            "`tokenizer_source: union`."
        ) from None


def _set_vocab_size(config: dict[str, Any], before: int, rows: int) -> None:
    """Set the number of tokens of the text model, and wherever else the same number is stated."""
    key = text_key(config)
    text: dict[str, Any] = config if key is None else config[key]
    sides = [config[k] for k in _SIDES if isinstance(config.get(k), dict)]
    same = {before, text.get("vocab_size")}
    is_stated = False
    for part in (config, text, *sides):
        for size in _SIZES:  # a decoder may have a vocabulary of its own
            if size in part and (part[size] in same or (part is text and size == "vocab_size")):
                part[size] = rows
                is_stated = True
    if not is_stated:  # the class of the configuration has it as its default
        text["vocab_size"] = rows


def _set_dtype(node: dict[str, Any], dtype: str) -> None:
    """Set the dtype wherever the configuration, or one nested in it, states one."""
    for key, value in node.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            node[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            _set_dtype(value, dtype)
