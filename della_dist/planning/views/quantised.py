"""Quantised checkpoints, told by the names and dtypes of their tensors.

Their integers are numbers only together with scales, so they can be neither merged nor copied.
"""

from __future__ import annotations

from della_dist.errors import InputError
from della_dist.planning.facts import model_facts
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import COPY_DTYPES, FLOAT_DTYPES

#: Last part of a tensor's name -> the scheme that has such tensors (layouts as in the libraries).
_MARKERS = {
    **dict.fromkeys(("qweight", "qzeros", "g_idx"), "GPTQ or AWQ"),
    **dict.fromkeys(
        ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB"), "bitsandbytes"
    ),
    **dict.fromkeys(
        ("weight_packed", "weight_zero_point", "weight_g_idx", "weight_shape"),
        "compressed-tensors",
    ),
    "W_q": "HQQ",
    "q_weight": "EXL2",
    "Qidxs": "QuIP#",
}
# Scales of a `weight` beside them, unless that is a plain number all the same.
_SCALES = {
    "weight_scale": "FP8, NVFP4 or integers, with scales",
    "weight_scales": "EETQ",
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale_2": "NVFP4 of ModelOpt",
    "weight_global_scale": "NVFP4 of compressed-tensors",
    "qscale_weight": "FP8 of Mistral",
}
# Integers, where a plain model may have numbers of the same name.
_INTEGERS = {"codes": "AQLM"}
_NAMES = _MARKERS.keys() | _SCALES.keys()
_BITSANDBYTES = "bitsandbytes__"  # quant_state.bitsandbytes__nf4

#: Files beside the weights that describe a quantisation.
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

_PACKED_DTYPES = COPY_DTYPES - {"BOOL", "I64", "U64"}


def refuse_quantised(checkpoint: CheckpointIndex) -> None:
    """Refuse a checkpoint whose weights are quantised.

    Raises
    ------
    InputError
        Naming the scheme and a tensor of it.
    """
    stated = model_facts(checkpoint).quant_method
    found: tuple[TensorEntry, str] | None = None
    for entry in checkpoint.tensors.values():
        if entry.dtype in FLOAT_DTYPES and entry.name.rpartition(".")[2] not in _NAMES:
            continue  # nearly all, of a hundred thousand
        if scheme := _scheme(checkpoint, entry):
            found = entry, stated or scheme
            break
        if found is None and (what := _packed(entry, is_stated=stated is not None)):
            found = entry, stated or what  # another tensor may tell more
    if found is not None:
        entry, scheme = found
        raise InputError(
            f"{checkpoint.location} is quantised ({scheme}): tensor {entry.name} is {entry.dtype} "
            f"{list(entry.shape)}, and means nothing without the others that belong to it. "
            "Quantised weights cannot be merged. Convert the checkpoint to BF16, F16 or F32 first, "
            "or merge the model that it was quantised from."
        )


def leftover_note(checkpoint: CheckpointIndex) -> str | None:
    """Return what to say of a checkpoint that claims a quantisation and has none."""
    files = [name for name in QUANTISATION_FILES if name in checkpoint.files]
    method = model_facts(checkpoint).quant_method
    if method is None and not files:
        return None
    where = files[0] if method is None else f"the quantization_config ({method}) of config.json"
    return (
        f"{checkpoint.location}: {where} speaks of a quantisation, but its tensors are plain "
        "numbers; it is not looked at"
        + ("." if method is None else ", and left out of the output's config.json.")
    )


def _scheme(checkpoint: CheckpointIndex, entry: TensorEntry) -> str | None:
    """Return the quantisation whose name a tensor has; None if it is a tensor like any other."""
    prefix, _, tail = entry.name.rpartition(".")
    if tail in _SCALES:
        weight = checkpoint.tensors.get(f"{prefix}.weight" if prefix else "weight")
        is_plain = weight is not None and weight.dtype in FLOAT_DTYPES
        return None if is_plain and model_facts(checkpoint).quant_method is None else _SCALES[tail]
    if tail.startswith(_BITSANDBYTES):
        return "bitsandbytes"
    if entry.dtype == "U8" and tail.endswith(("_blocks", "_scales")):
        return "MXFP4"
    if tail in _INTEGERS:
        return _INTEGERS[tail] if entry.dtype in _PACKED_DTYPES else None
    return _MARKERS.get(tail)


def _packed(entry: TensorEntry, *, is_stated: bool) -> str | None:
    """Return what a tensor holds in the place of numbers; None if it may be what it seems."""
    if entry.dtype.startswith(("F8", "F6", "F4")):
        return entry.dtype if is_stated else None  # else it is for matching to refuse
    if len(entry.shape) < 2 or entry.dtype not in COPY_DTYPES:
        return None
    if entry.name.rpartition(".")[2] == "weight":
        return f"{entry.dtype} in the place of a weight"
    return entry.dtype if is_stated and entry.dtype in _PACKED_DTYPES else None
