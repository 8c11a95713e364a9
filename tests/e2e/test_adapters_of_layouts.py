"""Adapters over other names and layouts than those of the class that they were trained with."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from della_dist.errors import InputError
from della_dist.runtime.open_plan import open_plan
from tests.adapters import by_peft, largest_difference, save_adapter
from tests.layouts import (
    EXPERTS,
    MODULES,
    OTHER_LAYOUT,
    SINGLE,
    adding,
    drawn,
    make_multimodal,
    merging,
    rewrite,
    save,
    save_models,
    weights,
    weights_of,
)
from tests.merging import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as in files and as in memory, a base and an expert of each."""
    return save_models(tmp_path_factory.mktemp("models"))


def whole(folder: Path, model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return what PEFT merges, as files have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
        save(merged, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("layout", ["base", "base_memory"])
def test_adapters_of_experts(folder: Path, tmp_path: Path, name: str, layout: str) -> None:
    model = folder / name / layout
    adapter = save_adapter(model, tmp_path / "adapter", target_parameters=EXPERTS, r=3)
    out = tmp_path / "out"
    run(adding(model, adapter), out)
    if layout == "base":
        expected = whole(tmp_path / "peft", model, adapter)
    else:
        expected = by_peft(model, adapter)
    assert largest_difference(out, expected) < 2e-7
    before = load_file(model / "model.safetensors")
    after = load_file(weights_of(out))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in before if ".experts." in n} <= changed


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        *MODULES.items(),
        ("llama", ["q_proj"]),
        ("llama", ["v_proj"]),
        ("llama", ["k_proj", "up_proj"]),
    ],
)
def test_adapters_of_attention(folder: Path, tmp_path: Path, name: str, modules: list[str]) -> None:
    """Names of an adapter are those of the class; the file has the other layout."""
    model, change = folder / name / "base", OTHER_LAYOUT[name]
    other = rewrite(model, tmp_path / "other", change)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=modules)
    run(adding(other, adapter), tmp_path / "out")
    expected = change(by_peft(model, adapter))
    assert largest_difference(tmp_path / "out", expected) < 2e-7
    before, after = load_file(other / "model.safetensors"), load_file(weights_of(tmp_path / "out"))
    assert any(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["base", "base_memory"])
def test_adapters_of_single_experts(folder: Path, tmp_path: Path, name: str, layout: str) -> None:
    """As transformers 4 had them: a pair of matrices for each matrix of each expert."""
    model = folder / name / layout
    tensors = load_file(folder / name / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    pairs: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for key, weight in tensors.items():
        expected[key] = weight
        if ".experts." in key:
            module = f"base_model.model.{key.removesuffix('.weight')}"
            a = torch.randn(3, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], 3, generator=generator)
            pairs |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            expected[key] = weight + 2 * b @ a
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(pairs, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    run(adding(model, adapter), tmp_path / "out")
    found = load_file(weights_of(tmp_path / "out"))
    if layout != "base":  # transformers itself puts them together
        rewrite(folder / name / "base", tmp_path / "single", lambda _: expected)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "single", dtype=torch.float32)
        expected = dict(loaded.state_dict())
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < 1e-5
    before = load_file(model / "model.safetensors")
    assert all((found[n] - before[n]).abs().max() > 1 for n in found if ".experts." in n)


def test_an_adapter_of_a_newer_class(tmp_path: Path) -> None:
    """Trained where `language_model.model` of the file was called `model.language_model`."""
    model = save(make_multimodal("llava"), tmp_path / "model")
    modules = r".*language_model.*(q_proj|up_proj)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        adapted: Any = get_peft_model(loaded, LoraConfig(r=4, target_modules=modules))
        drawn(adapted.base_model, seed=3)  # the model too: it is read again below
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        merged: Any = PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload()
        save(merged, tmp_path / "peft")
    run(adding(model, tmp_path / "adapter"), tmp_path / "out")
    expected = load_file(tmp_path / "peft" / "model.safetensors")
    assert largest_difference(tmp_path / "out", expected) < 2e-7
    notes = open_plan(adding(model, tmp_path / "adapter")).notes()
    assert any("model.language_model.* as language_model.model.*" in note for note in notes)
    before = load_file(model / "model.safetensors")
    found = load_file(weights_of(tmp_path / "out"))
    changed = {n for n in before if not torch.equal(before[n], found[n])}
    assert len(changed) == 4


def test_lengths_over_matrices_put_together(folder: Path, tmp_path: Path) -> None:
    """DoRA takes the lengths of rows that lie in several tensors."""
    models = folder / "phi3"
    adapter = save_adapter(
        models / "expert", tmp_path / "adapter", target_modules=MODULES["phi3"], use_dora=True
    )
    other = rewrite(models / "expert", tmp_path / "other", SINGLE)
    for name, expert in (("plain", models / "expert"), ("mixed", other)):
        run(merging(models / "base", [Path(f"{expert}+{adapter}")], "linear"), tmp_path / name)
    assert weights(tmp_path / "plain") == weights(tmp_path / "mixed")
    assert largest_difference(
        tmp_path / "plain",
        {n: (t + by_peft(models / "expert", adapter)[n] / 2) / 1.5
         for n, t in load_file(models / "base" / "model.safetensors").items()},
    ) < 2e-7  # fmt: skip
    with pytest.raises(InputError, match=r"DoRA of .* parts of a matrix"):
        open_plan(adding(other, adapter))


def test_an_adapter_of_a_whole_matrix_that_is_in_parts(folder: Path, tmp_path: Path) -> None:
    model = folder / "phi3" / "base"
    adapter = save_adapter(model, tmp_path / "adapter", modules_to_save=["gate_up_proj"],
                           target_modules=["o_proj"])  # fmt: skip
    other = rewrite(model, tmp_path / "other", SINGLE)
    with pytest.raises(InputError, match="takes the place of rows of several tensors"):
        open_plan(adding(other, adapter))


def test_an_adapter_of_the_class_without_a_head(folder: Path, tmp_path: Path) -> None:
    model = folder / "llama" / "base"
    plain = save_adapter(model, tmp_path / "plain", rank_pattern={"layers.0.self_attn.q_proj": 2})
    other = shutil.copytree(plain, tmp_path / "other")
    tensors = load_file(plain / "adapter_model.safetensors")
    names = {
        n.replace("base_model.model.model.", "base_model.model."): t for n, t in tensors.items()
    }
    save_file(names, other / "adapter_model.safetensors")
    run(adding(model, plain), tmp_path / "a")
    run(adding(model, other), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
