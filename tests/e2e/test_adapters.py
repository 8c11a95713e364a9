"""LoRA adapters as experts: the deltas of every variant of PEFT, and what is merged of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist import check
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import InputError, OutputError
from della_dist.ops.tensor import merge_tensor
from della_dist.planning.views.peft_variants import KNOWN
from della_dist.planning.views.peft_variants import VARIANTS as VARIANTS_REFUSED
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from della_dist.specs.sources import Merged
from della_dist.storage.manifest import MANIFEST_NAME
from tests.adapters import by_peft, largest_difference, save_adapter, save_llama, save_model
from tests.checkpoints import load_tensors
from tests.merging import run
from tests.vocabularies import make_models

README = (Path(__file__).parents[2] / "README.md").read_text()

#: Of float32: PEFT adds up in another order.
ROUNDING = 2e-7


def merging(
    models: list[object], base: object | None = None, method: str = "task_arithmetic", **keys: Any
) -> MergeConfig:
    """Return a merge of models, each with weight 1."""
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    shared = {} if method in ("linear", "passthrough") else {"normalize": False}
    content = {"merge_method": method, "models": listed, "parameters": shared, **keys}
    if base is not None:
        content["base_model"] = str(base)
    return config_from_mapping(content, "merge.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several kinds, and two adapters of one."""
    from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM

    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "base")
    save_llama(folder / "tied", tie_word_embeddings=True)
    save_llama(folder / "bf16", "bfloat16")
    shape = {"num_hidden_layers": 2, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = GPT2Config(n_embd=32, n_head=4, n_positions=32, **shape)
    save_model(folder / "gpt2", GPT2LMHeadModel(gpt2))
    experts = GptOssConfig(
        **shape, hidden_size=32, intermediate_size=32, num_local_experts=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    save_model(folder / "experts", GptOssForCausalLM(experts))
    save_adapter(folder / "base", folder / "a", r=4, lora_alpha=8)
    save_adapter(folder / "base", folder / "b", seed=2, r=2, lora_alpha=3, use_rslora=True)
    return folder


CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("base", {}),
    "rslora": ("base", {"use_rslora": True, "lora_alpha": 16}),
    "patterns": (
        "base",
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 8, "v_proj": 2},
            "alpha_pattern": {r"layers\.1\..*q_proj": 3},
        },
    ),
    "all_linear": ("base", {"target_modules": "all-linear"}),
    "embedding": ("base", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("base", {"target_modules": ["q_proj", "lm_head"]}),
    "modules_to_save": ("base", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved_twice": (
        "base",
        {"modules_to_save": ["lm_head", "embed_tokens"], "save_embedding_layers": True},
    ),
    "norms_to_save": ("base", {"modules_to_save": ["norm", "input_layernorm"]}),
    "dora": ("base", {"use_dora": True, "target_modules": "all-linear"}),
    "layers": ("base", {"layers_to_transform": [1]}),
    "tokens": ("base", {"trainable_token_indices": [3, 1, 90]}),
    "init": ("base", {"init_lora_weights": "gaussian"}),
    "tied_embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied_head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied_both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied_embedding_to_save": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied_head_to_save": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied_both_to_save": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_tokens": ("tied", {"trainable_token_indices": [3, 1, 90]}),
    "fan_in_fan_out": ("gpt2", CONV1D),
    "biases": ("gpt2", {**CONV1D, "bias": "all"}),
    "own_biases": ("gpt2", {**CONV1D, "bias": "lora_only"}),
    "experts": ("experts", {"target_parameters": EXPERTS}),
    "some_experts": ("experts", {"target_parameters": EXPERTS[1:], "rank_pattern": {"q_proj": 8}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_1_is_what_peft_merges(folder: Path, tmp_path: Path, variant: str) -> None:
    from transformers import AutoModelForCausalLM

    name, config = VARIANTS[variant]
    model = folder / name
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    out = tmp_path / "out"
    run(merging([f"{model}+{adapter}"], model), out)
    expected = by_peft(model, adapter)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32").state_dict()
    assert largest_difference(out, expected) < ROUNDING
    assert max(float((base[n] - expected[n]).abs().max()) for n in base) > 0.01
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = loaded.state_dict()
    assert max(float((state[n] - expected[n]).abs().max()) for n in expected) < ROUNDING
    assert verify(str(out), recompute=5).recomputed
    # An older PEFT wrote what torch.save does.
    run(merging([f"{model}+{as_bin(adapter, tmp_path / 'bin')}"], model), tmp_path / "old")
    assert weights(tmp_path / "old") == weights(out)
    # Without a base, and alone.
    for how in ("linear", "passthrough"):
        run(merging([f"{model}+{adapter}"], method=how), tmp_path / how)
        assert largest_difference(tmp_path / how, expected) < ROUNDING


def as_bin(adapter: Path, folder: Path) -> Path:
    """Copy an adapter, as PEFT wrote it before safetensors."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def test_an_adapter_alone_is_one_of_the_base(folder: Path, tmp_path: Path) -> None:
    run(merging([folder / "a"], folder / "base"), tmp_path / "alone")
    run(merging([f"{folder}/base+{folder}/a"], folder / "base"), tmp_path / "named")
    assert weights(tmp_path / "alone") == weights(tmp_path / "named")
    with pytest.raises(InputError, match=r"it is not said of which model") as error:
        open_plan(merging([folder / "a"], method="linear"))
    assert "base_model" not in str(error.value)


def test_deltas_of_several_adapters_add(folder: Path, tmp_path: Path) -> None:
    both = f"{folder}/base+{folder}/a+{folder}/b"
    run(merging([both], folder / "base"), tmp_path / "out")
    expected = by_peft(folder / "base", folder / "a", folder / "b")
    assert largest_difference(tmp_path / "out", expected) < ROUNDING
    # As experts of their own with weight 1, they add as well.
    run(merging([folder / "a", folder / "b"], folder / "base"), tmp_path / "experts")
    assert largest_difference(tmp_path / "experts", expected) < ROUNDING


def test_of_another_model_than_the_base(folder: Path, tmp_path: Path) -> None:
    """Its delta is that of the model, and the adapter's."""
    other = shifted(folder / "base", tmp_path / "other", 0.25)
    run(merging([f"{other}+{folder}/a"], folder / "base"), tmp_path / "out")
    assert largest_difference(tmp_path / "out", by_peft(other, folder / "a")) < ROUNDING


def test_a_base_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    base = f"{folder}/base+{folder}/a"
    run(merging([f"{base}+{folder}/b"], base), tmp_path / "out")
    expected = by_peft(folder / "base", folder / "a", folder / "b")
    assert largest_difference(tmp_path / "out", expected) < ROUNDING
    # An adapter alone is one of what the base is.
    run(merging([folder / "b"], base), tmp_path / "alone")
    assert largest_difference(tmp_path / "alone", expected) < ROUNDING


def test_beside_whole_models(folder: Path, tmp_path: Path) -> None:
    whole = shifted(folder / "base", tmp_path / "whole", 0.25)
    run(merging([whole, folder / "a"], folder / "base"), tmp_path / "out")
    expected = {n: t + 0.25 for n, t in by_peft(folder / "base", folder / "a").items()}
    assert largest_difference(tmp_path / "out", expected) < 2 * ROUNDING


def test_layers_of_a_model_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    """The delta is to the base's layer, wherever the adapter's layer was."""
    content = {
        "merge_method": "task_arithmetic",
        "base_model": f"{folder}/base",
        "slices": [
            {
                "sources": [
                    {"model": f"{folder}/base", "layer_range": [0, 1]},
                    {"model": f"{folder}/base+{folder}/a", "layer_range": layers},
                ]
            }
            for layers in ([0, 1], [1, 2])
        ],
        "parameters": {"weight": 1.0},
    }
    run(config_from_mapping(content, "merge.yaml"), tmp_path / "out")
    expected = by_peft(folder / "base", folder / "a")
    assert largest_difference(tmp_path / "out", expected) < ROUNDING


def test_deltas_are_never_rounded_to_the_models_dtype(folder: Path, tmp_path: Path) -> None:
    """Through BF16 most deltas as small as these would vanish."""
    import torch
    from safetensors.torch import load_file

    model = folder / "bf16"
    adapter = save_adapter(model, tmp_path / "adapter", std=0.003)
    run(merging([adapter], model, dtype="float32"), tmp_path / "out")
    expected = by_peft(model, adapter)
    assert largest_difference(tmp_path / "out", expected) < ROUNDING / 50
    run(merging([adapter], model), tmp_path / "rounded")
    for name, value in load_file(tmp_path / "rounded" / "model.safetensors").items():
        assert torch.equal(value, expected[name].bfloat16()), name


@pytest.mark.parametrize("method", ["della", "dare_ties", "ties", "task_arithmetic"])
def test_methods_merge_the_float32_delta(folder: Path, tmp_path: Path, method: str) -> None:
    """As the reference does, of deltas that are formed here by their definition."""
    keys = {} if method == "task_arithmetic" else {"density": 0.5}
    content = {
        "merge_method": method,
        "base_model": f"{folder}/bf16",
        "models": [
            {"model": f"{folder}/bf16+{folder}/{name}", "parameters": {"weight": weight}}
            for name, weight in (("a", 1.0), ("b", 0.5))
        ],
        "parameters": keys,
        "seed": 5,
    }
    config = config_from_mapping(content, "merge.yaml")
    run(config, tmp_path / "out")
    merged, base = weights(tmp_path / "out"), weights(folder / "bf16")
    plan = open_plan(config)
    formed = [deltas(folder / name) for name in "ab"]
    names = set()
    for shard in plan.shards:
        for tensor in shard.tensors:
            source = plan.source(tensor)
            if not isinstance(source, Merged):
                assert merged[tensor.name] == base[tensor.name]
                continue
            names.add(tensor.name)
            experts = [of[tensor.name].view(np.uint8) for of in formed]
            raw = np.frombuffer(base[tensor.name], np.uint8)
            expected, _ = merge_tensor(source.recipe, raw, experts, backend="reference")
            assert expected.tobytes() == merged[tensor.name], tensor.name
    assert names == set(formed[0])


def deltas(adapter: Path) -> dict[str, Any]:
    """Return the delta of every tensor, products added up in order in float32."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, b in tensors.items():
        if ".lora_B." not in name:
            continue
        left, right = b.numpy(), tensors[name.replace("lora_B", "lora_A")].numpy()
        rank = len(right)
        total = np.zeros((len(left), right.shape[1]), np.float32)
        for k in range(rank):
            total += left[:, k : k + 1] * right[k]
        scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        module = name.removeprefix("base_model.model.").partition(".lora_B")[0]
        found[f"{module}.weight"] = (total * np.float32(scaling)).reshape(-1)
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.raw.tobytes() for name, tensor in load_tensors(folder).items()}


def shifted(model: Path, folder: Path, by: float) -> Path:
    """Copy a model, every number of which is larger by a constant."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    save_file({n: t + by for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_what_no_adapter_changes_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    summary = run(merging([folder / "a", folder / "b"], folder / "base"), tmp_path / "out")
    records = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())
    assert [one["role"] for one in records["inputs"]] == ["base", *["expert"] * 4]
    merged, base = weights(tmp_path / "out"), weights(folder / "base")
    same = {name for name in base if merged[name] == base[name]}
    assert same == {n for n in base if not n.endswith(("q_proj.weight", "v_proj.weight"))}
    adapters = sum((folder / n / "adapter_model.safetensors").stat().st_size for n in "ab")
    assert summary.bytes_read < (folder / "base" / "model.safetensors").stat().st_size + adapters
    assert any(
        "LoRA on" in note for note in open_plan(merging([folder / "a"], folder / "base")).notes()
    )


SAME = [
    {"threads": 1, "workers": 1},
    {"threads": 2, "workers": 2, "shard_bytes": 5000},
    {"memory_bytes": 32 << 20},
    {"memory_bytes": 1 << 30},
]


@pytest.mark.parametrize("options", SAME, ids=str)
@pytest.mark.parametrize("method", ["della", "ties"])
def test_same_bytes(folder: Path, tmp_path: Path, options: Mapping[str, Any], method: str) -> None:
    adapter = save_adapter(folder / "base", tmp_path / "dora", use_dora=True)
    models: list[object] = [folder / "a", f"{folder}/base+{folder}/b+{adapter}"]
    config = merging(models, folder / "base", method, seed=3)
    assert (
        run(config, tmp_path / "out", **options).model_digest
        == run(config, tmp_path / "once").model_digest
    )


def edited(adapter: Path, folder: Path, **changes: Any) -> Path:
    """Copy an adapter with another configuration."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("changes", [{"lora_alpha": 80}, {"use_rslora": True}])
def test_another_scaling_is_another_merge(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The tensors of the adapter are the same files."""
    adapter = edited(folder / "a", tmp_path / "adapter")
    run(merging([adapter], folder / "base"), tmp_path / "out")
    edited(folder / "a", tmp_path / "changed", **changes)
    shutil.copy(tmp_path / "changed" / "adapter_config.json", adapter)
    with pytest.raises(OutputError, match=r"holds another merge: adapted"):
        run(merging([adapter], folder / "base"), tmp_path / "out")


@pytest.mark.parametrize("modules", [["attn.c_proj", "lm_head"], ["c_attn", "lm_head"]])
def test_which_matrices_are_transposed_is_the_models(
    folder: Path, tmp_path: Path, modules: list[str]
) -> None:
    """PEFT says of all modules what the last one was."""
    model = folder / "gpt2"
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=modules)
    run(merging([f"{model}+{adapter}"], model), tmp_path / "out")
    assert largest_difference(tmp_path / "out", by_peft(model, adapter)) < ROUNDING
    plain = edited(folder / "a", tmp_path / "plain", fan_in_fan_out=True)
    run(merging([plain], folder / "base"), tmp_path / "llama")
    assert largest_difference(tmp_path / "llama", by_peft(folder / "base", folder / "a")) < ROUNDING


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_folder_with_a_model_and_an_adapter(folder: Path, tmp_path: Path, form: str) -> None:
    """It is the model where a model stands, and the adapter behind a +."""
    import torch
    from safetensors.torch import load_file

    both = shifted(folder / "base", tmp_path / "both", 0.25)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / "a" / name, both)
    if form == "bin":
        torch.save(load_file(both / "model.safetensors"), both / "pytorch_model.bin")
        (both / "model.safetensors").unlink()
    base = folder / "base"
    assert any(
        "holds a model and an adapter" in n for n in open_plan(merging([both], base)).notes()
    )
    run(merging([both, f"{base}+{both}"], base), tmp_path / "out")
    expected = {n: t + 0.25 for n, t in by_peft(base, folder / "a").items()}
    assert largest_difference(tmp_path / "out", expected) < 2 * ROUNDING
    run(merging([f"{both}+{both}"], method="passthrough"), tmp_path / "own")
    assert largest_difference(tmp_path / "own", expected) < 2 * ROUNDING


