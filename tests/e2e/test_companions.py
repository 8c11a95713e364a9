"""The files beside the weights: carried over whole, in folders too, from anywhere to anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.errors import InputChangedError, InputError, OutputError, VerificationError
from della_dist.runtime.companions.small_files import CHUNK_BYTES
from della_dist.runtime.engines.drive import drive
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.run_history import RUN_NAME
from tests.checkpoints import sentencepiece_model
from tests.merging import config_for, run, save_family, write_config
from tests.remote import download, upload_inputs

#: A model of sentence-transformers: pooling, a dense layer with weights of its own, and a part that
#: is larger than what is held in memory at once.
FILES: dict[str, bytes] = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "x.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "x.Dense"},
        ]
    ).encode(),
    "1_Pooling/config.json": b'{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}',
    "1_Pooling/README.md": b"of the module",
    "2_Dense/config.json": b'{"in_features": 64, "out_features": 64}',
    "2_Dense/model.safetensors": b"dense weights",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "sentencepiece.bpe.model": b"\n\x03" + bytes(range(256)),
    "package/__init__.py": b"",
    "LICENSE": b"Do what you like.\n",
    "speaker_embeddings/a.npy": b"0123456789abcdef" * (CHUNK_BYTES // 8),
}
LEFT: dict[str, bytes] = {
    "README.md": b"the base's card",
    ".gitattributes": b"*.bin filter=lfs",
    "pytorch_model.bin": b"the same again",
    "onnx/model.onnx": b"exported",
    "onnx/config.json": b"{}",
    "checkpoint-10/trainer_state.json": b"{}",
    "speech/model.safetensors": b"weights of nobody knows what",
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path / "in", num_shards=2, config={"model_type": "llama"})
    write(base, FILES | LEFT)
    return config_for(base, experts, parameters={"density": 0.5})


def base_of(config: MergeConfig) -> Path:
    assert config.base_model is not None
    return Path(config.base_model)


def names_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def check_carried(out: Path) -> None:
    for name, data in FILES.items():
        assert (out / name).read_bytes() == data, name
    assert not names_in(out) & (LEFT.keys() - {"README.md"})
    assert b"the base's card" not in (out / "README.md").read_bytes()


def test_all_but_weights_and_leavings(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config, out)
    check_carried(out)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    listed = {file["name"] for file in (*manifest["files"], *manifest["shards"])}
    assert listed == names_in(out) - {MANIFEST_NAME, RUN_NAME}
    assert verify(str(out)).num_files == len(names_in(out)) - 1
    (out / "1_Pooling/config.json").write_bytes(FILES["1_Pooling/config.json"].upper())
    with pytest.raises(VerificationError, match=r"1_Pooling/config\.json was changed"):
        verify(str(out))
    (out / "1_Pooling/config.json").unlink()
    with pytest.raises(VerificationError, match=r"1_Pooling/config\.json is missing"):
        verify(str(out))


@pytest.mark.s3
def test_from_and_to_an_object_store(config: MergeConfig, s3_bucket: str, tmp_path: Path) -> None:
    # The base at the top of the bucket: what else is in there is none of its files.
    remote = upload_inputs(config, f"s3://{s3_bucket}/in")
    for number, source in enumerate((config, remote)):
        out = f"s3://{s3_bucket}/out{number}"
        run(source, out)
        verify(out)
        check_carried(download(out, tmp_path / f"out{number}"))
    run(remote, tmp_path / "local")
    check_carried(tmp_path / "local")


@pytest.mark.s3
def test_folders_of_a_bucket_that_are_inputs_are_not_carried(
    config: MergeConfig, s3_bucket: str, tmp_path: Path
) -> None:
    from tests.remote import upload

    content: dict[str, Any] = config.normalized()
    content["base_model"] = upload(base_of(config), f"s3://{s3_bucket}")
    for m, entry in enumerate(content["models"]):
        entry["model"] = upload(Path(entry["model"]), f"s3://{s3_bucket}/experts/{m}")
    from della_dist.config import config_from_mapping

    run(config_from_mapping(content, "test"), tmp_path / "out")
    check_carried(tmp_path / "out")
    assert not (tmp_path / "out/experts").exists()


def test_experts_in_a_folder_of_the_base(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path / "in", config={"model_type": "llama"})
    moved = []
    for m, expert in enumerate(experts):
        (base / "experts").mkdir(exist_ok=True)
        moved.append(expert.rename(base / f"experts/{m}"))
    out = tmp_path / "out"
    run(config_for(base, moved, parameters={"density": 0.5}), out)
    assert not (out / "experts").exists()


def test_without_a_base_the_first_model_gives_the_files(tmp_path: Path) -> None:
    _, (first, second, _) = save_family(tmp_path / "in", config={"model_type": "llama"})
    write(first, FILES)
    write(second, {"1_Pooling/config.json": b'{"other": 1}', "extra.txt": b""})
    run(config_for(None, [first, second], "linear"), tmp_path / "out")
    check_carried(tmp_path / "out")
    assert not (tmp_path / "out/extra.txt").exists()


def test_links_of_the_cache_of_the_hub(config: MergeConfig, tmp_path: Path) -> None:
    base = base_of(config)
    model = tmp_path / "hub/models--org--name"
    snapshot = model / "snapshots/0123abcd"
    (model / "blobs").mkdir(parents=True)
    for number, name in enumerate(sorted(names_in(base))):
        blob = model / f"blobs/{number}"
        (base / name).rename(blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (name.count("/") + 2)
        (snapshot / name).symlink_to(f"{up}blobs/{number}")
    experts = [Path(expert.model) for expert in config.models]
    out = tmp_path / "out"
    run(config_for(snapshot, experts, parameters={"density": 0.5}), out)
    check_carried(out)
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_plan_lists_them(config: MergeConfig, tmp_path: Path) -> None:
    path = str(write_config(tmp_path / "merge.yaml", config))
    planned = json.loads(CliRunner().invoke(main, ["plan", path, "--json"]).stdout)
    sizes = {name: len(data) for name, data in FILES.items()}
    sizes["config.json"] = (base_of(config) / "config.json").stat().st_size
    assert planned["files"] == [{"name": n, "size_bytes": sizes[n]} for n in sorted(sizes)]
    text = CliRunner().invoke(main, ["plan", path]).stdout
    assert f"files   {len(sizes)} beside the weights, " in text


def test_notes_say_what_is_left_out_and_what_is_not_merged(config: MergeConfig) -> None:
    notes = open_plan(config).notes()
    (unmerged,) = (note for note in notes if "not merged" in note)
    assert unmerged.startswith("2_Dense/model.safetensors: weights of modules")
    (left_out,) = (note for note in notes if "left out" in note)
    for name in ("pytorch_model.bin", "onnx/", "checkpoint-10/", "speech/model.safetensors"):
        assert name in left_out
    assert ".gitattributes" not in left_out
    assert "README.md" not in left_out
    assert "index.json" not in left_out


def test_what_needs_no_word_gets_none(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, num_shards=2, config={"model_type": "llama"})
    write(base, {"README.md": b"", ".gitattributes": b"", ".cache/x": b"", "LICENSE": b""})
    assert open_plan(config_for(base, experts, parameters={"density": 0.5})).file_notes == ()


def test_memory_is_projected(config: MergeConfig, tmp_path: Path) -> None:
    from della_dist.runtime.companions.carried import companions_mem

    before = companions_mem(open_plan(config))
    assert 2 * CHUNK_BYTES < before < 3 * CHUNK_BYTES  # of the one file that is larger, mostly
    (base_of(config) / "tokenizer.json").write_text(json.dumps({"x": "y" * (8 << 20)}))
    assert companions_mem(open_plan(config)) > 40 << 20
    path = str(write_config(tmp_path / "merge.yaml", config))
    planned = json.loads(CliRunner().invoke(main, ["plan", path, "--json"]).stdout)
    assert planned["projected_mem"] > 40 << 20


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "other"}'])
def test_a_configuration_that_is_changed_while_the_merge_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    base, experts = save_family(tmp_path / "in", config={"model_type": "llama"})
    config = config_for(base, experts, parameters={"density": 0.5}, dtype="float16")

    def drive_and_change(*arguments: Any) -> None:
        drive(*arguments)
        (base / "config.json").write_text(content)

    monkeypatch.setattr("della_dist.runtime.run.drive", drive_and_change)
    with pytest.raises(InputChangedError, match=r"config\.json was changed"):
        run(config, tmp_path / "out")


@pytest.mark.parametrize("change", ["same size", "longer", "shorter", "gone"])
def test_a_file_that_is_changed_while_the_merge_runs(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "out"
    path = base_of(config) / "1_Pooling/config.json"

    def drive_and_change(*arguments: Any) -> None:
        drive(*arguments)
        data = path.read_bytes()
        path.unlink()
        if change != "gone":
            path.write_bytes(
                {"same size": data.upper(), "longer": data + b" ", "shorter": data[:-1]}[change]
            )

    with monkeypatch.context() as patch:
        patch.setattr("della_dist.runtime.run.drive", drive_and_change)
        with pytest.raises(InputChangedError, match=r"1_Pooling/config\.json was .*run the same"):
            run(config, out)
    assert not (out / MANIFEST_NAME).exists()
    path.write_bytes(b'{"something": "else"}')
    with pytest.raises(OutputError, match=r"1_Pooling/config\.json was"):
        run(config, out)
    path.write_bytes(FILES["1_Pooling/config.json"])
    summary = run(config, out)
    assert summary.tasks_resumed == summary.num_tasks
    check_carried(out)


def test_a_restart_removes_those_of_the_merge_before(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config, out)
    for name in ("1_Pooling/README.md", "speaker_embeddings/a.npy"):
        (base_of(config) / name).unlink()
    run(config, out, restart=True)
    run(config, tmp_path / "elsewhere")
    assert names_in(out) == names_in(tmp_path / "elsewhere")
    assert not (out / "speaker_embeddings").exists()


def test_a_restart_of_an_unfinished_run_leaves_what_it_never_wrote(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from della_dist.runtime.output import commit as output

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(output, "dump_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, out)
    (out / "eval.py").write_text("mine")
    (out / "1_Pooling/eval.py").write_text("mine")
    run(config.with_seed(7), out, restart=True)
    check_carried(out)
    assert (out / "eval.py").read_text() == (out / "1_Pooling/eval.py").read_text() == "mine"


# What loads the outputs.


def test_chat_templates_as_transformers_loads_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from della_dist.demo.tokenizer import MIN_VOCAB, tokenizer_files

    base, experts = save_family(tmp_path / "in", config={"model_type": "llama"})
    files = {name: text.encode() for name, text in tokenizer_files(MIN_VOCAB).items()}
    files["additional_chat_templates/rag.jinja"] = b"{{ documents }}"
    files["additional_chat_templates/tool_use.jinja"] = b"{{ tools }}"
    files["chat_template.jinja"] = b"{{ messages }}"
    write(base, files)
    run(config_for(base, experts, parameters={"density": 0.5}), tmp_path / "out")
    loaded, expected = (
        transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base)
    )
    assert loaded.chat_template == expected.chat_template
    assert set(loaded.chat_template) == {"default", "rag", "tool_use"}


def test_a_tokenizer_of_sentencepiece_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = sentencepiece_model()
    base, experts = save_family(tmp_path / "in", config={"model_type": "xlm-roberta"})
    tokenizer_config = b'{"tokenizer_class": "XLMRobertaTokenizer"}'
    write(base, {"sentencepiece.bpe.model": model})
    write(base, {"tokenizer_config.json": tokenizer_config})
    run(config_for(base, experts, parameters={"density": 0.5}), tmp_path / "out")
    loaded, expected = (
        transformers.AutoTokenizer.from_pretrained(folder)("the answer is tea")["input_ids"]
        for folder in (tmp_path / "out", base)
    )
    assert loaded == expected
    assert len(set(loaded)) > 4  # not everything is unknown


def test_an_unreadable_file_is_an_error_before_anything_is_written(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for users who are not root: root may read everything.
    import pathlib

    opened = pathlib.Path.open

    def refuse(self: Path, *arguments: Any, **how: Any) -> Any:
        if self.name == "sentencepiece.bpe.model":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **how)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(InputError, match=r"sentencepiece\.bpe\.model failed: Permission denied"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
