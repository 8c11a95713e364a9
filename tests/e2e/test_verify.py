"""`della-dist verify` finds every changed byte, says where, and recomputes what was forged."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.runtime.output.checksums import check_shard
from della_dist.storage.manifest import (
    MANIFEST_NAME,
    TensorRecord,
    dump_manifest,
    load_manifest,
    model_digest,
)
from della_dist.storage.opening import open_store
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.tensor_table import TENSORS_NAME, dump_tensors, load_tensors
from tests.merging import assert_paragraph, config_for, run, save_family
from tests.staged import contents

NUM_FLIPS = 200

COMPANIONS = {
    "config.json": '{"model_type": "llama", "tie_word_embeddings": false}\n',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "merges.txt": "a b\n",
    "modeling_thing.py": "pass\n",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, `expert0` to `expert2` and a merge of them, `out`."""
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder, num_shards=2)
    for name, text in COMPANIONS.items():
        (base / name).write_text(text)
    config = config_for(base, experts, parameters={"density": 0.5})
    run(config, folder / "out", shard_bytes=150_000)
    return folder


@pytest.fixture
def out(family: Path, tmp_path: Path) -> Path:
    """Return a copy of the output, to be damaged."""
    return Path(shutil.copytree(family / "out", tmp_path / "out"))


