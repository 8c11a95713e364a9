"""Which differences between two config.json are said, and which are none."""

from __future__ import annotations

from typing import Any

import pytest

from della_dist.runtime.companions.config_differences import config_differences

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 8,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0",
    "_name_or_path": "org/base",
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": 500000.0}, "rope_theta 500000.0, not 10000.0"),
        ({"num_attention_heads": 16}, "num_attention_heads 16, not 8"),
        ({"model_type": "mistral"}, 'model_type "mistral", not "llama"'),
        ({"architectures": ["X"]}, 'architectures ["X"], not ["LlamaForCausalLM"]'),
        ({"eos_token_id": [2, 7]}, "eos_token_id [2, 7], not 2"),
        ({"rope_scaling": {"type": "linear"}}, 'rope_scaling {"type": "linear"}, where the other'),
        ({"sliding_window": 4096}, "sliding_window 4096, where the other says nothing"),
        ({"rope_theta": None}, "no rope_theta, where the other says 10000.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 500000.0"),
    ],
)
def test_said(change: dict[str, Any], says: str) -> None:
    (said,) = config_differences(BASE, {**BASE, **change})
    assert said.startswith("its config.json says ")
    assert says in said


def test_a_key_that_nobody_here_knows_counts() -> None:
    ours, theirs = {**BASE, "mamba_d_state": 16}, {**BASE, "mamba_d_state": 32}
    assert config_differences(ours, theirs) == ["its config.json says mamba_d_state 32, not 16"]


@pytest.mark.parametrize(
    "change",
    [
        {"torch_dtype": "float16", "transformers_version": "5.1", "_name_or_path": "x"},
        {"attention_dropout": 0.1, "use_cache": False, "initializer_range": 1},
        {"some_new_key": 1},  # newer versions of transformers write more
        {"rope_theta": 10000, "rope_scaling": None},
        {"tie_word_embeddings": True},  # its own matter
        {"dtype": "float32", "unsloth_version": "1", "auto_map": {"AutoModel": "x--y.Z"}},
    ],
)
def test_not_said(change: dict[str, Any]) -> None:
    assert config_differences(BASE, {**BASE, **change}) == []


def test_spellings_of_transformers_4_and_5_are_one() -> None:
    old = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}}
    assert config_differences(old, new) == []
    assert config_differences(new, old) == []


def test_nested_configurations() -> None:
    ours = {"text_config": BASE, "vision_config": {"depth": 2, "_attn": "a"}}
    theirs = {
        "text_config": {**BASE, "rope_theta": 1.0},
        "vision_config": {"depth": 3, "_attn": "b"},
    }
    (said,) = config_differences(ours, theirs)
    assert said == (
        "its config.json says text_config.rope_theta 1.0, not 10000.0; vision_config.depth 3, not 2"
    )


def test_many_are_counted_and_long_values_cut() -> None:
    ours = {f"key{i}": 0 for i in range(20)}
    theirs: dict[str, Any] = dict.fromkeys(ours, "x" * 500)
    (said,) = config_differences(ours, theirs)
    assert said.endswith(" and 14 more")
    assert len(said) < 500
