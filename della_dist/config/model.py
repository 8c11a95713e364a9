"""The validated configuration, and what it means for one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from della_dist.config import scalars
from della_dist.config.evaluate import evaluate
from della_dist.config.methods import METHODS, Method
from della_dist.config.modules import Module, Slice
from della_dist.config.output import OutputForm
from della_dist.config.problem import Problem
from della_dist.config.renames import Renames, spelled
from della_dist.config.settings import Setting, Settings, plain
from della_dist.config.tokenizer import TokenizerPolicy
from della_dist.errors import ConfigError
from della_dist.specs.recipe import Granularity, MergeSettings, OnNonfinite


@dataclass(frozen=True, slots=True)
class ExpertModel:
    """One expert, with the parameters that hold for it after precedence."""

    model: str
    """Where the checkpoint is."""
    settings: Settings
    """Its weight; density and epsilon where the method has them. Where none is there, or no branch
    for a tensor, everything is kept, and `default_epsilon` holds."""


@dataclass(frozen=True)
class MergeConfig:
    """A validated configuration. Compares by what it means, not by how it was written."""

    merge_method: str
    base_model: str | None
    """The reference, whose names, shapes, dtypes and files the output takes over; None: the first
    of the models, where the method has no base."""
    models: tuple[ExpertModel, ...]
    """The experts in the order of the file, which is the order of every sum."""
    settings: Settings
    """Of all experts alike: ``normalize``, and where the method has them ``rescale`` (``inverse``,
    ``l1`` or ``none``) and ``lambda``."""
    dtype: str | None = None
    """Safetensors name, or None for the reference checkpoint's dtype, tensor by tensor."""
    out_dtype: str | None = None
    """Wins over `dtype`."""
    seed: int = 0
    granularity: Granularity = "row"
    on_nonfinite: OnNonfinite = "error"
    extra_tensors: str = "error"
    """``error`` or ``ignore``: what becomes of tensors that only an expert has."""
    missing_tensors: str = "error"
    """``error`` or ``base``: what becomes of tensors that an expert lacks."""
    on_different_integers: str = "error"
    """``error`` or ``base``: what becomes of integer tensors that are not equal everywhere."""
    keep_fp32: str = "auto"
    """``auto``: F32 tensors that transformers keeps in F32 stay so in a 16-bit output; ``none``."""
    allow_different_tokenizers: bool = False
    """Whether rows of embeddings are merged by position although their tokens differ."""
    tokenizer: TokenizerPolicy | None = None
    """Whose tokens the output has; None: those of the base, which all models are to have."""
    chat_template: str | None = None
    """The output's, as jinja; None: what the base has."""
    output: OutputForm | None = None
    """In which form the merge is written; None: as a model."""
    renames: Renames = field(default_factory=dict)
    """By location, what becomes of the names of a checkpoint's tensors before anything else."""
    modules: tuple[Module, ...] = ()
    """The stacks of layers that are put together of slices; empty: whole models are merged. With
    modules, `models` are all that any slice names, and what holds for them is in the slices."""
    name: str | None = None
    """Of a stage: what others call its output."""
    stages: tuple[MergeConfig, ...] = ()
    """What is merged before this, each after those that it names, whose names stand for their
    outputs among the locations; they have no stages themselves."""
    node_labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Glob of input files -> ``key=value`` label of the nodes whose own disks have them. Says where
    to work, not what comes out."""
    source: str = field(default="the configuration", compare=False)
    """What messages call this configuration."""
    remarks: tuple[str, ...] = field(default=(), compare=False, repr=False)
    _filters: tuple[str, ...] = field(default=(), init=False, compare=False, repr=False)
    _has_gradients: bool = field(default=False, init=False, compare=False, repr=False)
    _cache: dict[tuple[float, tuple[bool, ...]], MergeSettings] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.merge_method not in METHODS or not self.models:
            raise ConfigError(f"{self.source}: needs a method that is known, and a model.")
        if self.has_base and self.base_model is None:
            raise ConfigError(f"{self.source}: {self.merge_method} needs a base_model.")
        branches = [branch for _, setting in self.all_settings() for branch in setting.branches]
        filters = dict.fromkeys(b.filter for b in branches if b.filter)
        object.__setattr__(self, "_filters", tuple(filters))
        object.__setattr__(self, "_has_gradients", any(len(b.points) > 1 for b in branches))

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of all modules; empty: whole models are merged."""
        return tuple(part for module in self.modules for part in module.slices)

    def all_settings(self) -> Iterator[tuple[str, Setting[Any]]]:
        """Yield name and setting of every parameter, those of each expert included."""
        for config in (self, *(part.config for part in self.slices)):
            for settings in (config.settings, *(expert.settings for expert in config.models)):
                yield from settings.items()

    @property
    def method(self) -> Method:
        """What the merge method is made of."""
        return METHODS[self.merge_method].given(self.base_model)

    @property
    def has_base(self) -> bool:
        """Whether deltas to a base are merged, rather than the checkpoints themselves."""
        return self.method.has_base

    @property
    def output_dtype(self) -> str | None:
        """Safetensors name of the dtype of merged tensors; None: that of the reference."""
        return self.out_dtype or self.dtype

    def with_seed(self, seed: int) -> MergeConfig:
        """Return the same configuration with another seed.

        Raises
        ------
        ConfigError
            If `seed` is not in [0, 2**64).
        """
        try:
            number = scalars.seed(seed)
        except ValueError as error:
            raise ConfigError(f"the seed {error}.") from None
        modules = tuple(m.with_configs(lambda c: replace(c, seed=number)) for m in self.modules)
        stages = tuple(stage.with_seed(number) for stage in self.stages)
        return replace(self, seed=number, modules=modules, stages=stages)

    def locations(self) -> list[str]:
        """Return where the checkpoints are: the base, if there is one, then the models."""
        base = [] if self.base_model is None else [self.base_model]
        return [*base, *(model.model for model in self.models)]

    def with_locations(self, where: Mapping[str, str]) -> MergeConfig:
        """Return the same configuration with every checkpoint named as `where` says."""
        return replace(
            self,
            base_model=None if self.base_model is None else where[self.base_model],
            models=tuple(replace(m, model=where[m.model]) for m in self.models),
            tokenizer=(
                None if self.tokenizer is None else self.tokenizer.with_locations(where.__getitem__)
            ),
            renames={where[location]: rules for location, rules in self.renames.items()},
            modules=tuple(
                m.with_configs(lambda part: part.with_locations(where)) for m in self.modules
            ),
        )

    def with_node_labels(self, rules: Iterable[str]) -> MergeConfig:
        """Return the same configuration with rules ``GLOB:KEY=VALUE`` before its own.

        Raises
        ------
        ConfigError
            If a rule is not written like that.
        """
        labels = {}
        for rule in rules:
            glob, _, label = rule.rpartition(":")
            if not glob or not scalars.NODE_LABEL.fullmatch(label):
                raise ConfigError(
                    f"--locality {rule}: write files and the label of the nodes that have them, "
                    "as '/data/base/*:disk=a'."
                )
            labels[glob] = label
        return self._with_labels(labels) if labels else self

    def _with_labels(self, labels: Mapping[str, str]) -> MergeConfig:
        stages = tuple(stage._with_labels(labels) for stage in self.stages)
        return replace(self, node_labels={**labels, **self.node_labels}, stages=stages)

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know of how this configuration is read, a line each."""
        return self.remarks

    def normalized(self) -> dict[str, Any]:
        """Return the configuration as a canonical JSON-able mapping.

        `config_from_mapping` makes an equal configuration of it. Everything that the output
        depends on is in it, with defaults filled in and parameters without effect left out.
        """
        stages = [{"name": stage.name, **stage.normalized()} for stage in self.stages]
        return {
            **({"stages": stages} if stages else {}),
            "merge_method": self.merge_method,
            "base_model": self._normalized_base(),
            **self._normalized_models(),
            "parameters": plain(self.settings),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            **({} if self.tokenizer is None else {"tokenizer": self.tokenizer.normalized()}),
            **({} if self.chat_template is None else {"chat_template": self.chat_template}),
            **({} if self.output is None else {"output": self.output.normalized()}),
            "seed": self.seed,
            "granularity": self.granularity,
            "on_nonfinite": self.on_nonfinite,
            "extra_tensors": self.extra_tensors,
            "missing_tensors": self.missing_tensors,
            "on_different_integers": self.on_different_integers,
            "keep_fp32": self.keep_fp32,
            "allow_different_tokenizers": self.allow_different_tokenizers,
        }

    def _normalized_base(self) -> str | dict[str, Any] | None:
        if self.method.base_among == "first":
            return self.models[0].model
        rules = {} if self.base_model is None else spelled(self.renames, self.base_model)
        return {"model": self.base_model, **rules} if rules else self.base_model

    def _normalized_models(self) -> dict[str, Any]:
        if not self.modules:
            models = [
                {
                    "model": m.model,
                    **spelled(self.renames, m.model),
                    "parameters": plain(m.settings),
                }
                for m in self.models
            ]
            return {"models": models}
        if self.modules[0].name is None:
            return self.modules[0].normalized()
        return {"modules": {module.name: module.normalized() for module in self.modules}}

    def shown(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the configuration as people share it, readable as one.

        Parameters
        ----------
        names
            What each checkpoint is called, by its location.
        """
        renamed = self.with_locations(names).normalized()
        content = {k: v for k, v in renamed.items() if v is not None}
        for key in ("dtype", "out_dtype"):
            if key in content:
                content[key] = scalars.DTYPE_WORDS[content[key]]
        return content

    def settings_for(
        self, tensor_name: str, t: float, of_experts: Sequence[str] | None = None
    ) -> MergeSettings:
        """Return how one tensor is merged.

        Parameters
        ----------
        tensor_name
            Looked at by filters.
        t
            Place in the depth of the model, 0 to 1 (`della_dist.config.layer_fraction`).
        of_experts
            What the tensor is called in each expert, which filters of the expert's own parameters
            look at, as in mergekit; None: the same.

        Raises
        ------
        ConfigError
            If density and epsilon do not fit together at this tensor, the weights of an average
            sum to zero, or a parameter that must be given is not.
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t must be from 0 to 1, not {t}")
        names = (tensor_name, *(of_experts or ()))
        matches = tuple(f in name for name in names for f in self._filters)
        key = (t if self._has_gradients else 0.0, matches)
        settings = self._cache.get(key)
        if settings is None:
            try:
                settings = evaluate(self, tensor_name, t, of_experts)
            except Problem as problem:
                raise ConfigError(f"{self.source}: tensor {tensor_name}: {problem}") from None
            self._cache[key] = settings
        return settings
