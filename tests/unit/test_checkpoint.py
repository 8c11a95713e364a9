"""What is a checkpoint and what is not; each refusal is one paragraph and comes at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from della_dist.errors import InputError
from della_dist.planning.facts import ModelFacts, model_facts
from della_dist.specs.checkpoint import FileVersion
from della_dist.storage.checkpoint import open_checkpoint, with_samples
from della_dist.storage.header import build_header

INDEX = "model.safetensors.index.json"
SHARD_2 = "model-00002-of-00002.safetensors"
SHARDS = {
    "model-00001-of-00002.safetensors": ["a", "b"],
    "model-00002-of-00002.safetensors": ["c"],
}


def write_shard(path: Path, names: Sequence[str], shape: tuple[int, ...] = (4, 2)) -> None:
    """Write a shard whose data is a hole: nothing may read it."""
    header, placed = build_header([(name, "BF16", shape) for name in names], {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, placed[-1].stop if placed else len(header))


def write_index(root: Path, shards: Mapping[str, Sequence[str]], name: str = INDEX) -> None:
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (root / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a good sharded checkpoint."""
    root = tmp_path / "model"
    for name, tensors in SHARDS.items():
        write_shard(root / name, tensors)
    write_index(root, SHARDS)
    (root / "config.json").write_text('{"tie_word_embeddings": false}')
    return root


def refusal(root: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(root))
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 1500
    return message


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# What is accepted.


def test_indexed(root: Path) -> None:
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.location == str(root)
    assert [shard.name for shard in checkpoint.shards] == list(SHARDS)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, "BF16", (4, 2))
        assert tensor.stop - tensor.start == 16
        assert name in SHARDS[checkpoint.shards[tensor.shard].name]
    stat = (root / checkpoint.shards[1].name).stat()
    assert checkpoint.shards[1].size_bytes == stat.st_size
    version = FileVersion.parse(checkpoint.shards[1].version)
    assert version == FileVersion(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    assert checkpoint.shards[1].sample == ""
    sampled = with_samples(checkpoint)
    for shard in sampled.shards:
        assert shard.sample == blake3((root / shard.name).read_bytes()).hexdigest()
    assert len(checkpoint.shards[1].header_sha256) == 64
    assert checkpoint.files == ("config.json", *SHARDS, INDEX)
    assert checkpoint.folders == ()
    assert model_facts(checkpoint) == ModelFacts(tie=False)


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors"],
        ["model.safetensors", "consolidated.safetensors"],
        ["other.safetensors"],
        ["model-00001-of-00001.safetensors"],
        [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)],
    ],
)
def test_without_index(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_shard(tmp_path / name, [f"tensor of {name}"])
    checkpoint = open_checkpoint(str(tmp_path))
    expected = [name for name in names if "consolidated" not in name]
    assert [shard.name for shard in checkpoint.shards] == expected
    assert list(checkpoint.tensors) == [f"tensor of {name}" for name in expected]


def test_index_rules_over_other_files(root: Path) -> None:
    write_shard(root / "consolidated.safetensors", ["a", "b", "c"])
    assert len(open_checkpoint(str(root)).shards) == 2


def test_only_index_may_have_another_name(root: Path) -> None:
    (root / INDEX).rename(root / "diffusion.safetensors.index.json")
    assert len(open_checkpoint(str(root)).tensors) == 3


def test_shards_in_a_subdirectory(tmp_path: Path) -> None:
    write_shard(tmp_path / "weights/one.safetensors", ["a"])
    write_index(tmp_path, {"weights/one.safetensors": ["a"]})
    assert open_checkpoint(str(tmp_path)).shards[0].name == "weights/one.safetensors"


def test_linked_checkpoint_and_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "link").symlink_to(root, target_is_directory=True)
    assert len(open_checkpoint(str(root.parent / "link")).tensors) == 3
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(open_checkpoint("~/model").tensors) == 3


