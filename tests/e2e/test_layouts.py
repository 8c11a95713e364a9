"""Experts whose tensors have other names, or another layout, than the base's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.runtime.open_plan import open_plan
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
