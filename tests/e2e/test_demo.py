"""The demo, from nothing to a merged model that transformers loads."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from della_dist.cli import main
from della_dist.demo.run import NUM_RECOMPUTED, run_demo
from della_dist.errors import OutputError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    lines: list[str] = []
    merged, verified = run_demo(directory, lines.append)
    assert merged.model_digest == verified.model_digest
    assert merged.num_tensors == verified.num_tensors > 50
    assert len(verified.recomputed) == NUM_RECOMPUTED
    return directory, lines


def test_says_what_to_look_at_next(demo: tuple[Path, list[str]]) -> None:
    directory, lines = demo
    for line in lines[lines.index("what to look at next:") + 1 :]:
        first = line.split()[0]
        if first.startswith(str(directory)):
            assert Path(first).exists()


def test_transformers_loads_the_output(demo: tuple[Path, list[str]]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages deprecate is not ours to fix
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        merged = demo[0] / "merged"
        model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(merged)
        prompt = tokenizer("The quick brown fox", return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    assert model.dtype == torch.bfloat16
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(prompt["input_ids"][0], skip_special_tokens=True).strip()


def test_merged_differs_from_the_base_by_a_mean_of_deltas(demo: tuple[Path, list[str]]) -> None:
    from tests.checkpoints import load_tensors, values_of

    directory = demo[0]
    base, merged, *experts = (
        load_tensors(directory / name) for name in ("base", "merged", "math", "code", "chat")
    )
    name = "model.layers.3.mlp.up_proj.weight"
    delta = values_of(merged[name]) - values_of(base[name])
    mean = np.mean([values_of(e[name]) - values_of(base[name]) for e in experts], axis=0)
    # The pruned deltas are unbiased, so the merged one points where their mean does.
    cosine = (delta * mean).sum() / ((delta**2).sum() * (mean**2).sum()) ** 0.5
    assert 0.4 < cosine < 0.95


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; the demo is made in a directory"):
        run_demo(tmp_path / "file", print)


def test_again_finds_everything_done(demo: tuple[Path, list[str]]) -> None:
    lines: list[str] = []
    merged, _ = run_demo(demo[0], lines.append)
    assert merged.tasks_resumed == merged.num_tasks
    assert lines[:2] == [
        f"the model family in {demo[0]} is there already",
        f"{demo[0]}/merged is complete already; nothing was merged",
    ]
    assert any(line.startswith("merging them") for line in demo[1])
    quiet = CliRunner().invoke(main, ["demo", str(demo[0]), "-q"])
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        run_demo(tmp_path, lambda line: None)
    assert (tmp_path / "base" / "precious.txt").read_text() == "mine"