def test_hub_cache(root: Path) -> None:
    model = root.parent / "hub/models--org--name"
    snapshot = model / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(root.iterdir())):
        path.rename(model / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(str(snapshot))
    assert len(checkpoint.tensors) == 3
    assert checkpoint.files == ("config.json", *SHARDS, INDEX)
    (root.parent / "linked").symlink_to(snapshot, target_is_directory=True)
    assert len(open_checkpoint(str(root.parent / "linked")).tensors) == 3
    # What lies beside the blobs is not the cache's.
    (model / "blobs/1").rename(root.parent / "elsewhere")
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    (snapshot / "model-00001-of-00002.safetensors").symlink_to(root.parent / "elsewhere")
    assert "is a link to" in refusal(snapshot)


def test_what_lies_at_the_top_level_is_named_whatever_it_is(root: Path) -> None:
    for name in ("tokenizer.json", ".hidden", "a.gguf"):
        (root / name).touch()
    (root / "folder").mkdir()
    (root / "folder/inner.json").touch()
    (root / ".cache").mkdir()
    (root / "linked").symlink_to("folder")
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.files == (
        *(".hidden", "a.gguf", "config.json", "dangling", "fifo", *SHARDS, INDEX),
        "tokenizer.json",
    )
    assert checkpoint.folders == (".cache", "folder", "linked")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.symlink_to("gone"), "config.json is a link to gone, which leads to"),
        (lambda path: path.symlink_to("/etc/hostname"), "is a link to /etc/hostname, outside"),
        (lambda path: path.mkdir(), "config.json is a directory, where a file"),
        (os.mkfifo, "config.json is not a regular file"),
        (lambda path: path.symlink_to(path.name), "which leads to nothing"),
    ],
)
def test_config_that_is_no_file(root: Path, spoil: Callable[[Path], object], says: str) -> None:
    (root / "config.json").unlink()
    spoil(root / "config.json")
    assert says in refusal(root)


@pytest.mark.parametrize(
    ("config", "facts", "ties_head"),
    [
        ('{"tie_word_embeddings": true}', ModelFacts(tie=True), True),
        ('{"tie_word_embeddings": false}', ModelFacts(tie=False), False),
        ("{}", ModelFacts(), None),
        ('{"tie_word_embeddings": 1}', ModelFacts(), None),
        ('{"text_config": {"tie_word_embeddings": true}}', ModelFacts(text_tie=True), True),
        ('{"text_config": {"tie_word_embeddings": false}}', ModelFacts(text_tie=False), None),
        (
            '{"tie_word_embeddings": false, "text_config": {"tie_word_embeddings": true}}',
            ModelFacts(tie=False, text_tie=True),
            True,
        ),
        ('{"text_config": null}', ModelFacts(), None),
        ('{"time_step_limit": [0.0, Infinity], "x": NaN}', ModelFacts(), None),
        ('{"is_encoder_decoder": true}', ModelFacts(is_encoder_decoder=True), None),
        (
            '{"quantization_config": {"quant_method": "gptq"}}',
            ModelFacts(quant_method="gptq"),
            None,
        ),
        (
            '{"text_config": {"compression_config": {"format": "pack-quantized"}}}',
            ModelFacts(quant_method="pack-quantized"),
            None,
        ),
        ('{"quantization_config": null}', ModelFacts(), None),
    ],
)
def test_facts_of_the_model(
    root: Path, config: str, facts: ModelFacts, ties_head: bool | None
) -> None:
    (root / "config.json").write_text(config)
    model = model_facts(open_checkpoint(str(root)))
    assert model == facts
    assert model.ties_head is ties_head


@pytest.mark.parametrize("config", ["", "{", "[]", "[" * 10_000, '{"a":1,"a":2}', "\0", "{'a': 1}"])
def test_bad_config(root: Path, config: str) -> None:
    (root / "config.json").write_text(config)
    assert "config.json is not a valid configuration" in refusal(root)


def test_no_config(root: Path) -> None:
    (root / "config.json").unlink()
    assert model_facts(open_checkpoint(str(root))) == ModelFacts()


# What is refused.


