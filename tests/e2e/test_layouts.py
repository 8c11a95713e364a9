"""Experts whose tensors have other names, or another layout, than the base's."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, InputError, OutputError
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from tests.adapters import by_peft, largest_difference, save_adapter
from tests.layouts import FUSED, MODELS, SINGLE, TWO_LAYOUTS, make, renamed, rewrite, save
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
    return hashlib.sha256(weights_of(out).read_bytes()).hexdigest()


def weights_of(out: Path) -> Path:
    """Return the one file of weights of an output."""
    (file,) = out.glob("*.safetensors")
    return file


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
    after = load_file(weights_of(out))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in before if ".experts." in n} <= changed


#: A model of a class that has attention in one matrix, or in several, and the other layout.
OTHER_LAYOUT = {"llama": FUSED, "phi3": SINGLE}
MODULES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


@pytest.mark.parametrize("name", OTHER_LAYOUT)
def test_attention_in_one_matrix_or_in_three(folder: Path, tmp_path: Path, name: str) -> None:
    change = OTHER_LAYOUT[name]
    mine = [folder / name / which for which in ("base", "expert")]
    theirs = [rewrite(path, tmp_path / f"{path.name}_other", change) for path in mine]
    for i, (ours, others) in enumerate(((mine, theirs), (theirs, mine))):
        run(merging(ours[0], [ours[1]]), tmp_path / f"plain{i}")
        run(merging(ours[0], [others[1]]), tmp_path / f"mixed{i}")
        assert weights(tmp_path / f"mixed{i}") == weights(tmp_path / f"plain{i}")


@pytest.mark.parametrize("modules", [None, ["q_proj"], ["v_proj"], ["k_proj", "up_proj"]])
@pytest.mark.parametrize("name", OTHER_LAYOUT)
def test_adapters_of_attention(
    folder: Path, tmp_path: Path, name: str, modules: list[str] | None
) -> None:
    """Names of an adapter are those of the class; the file has the other layout."""
    if modules is not None and name != "llama":
        pytest.skip("its class has one matrix")
    model, change = folder / name / "base", OTHER_LAYOUT[name]
    other = rewrite(model, tmp_path / "other", change)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=modules or MODULES[name])
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


def named(path: Path, *rules: tuple[str, str]) -> dict[str, Any]:
    """Return an entry of a configuration with its names changed."""
    return {"model": str(path), "rename": [{"from": a, "to": b} for a, b in rules]}


def test_rename(folder: Path, tmp_path: Path) -> None:
    """Names that no table knows, of the base as well as of an expert."""
    llama = folder / "llama"
    odd = ("model.layers.", "net.blocks/"), ("model.", "net."), ("lm_head.", "out.")
    base = renamed(llama / "base", tmp_path / "base", *odd)
    expert = renamed(llama / "expert", tmp_path / "expert", *odd)
    rules = (r"^net\.blocks/(\d+)", r"model.layers.\1"), ("^net[.]", "model.")
    content = merging(llama / "base", [expert]).normalized()
    with pytest.raises(InputError, match="none of the 21 tensors"):
        open_plan(config_from_mapping(content))
    content["models"][0] |= named(expert, *rules, ("^out", "lm_head"))
    run(config_from_mapping(content), tmp_path / "a")
    run(merging(llama / "base", [llama / "expert"]), tmp_path / "plain")
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")
    content["base_model"] = named(base, *rules, ("^out", "lm_head"))
    config = config_from_mapping(content)
    assert config == config_from_mapping(config.normalized())
    run(config, tmp_path / "b")
    assert weights(tmp_path / "b") == weights(tmp_path / "plain")
    assert "rename:" in (tmp_path / "b" / "README.md").read_text()
    assert verify(str(tmp_path / "b"), recompute=5).recomputed
    content["models"][0] |= named(expert, *rules, ("^out[.]", "lm_head."))
    with pytest.raises(OutputError, match="rename"):  # another configuration
        run(config_from_mapping(content), tmp_path / "b")


def test_rename_of_slices(folder: Path, tmp_path: Path) -> None:
    llama = folder / "llama"
    odd = renamed(llama / "expert", tmp_path / "odd", ("model.", "net."))

    def passed_through(first: dict[str, Any], second: dict[str, Any]) -> MergeConfig:
        sources = [{"sources": [{**one, "layer_range": [0, 2]}]} for one in (first, second)]
        return config_from_mapping({"merge_method": "passthrough", "slices": sources})

    base = {"model": str(llama / "base")}
    run(passed_through(base, {"model": str(llama / "expert")}), tmp_path / "plain")
    run(passed_through(base, named(odd, ("^net", "model"))), tmp_path / "renamed")
    assert weights(tmp_path / "renamed") == weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ([{"from": "(", "to": "x"}], r"rename\[0\]` is wrong: the pattern '\(' is no regular"),
        ([{"from": "(a+)+b", "to": "x"}], "too involved"),
        ([{"from": ".*.*.*a", "to": "x"}], "at most 2 repetitions"),
        ([{"from": "a", "to": r"\1"}], "invalid group reference"),
        ([{"from": "a"}], r"rename\[0\].to` must be text"),
        ([{"from": "", "to": "a"}], "is empty"),
        ([{"from": "a", "to": "b", "name": 1}], "is no known key"),
        ({"from": "a", "to": "b"}, "must be a list of rules"),
        ([3], "must be a rule"),
    ],
)
def test_rules_that_are_wrong(rules: object, part: str) -> None:
    model = {"model": "m", "rename": rules}
    for content in (
        {"merge_method": "linear", "models": [model]},
        {"merge_method": "task_arithmetic", "base_model": model, "models": [{"model": "e"}]},
    ):
        with pytest.raises(ConfigError, match=part):
            config_from_mapping(content)


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        (("nowhere", "there"), "no name of a tensor becomes another"),
        ((r"\d+", "0"), "calls both"),
        (("^.*$", ""), "calls lm_head.weight '', no name"),
    ],
)
def test_rules_that_do_not_fit(folder: Path, rule: tuple[str, str], part: str) -> None:
    content = merging(folder / "llama" / "base", [folder / "llama" / "expert"]).normalized()
    content["models"][0] |= named(folder / "llama" / "expert", rule)
    with pytest.raises(InputError, match=part):
        open_plan(config_from_mapping(content))
