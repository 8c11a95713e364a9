"""Files of torch.save that are damaged, hold something else, or would run something."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.hostile.situation import Situation, healthy_tensors, hostile, save_family
from tests.torch_files import archive_of, convert, opcode_tensor, opcode_text, save_torch, state_of

NAME = "pytorch_model.bin"


def refused_file(folder: Path, data: bytes, *words: str) -> Situation:
    """Return a family whose second expert is this file."""
    family = save_family(folder)
    expert = convert(family.experts[1])
    (expert / NAME).write_bytes(data)
    return family.refused(str(expert / NAME), *words)


def saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def touch(folder: Path, names: bytes) -> bytes:
    """Return a pickle that makes a file, if it is run."""
    return state_of(b"c" + names + b"\n(" + opcode_text(f"touch {folder}/pwned") + b"tR")


def register(name: str, build: Callable[[Path], Situation]) -> None:
    build.__name__ = f"case_{name}"
    hostile(build)


for _name, _names in {
    "os_system": b"os\nsystem",
    "posix_system": b"posix\nsystem",
    "eval": b"builtins\neval",
    "getattr": b"builtins\ngetattr",
    "torch_load": b"torch\nload",
    "subprocess": b"subprocess\nPopen",
}.items():

    def _calls(folder: Path, names: bytes = _names) -> Situation:
        shown = names.decode().replace("\n", ".")
        return refused_file(folder, archive_of(touch(folder, names)), shown)

    register(f"pickle_calls_{_name}", _calls)


@hostile
def case_pickle_of_a_module(folder: Path) -> Situation:
    return refused_file(folder, saved(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear")


@hostile
def case_pickle_of_a_training_state(folder: Path) -> Situation:
    state = {"model": {"a": torch.ones(2)}, "optimizer": {"b": torch.ones(2)}}
    return refused_file(folder, saved(state), "'optimizer'", "'model'")


@hostile
def case_pickle_with_a_number(folder: Path) -> Situation:
    return refused_file(folder, saved({"a": torch.ones(2), "epoch": 3}), "'epoch'", "int")


@hostile
def case_pickle_with_complex_numbers(folder: Path) -> Situation:
    content = {"a": torch.ones(2, dtype=torch.complex64)}
    return refused_file(folder, saved(content), "torch.ComplexFloatStorage")


@hostile
def case_legacy_pickle(folder: Path) -> Situation:
    data = saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    return refused_file(folder, data, "before version 1.6", "trust", "save_pretrained")


@hostile
def case_pickle_that_is_cut_short(folder: Path) -> Situation:
    data = saved({"a": torch.ones(2)})
    return refused_file(folder, data[:-30], "Download it again")


@hostile
def case_pickle_that_is_a_web_page(folder: Path) -> Situation:
    return refused_file(folder, b"<html>404</html>", "no file of torch.save", "Download it again")


@hostile
def case_pickle_whose_record_leads_out(folder: Path) -> Situation:
    data = archive_of(state_of(opcode_tensor()), more={"../../x": b""})
    return refused_file(folder, data, "leads out of the archive")


@hostile
def case_pickle_with_a_view_out_of_its_storage(folder: Path) -> Situation:
    data = archive_of(state_of(opcode_tensor((3,))))
    return refused_file(folder, data, "'a'", "a storage of 8 bytes")


@hostile
def case_pickle_with_endless_repetition(folder: Path) -> Situation:
    data = archive_of(state_of(opcode_tensor((1 << 40, 1 << 40), (0, 0))))
    return refused_file(folder, data, "'a'", "more elements than any file")


@hostile
def case_torch_index_leads_out_of_the_checkpoint(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], num_shards=2)
    weight_map = '{"weight_map": {"a": "../base/pytorch_model.bin"}}'
    (expert / f"{NAME}.index.json").write_text(weight_map)
    return family.refused(str(expert), "not the name of a file inside")


@hostile
def case_torch_index_names_another_format(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], num_shards=2)
    (expert / f"{NAME}.index.json").write_text('{"weight_map": {"a": "model.ckpt"}}')
    return family.refused(str(expert), "model.ckpt", "no PyTorch file")


@hostile
def case_torch_shard_is_missing(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], num_shards=2)
    (expert / "pytorch_model-00002-of-00002.bin").unlink()
    return family.refused("pytorch_model-00002-of-00002.bin is missing", "Download")


@hostile
def case_torch_shard_of_no_index_is_missing(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], num_shards=2)
    (expert / f"{NAME}.index.json").unlink()
    (expert / "pytorch_model-00001-of-00002.bin").unlink()
    return family.refused(str(expert), "1 of 2 shards", "pytorch_model-00001-of-00002.bin")


@hostile
def case_torch_file_beside_an_index(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], num_shards=2)
    torch.save({"a": torch.ones(2)}, expert / NAME)
    return family.refused(str(expert), "is two checkpoints", NAME)


@hostile
def case_only_training_states(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], name="optimizer.bin")
    torch.save({}, expert / "rng_state_0.pth")
    torch.save({}, expert / "training_args.bin")
    return family.refused(str(expert), "no weights of a model", "optimizer.bin", "training_args")


@hostile
def case_only_consolidated_files(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], name="consolidated.00.pth")
    return family.refused(str(expert), "consolidated.00.pth", "format of transformers")


@hostile
def case_several_torch_files(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], name="one.pt")
    save_torch(expert / "more", healthy_tensors())
    (expert / "more" / NAME).rename(expert / "two.pt")
    (expert / "more").rmdir()
    return family.refused(str(expert), "2 PyTorch files", "one.pt", "two.pt")


@hostile
def case_lightning_checkpoint(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], name="last.ckpt")
    return family.refused(str(expert), "last.ckpt", "convert")


@hostile
def case_torch_adapter_instead_of_a_model(folder: Path) -> Situation:
    family = save_family(folder)
    expert = convert(family.experts[1], name="adapter_model.bin")
    (expert / "config.json").rename(expert / "adapter_config.json")
    return family.refused(str(expert), "peft_type", "save_pretrained")