@pytest.mark.parametrize(
    "variant", ["tied_embedding", "tied_head", "tied_embedding_to_save", "tied_tokens"]
)
@pytest.mark.parametrize("is_stored", [False, True])
def test_ties_that_no_configuration_says(
    folder: Path, tmp_path: Path, variant: str, is_stored: bool
) -> None:
    """As older versions of transformers saved them: what is the default is left out."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=32, vocab_size=96)
    model = save_model(tmp_path / "model", GPT2LMHeadModel(config))
    how = dict(VARIANTS[variant][1])
    names = {"embed_tokens": "wte", "q_proj": "c_attn"}
    how = {
        key: [names.get(one, one) for one in value] if isinstance(value, list) else value
        for key, value in {"target_modules": ["c_attn"], **how}.items()
    }
    adapter = save_adapter(model, tmp_path / "adapter", **how)
    expected = by_peft(model, adapter)
    content = json.loads((model / "config.json").read_text())
    del content["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(content))
    if is_stored:
        tensors = load_file(model / "model.safetensors")
        head = tensors["transformer.wte.weight"].clone()
        save_file(
            {**tensors, "lm_head.weight": head}, model / "model.safetensors", {"format": "pt"}
        )
    run(merging([f"{model}+{adapter}"], model), tmp_path / "out")
    assert largest_difference(tmp_path / "out", expected) < ROUNDING
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert max(float((state[n] - expected[n]).abs().max()) for n in expected) < ROUNDING


def test_another_embedding_for_stacks_that_share_one(tmp_path: Path) -> None:
    """As old files have it: once for each. PEFT changes one, and who reads which is the code's."""
    from safetensors.torch import load_file, save_file
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes))
    model = save_model(tmp_path / "model", t5)
    how: dict[str, Any] = {"target_modules": ["q"], "modules_to_save": ["shared"]}
    adapter = save_adapter(model, tmp_path / "adapter", auto="AutoModelForSeq2SeqLM", **how)
    config = merging([f"{model}+{adapter}"], method="passthrough")
    open_plan(config)  # where it is stored once
    tensors = load_file(model / "model.safetensors")
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"again as decoder\.embed_tokens\.weight, encoder\.embed"):
        open_plan(config)


