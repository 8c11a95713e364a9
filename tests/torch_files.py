"""Checkpoints for tests as ``torch.save`` writes them, and archives that it never would."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import Tensor

TORCH_DTYPES: dict[str, Any] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def to_torch(tensor: Tensor) -> Any:
    """Return a tensor as torch has it."""
    dtype = TORCH_DTYPES[tensor.dtype]
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def raw_bytes(tensor: Any) -> bytes:
    """Return the bytes of a tensor of torch in row-major order."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def transposed(tensor: Any) -> Any:
    """Return the same numbers, stored in the order of the last axis first."""
    axes = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def cut_out(tensor: Any) -> Any:
    """Return the same numbers, stored as a part of something larger."""
    if not tensor.ndim:
        return torch.stack([tensor, tensor])[1]
    larger = torch.ones([n + 3 for n in tensor.shape], dtype=tensor.dtype)
    view = larger[tuple(slice(1, n + 1) for n in tensor.shape)]
    view.copy_(tensor)
    return view


def save_torch(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    num_shards: int = 1,
    config: Mapping[str, Any] | None = None,
    stored: Callable[[Any], Any] = lambda tensor: tensor,
    name: str = "pytorch_model.bin",
) -> Path:
    """Write a checkpoint directory as transformers did before safetensors."""
    path.mkdir(parents=True)
    content = {key: stored(to_torch(tensor)) for key, tensor in tensors.items()}
    if num_shards == 1:
        torch.save(content, path / name)
    else:
        weight_map = {}
        stem, suffix = name.rsplit(".", 1)
        for i in range(num_shards):
            shard = f"{stem}-{i + 1:05d}-of-{num_shards:05d}.{suffix}"
            mine = dict(list(content.items())[i::num_shards])
            torch.save(mine, path / shard)
            weight_map.update(dict.fromkeys(mine, shard))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / f"{name}.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def save_sparse_torch(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, is_transposed: bool = False
) -> Path:
    """Write a checkpoint in bf16 whose data take no room on the disk, and read as zeros."""
    path.mkdir(parents=True)
    content = {}
    for name, shape in shapes.items():
        turned = is_transposed and len(shape) > 1
        empty = torch.empty(shape[::-1] if turned else shape, dtype=torch.bfloat16)
        content[name] = empty.t() if turned else empty
    with torch.serialization.skip_data():
        torch.save(content, path / "pytorch_model.bin")
    return path


def convert(folder: Path, **how: Any) -> Path:
    """Write the safetensors checkpoint `folder` anew, as ``torch.save`` would have it."""
    from tests.checkpoints import load_tensors

    tensors = load_tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    there = list(folder.iterdir())
    moved = folder.with_name(f"{folder.name}.bin")
    save_torch(moved, tensors, **how)
    for path in there:
        path.rename(moved / path.name)
    folder.rmdir()
    return moved.rename(folder)


# What follows makes archives by hand.


def opcode_text(text: str) -> bytes:
    """Return the instruction that pushes text."""
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def opcode_int(number: int) -> bytes:
    """Return the instruction that pushes a whole number."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def opcode_ints(numbers: tuple[int, ...]) -> bytes:
    """Return the instructions that push a tuple of whole numbers."""
    return b"(" + b"".join(map(opcode_int, numbers)) + b"t"


def opcode_tensor(
    shape: tuple[int, ...] = (2,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    *,
    key: str = "0",
    kind: str = "torch FloatStorage",
    num_elements: int = 2,
) -> bytes:
    """Return the instructions that push a tensor, right or wrong."""
    storage = (
        b"(" + opcode_text("storage") + _global(kind) + opcode_text(key) + opcode_text("cpu")
    ) + (opcode_int(num_elements) + b"tQ")
    arguments = opcode_int(offset) + opcode_ints(shape) + opcode_ints(strides) + b"\x89}"
    return _global("torch._utils _rebuild_tensor_v2") + b"(" + storage + arguments + b"tR"


def _global(names: str) -> bytes:
    return b"c" + names.replace(" ", "\n").encode() + b"\n"


def state_of(value: bytes, name: str = "a") -> bytes:
    """Return a pickle of a dictionary with one entry, whose value some instructions push."""
    return b"\x80\x02}" + opcode_text(name) + value + b"s."


def archive_of(
    pickle: bytes, *, root: str = "archive", more: Mapping[str, bytes] | None = None
) -> bytes:
    """Return a file with this pickle and one storage of two numbers."""
    records = {
        "data.pkl": pickle,
        "byteorder": b"little",
        "data/0": bytes(8),
        "version": b"3\n",
        **(more or {}),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data)
    return file.getvalue()
