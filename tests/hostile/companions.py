"""Files beside the weights that are wrong: config.json, tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

from tests.hostile.situation import Situation, hostile, save_family


@hostile
def case_config_json_is_no_json(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "config.json").write_text("{'torch_dtype': 'bfloat16'}")
    return family.refused(str(family.base / "config.json"), "not a valid")


@hostile
def case_config_json_is_a_list(folder: Path) -> Situation:
    family = save_family(folder)
    (family.experts[1] / "config.json").write_text("[]")
    return family.refused(str(family.experts[1] / "config.json"), "not a JSON")


@hostile
def case_config_json_is_nested_without_end(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "config.json").write_text('{"a":' * 100_000)
    return family.refused(str(family.base / "config.json"), "not a valid")


@hostile
def case_config_json_of_a_gigabyte(folder: Path) -> Situation:
    family = save_family(folder)
    os.truncate(family.base / "config.json", 1 << 30)
    return family.refused(str(family.base / "config.json"), "too large")


@hostile
def case_tokenizer_of_a_gigabyte(folder: Path) -> Situation:
    family = save_family(folder)
    with (family.base / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    return family.refused(str(family.base / "tokenizer.json"), "1073741824")
