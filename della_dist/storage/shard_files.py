"""Which files make up a checkpoint: its index, or the files' names.

Safetensors files, or else what ``torch.save`` wrote: where there are both, they are two forms of
one model, and the first is read, as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from della_dist.errors import InputError
from della_dist.locations import is_url, local_path
from della_dist.storage.store import Store
from della_dist.storage.strict_json import object_at, parse_object
from della_dist.wording import few

SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
#: The first that is there holds the adapter, as in PEFT.
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
INDEX_NAME = "model.safetensors.index.json"
#: What ``torch.save`` writes is called.
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
#: Pickles that hold no whole model: states of training, and parts of tensors.
_NO_MODELS = (
    *("training_args.*", "optimizer*", "*_optimizer.*", "scheduler*", "scaler*", "sampler*"),
    *("rng_state*", "random_states_*", "consolidated.*", "*mp_rank_*", "*zero_pp_rank_*"),
    *("*_optim_states.pt", "adapter_model*", "pytorch_lora_weights*", "*openvino*", "ggml-*"),
)
#: How git-lfs's stand-ins for files begin, then and now.
LFS_POINTERS = (b"version https://git-lfs", b"version https://hawser")
LFS_HEAD_BYTES = max(map(len, LFS_POINTERS))
_MAX_INDEX_BYTES = 100_000_000
_NUMBERED = re.compile(
    r"(?P<stem>.+)-(?P<number>[0-9]{5,6})-of-(?P<count>[0-9]{5,6})(?P<suffix>\.[a-z]+)"
)
_MAX_REVISIONS = 5


@dataclass(frozen=True, slots=True)
class Format:
    """How the files of one form of a checkpoint are called."""

    single: str
    suffixes: tuple[str, ...]
    words: str

    @property
    def index(self) -> str:
        """The index that is preferred."""
        return f"{self.single}.index.json"

    @property
    def index_ending(self) -> str:
        """What every index ends in."""
        return f"{self.suffixes[0]}.index.json"

    def weights(self, names: Sequence[str]) -> list[str]:
        """Return what of `names` may be weights of a whole model."""
        return [
            name
            for name in names
            if name.endswith(self.suffixes)
            and name not in ADAPTER_NAMES
            and not (self is TORCH and any(fnmatchcase(name, p) for p in _NO_MODELS))
        ]


SAFETENSORS = Format(SINGLE_NAME, (".safetensors",), "safetensors")
TORCH = Format("pytorch_model.bin", TORCH_SUFFIXES, "PyTorch")


def format_of(names: Sequence[str]) -> Format:
    """Return in which form a checkpoint with these files is read."""
    for form in (SAFETENSORS, TORCH):
        if form.weights(names) or any(name.endswith(form.index_ending) for name in names):
            return form
    return SAFETENSORS


def is_adapter(names: Sequence[str]) -> bool:
    """Tell whether these files are an adapter of PEFT, perhaps beside a model."""
    return ADAPTER_CONFIG_NAME in names and any(name in names for name in ADAPTER_NAMES)


def half_an_adapter(location: str, names: Sequence[str]) -> InputError:
    """Return the error for a place that is no adapter, and should be one."""
    lacking = [] if ADAPTER_CONFIG_NAME in names else [ADAPTER_CONFIG_NAME]
    if not any(name in names for name in ADAPTER_NAMES):
        lacking.append(ADAPTER_NAMES[0])
    return InputError(
        f"adapter {location} has no {' and no '.join(lacking)}, as an adapter of PEFT has. Give "
        "the directory that `save_pretrained` of peft has written."
    )


def torch_names(names: Sequence[str]) -> list[str]:
    """Return what may be read of a checkpoint's pickles, their index included."""
    if format_of(names) is SAFETENSORS:
        return []
    return [*TORCH.weights(names), *(n for n in names if n.endswith(TORCH.index_ending))]


def is_torch_file(name: str) -> bool:
    """Tell whether a file of weights is one that ``torch.save`` wrote."""
    return name.endswith(TORCH_SUFFIXES)


def index_name(location: str, names: Sequence[str]) -> str | None:
    """Return the name of the index, or None where there is none."""
    form = format_of(names)
    found = [name for name in names if name.endswith(form.index_ending)]
    if len(found) > 1 and form.index not in found:
        raise InputError(
            f"checkpoint {location} has {len(found)} indexes ({few(found)}) and none is called "
            f"{form.index}. Keep the one that is meant in a directory of its own."
        )
    return form.index if form.index in found else found[0] if found else None