def verify(out: Path, *options: str) -> Result:
    result = CliRunner().invoke(main, ["verify", str(out), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_found(out: Path, *words: str, status: int = 3) -> None:
    assert_paragraph(verify(out), status, *words)


@contextmanager
def flipped(path: Path, position: int, bit: int = 0) -> Iterator[None]:
    """Flip one bit of a file, and flip it back."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))
        file.flush()
        yield
        file.seek(position)
        file.write(bytes([byte]))


def records(out: Path) -> list[TensorRecord]:
    return load_tensors((out / TENSORS_NAME).read_bytes())


def strict_files(out: Path) -> list[Path]:
    """Return every file of the output but the model card, which may be edited.

    That of how it was run is no part of it.
    """
    return [path for path in sorted(out.iterdir()) if path.name not in ("README.md", RUN_NAME)]


def shards(out: Path) -> list[Path]:
    found = sorted(out.glob("*.safetensors"))
    assert len(found) > 3
    return found


def test_intact(out: Path) -> None:
    result = verify(out)
    assert result.exit_code == 0
    assert result.stderr == ""
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    assert manifest["model_digest"] in result.stdout
    assert {f["name"] for f in manifest["files"]} == {
        *COMPANIONS,
        TENSORS_NAME,
        "README.md",
        "model.safetensors.index.json",
    }


def test_json(out: Path) -> None:
    result = verify(out, "--json", "--recompute", "2")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert set(summary) == {
        "output",
        "model_digest",
        "num_files",
        "num_tensors",
        "bytes_read",
        "recomputed",
        "edited",
        "elapsed_s",
    }
    assert summary["output"] == str(out)
    assert summary["num_tensors"] == len(records(out))
    assert summary["num_files"] == len(contents(out))
    read = contents(out, but=[MANIFEST_NAME]).values()
    assert summary["bytes_read"] == sum(map(len, read))
    assert len(summary["recomputed"]) == 2
    assert set(summary["recomputed"]) <= {t.name for t in records(out)}


def test_json_of_a_damaged_output_prints_nothing(out: Path) -> None:
    with flipped(out / "config.json", 0):
        result = verify(out, "--json")
    assert (result.exit_code, result.stdout) == (3, "")


def test_flips_in_shard_headers(out: Path) -> None:
    num_paddings = 0
    for shard in shards(out):
        data = shard.read_bytes()
        stop = 8 + int.from_bytes(data[:8], "little")
        end_of_json = len(data[:stop].rstrip(b" "))
        positions = [0, 3, 7, 8, 9, 8 + (stop - 8) // 2, end_of_json - 1]
        if end_of_json < stop:
            num_paddings += 1
            positions += [end_of_json, stop - 1]
        for position in positions:
            with flipped(shard, position, bit=position % 8):
                assert_found(out, shard.name, "header")
    assert num_paddings


def test_flips_at_the_edges_of_tensors(out: Path) -> None:
    num_checked = 0
    for tensor in records(out):
        if tensor.stop == tensor.start:
            continue
        num_checked += 1
        for position in (tensor.start, tensor.stop - 1):
            with flipped(out / tensor.shard, position, bit=7):
                assert_found(out, f"tensor {tensor.name} in shard {tensor.shard} was changed")
    assert num_checked > 10


def test_last_byte_in_a_step_of_its_own(out: Path) -> None:
    store, tensors = open_store(str(out)), records(out)
    for shard in load_manifest((out / MANIFEST_NAME).read_bytes())["shards"]:
        mine = [t for t in tensors if t.shard == shard["name"]]
        step_bytes = shard["size_bytes"] - 1
        assert check_shard(store, shard, mine, step_bytes) == []
        with flipped(out / shard["name"], step_bytes):
            (line,) = check_shard(store, shard, mine, step_bytes)
            assert f"in shard {shard['name']} was changed" in line


def test_one_flip_blames_one_tensor_only(out: Path) -> None:
    tensor = next(t for t in records(out) if t.name == "mask")
    with flipped(out / tensor.shard, tensor.start):
        message = verify(out).stderr
    assert message.count("was changed") == 1
    assert "header" not in message


def test_flips_at_random(out: Path) -> None:
    rng = random.Random(6)
    files = strict_files(out)
    tensors = records(out)
    assert len(files) > 10
    for i in range(NUM_FLIPS):
        file = files[i % len(files)]
        position = rng.randrange(file.stat().st_size)
        hit = [
            f"tensor {t.name} "
            for t in tensors
            if t.shard == file.name and t.start <= position < t.stop
        ]
        with flipped(file, position, bit=rng.randrange(8)):
            assert_found(out, file.name, *hit)
    assert verify(out).exit_code == 0


@pytest.mark.parametrize("change", ["cut", "append", "empty"])
def test_changed_lengths(out: Path, change: str) -> None:
    for file in strict_files(out):
        data = file.read_bytes()
        file.write_bytes({"cut": data[:-1], "append": data + b" ", "empty": b""}[change])
        assert_found(out, file.name)
        file.write_bytes(data)
    assert verify(out).exit_code == 0


def test_shard_cut_at_the_end_of_a_tensor(out: Path) -> None:
    last = max(records(out), key=lambda t: (t.shard, t.start))
    shard = out / last.shard
    shard.write_bytes(shard.read_bytes()[: last.start])
    assert_found(out, f"shard {last.shard} has {last.start} bytes, not {last.stop}")


def test_missing_files(out: Path) -> None:
    (out / RUN_NAME).unlink()  # which is not missed
    for file in sorted(out.iterdir()):
        data = file.read_bytes()
        file.unlink()
        # Without a manifest it is no output at all.
        assert_found(out, file.name, "missing", status=2 if file.name == MANIFEST_NAME else 3)
        file.write_bytes(data)
    assert verify(out).exit_code == 0


def test_swapped_shards(out: Path) -> None:
    one, other = shards(out)[1:3]
    one.rename(out / "third")
    other.rename(one)
    (out / "third").rename(other)
    assert_found(out, one.name, other.name)


def test_many_differences_are_counted(out: Path) -> None:
    for shard in shards(out):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    result = verify(out)
    assert result.exit_code == 3
    assert " more" in result.stderr
    assert len(result.stderr) < 1500


def planned(_: str) -> list[tuple[str, float]]:
    return [("expert0", 0.5), ("expert1", 0.5), ("expert2", 0.5)]


def forge(out: Path, tensor: TensorRecord) -> None:
    """Change one tensor, and everything that is said of it, in all places."""
    shard = out / tensor.shard
    data = bytearray(shard.read_bytes())
    data[tensor.start] ^= 1
    shard.write_bytes(data)
    changed = blake3(data[tensor.start : tensor.stop]).hexdigest()
    tensors = [replace(t, blake3=changed) if t == tensor else t for t in records(out)]
    parquet = dump_tensors(tensors, planned)
    (out / TENSORS_NAME).write_bytes(parquet)
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    for file in (*manifest["shards"], *manifest["files"]):
        if file["name"] == tensor.shard:
            file["sha256"] = hashlib.sha256(data).hexdigest()
        if file["name"] == TENSORS_NAME:
            file.update(size_bytes=len(parquet), sha256=hashlib.sha256(parquet).hexdigest())
    manifest["model_digest"] = model_digest(tensors)
    (out / MANIFEST_NAME).write_bytes(dump_manifest(manifest))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "scale", "mask"])
def test_recompute_finds_a_consistent_forgery(out: Path, name: str) -> None:
    tensor = next(t for t in records(out) if t.name == name)
    forge(out, tensor)
    assert verify(out).exit_code == 0
    result = verify(out, "--recompute", "1000")
    assert result.exit_code == 3, result.output
    assert f"tensor {name} in shard {tensor.shard}" in result.stderr
    assert f"(1 of {len(records(out))})" in result.stderr


def rewrite(out: Path, **changes: object) -> None:
    """Change what the manifest says, and its digest with it."""
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    for file in (*manifest["shards"], *manifest["files"]):
        data = (out / file["name"]).read_bytes()
        file.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (out / MANIFEST_NAME).write_bytes(dump_manifest({**manifest, **changes}))


def rewrite_table(out: Path, tensors: list[TensorRecord]) -> None:
    """Write another table, and a manifest to go with it."""
    (out / TENSORS_NAME).write_bytes(dump_tensors(tensors, planned))
    rewrite(out, model_digest=model_digest(tensors))


@pytest.mark.parametrize("key", ["num_tensors", "num_parameters"])
def test_counts_that_are_not_those_of_the_table(out: Path, key: str) -> None:
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    rewrite(out, **{key: manifest[key] + 1})
    assert_found(out, key, str(manifest[key]), str(manifest[key] + 1))


@pytest.mark.parametrize(
    "change", [{"name": "renamed"}, {"dtype": "I8"}, {"shape": (1, 1)}, {"start": 0}, {"stop": 9}]
)
def test_a_table_that_is_not_what_the_headers_say(out: Path, change: dict[str, object]) -> None:
    tensors = records(out)
    changed = next(t for t in tensors if t.name == "mask")
    # Its bytes may be right: only the header tells.
    other = [replace(t, **change) if t == changed else t for t in tensors]  # type: ignore[arg-type]
    rewrite_table(out, other)
    assert_found(out, str(change.get("name", "mask")))


def test_a_table_without_rows(out: Path) -> None:
    rewrite_table(out, [])
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    rewrite(out, num_tensors=0, num_parameters=0)
    assert_found(out, manifest["shards"][0]["name"], "header")


def test_a_table_with_a_shard_that_is_not_there(out: Path) -> None:
    tensors = records(out)
    rewrite_table(out, [*tensors, replace(tensors[0], name="more", shard="more.safetensors")])
    assert_found(out, "more.safetensors")


def test_a_table_that_is_none(out: Path) -> None:
    for data in (b"", b"PAR1", (out / TENSORS_NAME).read_bytes()[:-9]):
        (out / TENSORS_NAME).write_bytes(data)
        rewrite(out)
        assert_found(out, TENSORS_NAME, "no table")


@pytest.mark.parametrize("data", [b"{}", b"", b'{"weight_map": {"mask": "model.safetensors"}}'])
def test_an_index_that_is_not_that_of_the_table(out: Path, data: bytes) -> None:
    (out / "model.safetensors.index.json").write_bytes(data)
    rewrite(out)
    assert_found(out, "model.safetensors.index.json")


FOREIGN = [
    "model.safetensors",
    "other.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "hf_quant_config.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "other.safetensors.index.json",
    "consolidated.00.pth",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_of_somebody_else_beside_the_output(out: Path, name: str) -> None:
    (out / name).write_bytes(b"{}")
    assert_found(out, name, "loaded")
    (out / name).unlink()
    (out / name).mkdir()  # which nobody loads
    assert verify(out).exit_code == 0


def test_other_files_beside_the_output_are_fine(out: Path) -> None:
    for name in ("notes.txt", "eval.py", "training_args.bin", ".gitattributes"):
        (out / name).write_text("mine")
    assert verify(out).exit_code == 0


def test_an_edited_model_card_is_said_and_passes(out: Path) -> None:
    intact = json.loads(verify(out, "--json").stdout)
    assert intact["edited"] == []
    (out / "README.md").write_text("# My model\n")
    result = verify(out)
    assert result.exit_code == 0, result.stderr
    assert "README.md was edited" in result.stdout
    summary = json.loads(verify(out, "--json").stdout)
    assert summary["edited"] == ["README.md"]
    assert summary["num_files"] == intact["num_files"] - 1
    (out / "README.md").unlink()
    assert_found(out, "README.md is missing")


def test_a_link_out_of_the_output(out: Path) -> None:
    for file in (shards(out)[1], out / TENSORS_NAME, out / MANIFEST_NAME):
        file.rename(out.parent / "elsewhere")
        file.symlink_to(out.parent / "elsewhere")
        assert_found(out, f"{file.name} is a link")
        file.unlink()
        (out.parent / "elsewhere").rename(file)
    assert verify(out).exit_code == 0


def test_what_is_no_link_is_not_called_one(out: Path) -> None:
    card = out / "README.md"  # a link within the output is fine
    card.rename(out / "card")
    card.symlink_to("card")
    (out / TENSORS_NAME).unlink()
    (out / TENSORS_NAME).mkdir()
    result = verify(out)
    assert result.exit_code != 0
    assert TENSORS_NAME in result.stderr
    assert "is a link" not in result.stderr


def test_an_output_in_the_cache_of_the_hub(out: Path) -> None:
    # Which consists of links, each to a blob beside it.
    blobs = out.parent / "models--me--merged" / "blobs"
    blobs.mkdir(parents=True)
    for file in sorted(out.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert verify(out).exit_code == 0


def test_digests_that_do_not_make_the_models_digest(out: Path) -> None:
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    manifest["model_digest"] = "0" * 64
    (out / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    assert_found(out, TENSORS_NAME, "digest")


def test_manifest_that_names_a_file_outside(out: Path) -> None:
    (out.parent / "secret").write_text("")
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    for name in ("../secret", str(out.parent / "secret"), "a/../../secret", "..", ".", ""):
        manifest["files"][0]["name"] = name
        (out / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
        assert_found(out, MANIFEST_NAME)


def test_recompute_all_passes_on_an_intact_output(out: Path) -> None:
    result = verify(out, "--recompute", "1000")
    assert result.exit_code == 0, result.stderr
    assert f"recomputed {len(records(out))} tensors" in result.stdout


def test_recompute_refuses_inputs_that_were_changed(family: Path, tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    out = tmp_path / "out"
    run(config_for(base, experts), out)
    shard = experts[1] / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert verify(out).exit_code == 0  # the output itself is as it was written
    result = verify(out, "--recompute", "1")
    assert result.exit_code == 2
    assert f"{shard}: content was" in result.stderr
    shutil.rmtree(experts[1])
    result = verify(out, "--recompute", "1")
    assert result.exit_code == 2
    assert f"{out} cannot be recomputed: checkpoint {experts[1]} does not exist" in result.stderr


def test_recompute_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tmp_path / "family"
    save_family(family, num_experts=1)
    out = tmp_path / "out"
    monkeypatch.chdir(family)
    run(config_for(Path("base"), [Path("expert0")]), out)
    monkeypatch.chdir(tmp_path)
    result = verify(out, "--recompute", "3")
    assert result.exit_code == 0, result.stderr
    assert "recomputed 3 tensors" in result.stdout
    (family / "base").rename(family / "moved")
    result = verify(out, "--recompute", "3")
    assert result.exit_code == 2
    assert f"checkpoint {family / 'base'} does not exist" in result.stderr


def test_no_finished_output(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "unfinished" / ".della").mkdir(parents=True)
    (tmp_path / "unfinished" / ".della" / "plan.json").write_text("{}")
    (tmp_path / "unfinished" / "model-00001-of-00002.safetensors").write_text("")
    for name in ("empty", "file", "unfinished", "not there"):
        assert_found(tmp_path / name, str(tmp_path / name), "no finished output", status=2)


def test_a_repository_without_its_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["verify", "writer/one"])
    assert_paragraph(result, 2, "on the Hub is meant, write hf://writer/one.")
    (tmp_path / "writer" / "one").mkdir(parents=True)
    result = CliRunner().invoke(main, ["verify", "writer/one"])
    assert_paragraph(result, 2, "no finished output")
    assert "Hub" not in result.stderr
