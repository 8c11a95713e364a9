"""Outputs put together of layers: against checkpoints cut before, and against transformers."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist import plan
from della_dist.config import config_from_mapping, load_config
from della_dist.errors import ConfigError, InputError
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.checkpoints import Tensor, load_tensors, make_experts, save_checkpoint, tensor, values_of
from tests.merging import run, write_config

LAYERS = 6
CONFIG = {"num_hidden_layers": LAYERS, "tie_word_embeddings": False}


def model(seed: int, prefix: str = "model.", layers: int = LAYERS) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> Tensor:
        return tensor(rng.normal(0, 0.05, shape), "F32")

    tensors = {f"{prefix}embed_tokens.weight": random(20, 16)}
    for i in range(layers):
        tensors[f"{prefix}layers.{i}.self_attn.o_proj.weight"] = random(16, 16)
        tensors[f"{prefix}layers.{i}.mlp.down_proj.weight"] = random(16, 24)
        tensors[f"{prefix}layers.{i}.input_layernorm.weight"] = random(16)
    return {**tensors, f"{prefix}norm.weight": random(16), "lm_head.weight": random(20, 16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts, a to c."""
    folder = tmp_path_factory.mktemp("models")
    base = model(0)
    for name, tensors in zip(["base", *"abc"], [base, *make_experts(base, 3)], strict=True):
        save_checkpoint(folder / name, tensors, config=CONFIG)
    return folder


def source(folder: Path, name: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {
        "model": str(folder / name),
        "layer_range": [start, stop],
        "parameters": parameters,
    }


def cut(path: Path, out: Path, ranges: Sequence[tuple[int, int]]) -> Path:
    """Write a checkpoint of the layers in `ranges` of another, numbered anew."""
    tensors: dict[str, Tensor] = {}
    numbers = [i for start, stop in ranges for i in range(start, stop)]
    for name, value in load_tensors(path).items():
        found = re.search(r"layers\.([0-9]+)\.", name)
        if found is None:
            tensors[name] = value
        for new, old in enumerate(numbers if found else ()):
            if found and int(found[1]) == old:
                tensors[name.replace(found[0], f"layers.{new}.")] = value
    return save_checkpoint(out, tensors, config={**CONFIG, "num_hidden_layers": len(numbers)})


@pytest.mark.parametrize("method", ["della", "dare_ties", "ties", "task_arithmetic", "linear"])
def test_as_if_the_checkpoints_had_been_cut_before(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """Slices of all models are the same bytes as whole models of those layers."""
    ranges = [(0, 4), (2, 6), (3, 4)]
    parameters: dict[str, Any] = {"weight": 0.6, "density": 0.7, "lambda": 0.9}
    with_base = {"base_model": str(folder / "base")} if method != "linear" else {}
    slices = [{"sources": [source(folder, name, *layers) for name in "abc"]} for layers in ranges]
    content = {"merge_method": method, "parameters": parameters, "slices": slices, **with_base}
    if with_base:  # listed or not: it has the layers of the experts
        slices[1]["sources"].append(source(folder, "base", *ranges[1]))
    config = config_from_mapping(content)
    run(config, tmp_path / "sliced", shard_bytes=10_000)
    names = "abc" if method == "linear" else ["base", *"abc"]
    paths = [cut(folder / name, tmp_path / name, ranges) for name in names]
    whole: dict[str, Any] = {
        "merge_method": method,
        "parameters": parameters,
        "models": [{"model": str(path)} for path in paths[-3:]],
    }
    if with_base:
        whole["base_model"] = str(paths[0])
    run(config_from_mapping(whole), tmp_path / "whole")
    assert load_tensors(tmp_path / "sliced") == load_tensors(tmp_path / "whole")
    stated = json.loads((tmp_path / "sliced" / "config.json").read_text())
    assert stated["num_hidden_layers"] == 9
    assert verify(str(tmp_path / "sliced"), recompute=5).model_digest
    assert run(config, tmp_path / "sliced", shard_bytes=10_000).already_complete


def test_layers_of_several_models(folder: Path, tmp_path: Path) -> None:
    """Layers that differ between the sources, parameters of every level, gradients in a slice."""
    content = {
        "merge_method": "linear",
        "parameters": {"normalize": False, "weight": 0.1},
        "slices": [
            {
                "sources": [
                    source(folder, "a", 0, 3, weight=[1.0, 3.0]),
                    source(folder, "b", 2, 5),
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 0.5}]},
            },
            {"sources": [source(folder, "c", 5, 6), source(folder, "a", 0, 1, weight=2)]},
        ],
    }
    out = tmp_path / "out"
    config = load_config(write_config(tmp_path / "c.yaml", config_from_mapping(content)))
    run(config, out)
    read = {name: values(folder / name) for name in "abc"}
    made = values(out)

    def layer(name: str, i: int, rest: str) -> Any:
        return read[name][f"model.layers.{i}.{rest}"]

    for i in range(3):
        for rest, weight in (("mlp.down_proj.weight", 0.5), ("self_attn.o_proj.weight", 0.1)):
            expected = (1.0 + i) * layer("a", i, rest) + weight * layer("b", i + 2, rest)
            np.testing.assert_allclose(made[f"model.layers.{i}.{rest}"], expected, rtol=1e-5)
    rest = "input_layernorm.weight"
    expected = 0.1 * layer("c", 5, rest) + 2 * layer("a", 0, rest)
    np.testing.assert_allclose(made[f"model.layers.3.{rest}"], expected, rtol=1e-5, atol=1e-8)
    name = "model.embed_tokens.weight"  # of the first slice, at the beginning of its gradients
    np.testing.assert_allclose(made[name], read["a"][name] + 0.1 * read["b"][name], rtol=1e-4)
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_allclose(made[name], 0.1 * read["c"][name] + 2 * read["a"][name], 1e-4)
    assert len(made) == 3 + 4 * 3
    experts = experts_in_table(out)
    assert experts["model.layers.0.mlp.down_proj.weight"] == ["a", "b"]
    assert experts["lm_head.weight"] == ["c", "a"]


