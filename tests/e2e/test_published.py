"""Configurations in the form in which people publish them, from a Hub's cache to logits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download

from della_dist.cli import main
from della_dist.demo import make_family
from della_dist.storage.hub import snapshot as hub_snapshot
from tests.adapters import save_adapter
from tests.checkpoints import load_tensors
from tests.conftest import ask_hub
from tests.hub import files_of
from tests.servers.hub import Hub, add_commit
from tests.vocabularies import add_tokens

ALL = sorted((Path(__file__).parents[1] / "published").glob("*.yaml"))
#: Those of encoder-decoder models, which load as another class.
OF_BOTH = [path for path in ALL if path.stem.startswith("encoder-decoder")]
PUBLISHED = [path for path in ALL if path not in OF_BOTH]
LAYERS = 32


def named(key: str, paths: list[Path] = PUBLISHED) -> set[str]:
    """Return what stands behind a key in any of some configurations."""
    pattern = re.compile(rf"{key}:? ?(?:&\w+ )?([\w.-]+/[\w.-]+)")
    return {name for path in paths for name in pattern.findall(path.read_text())}


@pytest.fixture(scope="module")
def cache(hub_of_session: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that has a small Llama for every name, as the Hub's own client leaves it."""
    folder = tmp_path_factory.mktemp("published")
    shape: dict[str, Any] = {
        "hidden": 16,
        "intermediate": 32,
        "layers": LAYERS,
        "heads": 4,
        "kv_heads": 2,
    }
    family = make_family(folder / "family", vocab=512, num_experts=8, **shape)
    bases = named("base_model")
    with pytest.MonkeyPatch.context() as patch:
        hub_of_session.use()  # whatever a test before did with it
        ask_hub(hub_of_session.endpoint, folder / "hf", patch)
        for number, name in enumerate(sorted(named("model") | bases)):
            source = family.base if name in bases else family.experts[number % 8]
            if name.endswith(("-ChatML", "-padded")):
                source = with_other_tokens(source, folder / "others" / name)
            add_commit(hub_of_session.folder, name, files_of(source))
            snapshot_download(name)
        for seed, name in enumerate(sorted(named(r"\+"))):
            source = save_adapter(family.base, folder / "adapters" / name, seed=seed, std=0.02)
            add_commit(hub_of_session.folder, name, files_of(source))
            snapshot_download(name)
        for seed, name in enumerate(sorted(named("model", OF_BOTH))):
            source = with_both_sides(folder / "others" / name, seed)
            add_commit(hub_of_session.folder, name, files_of(source))
            snapshot_download(name)
        hub_snapshot.forget_snapshots()
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield folder
    hub_snapshot.forget_snapshots()


def with_both_sides(folder: Path, seed: int) -> Path:
    """Write a small T5 with as many layers as the one of that name, a fine-tune of one base."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)  # noqa: TID251
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=6, num_heads=2)
    model = T5ForConditionalGeneration(config)
    torch.manual_seed(seed)  # noqa: TID251
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def with_other_tokens(source: Path, folder: Path) -> Path:
    """Copy a model; by its name it gets tokens that all such have and its own, or more rows."""
    shutil.copytree(source, folder)
    if folder.name.endswith("-padded"):
        add_tokens(folder, [], pad_to_multiple_of=96)
    else:
        add_tokens(folder, ["<|tool|>", f"<|{folder.name}|>"])
    return folder


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published(cache: Path, tmp_path: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    options = ["--device", "cpu", "--json", "--keep-stages"]
    done = CliRunner().invoke(main, ["merge", str(path), str(out), *options])
    assert done.exit_code == 0, done.output
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    documents = {one.get("name"): one for one in yaml.safe_load_all(path.read_text())}
    stages = {at.name for at in (tmp_path / "out.stages").glob("*")}
    (last,) = documents.keys() - stages
    content = documents[last]
    assert loaded.config.num_hidden_layers == expected_layers(documents, content)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = loaded.get_input_embeddings().weight.shape[0]
    assert len(tokenizer) <= rows == loaded.config.vocab_size
    base = AutoTokenizer.from_pretrained(cache / "family" / "base")
    named = ("bos_token", "eos_token", "pad_token")
    assert all(getattr(tokenizer, key) == getattr(base, key) for key in named)
    assert set(base.all_special_tokens) <= set(tokenizer.all_special_tokens)
    policy = content.get("tokenizer_source") or content.get("tokenizer", {}).get("source")
    if policy == "union":
        added = {f"<|{n.partition('/')[2]}|>" for n in re.findall(r"\S+-ChatML", path.read_text())}
        shared = {"<|tool|>"} if added else set()  # others have the base's tokens
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        assert added | shared <= special
    words = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    logits = loaded(**tokenizer(words, return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    verified = CliRunner().invoke(main, ["verify", str(out), "--recompute", "3"])
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("path", OF_BOTH, ids=lambda path: path.stem)
def test_published_for_an_encoder_and_a_decoder(cache: Path, tmp_path: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["merge", str(path), str(out), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    modules = yaml.safe_load(path.read_text())["modules"]
    config = loaded.config
    assert config.num_layers == expected_layers({}, modules["encoder"])
    assert config.num_decoder_layers == expected_layers({}, modules["decoder"])
    words = torch.arange(3, 9)[None]
    assert torch.isfinite(loaded(input_ids=words, decoder_input_ids=words).logits).all()
    # The card has the recipe as it can be run again.
    recipe = re.search(r"```yaml\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert recipe is not None
    again = tmp_path / "again"
    (tmp_path / "c.yaml").write_text(recipe[1])
    done = CliRunner().invoke(main, ["merge", str(tmp_path / "c.yaml"), str(again), "--json"])
    assert done.exit_code == 0, done.output
    assert load_tensors(again) == load_tensors(out)
    verified = CliRunner().invoke(main, ["verify", str(out), "--recompute", "20"])
    assert verified.exit_code == 0, verified.output


def expected_layers(documents: dict[str | None, Any], content: Any) -> int:
    module = next(iter(content.get("modules", {}).values()), content)
    slices = module.get("slices")
    if slices is None:
        base = content.get("base_model", "")
        return expected_layers(documents, documents[base]) if base in documents else LAYERS
    ranges = [part["sources"][0]["layer_range"] for part in slices]
    return sum(stop - start for start, stop in ranges)
