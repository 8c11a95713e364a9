"""Experts whose tensors have other names, or another layout, than the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from della_dist import plan
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import InputError
from della_dist.planning.fingerprint import identity
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from tests.adapters import save_adapter
from tests.interrupting import interrupt
from tests.layouts import (
    EXPERTS,
    FUSED,
    METHODS,
    OTHER_LAYOUT,
    TWO_LAYOUTS,
    drawn,
    make_multimodal,
    merging,
    renamed,
    rewrite,
    save,
    save_models,
    weights,
    weights_of,
)
from tests.merging import run
from tests.remote import upload


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as in files and as in memory, a base and an expert of each."""
    return save_models(tmp_path_factory.mktemp("models"))


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
    ([("model.", "roberta.")], [("model.", "")]),
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


@pytest.mark.parametrize("name", OTHER_LAYOUT)
def test_attention_in_one_matrix_or_in_three(folder: Path, tmp_path: Path, name: str) -> None:
    change = OTHER_LAYOUT[name]
    mine = [folder / name / which for which in ("base", "expert")]
    theirs = [rewrite(path, tmp_path / f"{path.name}_other", change) for path in mine]
    for i, (ours, others) in enumerate(((mine, theirs), (theirs, mine))):
        run(merging(ours[0], [ours[1]]), tmp_path / f"plain{i}")
        run(merging(ours[0], [others[1]]), tmp_path / f"mixed{i}")
        assert weights(tmp_path / f"mixed{i}") == weights(tmp_path / f"plain{i}")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_models_of_text_and_images(tmp_path: Path, name: str) -> None:
    """As transformers 4.52 and later name them in memory, and as files do."""
    for seed, which in enumerate(("base", "expert")):
        model = make_multimodal(name, seed)
        save(model, tmp_path / which)
        save(model, tmp_path / f"{which}_memory", as_in_memory=True)
    for suffix, other in (("", "_memory"), ("_memory", "")):
        base = tmp_path / f"base{suffix}"
        plain, mixed = (tmp_path / f"{one}{suffix}" for one in ("plain_out", "mixed_out"))
        run(merging(base, [tmp_path / f"expert{suffix}"]), plain)
        run(merging(base, [tmp_path / f"expert{other}"]), mixed)
        assert weights(plain) == weights(mixed)
        (note,) = [n for n in open_plan(merging(base, [tmp_path / f"expert{other}"])).notes()
                   if "otherwise than in" in n]  # fmt: skip
        assert "language_model" in note or "model.*" in note


