"""Files beside the weights that are wrong: config.json, tokenizer."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.hostile.situation import Situation, hostile, save_family


@hostile
def case_config_json_is_no_json(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "config.json").write_text("{'torch_dtype': 'bfloat16'}")
    return family.refused(str(family.base / "config.json"), "not a valid")


@hostile
def case_config_json_is_a_list(folder: Path) -> Situation:
    family = save_family(folder)
    (family.experts[1] / "config.json").write_text("[]")
    return family.refused(str(family.experts[1] / "config.json"), "not a JSON")


@hostile
def case_config_json_is_nested_without_end(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "config.json").write_text('{"a":' * 100_000)
    return family.refused(str(family.base / "config.json"), "not a valid")


@hostile
def case_config_json_of_a_gigabyte(folder: Path) -> Situation:
    family = save_family(folder)
    os.truncate(family.base / "config.json", 1 << 30)
    return family.refused(str(family.base / "config.json"), "too large")


@hostile
def case_tokenizer_of_a_gigabyte(folder: Path) -> Situation:
    family = save_family(folder)
    with (family.base / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    return family.refused(str(family.base / "tokenizer.json"), "1073741824")


def spoiled(
    folder: Path, name: str, spoil: Callable[[Path], object], *words: str, of_expert: bool = False
) -> Situation:
    """Make a file of the base (or an expert) what it should not be."""
    family = save_family(folder)
    path = (family.experts[1] if of_expert else family.base) / name
    path.parent.mkdir(exist_ok=True)
    spoil(path)
    return family.refused(str(path), *words)


def write(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def link(target: str | Path) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def link_to_a_neighbour(path: Path) -> None:
    secret = path.parents[1] / "secret"
    secret.write_text("root:x:0:0\n")
    path.symlink_to(secret)


def socket_at(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(path.name)
    finally:
        os.chdir(here)


def link_to_a_folder(path: Path) -> None:
    outside = path.parents[1] / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    path.symlink_to(outside)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17209920\n"


@hostile
def case_vocabulary_is_a_link_out_of_the_checkpoint(folder: Path) -> Situation:
    return spoiled(folder, "vocab.txt", link("/etc/hostname"), "/etc/hostname", "outside")


@hostile
def case_unknown_file_is_a_link_to_a_neighbour(folder: Path) -> Situation:
    return spoiled(folder, "notes.md", link_to_a_neighbour, "secret", "outside")


@hostile
def case_file_in_a_folder_is_a_link_out(folder: Path) -> Situation:
    return spoiled(folder, "1_Pooling/config.json", link("/etc/hostname"), "outside")


@hostile
def case_folder_is_a_link(folder: Path) -> Situation:
    return spoiled(folder, "1_Pooling", link_to_a_folder, "link to a directory", "not followed")


@hostile
def case_folder_is_a_link_to_its_parent(folder: Path) -> Situation:
    return spoiled(folder, "self", link("."), "link to a directory")


@hostile
def case_tokenizer_is_a_dangling_link(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.json", link("gone.json"), "gone.json", "leads to nothing")


@hostile
def case_tokenizer_is_a_fifo(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.json", os.mkfifo, "not a regular file")


@hostile
def case_tokenizer_is_a_socket(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.model", socket_at, "not a regular file")


@hostile
def case_tokenizer_is_a_directory(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.json", Path.mkdir, "is a directory")


@hostile
def case_generation_config_is_a_directory(folder: Path) -> Situation:
    return spoiled(folder, "generation_config.json", Path.mkdir, "is a directory")


@hostile
def case_folder_with_the_name_of_the_card(folder: Path) -> Situation:
    return spoiled(folder, "README.md", Path.mkdir, "is a directory")


@hostile
def case_folder_with_the_name_of_the_table(folder: Path) -> Situation:
    return spoiled(folder, "della_tensors.parquet", Path.mkdir, "is a directory")


@hostile
def case_folder_with_the_name_of_a_shard(folder: Path) -> Situation:
    return spoiled(folder, "model-00001-of-00002.safetensors", Path.mkdir, "is a directory")


@hostile
def case_tokenizer_is_a_git_lfs_pointer(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.json", write(POINTER), "git-lfs", "git lfs pull")


@hostile
def case_sentencepiece_model_is_a_git_lfs_pointer(folder: Path) -> Situation:
    return spoiled(folder, "sentencepiece.bpe.model", write(POINTER), "git-lfs", "git lfs pull")


@hostile
def case_picture_is_a_git_lfs_pointer(folder: Path) -> Situation:
    return spoiled(folder, "figures/a.png", write(POINTER), "git-lfs", "git lfs pull")


@hostile
def case_module_weights_are_a_git_lfs_pointer(folder: Path) -> Situation:
    situation = spoiled(folder, "2_Dense/pytorch_model.bin", write(POINTER), "git lfs pull")
    modules = '[{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]'
    (folder / "base" / "modules.json").write_text(modules)
    return situation


@hostile
def case_pickled_weights_are_git_lfs_pointers(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "model.safetensors").unlink()
    (family.base / "pytorch_model.bin").write_bytes(POINTER)
    return family.refused(str(family.base), "pytorch_model.bin", "git-lfs", "git lfs pull")


@hostile
def case_tokenizer_is_empty(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.json", write(""), "is empty")


@hostile
def case_sentencepiece_model_is_empty(folder: Path) -> Situation:
    return spoiled(folder, "spiece.model", write(""), "is empty")


@hostile
def case_tokenizer_is_cut_short(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer.json", write('{"model": {"vocab": {"a": 0,'), "valid JSON")


@hostile
def case_unknown_json_is_a_web_page(folder: Path) -> Situation:
    return spoiled(folder, "1_Pooling/config.json", write("<html>404</html>"), "valid JSON")


@hostile
def case_json_is_no_text(folder: Path) -> Situation:
    return spoiled(folder, "preprocessor_config.json", write(b"{\xff\xfe}"), "valid JSON")


@hostile
def case_json_is_nested_without_end(folder: Path) -> Situation:
    return spoiled(folder, "special_tokens_map.json", write("[" * 100_000), "valid JSON")


@hostile
def case_expert_has_a_dangling_tokenizer(folder: Path) -> Situation:
    words = ("leads to nothing",)
    return spoiled(folder, "tokenizer.json", link("gone.json"), *words, of_expert=True)


@hostile
def case_expert_has_a_broken_tokenizer(folder: Path) -> Situation:
    return spoiled(folder, "tokenizer_config.json", write("{"), "valid JSON", of_expert=True)


@hostile
def case_expert_has_a_chat_template_from_elsewhere(folder: Path) -> Situation:
    return spoiled(folder, "chat_template.jinja", link("/etc/hostname"), "outside", of_expert=True)


@hostile
def case_file_with_a_line_break_in_its_name(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "a\nb.json").write_text("{}")
    return family.refused(str(family.base), r"'a\nb.json'", "Rename")


@hostile
def case_file_with_a_name_that_is_no_text(folder: Path) -> Situation:
    family = save_family(folder)
    Path(os.fsdecode(os.fsencode(family.base) + b"/\xff.json")).write_text("{}")
    return family.refused(str(family.base), r"\udcff.json", "Rename")


@hostile
def case_more_files_than_a_model_has(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "data").mkdir()
    for number in range(1001):
        (family.base / f"data/{number:04}.txt").touch()
    return family.refused(str(family.base), "more than 1000 files", "data/")


@hostile
def case_more_folders_than_a_model_has(folder: Path) -> Situation:
    family = save_family(folder)
    for number in range(1001):
        (family.base / f"data/{number:04}").mkdir(parents=True)
    return family.refused(str(family.base), "folders", "data/")


@hostile
def case_more_bytes_than_belong_to_a_model(folder: Path) -> Situation:
    family = save_family(folder)
    for name in ("a.npy", "b.npy"):
        with (family.base / name).open("wb") as file:
            file.truncate((1 << 30) + 1)
    return family.refused(str(family.base), "a.npy", "b.npy", "1073741825", "2147483648")


def tokens(*names: str) -> str:
    return json.dumps(
        {"model": {"type": "WordLevel", "vocab": {n: i for i, n in enumerate(names)}}}
    )


@hostile
def case_expert_with_a_permuted_tokenizer(folder: Path) -> Situation:
    family = save_family(folder)
    (family.base / "tokenizer.json").write_text(tokens("a", "b", "c", "d"))
    (family.experts[0] / "tokenizer.json").write_text(tokens("a", "b", "c", "d"))
    (family.experts[1] / "tokenizer.json").write_text(tokens("a", "c", "b", "d"))
    words = ("2 of 4", "1: 'c', not 'b'", "allow_different_tokenizers")
    return family.refused(str(family.base), str(family.experts[1]), *words)
