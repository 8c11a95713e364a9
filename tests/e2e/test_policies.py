"""What becomes of tensors that do not simply match, and that every one of it is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist import plan
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, InputError
from della_dist.ops.tensor import load_backend
from della_dist.planning.projection import project, task_cost
from della_dist.runtime.budget import budget
from della_dist.runtime.describe import describe_plan
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.verify import verify
from della_dist.specs.reading import bytes_to_read
from della_dist.specs.sources import columns
from della_dist.storage.tensor_table import TENSORS_NAME
from della_dist.storage.tensor_table import load_tensors as load_records
from tests.checkpoints import Tensor, load_tensors, make_experts, save_checkpoint, tensor, values_of
from tests.merging import config_for, expected_tensors, run, save_family

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"
BATCHES = "model.layers.0.bn.num_batches_tracked"


def random(seed: int, dtype: str, *shape: int) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(0, 0.05, shape), dtype)


def model() -> dict[str, Tensor]:
    return {
        EMBED: random(1, "BF16", 40, 24),
        UP: random(2, "BF16", 30, 24),
        GATE: random(3, "BF16", 30, 24),
        NORM: random(4, "F32", 24),
        HEAD: random(5, "BF16", 40, 24),
        BATCHES: tensor(np.array(100), "I64"),
    }


def save(folder: Path, *checkpoints: Mapping[str, Tensor], **how: Any) -> list[Path]:
    """Write the base and its experts."""
    return [save_checkpoint(folder / str(i), c, **how) for i, c in enumerate(checkpoints)]


def merge(folder: Path, paths: list[Path], method: str = "della", **keys: Any) -> dict[str, Tensor]:
    """Merge, check that the output is whole, and return it."""
    config = config_for(paths[0], paths[1:], method, **keys)
    out = folder / "out"
    run(config, out)
    verify(str(out), recompute=100)
    return load_tensors(out)


# Tensors that only the base has.


def test_missing_tensors_are_the_bases(tmp_path: Path) -> None:
    base = model()
    one, two = make_experts(base, 2)
    del one[UP], one[BATCHES]
    paths = save(tmp_path, base, one, two)
    with pytest.raises(InputError, match="missing_tensors: base"):
        open_plan(config_for(paths[0], paths[1:]))
    keys = {"missing_tensors": "base", "dtype": "float32", "keep_fp32": "none"}
    out = merge(tmp_path, paths, **keys)
    assert out[UP] == base[UP]  # its own dtype too
    assert out[BATCHES] == base[BATCHES]
    assert out[GATE].dtype == "F32"
    config = config_for(paths[0], paths[1:], **keys)
    expected = expected_tensors(config)
    assert {name: t.data for name, t in out.items()} == expected
    notes = [note for note in open_plan(config).notes() if f"{paths[1]}: lacks" in note]
    assert len(notes) == 1
    assert UP in notes[0]
    assert BATCHES in notes[0]
    assert "2 tensors" in notes[0]


def test_the_numbers_of_a_plan_know_what_is_read(tmp_path: Path) -> None:
    base = model()
    one, two = make_experts(base, 2)
    del one[UP]
    paths = save(tmp_path, base, one, two)
    config = config_for(paths[0], paths[1:], "ties", missing_tensors="base")
    opened = open_plan(config, shard_bytes=3000)
    summary = run(config, tmp_path / "out", shard_bytes=3000)
    projection = project(opened, budget(RunOptions()), load_backend("numba").scratch_bytes)
    assert summary.bytes_read == projection.bytes_to_read
    costs = sum(task_cost(opened, shard) for shard in opened.shards)
    assert costs == projection.bytes_to_read + projection.bytes_to_write
    sources = {t.name: opened.source(t) for shard in opened.shards for t in shard.tensors}
    assert [leaf.checkpoint for leaf in columns(sources[UP])] == [0]
    assert [leaf.checkpoint for leaf in columns(sources[GATE])] == [0, 1, 2]
    assert [leaf.checkpoint for leaf in columns(sources[BATCHES])] == [0, 1, 2]
    read = sum(bytes_to_read(source)[0] for source in sources.values())
    assert summary.bytes_read == read


@pytest.mark.parametrize(
    ("dtype", "kept", "num_passes"), [("F32", 64, 3), ("BF16", 64, 2), ("F32", 100, 1)]
)
def test_values_decide_how_often_a_tensor_is_read(
    tmp_path: Path, dtype: str, kept: int, num_passes: int
) -> None:
    """The plan says the least and the most; both are what is read where both are the same."""
    rng = np.random.default_rng(0)
    # The deltas of the one differ in their last bits only, those of the other in the first.
    spread = rng.permutation(100) if dtype == "F32" else np.exp2(rng.integers(-9, 9, 100))
    deltas = 1 + spread * 2.0**-20 if dtype == "F32" else spread
    base = {"one": tensor(np.zeros((10, 10)), dtype), "row": tensor(np.zeros(1), dtype)}
    expert = {"one": tensor(deltas.reshape(10, 10), dtype), "row": tensor(np.ones(1), dtype)}
    paths = save(tmp_path, base, expert)
    config = config_for(paths[0], paths[1:], "ties", parameters={"density": kept / 100})
    said = plan(config)
    read = run(config, tmp_path / "out").bytes_read
    a_pass = 2 * 100 * (4 if dtype == "F32" else 2)
    once = 2 * (4 if dtype == "F32" else 2)  # one element is kept without looking
    assert read == num_passes * a_pass + once
    assert said.bytes_to_read == min(num_passes, 2) * a_pass + once
    assert said.most_bytes_to_read == (1 if kept == 100 else 3) * a_pass + once


def test_inputs_that_are_not_rounded_are_said(tmp_path: Path) -> None:
    """mergekit rounds them first, which changes nothing where they have that dtype."""
    base = {UP: random(1, "BF16", 10, 10)}
    paths = save(tmp_path, base, {UP: random(2, "BF16", 10, 10)}, {UP: random(3, "F32", 10, 10)})

    def said(expert: Path, **keys: str) -> bool:
        notes = plan(config_for(paths[0], [expert], **keys)).notes
        return any("mergekit rounds the inputs" in note for note in notes)

    assert not said(paths[1], dtype="bfloat16")
    assert said(paths[2], dtype="bfloat16")
    assert said(paths[1], dtype="float32")
    assert not said(paths[2])


# Integers that differ.


def test_different_integers_are_the_bases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = model()
    one, two = make_experts(base, 2)
    two[BATCHES] = tensor(np.array(101), "I64")
    paths = save(tmp_path, base, one, two)
    strict = config_for(paths[0], paths[1:])
    with pytest.raises(InputError, match="on_different_integers: base"):
        run(strict, tmp_path / "strict")
    config = config_for(paths[0], paths[1:], on_different_integers="base")
    with caplog.at_level(logging.INFO, "della_dist.run"):
        summary = run(config, tmp_path / "out")
    assert load_tensors(tmp_path / "out")[BATCHES] == base[BATCHES]
    assert (summary.num_tensors, summary.num_merged, summary.num_from_base) == (6, 5, 1)
    assert any(BATCHES in message for message in caplog.messages)
    records = load_records((tmp_path / "out" / TENSORS_NAME).read_bytes())
    assert {r.name: r.action for r in records}[BATCHES] == "base"
    again = run(config, tmp_path / "out")
    assert (again.bytes_read, again.num_merged, again.num_from_base) == (0, 5, 1)
    # Nothing is said where all agree.
    caplog.clear()
    paths = save(tmp_path / "same", base, one)
    same = config_for(paths[0], paths[1:], on_different_integers="base")
    assert run(same, tmp_path / "out2").num_from_base == 0
    assert not any(BATCHES in message for message in caplog.messages)


# F32 among 16 bits.

BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("keep", "dtype", "kept"),
    [
        ("auto", "bfloat16", {BIAS, "model.layers.0.linear_attn.A_log"}),
        (
            "auto",
            "float16",
            {BIAS, "model.layers.0.linear_attn.A_log", "block.0.layer.1.DenseReluDense.wo.weight"},
        ),
        ("none", "bfloat16", set()),
    ],
)
def test_f32_that_the_model_needs(tmp_path: Path, keep: str, dtype: str, kept: set[str]) -> None:
    base = {
        **model(),
        BIAS: random(7, "F32", 64),
        "model.layers.0.linear_attn.A_log": random(8, "F32", 8),
        "block.0.layer.1.DenseReluDense.wo.weight": random(9, "F32", 6, 6),
    }
    (expert,) = make_experts(base, 1)
    expert[BIAS] = tensor(values_of(expert[BIAS]), "BF16")  # as it is often saved
    paths = save(tmp_path, base, expert)
    keys = {"dtype": dtype, "keep_fp32": keep}
    out = merge(tmp_path, paths, "task_arithmetic", **keys)
    assert {name for name, t in out.items() if t.dtype == "F32"} == kept
    if kept:
        assert out[BIAS].data == tensor(values_of(expert[BIAS]), "F32").data
    notes = open_plan(config_for(paths[0], paths[1:], "task_arithmetic", **keys)).notes()
    rounded = [n for n in notes if "rounded to" in n and "not rounded" not in n]
    assert len(rounded) == 1
    assert rounded[0].startswith(f"{4 - len(kept)} tensor")
    assert NORM in rounded[0]
    assert sum("kept in F32" in n for n in notes) == bool(kept)


def test_without_a_dtype_nothing_is_rounded(tmp_path: Path) -> None:
    base = model()
    paths = save(tmp_path, base, *make_experts(base, 1))
    assert merge(tmp_path, paths)[NORM].dtype == "F32"
    assert not any("F32" in note for note in open_plan(config_for(paths[0], paths[1:])).notes())


# Parameters that are stored twice.

MTP = "model.layers.61.embed_tokens.weight"
MTP_HEAD = "model.layers.61.shared_head.head.weight"


@pytest.mark.parametrize("method", ["della", "dare_ties", "ties"])
def test_what_is_equal_in_the_inputs_is_equal_in_the_output(tmp_path: Path, method: str) -> None:
    base = model()
    checkpoints = [base, *make_experts(base, 2)]
    half = {"parameters": {"density": 0.5}}
    alone = merge(tmp_path / "alone", save(tmp_path / "alone", *checkpoints), method, **half)
    for c in checkpoints:
        c.update({MTP: c[EMBED], MTP_HEAD: c[HEAD]})
    paths = save(tmp_path / "twice", *checkpoints, num_shards=3)
    # Parameters that depend on the place in the model, and on the name.
    keys = {"parameters": {"density": [{"filter": "shared_head", "value": 0.9}, {"value": 0.5}]}}
    keys = keys if method != "ties" else {"parameters": {"lambda": [0.5, 1.0]}}
    twice = merge(tmp_path / "twice", paths, method, **keys)
    assert twice[MTP] == twice[EMBED]
    assert twice[MTP_HEAD] == twice[HEAD]
    assert twice[HEAD] != twice[EMBED]
    notes = open_plan(config_for(paths[0], paths[1:], method, **keys)).notes()
    assert sum("stored again" in note for note in notes) == 2
    if method == "della":
        plain = merge(tmp_path / "plain", paths, method, **half)
        assert {n: plain[n] for n in alone} == alone  # what was there before has its old bytes


def test_a_tied_head_that_an_untied_config_stores(tmp_path: Path) -> None:
    base = model()
    checkpoints = [base, *make_experts(base, 2)]
    for c in checkpoints:
        c[HEAD] = c[EMBED]
    paths = save(tmp_path, *checkpoints, config={"tie_word_embeddings": False})
    out = merge(tmp_path, paths, parameters={"density": 0.5})
    assert out[HEAD] == out[EMBED]
    assert out[HEAD] != base[HEAD]


@pytest.mark.parametrize("owner", ["base", "expert"])
def test_twins_that_only_look_equal(tmp_path: Path, owner: str) -> None:
    # Larger than 16 blocks of 64 KiB, and different between two of them alone: filters count.
    base = {EMBED: random(1, "BF16", 1100, 1024)}
    (expert,) = make_experts(base, 1)
    for tensors in (base, expert):
        tensors[HEAD] = tensors[EMBED]
    other = base if owner == "base" else expert
    data = bytearray(other[HEAD].data)
    data[100_000:100_016] = random(2, "BF16", 8).data
    other[HEAD] = replace(other[HEAD], data=bytes(data))
    paths = save(tmp_path, base, expert, config={"tie_word_embeddings": False})
    weight = [{"filter": "lm_head", "value": 0.0}, {"value": 1.0}]
    models = [{"model": str(paths[1]), "parameters": {"weight": weight}}]
    assert open_plan(config_for(paths[0], [], "task_arithmetic", models=models)).twins == {}
    out = merge(tmp_path, paths, "task_arithmetic", models=models)
    assert out[HEAD].data == base[HEAD].data
    assert out[EMBED].data != base[EMBED].data


# Filters.


def filtered(paths: list[Path], text: str) -> MergeConfig:
    weight = [{"filter": text, "value": 0.3}, {"value": 1.0}]
    models = [{"model": str(p), "parameters": {"weight": weight}} for p in paths[1:]]
    content = {"merge_method": "task_arithmetic", "base_model": str(paths[0]), "models": models}
    return config_from_mapping(content, "test")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("mlp.gat_proj", "mlp.gate_proj"),
        ("mpl", "mlp"),
        ("model.layers.7.mlp", "model.layers.0.mlp"),
        ("self_attn", None),
    ],
)
def test_a_filter_of_no_tensor_is_refused(tmp_path: Path, text: str, nearest: str | None) -> None:
    base = model()
    paths = save(tmp_path, base, *make_experts(base, 1))
    with pytest.raises(ConfigError, match=f"filter '{text}' of `weight`") as caught:
        open_plan(filtered(paths, text))
    assert caught.value.exit_code == 2
    assert (
        (f"'{nearest}'" in str(caught.value)) if nearest else ("nearest" not in str(caught.value))
    )


@pytest.mark.parametrize("text", ["mlp", "*", "model.layers.0.", "weight", "lm_head", "norm"])
def test_filters_of_tensors(tmp_path: Path, text: str) -> None:
    base = model()
    paths = save(tmp_path, base, *make_experts(base, 1))
    assert not any(f"filter {text} of" in note for note in open_plan(filtered(paths, text)).notes())


def test_several_filters_of_no_tensor(tmp_path: Path) -> None:
    base = model()
    paths = save(tmp_path, base, *make_experts(base, 1))
    config = filtered(paths, "nothing")
    both = replace(
        config, settings={"lambda": filtered(paths, "none").models[0].settings["weight"]}
    )
    with pytest.raises(ConfigError, match="2 problems") as caught:
        open_plan(both)
    assert "'nothing' of `weight`" in str(caught.value)
    assert "'none' of `lambda`" in str(caught.value)


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_filter_of_a_tied_head_is_said_to_have_no_effect(
    tmp_path: Path, *, is_stored: bool
) -> None:
    base = model()
    checkpoints = [base, *make_experts(base, 1)]
    for c in checkpoints:
        c[HEAD] = c[EMBED]
        if not is_stored:
            del c[HEAD]
    paths = save(tmp_path, *checkpoints, config={"tie_word_embeddings": True})
    notes = open_plan(filtered(paths, "lm_head")).notes()
    assert sum("filter lm_head of `weight`: without effect" in note for note in notes) == 1


def test_a_filter_of_a_head_of_another_name_is_refused(tmp_path: Path) -> None:
    base = model()
    base["embed_out.weight"] = base.pop(HEAD)
    paths = save(tmp_path, base, *make_experts(base, 1))
    with pytest.raises(ConfigError, match="filter 'lm_head'"):
        open_plan(filtered(paths, "lm_head"))


# What is left of a quantisation, and what is said at the end.


def test_a_leftover_quantisation_is_not_in_the_output(tmp_path: Path) -> None:
    base = model()
    said = {"quant_method": "gptq", "bits": 4}
    config = {"quantization_config": said, "text_config": {"quantization_config": said, "x": 1}}
    paths = save(tmp_path, base, *make_experts(base, 1), config=config)
    merge(tmp_path, paths)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"text_config": {"x": 1}}
    described = describe_plan(config_for(paths[0], paths[1:]), None, RunOptions(device="cpu"))
    assert sum("quantization_config (gptq)" in note for note in described.notes) == 2


def test_the_summary_counts_every_tensor(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    summary = run(config_for(base, experts), tmp_path / "out")
    assert (summary.num_tensors, summary.num_merged) == (14, 12)
    assert (summary.num_from_base, summary.num_unstored) == (0, 0)
    tied = model()
    checkpoints = [tied, *make_experts(tied, 1)]
    for c in checkpoints:
        c[HEAD] = c[EMBED]
    paths = save(tmp_path / "tied", *checkpoints, config={"tie_word_embeddings": True})
    summary = run(config_for(paths[0], paths[1:]), tmp_path / "out2")
    assert (summary.num_tensors, summary.num_unstored) == (5, 1)