@pytest.mark.parametrize("memory", [False, True])
def test_an_expert_of_text_alone(folder: Path, tmp_path: Path, memory: bool) -> None:
    """Of a multimodal base: what it lacks is the base's, if that is allowed."""
    base = save(make_multimodal("llava"), tmp_path / "base", as_in_memory=memory)
    expert = folder / "llama" / "expert"
    with pytest.raises(InputError, match="lacks 43 tensors"):
        open_plan(merging(base, [expert]))
    run(merging(base, [expert], missing_tensors="base"), tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(weights_of(tmp_path / "out"))
    theirs = load_file(expert / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    ours = name.replace("model.", "model.language_model." if memory else "language_model.model.")
    assert torch.allclose(after[ours], (before[ours] + theirs[name]) / 2, atol=1e-7)
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert same == {n for n in before if "vision_tower" in n or "projector" in n}


def without(part: str) -> Any:
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return experts as (E, in, out)."""
    return {n: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for n, t in tensors.items()}


def model_type(folder: Path, name: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": name}))
    return folder


def one_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: torch.cat((t, t[:1])) if t.ndim == 3 else t for n, t in tensors.items()}


def as_query_key_value(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.replace("qkv_proj", "query_key_value"): t for n, t in FUSED(tensors).items()}


#: The base, the expert and what is done to it, and what is said.
REFUSED: dict[str, tuple[str, str, Any, str]] = {
    "a missing expert": (
        "qwen3_moe/base_memory", "qwen3_moe/expert", without("layers.1.mlp.experts.2.up_proj"),
        r"lacks model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight: ",
    ),
    "a missing expert under another name": (
        "mixtral/base_memory", "mixtral/expert", without("layers.0.block_sparse_moe.experts.3."),
        r"lacks .*experts\.3",
    ),
    "an expert too many": (
        "qwen3_moe/base", "qwen3_moe/expert_memory", one_more, r"expert \(number 4\)",
    ),
    "transposed experts": (
        "qwen3_moe/base", "qwen3_moe/expert_memory", transposed, "transposed",
    ),
    "half of the names": (
        "llama/base", "llama/expert",
        lambda tensors: {
            n.replace("model.layers.0", "layers.0").replace("model.layers.1", "blocks.1"): t
            for n, t in tensors.items()
        },
        r"has 12 of the 21 tensors .* names are blocks\.1\.\* .* model\.layers\.1\.\*",
    ),
    "unknown order": (
        "llama/base", "llama/expert", as_query_key_value,
        "queries, keys and values, .* not known for model_type 'llama'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(folder: Path, tmp_path: Path, what: str) -> None:
    base, expert, change, message = REFUSED[what]
    changed = rewrite(folder / expert, tmp_path / "expert", change)
    with pytest.raises(InputError, match=message) as error:
        open_plan(merging(folder / base, [changed]))
    assert str(changed) in str(error.value)
    # Nor does it count as the base where tensors may be missing.
    policies = {"missing_tensors": "base", "extra_tensors": "ignore"}
    with pytest.raises(InputError, match=message):
        open_plan(merging(folder / base, [changed], **policies))


def test_experts_in_turns_are_refused(folder: Path, tmp_path: Path) -> None:
    """gpt-oss has gate and up in turns, whatever the shapes are."""
    base = model_type(
        rewrite(folder / "qwen3_moe" / "base_memory", tmp_path / "base", lambda t: t), "gpt_oss"
    )
    with pytest.raises(InputError, match="gate and up in turns"):
        open_plan(merging(base, [folder / "qwen3_moe" / "expert"]))


SAME = [
    {"threads": 1, "workers": 1},
    {"threads": 2, "workers": 2, "shard_bytes": 9000},
    {"memory_bytes": 32 << 20},
    {"memory_bytes": 1 << 30},
]


@pytest.fixture(scope="module")
def mixed(folder: Path) -> tuple[MergeConfig, str]:
    """A merge with single experts and with an adapter over fused ones, and its digest."""
    models = folder / "qwen3_moe"
    adapter = save_adapter(models / "base", models / "adapter", target_parameters=EXPERTS, r=3)
    adapted = f"{models}/expert+{adapter}"
    config = merging(models / "base_memory", [models / "expert", Path(adapted)], "della", seed=3)
    return config, run(config, models / "out").model_digest


@pytest.mark.parametrize("options", SAME, ids=str)
def test_same_bytes(
    mixed: tuple[MergeConfig, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    config, digest = mixed
    assert run(config, tmp_path / "out", **options).model_digest == digest
    assert len(verify(str(tmp_path / "out"), recompute=100).recomputed) > 20


def test_interrupted_and_resumed(mixed: tuple[MergeConfig, str], tmp_path: Path) -> None:
    config, digest = mixed
    interrupt(config, tmp_path / "out", after=2, shard_bytes=9000)
    done = run(config, tmp_path / "out", shard_bytes=9000)
    assert (done.model_digest, done.tasks_resumed) == (digest, 2)


def test_of_a_stage(folder: Path, tmp_path: Path) -> None:
    """An output that the same run makes, with its experts in one tensor, for a base without."""
    models = folder / "qwen3_moe"
    first = merging(models / "base_memory", [models / "expert_memory"], "ties").normalized()
    second = merging(models / "base", [tmp_path / "first"]).normalized()
    run(config_from_mapping(first), tmp_path / "first")
    run(config_from_mapping(second), tmp_path / "second")
    second["models"][0]["model"] = "made"
    both = config_from_mapping({**second, "stages": [{**first, "name": "made"}]})
    run(both, tmp_path / "both")
    assert weights(tmp_path / "both") == weights(tmp_path / "second")


@pytest.mark.s3
def test_same_bytes_from_s3(
    mixed: tuple[MergeConfig, str], folder: Path, tmp_path: Path, s3_bucket: str
) -> None:
    config, digest = mixed
    models = folder / "qwen3_moe"
    there = {
        str(models / name): upload(models / name, f"s3://{s3_bucket}/{name}")
        for name in ("base_memory", "expert", "adapter")
    }
    content = config.normalized()
    content["base_model"] = there[str(models / "base_memory")]
    for entry in content["models"]:
        entry["model"] = "+".join(there[part] for part in entry["model"].split("+"))
    done = run(config_from_mapping(content), tmp_path / "out")
    assert done.model_digest == digest
    expected = plan(config)
    assert expected.bytes_to_read <= done.bytes_read <= expected.most_bytes_to_read


def test_names_that_match_are_as_they_were(folder: Path) -> None:
    """Nothing is looked at, nothing recorded."""
    plain = open_plan(merging(folder / "llama" / "base", [folder / "llama" / "expert"]))
    assert plain.layouts == {}
    assert "layouts" not in identity(plain)
    mixed = open_plan(merging(folder / "mixtral" / "base", [folder / "mixtral" / "expert_memory"]))
    assert list(identity(mixed)["layouts"]) == ["1"]


HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4}


BY_HEAD: dict[str, Any] = {
    "gpt_neox": (transformers.GPTNeoXConfig, {"intermediate_size": 48}),
    "bloom": (transformers.BloomConfig, {"n_head": 4, "n_layer": 2}),
    "persimmon": (transformers.PersimmonConfig, {"intermediate_size": 48}),
    "falcon": (transformers.FalconConfig, {}),
    "falcon_rw": (transformers.FalconConfig, {"multi_query": False}),
    "falcon_40b": (transformers.FalconConfig, {"new_decoder_architecture": True,
                                               "num_kv_heads": 2}),
}  # fmt: skip


def divided(model: Any) -> Any:
    """Return what cuts the matrix of queries, keys and values as its class does."""
    attention = next(m for m in model.modules() if hasattr(m, "query_key_value"))
    config = model.config

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if "query_key_value" not in name:
                out[name] = tensor
                continue
            columns = tensor.reshape(len(tensor), -1).T[None]
            if config.model_type == "gpt_neox":
                heads = columns.view(1, -1, config.num_attention_heads, 3 * attention.head_size)
                parts = heads.chunk(3, dim=-1)
            elif config.model_type == "bloom":
                parts = tuple(part.transpose(1, 2) for part in attention._reshape(columns))
            else:
                parts = attention._split_heads(columns)
            for letter, part in zip("qkv", parts, strict=True):
                mine = part[:, :, ::2] if letter != "q" and is_grouped else part  # once a group
                rows = mine.flatten(2)[0].T.reshape(-1, *tensor.shape[1:])
                out[name.replace("query_key_value", f"{letter}_proj")] = rows.contiguous()
        return out

    is_grouped = getattr(config, "new_decoder_architecture", False)
    return change


@pytest.mark.parametrize("name", BY_HEAD)
def test_queries_keys_and_values_by_head(tmp_path: Path, name: str) -> None:
    kind, more = BY_HEAD[name]
    config = kind(**{**HEADS, **more})
    for seed, which in enumerate(("base", "expert")):
        model = drawn(transformers.AutoModelForCausalLM.from_config(config), seed)
        save(model, tmp_path / which)
        rewrite(tmp_path / which, tmp_path / f"{which}_divided", divided(model))
    for suffix, other in (("", "_divided"), ("_divided", "")):
        base = tmp_path / f"base{suffix}"
        run(merging(base, [tmp_path / f"expert{suffix}"]), tmp_path / f"plain{suffix}")
        run(merging(base, [tmp_path / f"expert{other}"]), tmp_path / f"mixed{suffix}")
        assert weights(tmp_path / f"plain{suffix}") == weights(tmp_path / f"mixed{suffix}")