def unindexed_shards(location: str, names: Sequence[str], store: Store) -> list[str]:
    """Return the shards of a checkpoint without an index."""
    form = format_of(names)
    found = form.weights(names)
    if SINGLE_NAME in found:
        return [SINGLE_NAME]
    if not found:
        raise _no_weights(location, names)
    if form.single in found:
        return [form.single]
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name in found:
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match["stem"], match["count"], match["suffix"]), []).append(name)
    if len(found) == 1 and not sets:
        return found
    if len(sets) == 1 and len(next(iter(sets.values()))) == len(found):
        ((stem, count, suffix),) = sets
        width = len(count)
        expected = [
            f"{stem}-{number:0{width}}-of-{count}{suffix}"
            for number in range(1, min(int(count), 10 * len(found)) + 1)
        ]
        missing = sorted(set(expected) - set(found))
        if missing or len(found) != int(count):
            raise InputError(
                f"checkpoint {location} has {len(found)} of {int(count)} shards: missing "
                f"{few(missing)}. Download the rest."
            )
        return found
    raise InputError(
        f"checkpoint {location} has {len(found)} {form.words} files and no index that says which "
        f"belong to it ({few(found)}). Keep one model's files in the directory, or add its "
        f"{form.index}."
    )


def _no_weights(location: str, names: Sequence[str]) -> InputError:
    """Return the error for a checkpoint none of whose files are weights of a model."""
    if ADAPTER_CONFIG_NAME in names or any(name in names for name in ADAPTER_NAMES):
        return half_an_adapter(location, names)
    pickles = [name for name in names if name.endswith((*TORCH_SUFFIXES, ".ckpt"))]
    if any(fnmatchcase(name, "consolidated.*") for name in pickles):
        return InputError(
            f"checkpoint {location} holds no safetensors files, only consolidated files "
            f"({few(pickles)}): parts of tensors under other names, as the first releases of Llama "
            "had. Take the checkpoint in the format of transformers, or convert it first "
            "(convert_llama_weights_to_hf.py)."
        )
    if pickles:
        return InputError(
            f"checkpoint {location} holds no safetensors files, only pickles that are no weights "
            f"of a model ({few(pickles)}). Give the directory of the model itself, or convert it "
            "first (load it with transformers and save_pretrained, which writes safetensors)."
        )
    snapshots = _snapshots(location)
    if snapshots:
        return InputError(
            f"checkpoint {location} is a model's folder in a Hugging Face cache; its files are "
            f"in its snapshots. Give {' or '.join(snapshots)}."
        )
    return InputError(
        f"checkpoint {location} holds no safetensors files. Give the directory that has "
        f"{INDEX_NAME} or {SINGLE_NAME}."
    )


def _snapshots(location: str) -> list[str]:
    """Return the revisions that a model's folder of a Hugging Face cache holds.

    The one called ``main``, if it is known, or the first few.
    """
    if is_url(location):
        return []
    root = local_path(location)
    try:
        revisions = sorted(path.name for path in (root / "snapshots").iterdir() if path.is_dir())
        main = root / "refs" / "main"
        named = main.read_text().strip() if main.is_file() else ""
    except (OSError, ValueError):
        return []
    chosen = [named] if named in revisions else revisions[:_MAX_REVISIONS]
    return [str(root / "snapshots" / revision) for revision in chosen]


def read_weight_map(store: Store, index_name: str) -> dict[str, str]:
    """Return the index's map of tensor names to file names, each name checked to lie inside."""
    path = store.describe(index_name)
    size_bytes = store.stat(index_name).size_bytes
    if size_bytes > _MAX_INDEX_BYTES:
        raise InputError(
            f"{path} has {size_bytes} bytes: too large for an index. Download it again."
        )
    try:
        weight_map = object_at(parse_object(store.read(index_name)), "weight_map")
    except ValueError as error:
        raise InputError(f"{path} is not a valid index: {error}. Download it again.") from error
    result = {}
    checked: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise InputError(
                f"{path} is not a valid index: the file of {name[:200]!r} is no string. "
                "Download it again."
            )
        if shard not in checked:
            _check_name(store, index_name, shard)
            checked.add(shard)
        result[name] = shard
    if not result:
        raise InputError(f"{path} names no tensors. Download it again.")
    return result


def _check_name(store: Store, index_name: str, shard: str) -> None:
    """Refuse a file name, written in an index, that is spelled to lead out of the checkpoint."""
    path = store.describe(index_name)
    if "\0" in shard or any(part in ("", ".", "..") for part in shard.split("/")):
        raise InputError(
            f"{path} points to {shard[:200]!r}, which is not the name of a file inside the "
            "checkpoint. Do not use this checkpoint unless you trust it; download it again."
        )
    form = SAFETENSORS if index_name.endswith(SAFETENSORS.index_ending) else TORCH
    if not shard.endswith(form.suffixes):
        raise InputError(
            f"{path} points to {shard[:200]!r}, which is no {form.words} file. Convert the "
            "checkpoint to safetensors first."
        )