def values(path: Path) -> dict[str, Any]:
    return {name: values_of(t) for name, t in load_tensors(path).items()}


def experts_in_table(out: Path) -> dict[str, list[str]]:
    import pyarrow.parquet as pq

    rows = pq.read_table(out / TENSORS_NAME).to_pylist()
    return {row["name"]: [expert["expert"] for expert in row["experts"]] for row in rows}


def test_passing_through(folder: Path, tmp_path: Path) -> None:
    """To the bit, but for what is scaled."""
    a, b = load_tensors(folder / "a"), load_tensors(folder / "b")
    name = "model.layers.4.mlp.down_proj.weight"
    bits = bytearray(a[name].data)
    bits[:8] = np.array([-0.0, np.nan], "<f4").tobytes()  # what a sum would change
    save_checkpoint(
        tmp_path / "a", {**a, name: Tensor("F32", (16, 24), bytes(bits))}, config=CONFIG
    )
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "norm", "value": 0.5}, {"value": 1.0}]
    content = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source(tmp_path, "a", 3, 5)]},
            {"sources": [source(folder, "b", 4, 6, scale=scale)]},
        ],
    }
    out = tmp_path / "out"
    summary = run(config_from_mapping(content), out)
    made = load_tensors(out)
    assert made["model.embed_tokens.weight"] == a["model.embed_tokens.weight"]
    assert made["lm_head.weight"] == b["lm_head.weight"]
    assert made["model.layers.1.mlp.down_proj.weight"].data == bytes(bits)
    assert made["model.layers.3.mlp.down_proj.weight"] == b["model.layers.5.mlp.down_proj.weight"]
    assert not values_of(made["model.layers.2.self_attn.o_proj.weight"]).any()
    for new, old in (("model.layers.3.input_layernorm.weight", 5), ("model.norm.weight", None)):
        theirs = values_of(b[new if old is None else f"model.layers.{old}.input_layernorm.weight"])
        np.testing.assert_array_equal(values_of(made[new]), np.float32(0.5) * theirs)
    assert summary.num_merged == 2 * 2 + 1
    assert verify(str(out), recompute=100).model_digest == summary.model_digest


