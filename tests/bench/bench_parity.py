"""The same configurations through della-dist and mergekit 0.1.5: how far apart are the outputs?

Models of Llama and Qwen2, made small, in float32, so that what differs is meaning and not rounding.
Prints the largest difference of any element of each configuration, and what only one of them
writes. mergekit runs from an environment of its own, which is made on the first run::

    python -m tests.bench.bench_parity [--mergekit VENV] [--only slerp]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.bench.bench_merge import MERGEKIT, install_mergekit
from tests.checkpoints import load_tensors, values_of
from tests.layouts import drawn
from tests.vocabularies import EMBEDDING, HEAD, vocabulary
from tests.vocabularies import make_models as make_others

#: Differences above this are no rounding.
FAR = 1e-6

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    """Return a source of a slice."""
    return {"model": model, "layer_range": [start, stop], "parameters": parameters}


def expert(model: str, **parameters: Any) -> dict[str, Any]:
    """Return one of the models."""
    return {"model": model, "parameters": parameters}


_FILTERS = [
    {"filter": "mlp", "value": [0.2, 0.5, 0.7]},
    {"filter": "self_attn", "value": 0.4},
]
_OWN_AND_SHARED = {
    "models": [expert("A"), expert("B", weight=[0.2, 0.8]), expert("C", weight=_FILTERS)],
    "parameters": {"weight": 0.6},
}
_TWO_SLICES = [
    {"sources": [source("A", 0, 4), source("B", 0, 4)]},
    {"sources": [source("A", 3, 8), source("C", 3, 8)]},
]

#: What is compared: name to configuration. `A` is the base where there is one.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "linear: gradients, filters, levels": {"merge_method": "linear", **_OWN_AND_SHARED},
    "task_arithmetic: the same, with lambda": {
        **_OWN_AND_SHARED,
        "merge_method": "task_arithmetic",
        "base_model": "A",
        "parameters": {"weight": 0.6, "lambda": [0.5, 1.0]},
    },
    "ties: gradients of density": {
        "merge_method": "ties",
        "base_model": "A",
        "models": [expert("B", density=[0.3, 0.9]), expert("C", weight=0.5, density=0.5)],
        "parameters": {"weight": 1.0},
    },
    "breadcrumbs: gradients of density and gamma": {
        "merge_method": "breadcrumbs",
        "base_model": "A",
        "models": [
            expert("B", density=[0.3, 0.9], gamma=[0.05, 0.1]),
            expert("C", weight=0.5, density=0.5),
        ],
        "parameters": {"weight": 1.0, "gamma": 0.2, "lambda": 0.9},
    },
    "breadcrumbs_ties: filters": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "A",
        "models": [expert("B", weight=_FILTERS), expert("C", weight=0.5), expert("D")],
        "parameters": {"weight": 0.7, "density": 0.6, "gamma": 0.04, "normalize": True},
    },
    "breadcrumbs: one L1 ratio a tensor": {
        "merge_method": "breadcrumbs",
        "base_model": "A",
        "models": [expert("B"), expert("C")],
        "parameters": {"weight": 0.7, "density": 0.6, "rescale": True},
    },
    "nearswap: gradients and filters": {
        "merge_method": "nearswap",
        "base_model": "A",
        "models": [expert("B")],
        "parameters": {"t": [{"filter": "mlp", "value": [0.001, 0.03]}, {"value": 0.01}]},
    },
    "slices of nearswap": {
        "merge_method": "nearswap",
        "base_model": "A",
        "slices": _TWO_SLICES,
        "parameters": {"t": 0.02},
    },
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "A", "models": [expert("B")]},
    "sce": {
        "merge_method": "sce",
        "base_model": "A",
        "models": [expert("B"), expert("C"), expert("D")],
        "parameters": {"select_topk": [{"filter": "mlp", "value": [0.2, 0.7]}, {"value": 0.5}]},
    },
    "slices of sce: everything selected": {
        "merge_method": "sce",
        "base_model": "A",
        "slices": [
            {"sources": [source("A", 0, 4), source("B", 0, 4), source("C", 0, 4)]},
            {"sources": [source("A", 3, 8), source("D", 3, 8), source("C", 3, 8)]},
        ],
    },
    "ram": {
        "merge_method": "ram",
        "base_model": "A",
        "models": [expert("B"), expert("C"), expert("D")],
        "parameters": {"epsilon": 0.02},
    },
    "ramplus_tl: gradients": {
        "merge_method": "ramplus_tl",
        "base_model": "A",
        "models": [expert("B"), expert("C"), expert("D")],
        "parameters": {"epsilon": [0.01, 0.04], "r": 0.5, "alpha": 3.0},
    },
    "passthrough: two models, scales": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("A", 0, 6)]},
            {
                "sources": [
                    source("B", 2, 8, scale=[{"filter": "o_proj", "value": 0.0}, {"value": 0.5}])
                ]
            },
        ],
    },
    "passthrough: the same layers again": {
        "merge_method": "passthrough",
        "slices": [{"sources": [source("A", 0, 5)]}, {"sources": [source("A", 3, 8)]}],
    },
    "slices of linear: parameters of every level": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [source("A", 0, 4, weight=[0.1, 0.9]), source("B", 2, 6)],
                "parameters": {"weight": _FILTERS},
            },
            {"sources": [source("B", 4, 8, weight=0.3), source("C", 4, 8)]},
        ],
        "parameters": {"weight": 0.6},
    },
    "slices of task_arithmetic: the base listed": {
        "merge_method": "task_arithmetic",
        "base_model": "A",
        "slices": _TWO_SLICES,
        "parameters": {"weight": 0.6, "lambda": 0.9},
    },
    "slices of ties: gradients in each": {
        "merge_method": "ties",
        "base_model": "A",
        "slices": _TWO_SLICES,
        "parameters": {"weight": 0.6, "density": [0.3, 0.9]},
    },
    "slerp: gradients and filters": {
        "merge_method": "slerp",
        "base_model": "A",
        "models": [expert("B"), expert("A")],
        "parameters": {"t": [*_FILTERS, {"value": 0.5}]},
    },
    "slices of slerp": {
        "merge_method": "slerp",
        "base_model": "A",
        "slices": [
            {"sources": [source("A", 0, 4), source("B", 0, 4)], "parameters": {"t": [0, 1]}},
            {"sources": [source("C", 3, 8), source("A", 3, 8)], "parameters": {"t": 0.2}},
        ],
    },
    "nuslerp: weights and filters": {
        "merge_method": "nuslerp",
        "models": [expert("A", weight=_FILTERS), expert("B", weight=[0.2, 0.8])],
        "parameters": {"weight": 0.3},
    },
    "nuslerp: deltas": {
        "merge_method": "nuslerp",
        "base_model": "A",
        "models": [expert("B", weight=0.3), expert("C", weight=0.6)],
    },
    "nuslerp: deltas, by rows": {
        "merge_method": "nuslerp",
        "base_model": "A",
        "models": [expert("B", weight=0.3), expert("C", weight=0.6)],
        "parameters": {"nuslerp_flatten": False},
    },
    "multislerp: gradients, filters, levels": {"merge_method": "multislerp", **_OWN_AND_SHARED},
    "multislerp: deltas, weights as they are": {
        "merge_method": "multislerp",
        "base_model": "A",
        "models": [expert("B", weight=0.3), expert("C", weight=0.4)],
        "parameters": {"normalize_weights": False},
    },
    "karcher: three models": {
        "merge_method": "karcher",
        "models": [expert("A"), expert("B"), expert("C")],
    },
    "karcher: a base that is not listed, two steps": {
        "merge_method": "karcher",
        "base_model": "A",
        "models": [expert("B"), expert("C")],
        "parameters": {"max_iter": 2, "tol": 1e-4},
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "A",
        "models": [expert("B"), expert("C"), expert("D")],
    },
    "model_stock: by rows": {
        "merge_method": "model_stock",
        "base_model": "A",
        "models": [expert("B"), expert("C"), expert("D")],
        "parameters": {"filter_wise": True},
    },
    "tokens: base, one expert's at other numbers": {
        "merge_method": "task_arithmetic",
        "base_model": "V-base",
        "models": [expert("V-a"), expert("V-moved", weight=0.3)],
        "parameters": {"weight": 0.6},
        "tokenizer_source": "base",
    },
    "tokens: union of added ones": {
        "merge_method": "task_arithmetic",
        "base_model": "V-base",
        "models": [expert("V-same"), expert("V-a"), expert("V-b")],
        "parameters": {"weight": 0.6},
        "tokenizer_source": "union",
    },
    "tokens: those of a model, without a base": {
        "merge_method": "linear",
        "models": [expert("V-a"), expert("V-b"), expert("V-moved", weight=0.3)],
        "parameters": {"weight": 0.6},
        "tokenizer_source": "V-b",
    },
    "tokens: each kind of source": {
        "merge_method": "task_arithmetic",
        "base_model": "V-base",
        "models": [expert("V-a"), expert("V-b")],
        "parameters": {"weight": 0.6},
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<a>": {"source": {"kind": "model_token", "model": "V-b", "token": "<b1>"}},
                "<b2>": {"source": {"kind": "zero"}},
                "<both>": {"source": "V-a", "force": True},
                "Ġthe": {
                    "source": {"kind": "model_token", "model": "V-base", "token_id": 9},
                    "force": True,
                },
            },
        },
    },
}


def make_models(folder: Path) -> None:
    """Write four models of each kind: A, B, C, D with a head of their own, TA to TD tied.

    Those that begin with V- are of different vocabularies. The same in every run.
    """
    kinds = {"": LlamaConfig(**SIZES), "T": LlamaConfig(**SIZES, tie_word_embeddings=True)}
    for prefix, config in kinds.items():
        for seed, name in enumerate("ABCD"):
            model = drawn(AutoModelForCausalLM.from_config(config), seed)
            model.save_pretrained(folder / f"{prefix}{name}")
    for name, path in make_others(folder / "others").items():
        path.rename(folder / f"V-{name}")


def tied(content: Any) -> Any:
    """Return a configuration with the tied models in place of the others."""
    if isinstance(content, dict):
        return {key: tied(value) for key, value in content.items()}
    if isinstance(content, list):
        return list(map(tied, content))
    return f"T{content}" if content in ("A", "B", "C", "D") else content


def compare(folder: Path, name: str, content: dict[str, Any], mergekit: Path) -> str:
    """Merge with both, and return the row of the table."""
    (folder / "c.yaml").write_text(yaml.safe_dump({**content, "dtype": "float32"}))
    ours, theirs = folder / "ours", folder / "theirs"
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    run = [
        sys.executable,
        "-m",
        "della_dist",
        "merge",
        "c.yaml",
        str(ours),
        "--restart",
        "--no-check",
    ]
    subprocess.run(run, check=True, env=env, **quiet)  # type: ignore[call-overload]
    # For a model card it asks the Hub.
    run = [
        str(mergekit / "bin" / "mergekit-yaml"),
        "c.yaml",
        str(theirs),
        "--allow-crimes",
        "--no-write-model-card",
    ]
    subprocess.run(run, check=True, env=env, **quiet)  # type: ignore[call-overload]
    a, b = (load_tensors(path) for path in (ours, theirs))
    rows = [[], []] if "V-" not in str(content) else same_tokens(ours, theirs)
    largest, far, elements = 0.0, 0, 0
    for n in a.keys() & b.keys():
        x, y = (values_of(one[n]).astype(np.float64) for one in (a, b))
        if rows[0] and n in (EMBEDDING, HEAD):
            x, y = x[rows[0]], y[rows[1]]
        apart = np.abs(x - y)
        largest = max(largest, float(apart.max()))
        far, elements = far + int((apart > FAR).sum()), elements + apart.size
    alone = [f"only here: {n}" for n in sorted(a.keys() - b.keys())]
    alone += [f"only there: {n}" for n in sorted(b.keys() - a.keys())]
    if far:
        alone.append(f"{far} of {elements:,} elements, the others below {FAR:g}")
    return f"| {name} | {len(a)} | {largest:.1e} | {', '.join(alone)} |"


def same_tokens(ours: Path, theirs: Path) -> list[list[int]]:
    """Return the numbers of all tokens in both outputs, which must have the same tokens."""
    a, b = vocabulary(ours), vocabulary(theirs)
    assert a.keys() == b.keys(), (a.keys() ^ b.keys(), ours, theirs)
    return [list(a.values()), [b[token] for token in a]]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--mergekit", type=Path, help="environment that has mergekit")
    parser.add_argument("--only", default="", help="only configurations whose name has this text")
    args = parser.parse_args()
    mergekit = args.mergekit or Path(tempfile.gettempdir()) / "mergekit-0.1.5"
    install_mergekit(mergekit)
    print(f"| against {MERGEKIT} | tensors | largest difference | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder)
        name = "passthrough: two models, scales"
        configurations = {**CONFIGURATIONS, f"{name}, tied": tied(CONFIGURATIONS[name])}
        for name, content in configurations.items():
            if args.only in name:
                print(compare(folder, name, content, mergekit), flush=True)


if __name__ == "__main__":
    main()
