"""A byte-level BPE tokenizer, written by hand: no library is needed to make it.

Every text can be encoded and comes back the same; common words are one token.
"""

from __future__ import annotations

import json
from typing import Any

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

#: The smallest vocabulary: the special tokens and every byte.
MIN_VOCAB = len(SPECIAL_TOKENS) + 256

MAX_POSITIONS = 2048

_WORDS = (
    " the of and to in is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who "
    "will no more if out so what up said about than its into them can only other time new some "
    "could these two may first then do any like my now over such our man me even most made after "
    "also did many off before must well back through years much where your way down should "
    "because long each just state people those too mr how little good world make very year still "
    "see own work men day get here between both being under three never know same last another "
    "while us might great go come since against right came take used himself few house use place "
    "during without again home around small however found thought def return import self class "
    "if else for while print None True False number sum equals answer solve step"
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer_files(vocab: int) -> dict[str, str]:
    """Return name -> text of the tokenizer's files.

    Parameters
    ----------
    vocab
        Rows of the embedding; the tokenizer has at most as many tokens.

    Raises
    ------
    ValueError
        If `vocab` is below `MIN_VOCAB`.
    """
    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab must be at least {MIN_VOCAB}, not {vocab}")
    tokens = [*SPECIAL_TOKENS, *_byte_symbols()]
    merges = _merges(vocab - len(tokens))
    tokens += [a + b for a, b in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, t) for i, t in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {
        **special,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _added_token(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def _byte_symbols() -> list[str]:
    """Return the printable character that stands for each of the 256 bytes in byte-level BPE.

    Printable Latin-1 stands for itself, the others for the characters from U+0100 on, in order.
    """
    symbols, others = [], 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(0x100 + others))
            others += 1
    return symbols


def _merges(count: int) -> list[tuple[str, str]]:
    """Return at most `count` merges that build the common words from left to right."""
    merges: dict[tuple[str, str], None] = {}
    space = _byte_symbols()[0x20]
    for word in _WORDS.split():
        start = space
        for letter in word:
            merges.setdefault((start, letter))
            start += letter
    return list(merges)[:count]
