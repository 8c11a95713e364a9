"""What every hostile input is made of: a small healthy merge, with one thing wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import Tensor, make_experts, save_checkpoint, tensor

EMBED = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
STEPS = "steps"


@dataclass(frozen=True)
class Situation:
    """A merge that must be refused."""

    config: Path
    out: Path
    words: tuple[str, ...]
    """All of them are in the message."""
    options: tuple[str, ...] = ()
    """More arguments of the command line."""


@dataclass(frozen=True)
class Case:
    """How to make a situation."""

    name: str
    build: Callable[[Path], Situation]
    needs_data: bool
    """Only the values of tensors tell: `plan` does not see it."""


CASES: list[Case] = []


def hostile(build: Callable[[Path], Situation]) -> Callable[[Path], Situation]:
    """Register a case that headers and small files give away."""
    CASES.append(Case(build.__name__.removeprefix("case_"), build, needs_data=False))
    return build


def hostile_data(build: Callable[[Path], Situation]) -> Callable[[Path], Situation]:
    """Register a case that only the values of tensors give away."""
    CASES.append(Case(build.__name__.removeprefix("case_"), build, needs_data=True))
    return build


def healthy_tensors() -> dict[str, Tensor]:
    rng = np.random.default_rng(5)
    return {
        EMBED: tensor(rng.normal(0, 0.05, (12, 8)), "BF16"),
        UP: tensor(rng.normal(0, 0.05, (6, 16)), "BF16"),
        DOWN: tensor(rng.normal(0, 0.05, (5, 7)), "F32"),
        NORM: tensor(rng.normal(1, 0.05, (8,)), "F16"),
        HEAD: tensor(rng.normal(0, 0.05, (12, 8)), "BF16"),
        STEPS: tensor(np.arange(3), "I64"),
    }


@dataclass(frozen=True)
class Family:
    """A healthy base with two experts, and a configuration that merges them."""

    folder: Path
    base: Path
    experts: tuple[Path, Path]

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def configure(self, *lines: str, experts: Sequence[str | Path] = ()) -> None:
        """Write the configuration; `lines` come before the models."""
        models = "".join(
            f"  - model: {e}\n    parameters: {{weight: {1 + m}}}\n"
            for m, e in enumerate(experts or self.experts)
        )
        self.config.write_text(
            f"merge_method: della\nbase_model: {self.base}\n"
            + "".join(f"{line}\n" for line in lines)
            + f"models:\n{models}parameters: {{density: 0.5}}\n"
        )

    def refused(
        self, *words: str, out: Path | None = None, options: tuple[str, ...] = ()
    ) -> Situation:
        return Situation(self.config, self.out if out is None else out, words, options)


def save_family(
    folder: Path,
    *,
    base: Mapping[str, Tensor] | None = None,
    expert1: Mapping[str, Tensor] | None = None,
    num_shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Family:
    """Write a family; `base` is what the experts are made of, `expert1` changes the second one."""
    healthy = healthy_tensors() if base is None else dict(base)
    experts = make_experts(healthy, 2)
    experts[1] = {**experts[1], **(expert1 or {})}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama"} if config is None else config
    how: dict[str, Any] = {"num_shards": num_shards, "config": config}
    family = Family(
        folder,
        save_checkpoint(folder / "base", healthy, **how),
        (
            save_checkpoint(folder / "expert0", experts[0], **how),
            save_checkpoint(folder / "expert1", experts[1], **how),
        ),
    )
    family.configure()
    return family


def file_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