def test_tokens_of_several_adapters(folder: Path, tmp_path: Path) -> None:
    one = save_adapter(folder / "base", tmp_path / "one", trainable_token_indices=[3, 1])
    two = save_adapter(folder / "base", tmp_path / "two", trainable_token_indices=[5, 7])
    run(merging([f"{folder}/base+{one}+{two}"], folder / "base"), tmp_path / "out")
    expected = by_peft(folder / "base", one, two)
    assert largest_difference(tmp_path / "out", expected) < ROUNDING
    saved = save_adapter(folder / "base", tmp_path / "saved", modules_to_save=["embed_tokens"])
    for chain in (f"{one}+{saved}", f"{saved}+{one}", f"{saved}+{saved}/../saved"):
        with pytest.raises(InputError, match=r"experts of their own|same"):
            open_plan(merging([f"{folder}/base+{chain}"], folder / "base"))


def test_embeddings_of_several_adapters_add(folder: Path, tmp_path: Path) -> None:
    """PEFT saves the base's beside each, and would put that in the place of what was merged."""
    how: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head"]}
    base = folder / "base"
    adapters = [save_adapter(base, tmp_path / f"{i}", seed=i, **how) for i in (1, 5)]
    run(merging([f"{base}+{adapters[0]}+{adapters[1]}"], base), tmp_path / "out")
    plain = by_peft(base)
    merged = [by_peft(base, adapter) for adapter in adapters]
    expected = {n: w + sum(m[n] - w for m in merged) for n, w in plain.items()}
    assert largest_difference(tmp_path / "out", expected) < ROUNDING


