"""What the configuration of an adapter names, beside what its file has: said where they differ."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from della_dist.config.patterns import MAX_NAME, compiled
from della_dist.planning.views.peft_variants import CONFIG_NAME, KNOWN, PREFIX, VARIANTS
from della_dist.wording import few

#: Repetitions that a pattern of names may have, to be compared.
_MOST = 6


def config_notes(location: str, config: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Yield what an adapter's configuration says otherwise than its file.

    Keys that are not known, and set; what is named and not there; matrices that PEFT would leave
    out. All of these count here: nothing that a file has is left out in silence.

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
            f"{location}: {few(unknown)} in its {CONFIG_NAME} is nothing that is known here of "
            "PEFT, and counts for nothing. If a newer version has written it, compare the merge "
            "with its merge_and_unload."
        )
    if not any(name.startswith(PREFIX) for name in names):
        yield (
            f"{location}: its names do not begin with {PREFIX}, without which PEFT loads nothing. "
            "They count here."
        )
    plain = [name.removeprefix(PREFIX) for name in names]
    modules = sorted(
        {n.partition(".lora_")[0].removesuffix(".base_layer") for n in plain if ".lora_" in n}
    )
    if not config.get("target_parameters"):
        yield from _of_matrices(location, config, modules)
    saved = [one for one in config.get("modules_to_save") or () if not _is_saved(one, plain)]
    if saved:
        yield (
            f"{location}: it has no {few(saved)}, which its modules_to_save name. If it was cut "
            "short, get it again."
        )
    if config.get("trainable_token_indices") and not any("trainable_tokens_" in n for n in plain):
        yield (
            f"{location}: it has no rows of the tokens that its trainable_token_indices name. If "
            "it was cut short, get it again."
        )


def _of_matrices(location: str, config: Mapping[str, Any], modules: list[str]) -> Iterator[str]:
    named = config.get("target_modules")
    if not named:
        if modules:
            yield (
                f"{location}: its {CONFIG_NAME} names no target_modules, for which PEFT takes "
                "those that it knows of the model's type. All matrices count here."
            )
        return
    if isinstance(named, list):
        lacking = [one for one in named if not any(_ends_in(m, one) for m in modules)]
        if lacking:
            yield (
                f"{location}: it has no matrices of {few(lacking)}, which its target_modules name. "
                "If it was cut short, get it again."
            )
    try:
        beside = [module for module in modules if not _is_target(config, module)]
    except ValueError as error:
        yield f"{location}: what its {CONFIG_NAME} names was not compared: {error}."
        return
    if beside:
        yield (
            f"{location}: matrices of {few(beside)} count here, and would not in PEFT: its "
            "target_modules do not name them, or exclude_modules or layers_to_transform leave them "
            "out."
        )


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Return whether PEFT gives a module an adapter (its `check_target_module_exists`)."""
    if _is_named(config.get("exclude_modules"), module):
        return False
    named = config.get("target_modules")
    if not _is_named(named, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(named, str) or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (
        [re.match(r".*?\.[^.]*\.(?P<layer>\d+)\.", module)]
        if not patterns
        else [
            compiled(rf"(?:^|.*?\.){one}\.(?P<layer>\d+)\.", _MOST).match(module[:MAX_NAME])
            for one in patterns
        ]
    )
    numbers = [int(one["layer"]) for one in found if one is not None]
    return bool(numbers) and numbers[0] in ([layers] if isinstance(layers, int) else layers)


def _is_named(named: str | list[str] | None, module: str) -> bool:
    if not named or named == "all-linear":
        return bool(named)
    if isinstance(named, str):
        return compiled(named, _MOST).fullmatch(module[:MAX_NAME]) is not None
    return any(_ends_in(module, one) for one in named)


def _ends_in(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _is_saved(module: str, names: Collection[str]) -> bool:
    return any(f".{module}." in f".{name}" for name in names)
