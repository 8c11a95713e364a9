"""Experts whose tensors have other names, or another layout, than the base's."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.runtime.open_plan import open_plan
from tests.adapters import by_peft, largest_difference, save_adapter
from tests.layouts import MODELS, TWO_LAYOUTS, make, renamed, save
from tests.merging import run

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
}


def merging(
    base: Path, experts: list[Path], method: str = "task_arithmetic", **keys: Any
) -> MergeConfig:
    parameters = {"weight": 0.5, **METHODS.get(method, {})}
    models = [{"model": str(one), "parameters": parameters} for one in experts]
    content: dict[str, Any] = {"merge_method": method, "models": models, **keys}
    if method == "linear":
        models.insert(0, {"model": str(base), "parameters": {"weight": 1.0}})
    else:
        content["base_model"] = str(base)
    return config_from_mapping(content, "merge.yaml")


def weights(out: Path) -> str:
    """Return a digest of the weights of an output."""
    (file,) = out.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as in files and as in memory, a base and an expert of each."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        base, expert = make(name), make(name, seed=1)
        save(base, folder / name / "base")
        save(expert, folder / name / "expert")
        if name in TWO_LAYOUTS:
            save(base, folder / name / "base_memory", as_in_memory=True)
            save(expert, folder / name / "expert_memory", as_in_memory=True)
    return folder


@pytest.mark.parametrize("name", TWO_LAYOUTS)
def test_files_and_memory_merge_to_the_same_bytes(folder: Path, tmp_path: Path, name: str) -> None:
    models = folder / name
    for suffix in ("", "_memory"):
        other = "" if suffix else "_memory"
        base = models / f"base{suffix}"
        plain = merging(base, [models / f"expert{suffix}"])
        mixed = merging(base, [models / f"expert{other}"])
        run(plain, tmp_path / f"plain{suffix}")
        run(mixed, tmp_path / f"mixed{suffix}")
        assert weights(tmp_path / f"mixed{suffix}") == weights(tmp_path / f"plain{suffix}")
        assert not [n for n in open_plan(plain).notes() if "laid out" in n]
        (note,) = [n for n in open_plan(mixed).notes() if "laid out" in n]
        assert "whose layout the output has" in note
        assert "Random words are drawn by the names of the output" in note


#: What the base has, and what the expert has: beginnings of names.
PREFIXES = [
    ([], [("model.", "")]),
    ([("model.", "")], []),
    ([], [("model.", "transformer.")]),
    ([("model.", "model.language_model.")], [("model.", "language_model.model."),
                                             ("lm_head.", "language_model.lm_head.")]),
    ([("model.", "model.language_model.")], []),
    ([], [("", "module.")]),
    ([("lm_head.", "embed_out."), ("model.", "gpt_neox.")], []),
]  # fmt: skip


@pytest.mark.parametrize("pair", range(len(PREFIXES)))
@pytest.mark.parametrize("method", METHODS)
def test_other_prefixes(folder: Path, tmp_path: Path, pair: int, method: str) -> None:
    ours, theirs = PREFIXES[pair]
    base = renamed(folder / "llama" / "base", tmp_path / "base", *ours)
    plain = renamed(folder / "llama" / "expert", tmp_path / "plain", *ours)
    other = renamed(folder / "llama" / "expert", tmp_path / "other", *theirs)
    run(merging(base, [plain], method), tmp_path / "a")
    run(merging(base, [other], method), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adding(model: Path, *adapters: Path) -> MergeConfig:
    """Return a merge that adds the deltas of adapters to their model."""
    models = [{"model": str(one), "parameters": {"weight": 1.0}} for one in adapters]
    return config_from_mapping(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(model),
            "models": models,
            "parameters": {"normalize": False},
        }
    )


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
    after = load_file(next(out.glob("*.safetensors")))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in before if ".experts." in n} <= changed