def test_filters_look_at_the_layers_of_the_sources(folder: Path, tmp_path: Path) -> None:
    """As in mergekit: those of an expert at its own names, shared ones at the output's."""
    zero = [{"filter": "layers.5.mlp.down_proj", "value": 0.0}, {"value": 1.0}]
    slices = [
        {"sources": [source(folder, "a", 0, 4)]},
        {"sources": [source(folder, "a", 2, 6, scale=zero)]},
    ]
    run(config_from_mapping({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    for layer in range(8):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert (not values_of(made[name]).any()) == (layer == 7)
    lambdas = [{"filter": "layers.0.", "value": 0.0}, {"value": 1.0}]
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "slices": [
            {
                "sources": [
                    source(folder, "a", 4, 6, weight=[{"filter": "layers.5.", "value": 0.25}]),
                    source(folder, "b", 3, 5, weight=[{"filter": "layers.3.", "value": 0.5}]),
                    source(folder, "base", 4, 6),
                ],
                "parameters": {"lambda": lambdas},
            }
        ],
    }
    run(config_from_mapping(content), tmp_path / "sum")
    made = load_tensors(tmp_path / "sum")
    base, a, b = (load_tensors(folder / name) for name in ("base", "a", "b"))
    for rest in ("mlp.down_proj.weight", "input_layernorm.weight"):
        names = [f"model.layers.{layer}.{rest}" for layer in range(6)]
        assert made[names[0]] == base[names[4]]
        start = values_of(base[names[5]])
        deltas = values_of(a[names[5]]) - start, values_of(b[names[4]]) - start
        expected = start + 0.25 * deltas[0] + deltas[1]
        assert np.allclose(values_of(made[names[1]]), expected, atol=1e-7)
    wrong = [source(folder, "a", 0, 2, scale=[{"filter": "layers.7.", "value": 2.0}])]
    with pytest.raises(ConfigError, match=r"'layers.7.' of `scale` occurs in no tensor name"):
        plan({"merge_method": "passthrough", "slices": [{"sources": wrong}]})


def test_the_same_layers_again(folder: Path, tmp_path: Path) -> None:
    """They are tensors of their own: other random words, other bytes in the file."""
    again = [{"sources": [source(folder, "a", 2, 4)]} for _ in range(2)]
    content = {"base_model": str(folder / "base"), "merge_method": "dare_linear", "slices": again}
    config = config_from_mapping({**content, "parameters": {"density": 0.5}})
    run(config, tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    for i, rest in ((0, "mlp.down_proj.weight"), (1, "self_attn.o_proj.weight")):
        assert made[f"model.layers.{i}.{rest}"] != made[f"model.layers.{i + 2}.{rest}"]
    passed = config_from_mapping({"merge_method": "passthrough", "slices": again})
    run(passed, tmp_path / "passed")
    made = load_tensors(tmp_path / "passed")
    assert (
        made["model.layers.0.mlp.down_proj.weight"] == made["model.layers.2.mlp.down_proj.weight"]
    )


def test_a_plan_of_slices_travels(folder: Path) -> None:
    slices = [{"sources": [source(folder, name, 0, 2)]} for name in "ab"]
    opened = open_plan(config_from_mapping({"merge_method": "passthrough", "slices": slices}))
    again = pickle.loads(pickle.dumps(opened))
    for shard in opened.shards:
        for one in shard.tensors:
            assert again.source(one) == opened.source(one)


def test_what_a_plan_says(folder: Path) -> None:
    slices = [{"sources": [source(folder, name, 1, 3)]} for name in "ab"]
    described = plan({"merge_method": "passthrough", "slices": slices})
    assert described.num_tensors == 3 + 4 * 3
    assert described.layers == (
        f"0 to 1: 1 to 2 of {folder / 'a'}",
        f"2 to 3: 1 to 2 of {folder / 'b'}",
    )
    assert described.bytes_to_read == described.bytes_to_write


def test_one_module(folder: Path, tmp_path: Path) -> None:
    slices = [{"sources": [source(folder, "a", 0, 2)]}]
    own = {"slices": slices, "parameters": {"scale": 2}}
    inside = {
        "merge_method": "passthrough",
        "modules": {"text_decoder": own},
        "parameters": {"scale": 3},
    }
    assert config_from_mapping(inside) == config_from_mapping(
        {"merge_method": "passthrough", "slices": slices, "parameters": {"scale": 2}}
    )
    # Its name says nothing where there is one stack; filters that do not match fall through.
    own = {"slices": slices, "parameters": {"scale": [{"filter": "mlp", "value": 2}]}}
    run(config_from_mapping({**inside, "modules": {"decoder": own}}), tmp_path / "out")
    scale = [{"filter": "mlp", "value": 2}, {"value": 3}]
    plain = {"merge_method": "passthrough", "slices": slices, "parameters": {"scale": scale}}
    assert run(config_from_mapping(plain), tmp_path / "out").already_complete


@pytest.mark.parametrize(
    ("layers", "words"),
    [([3, 1], "which has no layer"), ([0], "must be two numbers"), ([-1, 2], "from 0 on")],
)
def test_one_wrong_value_is_one_problem(layers: list[int], words: str) -> None:
    slices = [{"sources": [{"model": "a", "layer_range": layers}]}]
    with pytest.raises(ConfigError, match=words) as caught:
        config_from_mapping({"merge_method": "passthrough", "slices": slices})
    assert "problems" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"slices\[0\].sources. is empty"):
        config_from_mapping({"merge_method": "passthrough", "slices": [{"sources": []}]})


def test_layers_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    def refused(*paths: Path, stop: int = 2) -> str:
        slices = [{"sources": [source(path.parent, path.name, 0, stop)]} for path in paths]
        with pytest.raises(InputError) as caught:
            plan({"merge_method": "passthrough", "slices": slices})
        return str(caught.value)

    assert "has 6 layers, and `layer_range: [0, 9]` asks for more" in refused(folder / "a", stop=9)
    several = refused(folder / "a", folder / "b", stop=9)
    assert "2 problems" in several
    assert several.count("`layer_range: [0, 9]`") == 2
    bare = save_checkpoint(tmp_path / "bare", {"x": tensor(np.ones(3), "F32")})
    assert "its layers are not to be found" in refused(bare)
    lacking = save_checkpoint(tmp_path / "few", model(1), config={"num_hidden_layers": 7})
    assert "it has 6 of model.layers.*, and its config.json says 7" in refused(lacking)
    two = {f"{stack}.block.{i}.x": tensor(np.ones(3), "F32") for stack in "ab" for i in range(2)}
    both = save_checkpoint(tmp_path / "two", two)
    assert "several stacks of layers (2 of a.block.*, 2 of b.block.*)" in refused(both)


def test_what_has_a_part_for_each_layer(tmp_path: Path) -> None:
    tensors = {**model(0), "model.embed_tokens_per_layer.weight": tensor(np.ones((20, 12)), "F32")}
    save_checkpoint(tmp_path / "a", tensors, config=CONFIG)
    slices = [{"sources": [source(tmp_path, "a", 0, 3)]}]
    with pytest.raises(InputError, match=r"embed_tokens_per_layer.weight has a part for each"):
        plan({"merge_method": "passthrough", "slices": slices})


def test_tokens_matter_where_rows_are_taken(folder: Path, tmp_path: Path) -> None:
    """A model in the middle gives layers alone, whatever its tokens are."""
    for name in "abc":
        shutil.copytree(folder / name, tmp_path / name)
        words = ["x", "y", "z"] if name == "b" else ["x", "z", "y"]
        document = {"model": {"vocab": {word: i for i, word in enumerate(words)}}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(document))

    def of(order: str) -> dict[str, Any]:
        slices = [{"sources": [source(tmp_path, name, 0, 2)]} for name in order]
        return {"merge_method": "passthrough", "slices": slices}

    assert plan(of("abc")).num_tensors == 3 + 3 * 6
    with pytest.raises(InputError, match="has other tokens"):
        plan(of("acb"))


def test_a_configuration_follows_its_layers(folder: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "layer_types": list("abcdef"), "hybrid_override_pattern": "M-M*-E"}
    config |= {"mlp_only_layers": [1, 5], "eos_token_id": [1, 2], "rope_scaling": None}
    save_checkpoint(tmp_path / "a", model(3), config=config)
    slices = [{"sources": [source(tmp_path, "a", *layers)]} for layers in ((4, 6), (0, 3))]
    content = {"merge_method": "passthrough", "slices": slices}
    run(config_from_mapping(content), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **config,
        "num_hidden_layers": 5,
        "layer_types": list("efabc"),
        "hybrid_override_pattern": "-EM-M",
        "mlp_only_layers": [1, 3],
    }


def test_a_tied_model_of_itself_stays_tied(tmp_path: Path) -> None:
    """Other parameters of layers at the ends change nothing of the head."""
    tensors = model(0)
    del tensors["lm_head.weight"]
    config = {**CONFIG, "tie_word_embeddings": True}
    save_checkpoint(tmp_path / "a", tensors, config=config)
    scale = [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]
    slices = [
        {"sources": [source(tmp_path, "a", 0, 3)]},
        {"sources": [source(tmp_path, "a", 3, 6, scale=scale)]},
    ]
    run(config_from_mapping({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    assert "lm_head.weight" not in load_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_model_with_two_ranges_has_one_embedding(folder: Path, tmp_path: Path) -> None:
    sources = [source(folder, "a", 0, 2, weight=0.5), source(folder, "a", 2, 4, weight=0.25)]
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "slices": [{"sources": [*sources, source(folder, "base", 0, 2)]}],
    }
    run(config_from_mapping(content), tmp_path / "out")
    made, base, a = (values(path) for path in (tmp_path / "out", folder / "base", folder / "a"))
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(made[name], base[name] + 0.5 * (a[name] - base[name]), rtol=1e-5)
    name, other = "model.layers.1.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"
    deltas = 0.5 * (a[name] - base[name]) + 0.25 * (a[other] - base[name])
    np.testing.assert_allclose(made[name], base[name] + deltas, rtol=1e-5, atol=1e-7)


def refused(folder: Path, *which: str, **keys: Any) -> str:
    """Return why slices of the first layers of some models are refused."""
    slices = [{"sources": [source(folder, name, 0, 2)]} for name in which]
    with pytest.raises(InputError) as caught:
        plan({"merge_method": "passthrough", "slices": slices, **keys})
    return str(caught.value)


def test_models_that_do_not_make_one(folder: Path, tmp_path: Path) -> None:
    ours = model(0)
    other = {n.replace("model.", "net."): t for n, t in ours.items()}
    wide = {n: tensor(np.ones((16, 32)), "F32") if "down_proj" in n else t for n, t in ours.items()}
    words = {n: tensor(np.ones((21, 16)), "F32") if "head" in n else t for n, t in ours.items()}
    masked = {n: t for n, t in ours.items() if "head" not in n}
    for name, tensors, more in (
        ("a", ours, {}),
        ("other", other, {}),
        ("wide", wide, {}),
        ("words", words, {}),
        ("biased", {**ours, "model.layers.1.self_attn.o_proj.bias": ours["model.norm.weight"]}, {}),
        ("masked", masked, {"tie_word_embeddings": True, "architectures": ["BertForMaskedLM"]}),
        ("both", ours, {"is_encoder_decoder": True}),
    ):
        save_checkpoint(tmp_path / name, tensors, config={**CONFIG, **more})
    assert "calls its layers net.layers.*" in refused(tmp_path, "a", "other")
    assert "mlp.down_proj.weight is [16, 32], and in" in refused(tmp_path, "a", "wide")
    assert "lack: *.self_attn.o_proj.bias" in refused(tmp_path, "a", "biased")
    assert "its head has 21 rows" in refused(tmp_path, "a", "words")
    assert "would lose its head" in refused(tmp_path, "a", "masked")
    assert "is an encoder and a decoder" in refused(tmp_path, "both")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert "Name it in one way" in refused(tmp_path, "a", "link")


def test_what_stands_in_front_and_behind(tmp_path: Path) -> None:
    """By what it is, not only by what it is called."""
    front = ["transformer.wte.weight", "model.project_in.weight", "mm_projector.0.weight"]
    front += ["embeddings.LayerNorm.weight"]
    back = ["embed_out.weight", "model.embedding_norm.weight", "ln_f.weight", "score.weight"]
    for seed, name in enumerate("ab"):
        layers = {n: t for n, t in model(seed).items() if "layers" in n}
        more = {n: tensor(np.full((3, 4), seed), "F32") for n in (*front, *back)}
        save_checkpoint(tmp_path / name, {**layers, **more}, config={"num_hidden_layers": LAYERS})
    slices = [{"sources": [source(tmp_path, name, 0, 2)]} for name in "ab"]
    run(config_from_mapping({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    made = values(tmp_path / "out")
    assert [float(made[n].max()) for n in (*front, *back)] == [0.0] * len(front) + [1.0] * len(back)


def test_kinds_of_layers_that_no_list_tells(tmp_path: Path) -> None:
    """The code tells them by their number, and a person is told."""
    tensors = model(0)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_checkpoint(tmp_path / "odd", tensors, config={"num_hidden_layers": LAYERS})
    gemma = {"num_hidden_layers": LAYERS, "model_type": "gemma2"}
    save_checkpoint(tmp_path / "gemma", model(0), config=gemma)

    def notes(name: str, start: int) -> str:
        slices = [{"sources": [source(tmp_path, name, start, 6)]}]
        return str(plan({"merge_method": "passthrough", "slices": slices}).notes)

    assert "layer 0 has other tensors than that of" in notes("odd", 1)
    assert "other tensors" not in notes("odd", 0)
    assert "says by the number of a layer" in notes("gemma", 1)
    assert "says by the number of a layer" not in notes("gemma", 2)


def test_a_text_model_that_does_not_count_its_layers(tmp_path: Path) -> None:
    """As LLaVA's: what it leaves out is the default of its code, which is another number."""
    save_checkpoint(tmp_path / "a", model(0), config={"text_config": {"model_type": "llama"}})
    slices = [{"sources": [source(tmp_path, "a", 0, 4)]}]
    run(config_from_mapping({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated["text_config"]["num_hidden_layers"] == 4


def test_a_model_with_images(tmp_path: Path) -> None:
    """Slices are of the text; the other stack comes from the first."""
    paths = []
    for seed in range(2):
        text = model(seed, "model.language_model.")
        image = model(seed + 5, "model.vision_tower.encoder.", layers=LAYERS)
        del image["lm_head.weight"]
        config = {"text_config": {"num_hidden_layers": LAYERS, "layer_types": list("fsfsff")}}
        paths.append(save_checkpoint(tmp_path / str(seed), {**image, **text}, config=config))
    slices = [
        {"sources": [source(tmp_path, "0", 0, 3)]},
        {"sources": [source(tmp_path, "1", 1, 6)]},
    ]
    out = tmp_path / "out"
    run(config_from_mapping({"merge_method": "passthrough", "slices": slices}), out)
    made, first, last = load_tensors(out), load_tensors(paths[0]), load_tensors(paths[1])
    images = {name for name in first if "vision" in name}
    assert {n: made[n] for n in images} == {n: first[n] for n in images}
    assert made["model.language_model.norm.weight"] == last["model.language_model.norm.weight"]
    assert json.loads((out / "config.json").read_text())["text_config"] == {
        "num_hidden_layers": 8,
        "layer_types": list("fsfsfsff"),
    }


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    tensors = model(0, layers=LAYERS + 1)
    config = {**CONFIG, "num_nextn_predict_layers": 1, "first_k_dense_replace": 2}
    path = save_checkpoint(tmp_path / "a", tensors, config=config)
    slices = [
        {"sources": [source(tmp_path, "a", 0, 4)]},
        {"sources": [source(tmp_path, "a", 1, 6)]},
    ]
    content = {"merge_method": "passthrough", "slices": slices}
    described = plan(content)
    assert f"{path}: the layers that predict further tokens are left out" in str(described.notes)
    assert "`first_k_dense_replace` says by the number of a layer" in str(described.notes)
    run(config_from_mapping(content), tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["num_hidden_layers"], stated["num_nextn_predict_layers"]) == (9, 0)
    assert len(load_tensors(tmp_path / "out")) == 9 * 3 + 3


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_by_transformers(tmp_path: Path, tied: bool) -> None:
    """A model put together of itself is itself; one of two has the head of the second."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    paths = []
    for seed in range(2):
        torch.manual_seed(seed)  # noqa: TID251
        config = Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        made = AutoModelForCausalLM.from_config(config).to(torch.float32)
        made.save_pretrained(tmp_path / str(seed))
        paths.append((made, tmp_path / str(seed)))
    words = torch.arange(20)[None]

    def merged(name: str, *which: tuple[int, int, int]) -> Any:
        slices = [{"sources": [source(tmp_path, str(i), a, b)]} for i, a, b in which]
        content = {"merge_method": "passthrough", "slices": slices}
        run(config_from_mapping(content), tmp_path / name)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info.values()), info
        return loaded

    (first, _), (second, _) = paths
    same = merged("same", (0, 0, 2), (0, 2, 6))
    assert torch.equal(same(words).logits, first(words).logits)
    both = merged("both", (0, 0, 4), (1, 1, 6))
    assert both.config.num_hidden_layers == len(both.config.layer_types) == 9
    assert torch.isfinite(both(words).logits).all()
    assert torch.equal(both.lm_head.weight, second.lm_head.weight)
    assert torch.equal(both.model.embed_tokens.weight, first.model.embed_tokens.weight)
    moved = both.model.layers[4].mlp.up_proj.weight
    assert torch.equal(moved, second.model.layers[1].mlp.up_proj.weight)