def test_places_that_are_no_checkpoint(tmp_path: Path, root: Path) -> None:
    assert "does not exist. Check the path" in refusal(tmp_path / "missing")
    assert "does not exist. Check the path" in refusal("some-org/Some.Model-7B")
    for path in (r"E:\models\one", "D:/models/one", r"\\disk\one", r".\one"):
        assert "written as on Windows" in refusal(path)
    assert "is not a directory" in refusal(root / "config.json")
    assert "NUL" in refusal("a\0b")
    assert "holds nothing. Check the URL" in refusal("memory://nowhere/model")
    assert "fsspec" in refusal("nonsense://bucket/model")
    (tmp_path / "empty").mkdir()
    assert "holds no safetensors files" in refusal(tmp_path / "empty")
    (tmp_path / "empty/pytorch_model.bin").touch()
    assert "pytorch_model.bin is no file of torch.save" in refusal(tmp_path / "empty")
    (tmp_path / "lora").mkdir()
    write_shard(tmp_path / "lora/adapter_model.safetensors", ["a"])
    (tmp_path / "lora/adapter_config.json").touch()
    assert "adapter_config.json is not a valid" in refusal(tmp_path / "lora")
    (tmp_path / "lora/adapter_config.json").unlink()
    assert "lora has no adapter_config.json, as an adapter" in refusal(tmp_path / "lora")
    (tmp_path / "lora/adapter_model.safetensors").rename(tmp_path / "lora/other.txt")
    (tmp_path / "lora/adapter_config.json").touch()
    assert "lora has no adapter_model.safetensors, as an adapter" in refusal(tmp_path / "lora")
    write_shard(tmp_path / "lora/model.safetensors", ["x.lora_A.weight", "x.lora_B.weight"])
    assert "lora has no adapter_model.safetensors, as an adapter" in refusal(tmp_path / "lora")
    write_shard(tmp_path / "bare/model.safetensors", [])
    assert "holds no tensors" in refusal(tmp_path / "bare")


@pytest.mark.parametrize("location", ["missing", "./some/missing", "a/b/c"])
def test_missing_relative_path_is_shown_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_checkpoint(location)
    hint = " (a model on the Hub is named org/name)" if location == "missing" else ""
    assert f"it was looked for at {tmp_path / location}{hint}." in str(caught.value)


def test_root_of_a_model_in_a_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--some--model"
    for revision in ("0123abc", "4567def"):
        write_shard(root / "snapshots" / revision / "model.safetensors", ["a"])
    (root / "blobs").mkdir()
    first, second = (str(root / "snapshots" / revision) for revision in ("0123abc", "4567def"))
    assert f"in its snapshots. Give {first} or {second}." in refusal(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("4567def")
    assert f"in its snapshots. Give {second}." in refusal(root)
    assert list(open_checkpoint(second).tensors) == ["a"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.safetensors", "b.safetensors"], "no index that says which"),
        (["m-00001-of-00002.safetensors", "b.safetensors"], "no index that says which"),
        (["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"], "missing m-00002-of-"),
        (["m-00001-of-00002.safetensors"], "1 of 2 shards"),
        (["m-00000-of-00001.safetensors"], "missing m-00001-of-00001"),
        (["m-00001-of-99999.safetensors"], "1 of 99999 shards"),
        (["m-00001-of-00000.safetensors"], "1 of 0 shards"),
    ],
)
def test_unclear_sets(tmp_path: Path, names: list[str], says: str) -> None:
    for name in names:
        write_shard(tmp_path / name, [name])
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        '{"weight_map": {}, "weight_map": {}}',
        '{"weight_map": ' + "[" * 100_000,
        '{"weight_map": ' + '{"a":' * 5000 + "1" + "}" * 5001,
        '{"x": ' + "1" * 100_000 + "}",
        "\xff",
    ],
)
def test_bad_index(root: Path, text: str) -> None:
    (root / INDEX).write_bytes(text.encode("latin-1"))
    assert f"{INDEX} is not a valid index" in refusal(root)


def test_odd_indexes(root: Path) -> None:
    (root / INDEX).write_text('{"weight_map": {}}')
    assert "names no tensors" in refusal(root)
    os.truncate(root / INDEX, 100_000_001)
    assert "too large for an index" in refusal(root)
    (root / INDEX).unlink()
    os.mkfifo(root / INDEX)
    assert "is not a regular file" in refusal(root)
    (root / INDEX).unlink()
    (root / "a.safetensors.index.json").touch()
    (root / "b.safetensors.index.json").touch()
    assert "has 2 indexes" in refusal(root)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "x/../../outside.safetensors",
        "./model.safetensors",
        "",
        "a//b.safetensors",
        "nul\0.safetensors",
    ],
)
def test_index_that_leads_out(root: Path, shard: str) -> None:
    write_shard(root.parent / "outside.safetensors", ["a"])
    write_index(root, {shard: ["a"]})
    assert "not the name of a file inside the checkpoint" in refusal(root)


