"""The tokenizer and chat template that a configuration gives, as transformers finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from della_dist import plan
from della_dist.config import config_from_mapping
from della_dist.demo import make_family
from della_dist.errors import ConfigError, OutputError
from della_dist.runtime.companions.names import is_of_tokenizer
from tests.merging import run

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye."},
]
#: As the models that have these formats are prompted.
FORMATS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
    "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHello?\n\n### Response:\nHi.\n\n"
    "### Instruction:\nBye.\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello?\n[|assistant|]Hi.[|endofturn|]\n"
    "[|user|]Bye.\n[|assistant|]",
    "{% for m in messages %}<{{ m['role'] }}>{% endfor %}": "<system><user><assistant><user>",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    make_family(folder, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    return folder


def configuration(folder: Path, template: str | None) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(folder / name)} for name in ("math", "code")],
        "chat_template": template,
    }


def applied(path: Path, **how: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, **how
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", FORMATS)
def test_what_is_given(family: Path, tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    run(config_from_mapping(configuration(family, template)), out)
    bos = AutoTokenizer.from_pretrained(out).bos_token or ""
    assert applied(out) == FORMATS[template].replace("{bos}", bos)
    stated = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert stated == (out / "chat_template.jinja").read_text()  # older versions look there
    assert run(config_from_mapping(configuration(family, template)), out).already_complete


def test_templates_of_other_names_stay(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    path = folder / "math" / "tokenizer_config.json"
    document = json.loads(path.read_text())
    named = [{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in ("default", "rag")]
    path.write_text(json.dumps({**document, "chat_template": named}))
    out = tmp_path / "out"
    run(config_from_mapping(configuration(folder, "chatml")), out)
    (out / "chat_template.jinja").unlink()  # which would be the only one
    assert applied(out) == FORMATS["chatml"]
    assert applied(out, chat_template="rag") == "rag"


def test_where_none_is_given_the_bases_stays(family: Path, tmp_path: Path) -> None:
    for name in (None, "auto"):
        out = tmp_path / str(name)
        run(config_from_mapping(configuration(family, name)), out)
        assert applied(out) == applied(family / "math")
        files = ((path / "tokenizer_config.json").read_bytes() for path in (out, family / "math"))
        assert next(files) == next(files)


def test_marks_that_are_no_tokens_are_said(family: Path) -> None:
    def said(template: str) -> bool:
        notes = plan(configuration(family, template)).notes
        return any("are no tokens of" in note for note in notes)

    assert said("exaone")
    assert not said("alpaca")


# ---------------------------------------------------------------- whose tokenizer


@pytest.fixture
def own(family: Path, tmp_path: Path) -> Path:
    """The family with a tokenizer of its own for `code`, over the same vocabulary."""
    folder = shutil.copytree(family, tmp_path / "family")
    path = folder / "code" / "tokenizer_config.json"
    document = json.loads(path.read_text())
    del document["chat_template"]
    path.write_text(json.dumps({**document, "padding_side": "left", "model_max_length": 77}))
    (folder / "code" / "chat_template.jinja").write_text("{{ 'of code' }}")
    (folder / "math" / "merges.txt").write_text("a b\n")
    return folder


def of_tokenizer(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if is_of_tokenizer(f.name)}


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_the_tokenizer_of_a_model(own: Path, tmp_path: Path, key: str) -> None:
    from transformers import AutoTokenizer

    out, code = tmp_path / "out", str(own / "code")
    value = code if key == "tokenizer_source" else {"source": code}
    content = {**configuration(own, None), key: value}
    run(config_from_mapping(content), out)
    assert of_tokenizer(out) == of_tokenizer(own / "code") != of_tokenizer(own / "math")
    assert not (out / "merges.txt").exists()  # of the other's
    assert (out / "config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
    assert applied(out) == "of code"
    assert run(config_from_mapping(content), out).already_complete
    with_template = tmp_path / "both"
    run(config_from_mapping({**content, "chat_template": "chatml"}), with_template)
    assert applied(with_template) == FORMATS["chatml"]
    changed = own / "code" / "tokenizer_config.json"
    changed.write_text(changed.read_text().replace("77", "78"))
    with pytest.raises(OutputError, match="another merge"):
        run(config_from_mapping(content), out)


def test_a_folder_that_is_called_base(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word means the base of the configuration, wherever it lies."""
    monkeypatch.chdir(own)
    (own / "base").rename(own / "union")
    (own / "math").rename(own / "base")
    models = [{"model": "code"}, {"model": "base"}, {"model": "union"}]
    for word in ("base", "union"):
        content = {"merge_method": "linear", "models": models, "tokenizer_source": word}
        run(config_from_mapping(content), tmp_path / word)
        assert of_tokenizer(tmp_path / word) == of_tokenizer(own / "code")
        manifest = json.loads((tmp_path / word / "della_manifest.json").read_text())
        assert manifest["config"]["tokenizer"] == {"source": word}
    with pytest.raises(ConfigError, match="from / on"):
        config_from_mapping({**content, "tokenizer_source": "./base"})


def test_a_union_of_equal_vocabularies(own: Path, tmp_path: Path) -> None:
    content = {**configuration(own, None), "tokenizer_source": "union"}
    run(config_from_mapping(content), tmp_path / "out")
    assert of_tokenizer(tmp_path / "out") == of_tokenizer(own / "math")