def test_a_head_by_lora_and_an_embedding_as_a_whole(folder: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    adapter = save_adapter(folder / "tied", tmp_path / "adapter", **how)
    run(merging([adapter], folder / "tied"), tmp_path / "out")
    expected = by_peft(folder / "tied", adapter)
    assert largest_difference(tmp_path / "out", expected) < ROUNDING


def test_tensors_that_share_bytes_and_are_not_tied(folder: Path, tmp_path: Path) -> None:
    """Of a .bin file, in which two layers are one."""
    import torch
    from safetensors.torch import load_file

    model = shutil.copytree(folder / "base", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    tensors[second] = tensors[first]
    torch.save(tensors, model / "pytorch_model.bin")
    adapter = save_adapter(folder / "base", tmp_path / "adapter", layers_to_transform=[0])
    run(merging([f"{model}+{adapter}"], model), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[second], tensors[second])
    assert not torch.equal(merged[first], tensors[first])


@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_the_models_dtype(folder: Path, tmp_path: Path, method: str) -> None:
    """PEFT saves embeddings in float32 beside a model in bfloat16."""
    from safetensors.torch import load_file

    how: dict[str, Any] = {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["embed_tokens"],
    }
    adapter = save_adapter(folder / "bf16", tmp_path / "adapter", **how)
    run(merging([f"{folder}/bf16+{adapter}"], method=method), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in merged.values()} == {"torch.bfloat16"}


def test_vocabularies_are_the_models(folder: Path, tmp_path: Path) -> None:
    """Of a model with an adapter, too; equal ones need nothing done."""
    models = make_models(tmp_path / "models")
    adapter = save_adapter(models["base"], tmp_path / "adapter")
    base = models["base"]
    equal = merging([adapter, models["same"]], base, tokenizer_source="union")
    run(equal, tmp_path / "out")
    other = merging([f"{models['moved']}+{adapter}"], base, tokenizer_source="union")
    with pytest.raises(InputError, match=r"`tokenizer` moves rows"):
        open_plan(other)
    shutil.copy(models["moved"] / "tokenizer.json", adapter)
    for source in ("union", str(adapter)):  # whose tokens would be another's
        with pytest.raises(InputError, match="with another tokenizer") as error:
            open_plan(merging([adapter, models["same"]], base, tokenizer_source=source))
        assert f"{adapter} is an adapter of {base} with another" in str(error.value)
    run(merging([adapter], base, tokenizer_source="base"), tmp_path / "of_base")


def test_files_of_the_training_are_compared(folder: Path, tmp_path: Path) -> None:
    """An adapter that was trained with other tokens, or another chat template, is said."""
    models = make_models(tmp_path / "models")
    base = models["base"]
    adapter = save_adapter(base, tmp_path / "adapter")
    config = merging([adapter], base)

    def notes() -> str:
        return "\n".join(n for n in open_plan(config).file_notes if str(adapter) in n)

    assert notes() == ""
    shutil.copy(base / "tokenizer.json", adapter)
    assert notes() == ""
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copy(models["a"] / "tokenizer.json", adapter)
    assert re.search(r"only it has the chat template|another version of the chat", notes())
    assert "tokens only it has" in notes()
    shutil.copy(models["moved"] / "tokenizer.json", adapter)
    assert "are merged by position as the model has them" in notes()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, "is IA3, not LoRA"),
    "LoHa": ({"peft_type": "LOHA"}, "is LOHA, not LoRA"),
    "LoKr": ({"peft_type": "LOKR"}, "is LOKR, not LoRA"),
    "OFT": ({"peft_type": "OFT"}, "is OFT, not LoRA"),
    "VeRA": ({"peft_type": "VERA"}, "is VERA, not LoRA"),
    "X-LoRA": ({"peft_type": "XLORA"}, "is XLORA, not LoRA"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "is PROMPT_TUNING, not LoRA"),
    "nothing": ({"peft_type": None}, "says no peft_type"),
    "number": ({"target_parameters": 5}, "target_parameters 5 .* must be a list of names, or null"),
    "numbers": ({"modules_to_save": [5]}, "modules_to_save .* must be a list of names, or null"),
    "table": ({"target_modules": {"q_proj": 1}}, "a list of names or a name or pattern, or null"),
    "patterns": ({"rank_pattern": [1]}, r"rank_pattern \[1\] .* must be a mapping, or null"),
    "switch": ({"init_lora_weights": ["pissa"]}, "must be true or false or a name or pattern"),
    "layers": ({"layers_to_transform": True}, "must be a whole number or a list of whole"),
    "QA-LoRA": ({"use_qalora": True}, "LoRA with QA-LoRA"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "LoRA with layer replication"),
    "activated": ({"alora_invocation_tokens": [1]}, "LoRA with activated LoRA"),
    "lora_bias": ({"lora_bias": True}, "LoRA with a bias of its own"),
    "block-diagonal": ({"use_bdlora": {"x": 1}}, "LoRA with block-diagonal LoRA"),
    "VeLoRA": ({"velora_config": {"x": 1}}, "LoRA with VeLoRA"),
    "Arrow": ({"arrow_config": {"x": 1}}, "LoRA with Arrow"),
    "KaSA": ({"kasa_config": {"x": 1}}, "LoRA with KaSA"),
    "MonteCLoRA": ({"monteclora_config": {"x": 1}}, "LoRA with MonteCLoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "takes a part of the base away"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "takes a part of the base away"),
    "rank": ({"r": 3}, "has rank 4, and the configuration says 3"),
    "alpha": ({"lora_alpha": "8"}, "has lora_alpha '8'"),
    "infinite": ({"lora_alpha": float("inf")}, "has lora_alpha inf"),
    "huge": ({"lora_alpha": 10**400}, "has lora_alpha 1000"),
    "none": ({"lora_alpha": None}, "has lora_alpha nothing: no number"),
    "deep": ({"rank_pattern": {"(" * 3000: 4}}, "rank_pattern or alpha_pattern"),
    "long": ({"alpha_pattern": {"a{99999999999}": 4}}, "rank_pattern or alpha_pattern"),
    "pattern": ({"rank_pattern": {"(": 4}}, "rank_pattern or alpha_pattern"),
    "endless": ({"alpha_pattern": {"(a+)+": 4}}, "too involved"),
    "DoRA": ({"use_dora": True}, "has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_its_name(folder: Path, tmp_path: Path, what: str) -> None:
    changes, message = REFUSED[what]
    adapter = edited(folder / "a", tmp_path / "adapter", **changes)
    with pytest.raises(InputError, match=message) as error:
        open_plan(merging([adapter], folder / "base"))
    assert str(adapter) in str(error.value)


def test_the_readme_names_them_all() -> None:
    changed = {key for changes, _ in REFUSED.values() for key in changes}
    assert set(VARIANTS_REFUSED) <= changed
    table = README.partition("| adapters | |")[2].partition("\n\n")[0]
    assert all(name in table for name in VARIANTS_REFUSED.values())
    kinds = [c["peft_type"] for c, _ in REFUSED.values() if c.get("peft_type")]
    assert all(kind.partition("_")[0].lower() in table.lower().replace("-", "") for kind in kinds)


def test_adapters_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def refused(change: Any) -> str:
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        adapter = shutil.copytree(folder / "a", tmp_path / "adapter")
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(change(tensors), adapter / "adapter_model.safetensors")
        with pytest.raises(InputError) as error:
            open_plan(merging([adapter], folder / "base"))
        return str(error.value)

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert "has no lora_B" in refused(
        lambda t: {n: e for n, e in t.items() if n != first.replace("lora_A", "lora_B")}
    )
    assert "is no tensor of" in refused(
        lambda t: {**t, "base_model.model.x.weight": t[first].clone()}
    )
    assert "belongs to no tensor" in refused(
        lambda t: {n.replace("q_proj", "qq_proj"): e for n, e in t.items()}
    )
    assert "an adapter of another model" in refused(
        lambda t: {**t, first: t[first][:, :8].contiguous()}
    )
    assert "F64" in refused(lambda t: {**t, first: t[first].double()})
    assert "is there twice" in refused(
        lambda t: {**t, first.replace(".weight", ".default.weight"): t[first].clone()}
    )
    with pytest.raises(InputError, match=r"are the same checkpoint"):
        open_plan(merging([folder / "a", f"{folder}/base+{folder}/a"], folder / "base"))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, None),
        ({"target_modules": ["self_attn.q_proj", "k_proj"]}, "no matrices of k_proj, which its"),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj"]},
            "layers.1.self_attn.q_proj count",
        ),
        ({"target_modules": r".*\.q_proj"}, None),
        ({"target_modules": r".*\.0\..*_proj"}, "layers.1.self_attn.q_proj count here"),
        ({"target_modules": "(((((a+)+)"}, "was not compared: the pattern"),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": None}, "names no target_modules, for which PEFT takes"),
        ({"exclude_modules": ["q_proj"]}, "layers.0.self_attn.q_proj, model.layers.1.self_attn"),
        ({"exclude_modules": r".*1\.self_attn.*"}, "matrices of model.layers.1.self_attn.q_proj"),
        ({"layers_to_transform": [0, 1]}, None),
        ({"layers_to_transform": 0}, "matrices of model.layers.1.self_attn.q_proj count here"),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, "matrices of model.layers.0."),
        ({"layers_to_transform": [0], "layers_pattern": ["h"]}, "layers.0.self_attn.q_proj, model"),
        ({"modules_to_save": ["norm", "lm_head"]}, "it has no norm, lm_head, which its modules_to"),
        ({"trainable_token_indices": [1]}, "it has no rows of the tokens that its trainable_token"),
    ],
)
def test_what_the_configuration_says_otherwise(
    adapter_of_q: Path, folder: Path, tmp_path: Path, changes: dict[str, Any], note: str | None
) -> None:
    """All that the file has counts; PEFT agrees on what it would leave out."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    adapter = edited(adapter_of_q, tmp_path / "adapter", **changes)
    notes = open_plan(merging([f"{folder / 'base'}+{adapter}"], folder / "base")).notes()
    own = (f"{adapter}: LoRA", f"{folder / 'base'}+{adapter}: LoRA")
    found = [one for one in notes if one.startswith(str(adapter)) and not one.startswith(own)]
    assert len(found) == (note is not None), found
    assert note is None or note in found[0]
    config = LoraConfig.from_pretrained(str(adapter))
    if config.target_modules not in (None, "(((((a+)+)", "all-linear"):
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn.q_proj"
            counts = bool(check_target_module_exists(config, module))
            assert counts != any(module in one and "count here" in one for one in found)


@pytest.fixture(scope="module")
def adapter_of_q(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "of_q"
    return save_adapter(folder / "base", path, target_modules=["q_proj"])


def test_lengths_that_are_not_said(folder: Path, tmp_path: Path) -> None:
    """PEFT leaves them out, and the matrices would count by themselves."""
    adapter = save_adapter(folder / "base", tmp_path / "dora", use_dora=True)
    plain = edited(adapter, tmp_path / "plain", use_dora=False)
    with pytest.raises(InputError, match=r"does not say `use_dora: true`"):
        open_plan(merging([plain], folder / "base"))


def test_keys_that_are_not_known(folder: Path, tmp_path: Path) -> None:
    """They are told of where they are set: one of them may be another kind of LoRA."""
    known = edited(folder / "a", tmp_path / "known", use_flubber=False, flub_config=None)
    strange = edited(folder / "a", tmp_path / "strange", use_flubber=True, alpha=32, lora_dropout=1)
    for adapter, named in ((known, None), (strange, "alpha, use_flubber")):
        notes = open_plan(merging([adapter], folder / "base")).notes()
        found = [note for note in notes if "is nothing that is known here of PEFT" in note]
        assert len(found) == (named is not None)
        assert named is None or f"{adapter}: {named} in its adapter_config.json is" in found[0]


def test_every_key_of_peft_is_known() -> None:
    import dataclasses

    from peft import LoraConfig

    assert {f.name for f in dataclasses.fields(LoraConfig)} <= KNOWN | set(VARIANTS_REFUSED)


def test_what_is_looked_at_of_adapters_is_what_peft_merges(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32").state_dict()
    matrices = [name for name in base if "q_proj" in name or "v_proj" in name]
    start = np.concatenate([base[name].double().numpy().reshape(-1) for name in matrices])
    found = check(merging([folder / "a", folder / "b"], folder / "base"))
    for name, one in zip("ab", found.models, strict=True):
        merged = by_peft(folder / "base", folder / name)
        flat = np.concatenate([merged[n].double().numpy().reshape(-1) for n in matrices])
        delta = flat - start
        assert one.model == f"{folder / 'base'}+{folder / name}"
        relative = float(np.linalg.norm(delta) / np.linalg.norm(start))
        assert one.relative_delta == pytest.approx(relative, rel=1e-4)
        assert one.verdict == "far"  # whatever its size, an adapter is one of the base
        assert one.untouched == pytest.approx(float((delta == 0).mean()), abs=1e-3)
    (pair,) = found.pairs
    assert abs(pair.delta_cosine) < 0.2


def test_nothing_is_looked_at_of_an_adapter_of_what_is_not_made_yet(
    folder: Path, tmp_path: Path
) -> None:
    first = merging([f"{folder / 'base'}+{folder / 'a'}"], method="passthrough").normalized()
    last = merging([f"first+{folder / 'b'}"], folder / "base").normalized()
    config = config_from_mapping({**last, "stages": [{"name": "first", **first}]})
    assert check(config).models == ()
    run(config, tmp_path / "out", check=True)
