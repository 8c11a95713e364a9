"""Variants of LoRA whose tensors look like any others, refused by their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from della_dist.errors import InputError
from della_dist.wording import few

CONFIG_NAME = "adapter_config.json"
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
    if str(kind).upper() != "LORA":
        raise InputError(
            f"adapter {location} is {kind}, not LoRA, the one kind that is known here. Merge it "
            "into its model first (peft's merge_and_unload), if it can be."
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


def config_notes(location: str, config: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Yield what of an adapter's configuration counts for nothing here.

    Keys that are not known, and set; where its matrices are not those that are named.

    Parameters
    ----------
    location, config
        Of the adapter.
    names
        Of its tensors.
    """
    unknown = sorted(k for k, v in config.items() if v and k not in KNOWN and k not in VARIANTS)
    if unknown:
        yield (
            f"{location}: its {CONFIG_NAME} has {few(unknown)}, which mean nothing to the versions "
            "of PEFT that are known here, and count for nothing. If a newer one has written it, "
            "compare the merge with its merge_and_unload."
        )
    named = config.get("target_modules")
    if not isinstance(named, list) or config.get("target_parameters"):
        return
    modules = sorted({name.partition(".lora_")[0] for name in names if ".lora_" in name})
    ends = [f".{one}" for one in named]
    lacking = [end[1:] for end in ends if not any(f".{m}".endswith(end) for m in modules)]
    if lacking:
        yield (
            f"{location}: it has no matrices of {few(lacking)}, which its target_modules name. "
            "If it was cut short, get it again."
        )
    beside = [module for module in modules if not f".{module}".endswith(tuple(ends))]
    if beside:
        yield (
            f"{location}: matrices of {few(beside)} count here, and would not in PEFT: its "
            "target_modules do not name them."
        )
