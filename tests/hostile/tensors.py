"""Checkpoints that do not fit together, as their headers show."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from tests.checkpoints import Tensor, save_checkpoint, tensor
from tests.hostile.situation import (
    EMBED,
    HEAD,
    NORM,
    STEPS,
    UP,
    Situation,
    file_bytes,
    healthy_tensors,
    hostile,
    save_family,
)


def zeros(dtype: str, *shape: int) -> Tensor:
    return tensor(np.zeros(shape), dtype)


def without(*names: str) -> dict[str, Tensor]:
    return {name: t for name, t in healthy_tensors().items() if name not in names}


@hostile
def case_shapes_differ(folder: Path) -> Situation:
    family = save_family(folder, expert1={UP: zeros("BF16", 16, 6)})
    return family.refused(str(family.experts[1]), UP, "[16, 6]", "[6, 16]", str(family.base))


@hostile
def case_vocabularies_differ(folder: Path) -> Situation:
    larger = {EMBED: zeros("BF16", 13, 8), HEAD: zeros("BF16", 13, 8)}
    family = save_family(folder, expert1=larger)
    return family.refused(str(family.experts[1]), EMBED, "13 rows", "tokenizer.json")


@hostile
def case_models_of_other_sizes(folder: Path) -> Situation:
    family = save_family(folder)
    for i, path in enumerate(family.experts):
        shutil.rmtree(path)
        other = {EMBED: zeros("BF16", 12 + i, 16), HEAD: zeros("BF16", 12, 16)}
        save_checkpoint(path, {**healthy_tensors(), **other})
    said = (f"({i}) {path} does not fit" for i, path in enumerate(family.experts, 1))
    return family.refused("2 problems", *said, "[12, 16], not [12, 8]", "of the same size")


@hostile
def case_heads_of_other_vocabularies(folder: Path) -> Situation:
    family = save_family(folder, expert1={HEAD: zeros("BF16", 13, 8)})
    return family.refused(str(family.experts[1]), HEAD, "[13, 8]", "`tokenizer_source: union`")


@hostile
def case_shapes_differ_in_trailing_ones(folder: Path) -> Situation:
    family = save_family(folder, expert1={NORM: zeros("F16", 8, 1)})
    return family.refused(str(family.experts[1]), NORM, "[8, 1]", "[8]")


@hostile
def case_expert_lacks_a_tensor(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.experts[1])
    save_checkpoint(family.experts[1], without(NORM))
    return family.refused(str(family.experts[1]), NORM, "lacks 1 tensor", str(family.base))


@hostile
def case_expert_has_a_tensor_more(folder: Path) -> Situation:
    family = save_family(folder, expert1={"model.layers.2.mlp.up_proj.weight": zeros("BF16", 1)})
    return family.refused(
        str(family.experts[1]), "model.layers.2.mlp.up_proj.weight", "extra_tensors: ignore"
    )


@hostile
def case_expert_has_other_names(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.experts[0])
    renamed = {f"unheard_of.{name}": t for name, t in healthy_tensors().items()}
    save_checkpoint(family.experts[0], renamed)
    return family.refused(
        str(family.experts[0]), "none of the 6 tensors", "unheard_of.", "`rename`"
    )


@hostile
def case_extra_tensor_with_a_poisoned_name(folder: Path) -> Situation:
    # A terminal obeys escape sequences, and a log takes each line for a message of its own.
    name = "\x1b[2Jeverything is fine\n\nmerged 6 tensors\r\u202e\u2028" + "long" * 50_000
    family = save_family(folder, expert1={name: zeros("BF16", 1)})
    return family.refused(str(family.experts[1]), "everything is fine", "extra_tensors: ignore")


@hostile
def case_many_extra_tensors(folder: Path) -> Situation:
    extra = {f"model.experts.{i}.weight": zeros("F32", 1) for i in range(500)}
    family = save_family(folder, expert1=extra)
    return family.refused(str(family.experts[1]), "500 tensors", "and 495 more")


@hostile
def case_integer_dtypes_differ(folder: Path) -> Situation:
    family = save_family(folder, expert1={STEPS: zeros("I32", 3)})
    return family.refused(str(family.experts[1]), STEPS, "I32", "I64")


@hostile
def case_integer_in_the_place_of_a_weight(folder: Path) -> Situation:
    family = save_family(folder, expert1={UP: zeros("I64", 6, 16)})
    return family.refused(str(family.experts[1]), UP, "I64", "Convert")


@hostile
def case_weight_in_the_place_of_an_integer(folder: Path) -> Situation:
    family = save_family(folder, expert1={STEPS: zeros("F32", 3)})
    return family.refused(str(family.experts[1]), STEPS, "F32", "I64")


def refused_dtype(folder: Path, dtype: str, itemsize: int) -> Situation:
    """Give all checkpoints a tensor of a dtype that cannot be merged."""
    family = save_family(folder)
    header = {"q": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8 * itemsize]}}
    for checkpoint in (family.base, *family.experts):
        file = checkpoint / "model.safetensors"
        file.write_bytes(file_bytes(header, bytes(8 * itemsize)))
    return family.refused(str(family.base), "tensor q", dtype, "Convert")


@hostile
def case_quantised_f8(folder: Path) -> Situation:
    return refused_dtype(folder, "F8_E4M3", 1)


@hostile
def case_complex_numbers(folder: Path) -> Situation:
    return refused_dtype(folder, "C64", 8)


@hostile
def case_quantised_expert_only(folder: Path) -> Situation:
    family = save_family(folder, base={UP: zeros("BF16", 4)})
    header = {UP: {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}
    (family.experts[1] / "model.safetensors").write_bytes(file_bytes(header, bytes(4)))
    return family.refused(str(family.experts[1]), UP, "F8_E5M2", "Convert")


@hostile
def case_expert_without_any_head(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.experts[1])
    save_checkpoint(family.experts[1], without(HEAD), config={"tie_word_embeddings": False})
    return family.refused(str(family.experts[1]), HEAD, "lacks 1 tensor", "not the embedding")


@hostile
def case_base_without_any_head(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.base)
    save_checkpoint(family.base, without(HEAD), config={"tie_word_embeddings": False})
    return family.refused(str(family.experts[0]), HEAD, "does not have", "extra_tensors: ignore")


@hostile
def case_gptq(folder: Path) -> Situation:
    layer = UP.removesuffix(".weight")
    family = save_family(
        folder,
        expert1={
            f"{layer}.qweight": zeros("I32", 1, 16),
            f"{layer}.qzeros": zeros("I32", 1, 2),
            f"{layer}.scales": zeros("F16", 1, 16),
            f"{layer}.g_idx": zeros("I32", 6),
        },
    )
    return family.refused(str(family.experts[1]), "GPTQ", f"{layer}.", "Convert")


@hostile
def case_gptq_everywhere(folder: Path) -> Situation:
    # Equal integers everywhere would pass for tensors to copy, and scales for tensors to merge.
    layer = UP.removesuffix(".weight")
    packed = {
        **without(UP),
        f"{layer}.qweight": zeros("I32", 1, 16),
        f"{layer}.scales": zeros("F16", 1, 16),
    }
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    family = save_family(folder, base=packed, config=config)
    return family.refused(str(family.base), "gptq", f"{layer}.qweight", "Convert")


@hostile
def case_filter_of_no_tensor(folder: Path) -> Situation:
    family = save_family(folder)
    settings = "density: [{filter: mlp.upp_proj, value: 0.9}, {value: 0.5}]"
    family.config.write_text(family.config.read_text().replace("density: 0.5", settings))
    return family.refused("'mlp.upp_proj'", "`density`", "nearest is 'mlp.up_proj'")


@hostile
def case_missing_tensors_of_another_model(folder: Path) -> Situation:
    family = save_family(folder)
    shutil.rmtree(family.experts[0])
    renamed = {f"unheard_of.{name}": t for name, t in healthy_tensors().items()}
    save_checkpoint(family.experts[0], renamed)
    family.configure("missing_tensors: base", "extra_tensors: ignore")
    return family.refused(
        str(family.experts[0]), "none of the 6 tensors", "unheard_of.", "`rename`"
    )


@hostile
def case_same_expert_twice(folder: Path) -> Situation:
    family = save_family(folder)
    family.configure(experts=[family.experts[0], family.experts[0]])
    return family.refused(str(family.experts[0]), "models[1].model", "larger weight")


@hostile
def case_same_expert_by_another_spelling(folder: Path) -> Situation:
    family = save_family(folder)
    again = f"{folder}/expert1/../expert0/./"
    family.configure(experts=[family.experts[0], again])
    return family.refused("models[1].model", "same checkpoint", "larger weight")


@hostile
def case_same_expert_by_a_relative_path(folder: Path) -> Situation:
    family = save_family(folder)
    again = os.path.relpath(family.experts[0])
    family.configure(experts=[family.experts[0], again])
    return family.refused(again, "same checkpoint", "larger weight")


@hostile
def case_same_expert_by_a_link(folder: Path) -> Situation:
    family = save_family(folder)
    link = folder / "again"
    link.symlink_to(family.experts[0])
    family.configure(experts=[family.experts[0], link])
    return family.refused(str(link), str(family.experts[0]), "same checkpoint", "larger weight")


@hostile
def case_base_as_an_expert_by_a_link(folder: Path) -> Situation:
    family = save_family(folder)
    link = folder / "again"
    link.symlink_to(family.base)
    family.configure(experts=[family.experts[0], link])
    return family.refused(str(link), str(family.base), "same checkpoint")
