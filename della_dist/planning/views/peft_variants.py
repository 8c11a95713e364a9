"""Variants of LoRA whose tensors look like any others, refused by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from della_dist.config.problem import shown
from della_dist.errors import InputError

CONFIG_NAME = "adapter_config.json"
#: What PEFT puts before the names of a model.
PREFIX = "base_model.model."
#: Set where the low rank is not all there is to it: the variant's name.
VARIANTS = {
    "use_qalora": "QA-LoRA",
    "layer_replication": "layer replication",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "lora_bias": "a bias of its own",
}
#: What else a configuration of LoRA has: what is read elsewhere, and what training alone looks at.
KNOWN = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode"),
        *("base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern"),
        *("alpha_pattern", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "modules_to_save"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "trainable_token_indices", "ensure_weight_tying", "lora_dropout"),
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "runtime_config", "megatron_config", "megatron_core"),
    }
)
#: What a value may be.
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a name or pattern": lambda value: isinstance(value, str),
    "a list of names": lambda value: _is_list(value, str),
    "a whole number": lambda value: type(value) is int,
    "a list of whole numbers": lambda value: _is_list(value, int),
    "a mapping": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
}
_NAMES, _PATTERN, _TABLE = "a list of names", "a name or pattern", "a mapping"
#: Of keys that decide what is adapted.
_MAY_BE = {
    "target_modules": (_NAMES, _PATTERN),
    "exclude_modules": (_NAMES, _PATTERN),
    "target_parameters": (_NAMES,),
    "modules_to_save": (_NAMES,),
    "layers_to_transform": ("a whole number", "a list of whole numbers"),
    "layers_pattern": (_NAMES, _PATTERN),
    "rank_pattern": (_TABLE,),
    "alpha_pattern": (_TABLE,),
    "init_lora_weights": ("true or false", _PATTERN),
}
#: Beginnings that take something off the base, which is then another one.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_variants(location: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not known here, by its configuration.

    Raises
    ------
    InputError
        Naming what it is.
    """
    kind = config.get("peft_type")
    if kind is None:
        raise InputError(
            f"adapter {location} has an {CONFIG_NAME} that says no peft_type, as PEFT's own does. "
            "Give the directory that `save_pretrained` of peft has written."
        )
    if str(kind).upper() != "LORA":
        raise InputError(
            f"adapter {location} is {kind}, not LoRA, the one kind that is known here. Merge it "
            "into its model first (peft's merge_and_unload), if it can be."
        )
    for key, kinds in _MAY_BE.items():
        value = config.get(key)
        if value is not None and not any(_KINDS[kind](value) for kind in kinds):
            raise InputError(
                f"adapter {location} has {key} {shown(value)} in its {CONFIG_NAME}; it must "
                f"be {' or '.join(kinds)}, or null."
            )
    for key, name in VARIANTS.items():
        if config.get(key):
            raise InputError(
                f"adapter {location} is LoRA with {name}, which is not known here. Merge it into "
                "its model first (peft's merge_and_unload), if it can be."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"adapter {location} began as {start}, which takes a part of the base away: it is no "
            "adapter of the base itself. Save it with peft's "
            "`path_initial_model_for_weight_conversion`, which makes it one."
        )


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)
