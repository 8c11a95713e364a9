"""Quantised checkpoints are told by their tensors, and refused by name before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from della_dist.errors import InputError
from della_dist.planning.views.quantised import leftover_note, refuse_quantised
from della_dist.specs.checkpoint import CheckpointIndex, ShardFile, TensorEntry

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]

UP = "model.layers.0.mlp.up_proj"
PLAIN: Kinds = {
    "model.embed_tokens.weight": ("BF16", (32, 16)),
    f"{UP}.weight": ("BF16", (32, 16)),
    "model.norm.weight": ("F32", (16,)),
    "model.layers.0.bn.num_batches_tracked": ("I64", ()),
    "model.embeddings.position_ids": ("I64", (1, 512)),
    "model.layers.0.ffn.gate.tid2eid": ("I64", (10, 2)),
    "mask": ("BOOL", (4, 4)),
}


def checkpoint(
    kinds: Kinds, quant_method: str | None = None, files: tuple[str, ...] = ()
) -> CheckpointIndex:
    tensors = {n: TensorEntry(n, dtype, shape, 0, 0, 0) for n, (dtype, shape) in kinds.items()}
    shard = ShardFile("model.safetensors", 0, "", "")
    scheme = None if quant_method is None else {"quant_method": quant_method}
    documents = {"config.json": {"quantization_config": scheme}}
    return CheckpointIndex("/expert", (shard,), tensors, files, documents)


#: What a matrix of 32 x 16 becomes: layouts of the libraries that write them.
SCHEMES: dict[str, tuple[str, Kinds]] = {
    "gptq": (
        "GPTQ",
        {
            f"{UP}.qweight": ("I32", (2, 32)),
            f"{UP}.qzeros": ("I32", (1, 4)),
            f"{UP}.scales": ("F16", (1, 32)),
            f"{UP}.g_idx": ("I32", (16,)),
        },
    ),
    "awq": (
        "AWQ",
        {
            f"{UP}.qweight": ("I32", (16, 4)),
            f"{UP}.qzeros": ("I32", (1, 4)),
            f"{UP}.scales": ("F16", (1, 32)),
        },
    ),
    "bitsandbytes 4 bit": (
        "bitsandbytes",
        {
            f"{UP}.weight": ("U8", (256, 1)),
            f"{UP}.weight.absmax": ("F32", (8,)),
            f"{UP}.weight.quant_map": ("F32", (16,)),
            f"{UP}.weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
        },
    ),
    "bitsandbytes 8 bit": (
        "bitsandbytes|I8",
        {f"{UP}.weight": ("I8", (32, 16)), f"{UP}.SCB": ("F32", (32,))},
    ),
    "pack-quantized": (
        "compressed-tensors|scales",
        {
            f"{UP}.weight_packed": ("I32", (32, 2)),
            f"{UP}.weight_scale": ("BF16", (32, 1)),
            f"{UP}.weight_shape": ("I64", (2,)),
        },
    ),
    "int-quantized": (
        "I8|scales",
        {f"{UP}.weight": ("I8", (32, 16)), f"{UP}.weight_scale": ("BF16", (32, 1))},
    ),
    "fp8 blocks": (
        "FP8 in blocks",
        {f"{UP}.weight": ("F8_E4M3", (32, 16)), f"{UP}.weight_scale_inv": ("F32", (1, 1))},
    ),
    "fp8 channels": (
        "FP8",
        {f"{UP}.weight": ("F8_E4M3", (32, 16)), f"{UP}.weight_scale": ("F32", (32, 1))},
    ),
    "nvfp4 of modelopt": (
        "U8|NVFP4",
        {
            f"{UP}.weight": ("U8", (32, 8)),
            f"{UP}.weight_scale": ("F8_E4M3", (32, 1)),
            f"{UP}.weight_scale_2": ("F32", ()),
        },
    ),
    "mxfp4": (
        "MXFP4",
        {
            "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (2, 32, 1, 16)),
            "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (2, 32, 1)),
        },
    ),
    "hqq": ("HQQ", {f"{UP}.W_q": ("U8", (16, 16)), f"{UP}.scale": ("F16", (8, 1))}),
    "aqlm": (
        "AQLM",
        {f"{UP}.codes": ("I8", (4, 16, 1)), f"{UP}.codebooks": ("F16", (1, 256, 1, 8))},
    ),
}


@pytest.mark.parametrize("stated", [None, "some-method"])
@pytest.mark.parametrize("name", SCHEMES)
def test_is_refused_by_name(name: str, stated: str | None) -> None:
    scheme, kinds = SCHEMES[name]
    others = {n: kind for n, kind in PLAIN.items() if n != f"{UP}.weight"}
    with pytest.raises(InputError, match=stated or scheme) as caught:
        refuse_quantised(checkpoint({**others, **kinds}, stated))
    message = str(caught.value)
    assert "/expert is quantised" in message
    assert any(f"tensor {n} is {d}" in message for n, (d, _) in kinds.items())
    assert "Convert" in message


@pytest.mark.parametrize(
    "kinds",
    [
        {f"{UP}.weight": ("I8", (32, 8))},
        {"model.layers.0.experts.packed": ("U8", (2, 32, 8))},
        {f"{UP}.weight": ("F8_E4M3", (32, 16))},
    ],
)
def test_a_scheme_of_its_own_is_refused_by_its_stated_name(kinds: Kinds) -> None:
    with pytest.raises(InputError, match=r"quantised \(vptq\)"):
        refuse_quantised(checkpoint({**PLAIN, **kinds}, "vptq"))


def test_plain_checkpoints_pass() -> None:
    refuse_quantised(checkpoint(PLAIN))
    assert leftover_note(checkpoint(PLAIN)) is None
    # Parameters that merely share a name with scales.
    named: Kinds = {
        **PLAIN,
        "vision.scales": ("F32", (3,)),
        "attn.k_scale": ("F32", ()),
        f"{UP}.weight_scale": ("F32", (32,)),
        "quantizer.codebooks": ("F32", (8, 16)),
        "model.codes": ("BF16", (8, 16)),
    }
    refuse_quantised(checkpoint(named))


def test_what_is_left_of_a_quantisation() -> None:
    stated = checkpoint(PLAIN, "gptq")
    refuse_quantised(stated)
    assert "quantization_config (gptq)" in str(leftover_note(stated))
    file = checkpoint(PLAIN, files=("config.json", "hf_quant_config.json"))
    refuse_quantised(file)
    assert "hf_quant_config.json" in str(leftover_note(file))