def test_links_that_lead_out(root: Path) -> None:
    write_shard(root.parent / "outside.safetensors", ["c"])
    path = root / "model-00002-of-00002.safetensors"
    path.unlink()
    path.symlink_to("../outside.safetensors")
    assert "is a link to" in refusal(root)
    path.unlink()
    (root / "inside").mkdir()
    write_shard(root / "inside/c.safetensors", ["c"])
    path.symlink_to("inside/c.safetensors")
    assert len(open_checkpoint(str(root)).tensors) == 3
    path.unlink()
    path.symlink_to(path.name)
    refusal(root)


def test_links_that_lead_out_without_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "elsewhere/x", ["a"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").symlink_to("../elsewhere/x")
    assert "is a link to" in refusal(tmp_path / "model")


def test_old_downloads_link_into_the_hub_cache(root: Path) -> None:
    blobs = root.parent / "hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    path = root / SHARD_2
    path.rename(blobs / "0123")
    path.symlink_to(blobs / "0123")
    assert len(open_checkpoint(str(root)).tensors) == 3


def test_index_that_names_pickles(root: Path) -> None:
    write_index(root, {"pytorch_model.bin": ["a"]})
    assert "which is no safetensors file" in refusal(root)


def test_two_checkpoints_in_one_directory(root: Path) -> None:
    write_shard(root / "model.safetensors", ["a", "b", "c"])
    assert "is two checkpoints" in refusal(root)
    write_index(root, {"model.safetensors": ["a", "b", "c"]})
    assert len(open_checkpoint(str(root)).shards) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), f"{SHARD_2} is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
        (lambda path: os.truncate(path, 40), "cut short"),
        (lambda path: os.truncate(path, 0), "0 bytes, too few"),
        (lambda path: os.truncate(path, 10**12), "written past its end"),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "lfs pull",
        ),
        (lambda path: (path.unlink(), path.mkdir()), "is a directory, where a file"),
        (to_fifo, "is not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to("gone")), "a link to gone, which leads to"),
        (lambda path: write_shard(path, ["c", "d"]), "does not know 1 tensors"),
        (lambda path: write_shard(path, ["d"]), "shards that do not have them (c; the first in"),
        (lambda path: write_shard(path, ["a", "c"]), "tensor 'a' is both in"),
        (
            lambda path: write_index(
                path.parent, {SHARD_2: ["a", "c"], "model-00001-of-00002.safetensors": ["b"]}
            ),
            "places tensor 'a' in model-00002",
        ),
    ],
)
def test_spoiled(root: Path, change: Callable[[Path], object], says: str) -> None:
    change(root / SHARD_2)
    began = time.process_time()
    assert says in refusal(root)
    assert time.process_time() - began < 2


def test_unreadable(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (root / SHARD_2).chmod(0)
    assert "Permission denied" in refusal(root)


def test_many_names_are_shortened(root: Path) -> None:
    write_shard(root / SHARD_2, ["c", *(f"layer.{number:04}" for number in range(1000))])
    message = refusal(root)
    assert "1000 tensors" in message
    assert "and 995 more" in message


# Size.


def test_two_hundred_shards_of_five_hundred_tensors(tmp_path: Path) -> None:
    shards = {
        f"model-{number:05}-of-00200.safetensors": [
            f"model.layers.{number}.mlp.experts.{expert}.gate_proj.weight" for expert in range(500)
        ]
        for number in range(1, 201)
    }
    for name, tensors in shards.items():
        write_shard(tmp_path / name, tensors, (7168, 2048))  # 2.9 TB, of holes
    write_index(tmp_path, shards)
    took = []
    for _ in range(2):
        began = time.process_time()
        checkpoint = open_checkpoint(str(tmp_path))
        took.append(time.process_time() - began)
    assert len(checkpoint.tensors) == 100_000
    assert min(took) < 2.4  # 0.8 s on a quiet machine
