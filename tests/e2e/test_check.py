"""The check of models: the right verdict for what training, damage and mistakes leave behind."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import della_dist
from della_dist import CheckSummary, ModelCheck, RunOptions
from della_dist.cli import main
from della_dist.config import config_from_mapping
from della_dist.errors import ConfigError, InputError
from tests import kin
from tests.checkpoints import Tensor, save_checkpoint, save_lora, tensor
from tests.interrupting import interrupt
from tests.merging import assert_paragraph, run
from tests.remote import upload
from tests.servers.proxy import faulty_proxy

SEEDS = range(20)
MIB = 1 << 20


def configuration(
    base: Path | str | None, experts: Sequence[Path | str], method: str = "ties", **keys: Any
) -> dict[str, Any]:
    models = [{"model": str(expert)} for expert in experts]
    content = {"merge_method": method, "models": models, **keys}
    return content if base is None else {"base_model": str(base), **content}


def by_name(found: CheckSummary) -> dict[str, ModelCheck]:
    return {Path(model.model).name: model for model in found.models}


@pytest.mark.parametrize("seed", SEEDS)
def test_verdicts(tmp_path: Path, seed: int) -> None:
    base = kin.drawn(seed)
    permutation = list(kin.PERMUTATIONS)[seed % len(kin.PERMUTATIONS)]
    gentle = kin.tuned(base, 0.04, seed + 100)
    head = {"lm_head.weight": kin.drawn(seed + 200)["lm_head.weight"]}
    models: Mapping[str, tuple[kin.Weights, str]] = {
        "gentle": (gentle, "same backbone"),
        "hard": (kin.tuned(base, 0.1, seed + 101), "same backbone"),
        "lora": (kin.low_rank(base, seed), "same backbone"),
        "new-head": ({**gentle, **head}, "same backbone"),
        "continued": (kin.tuned(base, 0.3, seed + 102), "far"),
        "unrelated": (kin.drawn(seed + 300), "another backbone"),
        "copy": (base, "copy"),
        "damaged": (kin.tuned(base, 0.04, seed + 103), "damaged"),
        "permuted": (
            kin.PERMUTATIONS[permutation](kin.tuned(base, 0.04, seed + 104)),
            "another backbone",
        ),
    }
    kin.save(tmp_path / "base", base)
    paths = [kin.save(tmp_path / name, weights) for name, (weights, _) in models.items()]
    damaged = kin.damage(tmp_path / "damaged", list(kin.DAMAGES)[seed % len(kin.DAMAGES)], seed)
    config = configuration(tmp_path / "base", paths)
    for sample_bytes in (3 * MIB, 256 * MIB):  # of 7.5 MB in all
        found = della_dist.check(config, sample_bytes=sample_bytes)
        assert found.bytes_read <= sample_bytes
        assert (found.num_tensors < found.num_compared) == (sample_bytes == 3 * MIB)
        checks = by_name(found)
        expected = {name: verdict for name, (_, verdict) in models.items()}
        assert {name: check.verdict for name, check in checks.items()} == expected
        assert {file for odd in checks["damaged"].oddities for file in odd.files} == {damaged.name}
        assert all(checks[name].oddities == () for name in ("gentle", "hard", "lora", "continued"))
    # The last one has read everything.
    relative, cosine = figures(base, gentle)
    assert checks["gentle"].relative_delta == pytest.approx(relative, rel=0.02)
    assert checks["gentle"].cosine == pytest.approx(cosine, abs=1e-4)
    assert checks["copy"].untouched == 1
    assert 0.5 < checks["lora"].untouched < 0.95


def figures(base: kin.Weights, expert: kin.Weights) -> tuple[float, float]:
    """Return the norm of the delta in parts of the base's, and the cosine, of matrices."""
    names = [name for name, shape in kin.SHAPES.items() if len(shape) > 1]
    flat = [np.concatenate([w[n].reshape(-1) for n in names]) for w in (base, expert)]
    b, e = (values.astype(np.float64) for values in flat)
    return (
        float(np.linalg.norm(e - b) / np.linalg.norm(b)),
        float(b @ e / np.linalg.norm(b) / np.linalg.norm(e)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts of it, one of them again with noise, and a model of its own."""
    folder = tmp_path_factory.mktemp("kin")
    base = kin.drawn(0)
    math = kin.tuned(base, 0.04, 1)
    models = {
        "base": base,
        "math": math,
        "code": kin.tuned(base, 0.05, 2),
        "math-again": kin.tuned(math, 0.002, 3),
        "other": kin.drawn(4),
        "other-tuned": kin.tuned(kin.drawn(4), 0.04, 5),
        "far": kin.tuned(base, 0.3, 6),
        "hole": math,
        "nan": {**math, "model.norm.weight": np.full(96, np.nan, np.float32)},
    }
    for name, weights in models.items():
        kin.save(folder / name, weights)
    kin.damage(folder / "hole", "hole", 1)
    return folder


def test_a_model_below_an_adapter_is_not_judged_by_its_norms(folder: Path, tmp_path: Path) -> None:
    """Its matrices are only seen as the adapter changes them; that expert has a verdict."""
    base = kin.drawn(0)
    trained = kin.tuned(base, 0.04, 7)
    vectors = {name for name, shape in kin.SHAPES.items() if len(shape) < 2}
    below = kin.save(tmp_path / "below", {**trained, **{name: base[name] for name in vectors}})
    rng = np.random.default_rng(0)
    factors = {
        name.removesuffix(".weight"): (
            rng.normal(0, 0.01, (2, shape[1])),
            rng.normal(0, 0.01, (shape[0], 2)),
        )
        for name, shape in kin.SHAPES.items()
        if len(shape) == 2
    }
    lora = save_lora(tmp_path / "lora", factors, 2, 2)
    config = configuration(folder / "base", [f"{below}+{lora}", folder / "math"])
    found = della_dist.check(config)
    assert [one.verdict for one in found.models].count("copy") == 0
    assert all("untouched copy" not in note for note in found.notes)
    assert {Path(one.model).name for one in found.models} >= {"math"}


def of(folder: Path, *names: str, base: str | None = "base", **keys: Any) -> dict[str, Any]:
    at = None if base is None else folder / base
    return configuration(at, [folder / name for name in names], **keys)


def invoke(command: str, config: Mapping[str, Any], path: Path, *options: object) -> Result:
    file = path / "merge.yaml"
    file.write_text(json.dumps(config))
    return CliRunner().invoke(main, [command, str(file), *map(str, options)])


def test_what_the_command_prints(folder: Path, tmp_path: Path) -> None:
    config = of(folder, "math", "code", "math-again")
    result = invoke("check", config, tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"against {folder / 'base'}"
    assert re.fullmatch(
        r" {8}math {8}same backbone     delta 4\.?\d? %, cosine 0\.999\d, untouched .* %", lines[1]
    )
    assert re.search(r"math and code: cosine -?0\.00\d, signs agree at (49|50|51) %", result.stdout)
    assert f"{folder / 'math'} and {folder / 'math-again'} are nearly the same" in result.stdout
    printed = json.loads(invoke("check", config, tmp_path, "--json").stdout)
    found = json.loads(json.dumps(della_dist.check(config).to_dict()))
    same = {key: value for key, value in found.items() if key != "elapsed_s"}
    assert same == {key: value for key, value in printed.items() if key != "elapsed_s"}
    assert [pair["models"][1] for pair in found["pairs"]] == [
        str(folder / name) for name in ("code", "math-again", "math-again")
    ]


def test_exit_status_of_the_command(folder: Path, tmp_path: Path) -> None:
    for name in ("other", "hole"):
        result = invoke("check", of(folder, "math", name), tmp_path)
        assert result.exit_code == 3
        assert f"note    {folder / name} " in result.stdout
        assert result.stderr == ""
    assert invoke("check", of(folder, "math", "far"), tmp_path).exit_code == 0
    wrong = invoke("check", of(folder, "math"), tmp_path, "--sample", "12 parsecs")
    assert_paragraph(wrong, 2, "--sample", "12 parsecs")
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        della_dist.check(of(folder, "math"), sample_bytes=1000)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other", ("another backbone", "base", "median cosine", "pre-trained model")),
        ("hole", ("damaged", "model-00002-of-00002.safetensors", "all zeros")),
    ],
)
def test_a_merge_refuses(folder: Path, tmp_path: Path, name: str, words: Sequence[str]) -> None:
    config, out = of(folder, "math", name), tmp_path / "out"
    result = invoke("merge", config, tmp_path, out)
    assert_paragraph(result, 2, str(folder / name), *words, "--allow-mismatch")
    assert not out.exists()
    with pytest.raises(InputError, match="--allow-mismatch"):
        della_dist.merge(config, out)
    allowed = della_dist.merge(config, out, RunOptions(allow_mismatch=True))
    assert any(note.startswith(f"{folder / name} ") for note in allowed.notes)
    unseen = della_dist.merge(config, tmp_path / "unseen", RunOptions(check=False))
    assert not any(note.startswith(f"{folder / name} ") for note in unseen.notes)
    assert unseen.model_digest == allowed.model_digest


def test_a_merge_says_what_it_does_not_refuse(folder: Path, tmp_path: Path) -> None:
    summary = della_dist.merge(of(folder, "math", "math-again", "far"), tmp_path / "out")
    said = [note for note in summary.notes if note.startswith(str(folder))]
    assert [note.split(" (")[0] for note in said] == [
        f"{folder / 'far'} is much further than a fine-tune",
        f"{folder / 'math'} and {folder / 'math-again'} are nearly the same",
    ]


def test_values_that_are_no_numbers_are_left_to_the_merge(folder: Path, tmp_path: Path) -> None:
    """Of these the configuration says what becomes."""
    config = of(folder, "math", "nan", on_nonfinite="zero")
    (nan,) = (model for model in della_dist.check(config).models if model.model.endswith("nan"))
    assert (nan.verdict, nan.num_nonfinite) == ("damaged", 96)
    assert "model.norm.weight" in nan.oddities[0].where
    assert nan.relative_delta == pytest.approx(0.04, rel=0.1)
    della_dist.merge(config, tmp_path / "out")


def test_a_base_that_is_damaged(folder: Path) -> None:
    for base, what in (("hole", "all zeros in the other"), ("nan", "96 of 96 values of the other")):
        (found,) = della_dist.check(of(folder, "code", base=base)).models
        assert found.verdict == "same backbone"
        assert found.oddities
        assert all(odd.what.startswith(what) for odd in found.oddities)


def test_a_base_that_does_not_belong_to_the_others(folder: Path) -> None:
    found = della_dist.check(of(folder, "math", "code", base="other"))
    assert {model.verdict for model in found.models} == {"another backbone"}
    assert found.notes[-1] == (
        "The models are like each other (cosines above 0.9): it is "
        f"{folder / 'other'} that does not belong to them."
    )


def test_methods_without_a_base_compare_with_the_first(folder: Path, tmp_path: Path) -> None:
    config = of(folder, "math", "code", "other", base=None, merge_method="linear")
    found = della_dist.check(config)
    assert {model.reference for model in found.models} == {str(folder / "math")}
    assert {n: m.verdict for n, m in by_name(found).items()} == {
        "code": "same backbone",
        "other": "another backbone",
    }
    # A base that is there for its files alone is not compared.
    files = {**config, "base_model": str(folder / "other-tuned")}
    assert by_name(della_dist.check(files)).keys() == {"code", "other"}
    with pytest.raises(InputError, match="another backbone"):
        della_dist.merge(config, tmp_path / "out")
    config["models"][2]["parameters"] = {"weight": 0.0}
    assert by_name(della_dist.check(config)).keys() == {"code"}
    della_dist.merge(config, tmp_path / "out")


def layers(folder: Path, name: str, first: int, last: int) -> dict[str, Any]:
    return {"model": str(folder / name), "layer_range": [first, last]}


def test_layers_that_are_stacked_are_not_compared(folder: Path, tmp_path: Path) -> None:
    stacked = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers(folder, "math", 0, 3)]},
            {"sources": [layers(folder, "other", 1, 4)]},
        ],
    }
    assert della_dist.check(stacked).models == ()
    assert "there is nothing to compare" in invoke("check", stacked, tmp_path).stdout
    della_dist.merge(stacked, tmp_path / "stacked")
    shifted = {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers(folder, "math", 0, 2), layers(folder, "code", 2, 4)]},
            {"sources": [layers(folder, "math", 2, 4), layers(folder, "code", 2, 4)]},
        ],
    }
    found = by_name(della_dist.check(shifted))
    # Of the first slice, only what belongs to no layer.
    assert found["code"].verdict == "same backbone"
    assert found["code"].num_tensors == 9 * 2 + 3


def test_a_run_that_goes_on_is_not_checked_again(folder: Path, tmp_path: Path) -> None:
    config, out = config_from_mapping(of(folder, "math", "other")), tmp_path / "out"
    small: dict[str, Any] = {"shard_bytes": 200_000, "check": True}
    interrupt(config, out, after=2, **{**small, "check": False})
    assert run(config, out, **small).tasks_resumed == 2
    assert run(config, out, **small).already_complete
    with pytest.raises(InputError, match="another backbone"):
        run(config, out, restart=True, **small)
    assert run(config, out, **small).already_complete  # nothing was removed


def test_stages_are_checked_before_any_work(folder: Path, tmp_path: Path) -> None:
    first = {"name": "both", **of(folder, "math", "code")}
    last = of(folder, "far", "other")
    last["models"][0]["model"] = "both"
    stages = {**last, "stages": [first]}
    found = della_dist.check(stages)
    assert [stage.name for stage in found.stages] == ["both"]
    assert by_name(found).keys() == {"other"}  # what is not made yet cannot be looked at
    assert [model.model for model in found.refused] == [str(folder / "other")]
    with pytest.raises(InputError, match="another backbone"):
        della_dist.merge(stages, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_how_much_of_the_base_is_left(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = of(folder, "math", "code", merge_method="task_arithmetic")
    della_dist.merge({**config, "parameters": {"weight": 1.0, "lambda": 0.5}}, out)
    found = della_dist.check(config, out)
    assert found.output is not None
    one, other = (model.relative_delta for model in found.models)
    assert found.output.relative_delta == pytest.approx(0.5 * math.hypot(one, other), rel=0.02)
    assert found.output.verdict == "same backbone"
    # Half the sum of two deltas that are perpendicular to each other.
    expected = [one / math.hypot(one, other), other / math.hypot(one, other)]
    assert [pair.delta_cosine for pair in found.output_pairs] == pytest.approx(expected, abs=0.02)
    assert {pair.models[1] for pair in found.output_pairs} == {str(out)}
    printed = invoke("check", config, tmp_path, "--out", out).stdout
    assert "out   same backbone     delta" in printed
    shown = [
        f"deltas  {n} and out: cosine 0.{int(10 * c)}"
        for n, c in zip(["math", "code"], expected, strict=True)
    ]
    assert all(line in printed for line in shown)
    small = kin.save(tmp_path / "small", {n: w[:8] for n, w in kin.drawn(9).items()})
    with pytest.raises(InputError, match="is no output of this configuration"):
        della_dist.check(config, small)


@pytest.mark.s3
def test_from_a_store(
    folder: Path, s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures; what is read is what a proxy has seen."""
    names = ("base", "math", "code", "other")
    local = of(folder, *names[1:])
    remote = json.loads(json.dumps(local).replace(str(folder), f"s3://{s3_bucket}"))
    for name in names:
        upload(folder / name, f"s3://{s3_bucket}/{name}")
    with faulty_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
        found = della_dist.check(remote, sample_bytes=MIB)
        ranges = [
            re.fullmatch(r"bytes=(\d+)-(\d+)", seen.range)
            for seen in proxy.seen()
            if seen.method == "GET" and ".safetensors" in seen.target and seen.range
        ]
    # Headers begin a file; two whole embeddings are what planning compares with their heads.
    sizes = [int(one[2]) + 1 - int(one[1]) for one in ranges if one and int(one[1])]
    whole = 2 * 200 * 96
    assert found.bytes_read == sum(size for size in sizes if size != whole)
    assert sizes.count(whole) == 2
    assert 0.8 * MIB < found.bytes_read <= MIB
    here = della_dist.check(local, sample_bytes=MIB)
    text = json.dumps(found.to_dict()["models"]).replace(f"s3://{s3_bucket}", str(folder))
    assert text == json.dumps(here.to_dict()["models"])


def test_another_layout_is_compared_as_it_is_merged(folder: Path, tmp_path: Path) -> None:
    weights = kin.tuned(kin.drawn(0), 0.04, 1)
    fused = {name: tensor(values, "BF16") for name, values in weights.items()}
    for layer in range(kin.NUM_LAYERS):
        for whole, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            at = f"model.layers.{layer}.{whole.partition('.')[0]}"
            pieces = [fused.pop(f"{at}.{part}_proj.weight") for part in parts]
            shape = (sum(piece.shape[0] for piece in pieces), 96)
            data = b"".join(piece.data for piece in pieces)
            fused[f"model.layers.{layer}.{whole}.weight"] = Tensor("BF16", shape, data)
    save_checkpoint(tmp_path / "math", fused, config={"model_type": "llama"})
    (plain,) = della_dist.check(of(folder, "math")).models
    (found,) = della_dist.check(configuration(folder / "base", [tmp_path / "math"])).models
    assert replace(found, model=plain.model) == plain
