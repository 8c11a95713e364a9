"""Outputs that are put together of layers: modules, each one stack of layers made of slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from della_dist.config.renames import spelled
from della_dist.config.settings import Settings, plain

if TYPE_CHECKING:
    from della_dist.config.model import MergeConfig

# The stacks of layers that a model may have, as its configuration calls them.
TEXT = "text_decoder"
VISION = "vision_tower"
ENCODER = "encoder"
DECODER = "decoder"
#: What else a module may be called.
_ALIASES = {
    TEXT: ("language_model", "llm", "text", "text_model"),
    VISION: ("vision", "vision_encoder", "vision_model", "visual"),
}

#: All layers that a model has, before its checkpoint is open; nobody can write it.
ALL_LAYERS = (0, 0)


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output that are merged from the same layers of the same checkpoints."""

    config: MergeConfig
    """What of: its models and settings; it has no slices itself."""
    ranges: tuple[tuple[int, int], ...]
    """Of each of its models, the first layer and the one after the last; all of one length. Or
    `ALL_LAYERS`, each."""
    base_range: tuple[int, int] | None
    """Of the base, where the method has one."""

    @property
    def num_layers(self) -> int:
        """Layers of the output."""
        return self.ranges[0][1] - self.ranges[0][0]

    @property
    def is_whole(self) -> bool:
        """Whether all layers of its models are meant, which are to be found out."""
        return self.ranges[0] == ALL_LAYERS

    def sources(self) -> list[tuple[str, tuple[int, int], Settings]]:
        """Return every checkpoint with its layers and settings, the base first."""
        experts = [
            (model.model, layers, model.settings)
            for model, layers in zip(self.config.models, self.ranges, strict=True)
        ]
        if self.base_range is None or self.config.base_model is None:
            return experts
        return [(self.config.base_model, self.base_range, {}), *experts]

    def normalized(self) -> dict[str, Any]:
        """Return the slice as a mapping of a configuration."""
        sources = [
            {
                "model": model,
                "layer_range": list(layers),
                **spelled(self.config.renames, model),
                "parameters": plain(settings),
            }
            for model, layers, settings in self.sources()
        ]
        return {"sources": sources, "parameters": plain(self.config.settings)}


@dataclass(frozen=True, slots=True)
class Module:
    """One stack of layers of the output."""

    name: str | None
    """Which: a stack, or what the configuration calls it. None: the only one, or the text's."""
    slices: tuple[Slice, ...]
    """In their order; the only one where it is whole."""

    @property
    def stack(self) -> str:
        """The stack that it is, once its name is known to be one."""
        return TEXT if self.name is None else self.name

    def with_configs(self, change: Callable[[MergeConfig], MergeConfig]) -> Module:
        """Return the same module with something changed of what its slices are merged by."""
        slices = tuple(replace(part, config=change(part.config)) for part in self.slices)
        return replace(self, slices=slices)

    def normalized(self) -> dict[str, Any]:
        """Return the module as a mapping of a configuration."""
        if not self.slices[0].is_whole:
            return {"slices": [part.normalized() for part in self.slices]}
        config = self.slices[0].config
        models = [
            {
                "model": m.model,
                **spelled(config.renames, m.model),
                "parameters": plain(m.settings),
            }
            for m in config.models
        ]
        return {"models": models, "parameters": plain(config.settings)}


def stack_called(name: str) -> str:
    """Return the stack that a module of this name is; the name itself where it is no alias."""
    return next((stack for stack, aliases in _ALIASES.items() if name in aliases), name)
