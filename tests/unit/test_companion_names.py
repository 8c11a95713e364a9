"""Which kinds of files that people publish beside the weights belong to the model."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from della_dist.runtime.companions.names import (
    is_carried,
    is_carried_folder,
    is_worth_a_word,
    looks_like_a_file,
    never_read,
)


def words(text: str) -> list[str]:
    return text.split()


#: From repositories of the Hub: text, vision, speech and embedding models, and what trainers leave.
CARRIED = words("""
config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model spiece.model source.spm target.spm
sentencepiece.bpe.model qwen.tiktoken tiktoken.model tekken.json bpe.codes emoji.json dict.txt
normalizer.json chat_template.jinja chat_template.json additional_chat_templates/rag.jinja
preprocessor_config.json processor_config.json video_preprocessor_config.json
image_processor_config.json feature_extractor_config.json audio_tokenizer_config.json
modeling_deepseek.py configuration_deepseek.py tokenization_kimi.py __init__.py inference/model.py
inference/configs/config_671B.json requirements.txt
modules.json config_sentence_transformers.json sentence_bert_config.json 1_Pooling/config.json
2_Dense/config.json 2_Normalize/config.json 1_Pooling/README.md
LICENSE LICENSE.txt NOTICE USE_POLICY.md MODEL_CARD.md model_index.json params.json
alphabet.json language_model/attrs.json language_model/unigrams.txt speaker_embeddings/a_prompt.npy
figures/benchmark.png assets/demo.wav optimizer_config.py custom_generate/generate.py
recipe.yaml all_results.json args.json tokenizer.tok.json
""")

LEFT_OUT = words("""
model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json
consolidated.safetensors consolidated.00.pth pytorch_model.bin pytorch_model.bin.index.json
pytorch_model-00001-of-00002.bin training_args.bin optimizer.pt scheduler.pt rng_state_0.pth
scaler.pt trainer_state.json random_states_0.pkl zero_to_fp32.py latest tf_model.h5
tf_model.h5.index.json flax_model.msgpack flax_model.msgpack.index.json rust_model.ot model.onnx
model.onnx.data decoder_model.onnx_data model-q4_K_M.gguf ggml-model-q4_0.bin model.ckpt
model.ckpt-1000.index model.ckpt.meta saved_model.pb model.tflite model.mlmodel model.pte
model.nemo rank0.engine weights.pdparams model.litertlm model.llamafile E.BIN
speech/model.safetensors
events.out.tfevents.1700000000.host.1.0 logs/events.out.tfevents.1700000000.host.1.0
adapter_config.json adapter_model.safetensors adapter_model.bin
hf_quant_config.json quantize_config.json quant_config.json
README.md readme.md .gitattributes .gitignore .DS_Store della_manifest.json della_tensors.parquet
della_run.json
""")

FOLDERS = {
    **dict.fromkeys(("1_Pooling", "additional_chat_templates", "inference", "assets", "a/b"), True),
    **dict.fromkeys(("optimizer", "checkpoints", "originals", "v1.0", "language_model"), True),
    **dict.fromkeys(("original", "onnx", "openvino", "coreml", "Model.mlpackage"), False),
    **dict.fromkeys(("checkpoint-500", "last-checkpoint", "global_step500", "runs"), False),
    **dict.fromkeys((".git", ".cache", "__pycache__", "wandb", "optimizer_0", "a/.git"), False),
}


@pytest.mark.parametrize("name", CARRIED)
def test_carried(name: str) -> None:
    assert is_carried(name)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(name: str) -> None:
    assert not is_carried(name)


@pytest.mark.parametrize(("name", "is_looked_into"), FOLDERS.items())
def test_folders(name: str, is_looked_into: bool) -> None:
    assert is_carried_folder(name) == is_looked_into


def test_the_table_has_every_kind_that_was_lost_once() -> None:
    assert len(set(CARRIED)) >= 57
    assert len(set(LEFT_OUT)) >= 50


def test_weights_of_modules_are_part_of_the_model() -> None:
    modules = frozenset({"2_Dense", "a/3_Dense"})
    for name in ("2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "a/3_Dense/x.bin"):
        assert is_carried(name, modules)
        assert not is_carried(name)
    for name in ("model.safetensors", "3_Dense/model.safetensors", "2_Dense/model.onnx"):
        assert not is_carried(name, modules)


def test_names_of_the_output_itself_are_only_taken_at_the_top() -> None:
    assert is_carried("docs/README.md")
    assert not is_carried("README.md")


def test_matters_of_course_are_not_worth_a_word() -> None:
    for name in ("README.md", ".gitattributes", ".cache/", "model.safetensors.index.json"):
        assert not is_worth_a_word(name)
    for name in ("pytorch_model.bin", "original/", "checkpoint-5", "adapter_config.json"):
        assert is_worth_a_word(name)


def test_folders_that_stand_where_a_file_should_be() -> None:
    assert looks_like_a_file("tokenizer.json")
    assert looks_like_a_file("a/Spiece.MODEL")
    assert not looks_like_a_file("v1.0")
    assert not looks_like_a_file("1_Pooling")


def test_what_is_not_downloaded() -> None:
    """Weights of torch are, where they are what is merged; and then no others of that form."""
    index = "pytorch_model.bin.index.json"
    keys = ["pytorch_model.bin", index, "optimizer.pt", "a[1].bin", "sub/x.bin", "config.json"]

    def left(weights: list[str]) -> list[str]:
        return list(filter_repo_objects(keys, ignore_patterns=never_read(keys, weights)))

    assert left([]) == ["config.json"]
    assert left(keys[:2]) == ["pytorch_model.bin", index, "config.json"]
