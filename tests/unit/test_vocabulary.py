"""Vocabularies in every form that tokenizers have, against the libraries that load them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from della_dist.runtime.companions.vocabulary import added_tokens, read_vocabulary, vocabulary_names
from tests.checkpoints import sentencepiece_model

TOKENS = ["<unk>", "the", "an", "##swer", "is", "tea"]
EXPECTED = dict(enumerate(TOKENS))
BY_TOKEN = {token: number for number, token in EXPECTED.items()}


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


SPM = b"".join(
    field(1, field(1, token.encode()) + b"\x15\x00\x00\x80\xbf" + b"\x18\x01") for token in TOKENS
) + field(2, b"\x18\x01")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", dumped({"model": {"type": "BPE", "vocab": BY_TOKEN}})),
        (
            "tokenizer.json",
            dumped({"model": {"type": "Unigram", "vocab": [[t, 0] for t in TOKENS]}}),
        ),
        (
            "tokenizer.json",
            dumped(
                {
                    "model": {"vocab": dict(list(BY_TOKEN.items())[:5])},
                    "added_tokens": [{"id": 5, "content": "tea"}],
                }
            ),
        ),
        ("vocab.json", dumped(BY_TOKEN)),
        ("vocab.json", dumped(TOKENS)),
        ("vocab.txt", "\n".join(TOKENS).encode()),
        ("vocab.txt", ("\n".join(TOKENS) + "\n").encode()),
        ("vocab.txt", "\r\n".join(TOKENS).encode()),
        ("tokenizer.model", SPM),
        ("sentencepiece.bpe.model", SPM),
        ("source.spm", SPM),
        (
            "qwen.tiktoken",
            b"".join(b"%b %d\n" % (base64.b64encode(t.encode()), n) for n, t in EXPECTED.items()),
        ),
        (
            "tekken.json",
            dumped(
                {
                    "config": {"default_num_special_tokens": 1},
                    "special_tokens": [{"rank": 0, "token_str": "<unk>"}],
                    "vocab": [{"rank": n, "token_bytes": t} for n, t in enumerate(TOKENS[1:])],
                }
            ),
        ),
    ],
)
def test_forms(name: str, data: bytes) -> None:
    assert read_vocabulary(name, data) == EXPECTED
    assert vocabulary_names([name, "merges.txt", "x.py"]) == [name]


def test_tiktoken_in_a_file_called_model() -> None:
    data = b"IQ== 0\nIg== 1\n"
    assert read_vocabulary("tokenizer.model", data) == {0: "!", 1: '"'}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", dumped({"model": None})),
        ("tokenizer.json", dumped({"model": {"vocab": {}}, "added_tokens": [1]})),
        (
            "tokenizer.json",
            dumped({"model": {"vocab": {}}, "added_tokens": [{"id": 3, "content": None}]}),
        ),
        ("vocab.json", dumped({"eng": {"a": 0}})),
        ("vocab.json", dumped({"a": "zero"})),
        ("vocab.txt", b"\xff\xfe"),
        ("tekken.json", b"{}"),
        ("tokenizer.model", b"\x80\x02pickled"),
        ("tokenizer.model", b"\xff" * 40),
        ("tokenizer.model", SPM[:-3]),
        ("tokenizer.model", field(1, b"")),
        ("tokenizer.model", b"\n\xff"),
    ],
)
def test_unknown_forms(name: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_vocabulary(name, data)


def test_added_tokens_of_slow_tokenizers() -> None:
    documents = {
        "added_tokens.json": {"<a>": 7, "<b>": 8},
        "tokenizer_config.json": {
            "added_tokens_decoder": {"8": {"content": "<c>"}, "9": {"content": "<d>"}}
        },
    }
    assert added_tokens(documents) == {7: "<a>", 8: "<c>", 9: "<d>"}
    assert added_tokens({}) == {}
    odd: dict[str, Any] = {
        "added_tokens.json": [],
        "tokenizer_config.json": {"added_tokens_decoder": 1},
    }
    assert added_tokens(odd) == {}


def test_the_preferred_file_comes_first() -> None:
    names = ["tokenizer.model", "x.tiktoken", "vocab.json", "tokenizer.json", "source.spm"]
    assert vocabulary_names(names) == [
        *("tokenizer.json", "vocab.json", "tokenizer.model", "source.spm", "x.tiktoken"),
    ]
    assert vocabulary_names(["language.model", "config.json"]) == []


# Against the libraries.


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_as_tokenizers_numbers_them(kind: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    models = tokenizers.models
    made = {
        "BPE": lambda: models.BPE(vocab=BY_TOKEN, merges=[]),
        "WordPiece": lambda: models.WordPiece(vocab=BY_TOKEN, unk_token="<unk>"),
        "WordLevel": lambda: models.WordLevel(vocab=BY_TOKEN, unk_token="<unk>"),
        "Unigram": lambda: models.Unigram([(t, -1.0) for t in TOKENS], unk_id=0),
    }[kind]()
    tokenizer = tokenizers.Tokenizer(made)
    tokenizer.add_special_tokens(["<|im_start|>", "tea"])
    expected = {n: t for t, n in tokenizer.get_vocab(with_added_tokens=True).items()}
    assert read_vocabulary("tokenizer.json", tokenizer.to_str().encode()) == expected
    assert expected == EXPECTED | {6: "<|im_start|>"}


def test_as_sentencepiece_numbers_them() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece_model()
    loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
    expected = {n: loaded.id_to_piece(n) for n in range(loaded.get_piece_size())}
    assert read_vocabulary("tokenizer.model", model) == expected
