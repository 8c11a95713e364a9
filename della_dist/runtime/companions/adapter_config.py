"""The ``adapter_config.json`` of an output that is an adapter: what PEFT makes modules from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from della_dist.locations import absolute
from della_dist.planning.adapter_output import AdapterOutput, common
from della_dist.planning.build import MergePlan
from della_dist.planning.facts import model_facts
from della_dist.planning.views.peft_variants import CONFIG_NAME
from della_dist.report.card import repository

ADAPTER_CONFIG_NAME = CONFIG_NAME


def adapter_config(plan: MergePlan) -> bytes:
    """Return the ``adapter_config.json`` of the output.

    ``lora_alpha`` is the rank everywhere, so that what B @ A counts is 1.
    """
    adapter, base = plan.adapter, plan.base
    assert adapter is not None
    assert base is not None
    name, revision = repository(absolute(base.location)) or (absolute(base.location), None)
    rank = common(adapter.ranks)
    others = {module: r for module, r in adapter.ranks.items() if r != rank}
    patterns = dict(sorted(_by_ending(others, adapter.ranks)))
    content = {
        "alpha_pattern": patterns,
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "bias": "lora_only" if adapter.has_biases else "none",
        "fan_in_fan_out": adapter.is_conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(adapter.saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": patterns,
        "revision": revision,
        "target_modules": _targets(adapter),
        "task_type": _task(plan),
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _targets(adapter: AdapterOutput) -> list[str]:
    """Return how PEFT finds the modules: by their last names, where these mean no others."""
    ours = set(adapter.ranks)
    others = {module for module in _with_outer(adapter.known) if module not in ours}
    taken = {module.rpartition(".")[2] for module in others}
    return sorted({last if _is_ending(last, taken) else m for m, last in _last_names(ours)})


def _by_ending(ranks: Mapping[str, int], every: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield patterns of names, and the rank of the modules that they mean."""
    of_ending: dict[str, set[int]] = {}
    for module, last in _last_names(every):
        of_ending.setdefault(last, set()).add(every[module])
    mixed = {last for last, found in of_ending.items() if len(found) > 1}
    for module, last in _last_names(ranks):
        yield last if _is_ending(last, mixed) else module, ranks[module]


def _is_ending(last: str, taken: Collection[str]) -> bool:
    return last not in taken and not last.isdigit()


def _last_names(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    return ((module, module.rpartition(".")[2]) for module in modules)


def _with_outer(modules: Collection[str]) -> set[str]:
    """Return the modules, and those that they are in."""
    found = set(modules)
    for module in modules:
        while module := module.rpartition(".")[0]:
            found.add(module)
    return found


#: What config.json says of models that hear (Whisper and others).
_OF_SOUND = ("num_mel_bins", "input_feat_per_channel")


def _task(plan: MergePlan) -> str | None:
    """Return what PEFT calls the task of the base; None where that would add modules to it."""
    config = plan.reference.documents.get("config.json", {})
    stated: Any = config.get("architectures")
    classes = [str(one) for one in stated] if isinstance(stated, list) else []
    if any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in classes):
        return "CAUSAL_LM"
    if any(key in config for key in _OF_SOUND):  # PEFT would hand the model words of text
        return None
    is_seq2seq = any(one.endswith("ForConditionalGeneration") for one in classes)
    return "SEQ_2_SEQ_LM" if is_seq2seq and model_facts(plan.reference).is_encoder_decoder else None
