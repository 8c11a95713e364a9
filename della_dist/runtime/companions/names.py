"""Which files of a checkpoint are carried over to the output: all but weights and leavings.

A list of what is left out, not of what is taken: a file that nobody here has heard of belongs to
the model. Left out are weights in every format (they are what is merged, or a copy of it), exports
of them, states of training, what speaks of a quantisation, hidden files, the model card, and
adapters: transformers loads an ``adapter_config.json`` beside a model in the place of that model.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable
from fnmatch import translate

_WEIGHTS = (
    *("*.safetensors", "*.safetensors.*", "*.bin", "*.bin.*", "*.index.json", "consolidated*"),
    *("*.pt", "*.pth", "*.th", "*.ckpt", "*.ckpt.*", "*.ckpt-*", "*.ot", "*.distcp", "*.nemo"),
    *("*.gguf", "*.gguf.*", "*.ggml", "*.ggml.*", "*.llamafile", "*.h5", "*.h5.*", "*.keras"),
    *("*.msgpack", "*.msgpack.*", "*.onnx", "*.onnx.*", "*.onnx_data*", "*.ort", "*.pb"),
    *("*.tflite", "*.mlmodel", "*.pte", "*.ptl", "*.engine", "*.trt", "*.litertlm", "*.task"),
    *("*.mnn", "*.pdparams", "*.pdopt", "*.pdmodel", "*.rknn", "*.hef", "*.mar"),
    *("adapter_config.json", "adapter_model.*"),
)
_TRAINING = (
    *("trainer_state.json", "training_args.json", "random_states_*.pkl", "events.out.tfevents*"),
    *("zero_to_fp32.py", "latest", "latest_checkpointed_iteration.txt"),
)
#: Merged weights are plain numbers, and loaders would take them for what these files say.
_QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
#: At the top level: the output has its own.
_OURS = (
    *("readme.md", "report.html", "della_manifest.json", "della_tensors.parquet", "della_run.json"),
    "della_pictures",
)
_FOLDERS = (
    *("original", "onnx", "openvino", "openvino_*", "coreml", "*.mlpackage", "*.mlmodelc"),
    *("checkpoint-*", "last-checkpoint", "global_step*", "optimizer_*", "pytorch_model_fsdp*"),
    *("della_pictures", "runs", "wandb", "mlruns", "tensorboard", "lightning_logs", "__pycache__"),
)
#: Of a repository, what no merge reads: all of these but the weights that may be merged ...
_NEVER_READ = (
    *(p for p in _WEIGHTS if "safetensors" not in p and p != "*.index.json"),
    *(f"{folder}/*" for folder in _FOLDERS),
)
# ... which are these where there are no safetensors files.
_OF_TORCH = ("*.bin", "*.bin.*", "*.pt", "*.pth")
#: A folder with such an ending stands where a file should be.
_FILE_ENDINGS = (
    *(".json", ".model", ".txt", ".jinja", ".py", ".spm", ".tiktoken"),
    *(".safetensors", ".md", ".parquet"),
)


#: At the top level.
_TOKENIZER = (
    *("tokenizer*.json", "*.model", "*.spm", "*.tiktoken", "vocab.*", "merges.txt", "tekken.json"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template*"),
    "tokenization_*.py",
)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))


_is_weights = _any_of(_WEIGHTS).match
_is_left_out = _any_of((*_TRAINING, *_QUANTISATION, ".*")).match
_is_ours = _any_of(_OURS).match
_is_of_torch = _any_of(_OF_TORCH).match
_is_of_tokenizer = _any_of(_TOKENIZER).match
_is_left_out_folder = _any_of((*_FOLDERS, ".*")).match


def never_read(keys: Iterable[str], weights: Collection[str]) -> list[str]:
    """Return patterns of what no merge reads of a repository.

    Parameters
    ----------
    keys
        Its files.
    weights
        Those of them that are merged, if they are of torch.
    """
    if not weights:
        return list(_NEVER_READ)
    unread = [key for key in keys if key not in weights and _is_of_torch(key)]
    return [*(p for p in _NEVER_READ if p not in _OF_TORCH), *map(glob.escape, unread)]


def is_carried(key: str, modules: Iterable[str] = ()) -> bool:
    """Tell whether a file is carried over; the folders that it is in are.

    Parameters
    ----------
    key
        Its name relative to the checkpoint.
    modules
        Folders of modules with weights of their own, which are part of the model
        (``2_Dense`` of sentence-transformers).
    """
    folder, _, name = key.lower().rpartition("/")
    if _is_left_out(name) or (not folder and _is_ours(name)):
        return False
    return not _is_weights(name) or is_module_weights(key, modules)


def is_of_tokenizer(key: str) -> bool:
    """Tell whether a file that is carried over is the tokenizer's, chat templates included."""
    if "/" in key:
        return key.startswith("additional_chat_templates/")
    return _is_of_tokenizer(key.lower()) is not None


def is_module_weights(key: str, modules: Iterable[str]) -> bool:
    """Tell whether a file is the weights of one of `modules`."""
    folder, _, name = key.rpartition("/")
    return folder in modules and name.lower().endswith((".safetensors", ".bin"))


def is_carried_folder(key: str) -> bool:
    """Tell whether a folder is looked into."""
    return not _is_left_out_folder(key.lower().rpartition("/")[2])


def is_worth_a_word(key: str) -> bool:
    """Tell whether leaving this file or folder out is to be said: all but matters of course.

    Hidden files, the model card, indexes of weights and the records of an earlier merge are such.
    """
    key = key.removesuffix("/")  # of a folder
    name = key.lower().rpartition("/")[2]
    is_of_course = name.startswith(".") or name == "__pycache__" or name.endswith(".index.json")
    return not is_of_course and ("/" in key or not _is_ours(name))


def looks_like_a_file(folder: str) -> bool:
    """Tell whether a folder has a name that only a file should have."""
    return folder.lower().endswith(_FILE_ENDINGS)
