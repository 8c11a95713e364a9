"""What searches find beside one lambda for all, on trained models, and what a trial costs.

Trains the small family of ``tests.quality``, searches a weight per expert and what ``--auto``
opens, and prints the scores on what no trial saw::

    python -m tests.bench.bench_search [--trials 60] [--seeds 2] [--family DIR]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from della_dist.report.search import search_lines
from della_dist.runtime.search.run import Effort, search
from della_dist.runtime.search.scoring import scoring_of
from della_dist.runtime.search.spaces import open_space
from tests.quality import data, model
from tests.quality.plans import REDUCED

#: Of each skill; half of them are held out.
NUM_EXAMPLES = 200
MOST_WEIGHT = 1.5


def main() -> None:
    """Train, search, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="of the search")
    parser.add_argument("--family", type=Path, help="where it is kept; trained if it is not there")
    options = parser.parse_args()
    torch.set_num_threads(model.NUM_THREADS)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        family = options.family or Path(name) / "family"
        if not family.exists():
            train(family)
        for seed in range(options.seeds):
            for auto in (False, True):
                print(f"\nsearch seed {seed}, {'--auto' if auto else 'a weight per expert'}")
                run(family, f"{name}/out{seed}{auto}", options.trials, seed, auto=auto)


def run(family: Path, out: str, trials: int, seed: int, *, auto: bool) -> None:
    """Search, and print what was found and what it took."""
    space = open_space(family / ("merge.yaml" if auto else "space.yaml"), auto=auto)
    files = [f"{skill}={family / skill}.jsonl" for skill in data.SKILLS]
    scoring = scoring_of(space.config(space.first), None, files, 0)
    said: list[float] = []
    started = time.monotonic()
    found = search(
        space,
        out,
        scoring,
        Effort(trials),
        seed=seed,
        say=lambda line: said.append(time.monotonic()) if line.startswith("trial") else None,
    )
    print("\n".join(search_lines(found)))
    made = statistics.median(one.seconds for one in found.trials)
    every = statistics.median(b - a for a, b in itertools.pairwise(said))
    print(
        f"{time.monotonic() - started:.1f} s in all; a trial in the middle: {made:.3f} s to merge "
        f"and evaluate, {every - made:.3f} s to choose and to keep"
    )


def train(folder: Path) -> None:
    """Write a base, three experts, examples of each skill, and a space of their weights."""
    (plan,) = REDUCED
    base = model.new_model(plan.size, seed=0)
    items = data.batches(data.MIXTURE, "first half", 0, plan.base.batch_items)
    model.train(base, items, plan.base)
    save(base, folder / "base")
    for number, (name, skill) in enumerate(data.SKILLS.items()):
        expert = model.load(folder / "base").train()
        items = data.batches([(skill, 1.0)], "first half", 100 + number, plan.experts.batch_items)
        model.train(expert, items, plan.experts)
        save(expert, folder / name)
        rng, lines = np.random.default_rng(number), dict[str, None]()
        while len(lines) < NUM_EXAMPLES:
            item = skill.draw(rng)
            if item.part in ("validation", "test"):
                lines[json.dumps({"prompt": item.given, "response": item.answer})] = None
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    document = {"merge_method": "task_arithmetic", "base_model": str(folder / "base")}
    weight = {"search": [0.0, MOST_WEIGHT]}
    for name, parameters in (("space.yaml", {"weight": weight}), ("merge.yaml", {})):
        models = [
            {"model": str(folder / expert), "parameters": copy.deepcopy(parameters)}
            for expert in data.SKILLS
        ]
        (folder / name).write_text(yaml.safe_dump({**document, "models": models}))


def save(trained: object, folder: Path) -> None:
    """Write a model, and a tokenizer of the alphabet that begins and ends with a newline."""
    model.save(trained, folder)
    vocabulary = {letter: i for i, letter in enumerate(data.ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="\n $A", special_tokens=[("\n", 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n").save_pretrained(folder)


if __name__ == "__main__":
    main()
