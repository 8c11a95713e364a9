"""The validated plan of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType
from typing import Any

from della_dist.config import MergeConfig
from della_dist.config.tokenizer import WORDS
from della_dist.errors import InputError, each
from della_dist.planning.actions import match_part, take_over
from della_dist.planning.adapter_output import AdapterOutput, with_adapter
from della_dist.planning.content import Content, Positions
from della_dist.planning.facts import described
from della_dist.planning.filters import check_filters
from della_dist.planning.layout import (
    OutputTensor,
    ShardLayout,
    default_shard_bytes,
    lay_out,
)
from della_dist.planning.matching import Action, Matching, joined
from della_dist.planning.output_dtypes import dtype_notes, fp32_notes, output_dtype
from della_dist.planning.parts import Part, whole_models
from della_dist.planning.rankable import refuse_unrankable
from della_dist.planning.ties import (
    EMBEDDINGS,
    HEADS,
    Ties,
    ends_in,
    resolve_ties,
    separate_heads,
)
from della_dist.planning.twins import find_twins, twins_beside_layers
from della_dist.planning.views.adapted_content import AdaptedContent
from della_dist.planning.views.adapters import AdaptedModel, adapter_notes
from della_dist.planning.views.inputs import inputs_are_rows, is_convolution
from della_dist.planning.views.layouts import Layout
from della_dist.planning.views.modules import with_stacks
from della_dist.planning.views.quantised import leftover_note, refuse_quantised
from della_dist.planning.views.slice_config import Layer, config_notes
from della_dist.planning.views.slices import has_two_ends, layers_of, sliced_parts
from della_dist.planning.views.strided import strided_note
from della_dist.planning.views.tokens import Vocabularies, align
from della_dist.planning.views.vocabulary import Alignment, seen_as
from della_dist.specs.balancing import can_be_balanced, has_inputs, matrices
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.sources import Adapted, Balanced, Merged, Same, Source
from della_dist.specs.sources import Column as SourceColumn

NO_ADAPTERS: Mapping[int, AdaptedModel] = MappingProxyType({})
NO_LAYOUTS: Mapping[int, Layout] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that is decided before the first tensor is read."""

    config: MergeConfig
    base: CheckpointIndex | None
    """The reference where it is not the first expert. Deltas are to it if the method has a base;
    otherwise no tensor that is merged is read from it."""
    experts: tuple[CheckpointIndex, ...]
    parts: tuple[Part, ...]
    """What the tensors are made of."""
    part_of: Mapping[str, int]
    """Tensor -> its part, where there are several."""
    matching: Matching
    shard_bytes: int
    shards: tuple[ShardLayout, ...]
    """One task each."""
    others: tuple[CheckpointIndex, ...]
    """Adapters, and models that they are of, which are none of the checkpoints that are merged."""
    ties: Ties
    """Which heads are the embedding."""
    twins: Mapping[str, str]
    """Tensor -> the one that it is stored again of, whose random words and parameters it has."""
    layouts: Mapping[int, str] = field(default_factory=dict)
    """Number of an input -> digest of what its tensors are, where they have other names or another
    layout in its files."""
    remarks: tuple[str, ...] = ()
    """What a person should know of the tensors."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of every file beside the weights that the output takes over, by name."""
    companion_bytes: Mapping[str, int] = field(default_factory=dict)
    """Their sizes."""
    file_notes: tuple[str, ...] = ()
    """What a person should know of the files beside the weights, the experts' included."""
    adapter: AdapterOutput | None = None
    """What is written in the place of the merged model; None: that is."""
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    """What of this machine and its libraries the bytes hang on; empty: nothing."""
    stages: tuple[Mapping[str, Any], ...] = ()
    """Of every stage of the same run behind the inputs, in order: name, location, digest (None:
    not known yet) and identity."""

    @property
    def reference(self) -> CheckpointIndex:
        """The checkpoint whose files the output takes over."""
        return self.model_of(self.base if self.base is not None else self.experts[0])

    def model_of(self, checkpoint: CheckpointIndex) -> CheckpointIndex:
        """Return the checkpoint itself, or that whose adapters make it."""
        adapted = self.parts[0].adapted.values()
        found = [one.inputs[0] for one in adapted if one.index.location == checkpoint.location]
        return self.inputs[found[0]] if found else checkpoint

    @property
    def tokenizer(self) -> CheckpointIndex:
        """The checkpoint whose tokenizer the output has, or is made of."""
        policy = self.config.tokenizer
        if policy is None or policy.source in WORDS:
            return self.reference
        return self.model_of(next(c for c in self.inputs if c.location == policy.source))

    @property
    def alignment(self) -> Alignment | None:
        """What becomes of rows of tokens; None where they all stay where they are."""
        return self.parts[0].alignment

    def has_rows_of(self, checkpoint: CheckpointIndex) -> bool:
        """Return whether embeddings or heads of a checkpoint are merged, row by row of tokens."""
        if not self.config.slices:
            return True
        number = next(i for i, c in enumerate(self.inputs) if c is checkpoint)
        return any(
            ends_in(name, (*EMBEDDINGS, *HEADS))
            for part in self.parts
            if number in {column.checkpoint for column in part.columns}
            for name in part.reference.tensors
        )

    @property
    def inputs(self) -> tuple[CheckpointIndex, ...]:
        """All checkpoints that are read: the base, if any, then the experts, then others."""
        return (*self.merged, *self.others)

    @property
    def merged(self) -> tuple[CheckpointIndex, ...]:
        """The base, if any, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def stage(self) -> int:
        """How many merges lie one after another behind the inputs; 0 where none is a merge."""
        return 1 + max((c.stage for c in self.inputs if c.stage is not None), default=-1)

    @property
    def num_tensors(self) -> int:
        """Tensors of the output."""
        return sum(len(shard.tensors) for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensor data of the output, without headers."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def expert_elements(self) -> int:
        """Elements to merge, counted once an expert."""
        merged = (self.made_of(tensor) for shard in self.shards for tensor in shard.tensors)
        return sum(
            num_elements(tensor.shape) * len(self.part(tensor.name).config.models)
            for tensor in {tensor.name: tensor for tensor in merged}.values()
            if self.matching.actions[tensor.name] == "merge"
        )

    def made_of(self, tensor: OutputTensor) -> OutputTensor:
        """Return the tensor of the merged model that one of the output stands for, or is."""
        return tensor if self.adapter is None else self.adapter.pieces[tensor.name].tensor

    def _merged_name(self, name: str) -> str:
        return name if self.adapter is None else self.adapter.pieces[name].tensor.name

    def layers(self) -> dict[str, list[Layer]]:
        """Return what each layer of every stack is made of that is put together of slices."""
        return layers_of(self.config, self.merged)

    def part(self, name: str) -> Part:
        """Return the part that a tensor of the output belongs to."""
        return self.parts[self.part_of.get(name, 0)]

    def experts_of(self, name: str) -> tuple[int, ...]:
        """Return the indices into `inputs` of the experts of a tensor."""
        part = self.part(self._merged_name(name))
        return tuple(c.checkpoint for c in part.columns[-len(part.config.models) :])

    def densities_of(self, name: str) -> tuple[float | None, ...]:
        """Return the part of each expert's deltas to a tensor that is to be kept; None: unknown."""
        name = self._merged_name(name)
        name = self.twins.get(name, name)
        return self.part(name).settings(name).planned_densities

    def action(self, name: str) -> Action:
        """Return what becomes of a tensor, as the output records it."""
        if self.adapter is not None and self.adapter.pieces[name].side is not None:
            return "factor"
        return self.matching.actions[self._merged_name(name)]

    def source(self, tensor: OutputTensor) -> Source:
        """Return what a tensor of the output is made of."""
        if self.adapter is not None:
            return self.adapter.source(tensor.name, self.merged_source)
        return self.merged_source(tensor)

    def merged_source(self, tensor: OutputTensor) -> Source:
        """Return what a tensor of the merged model is made of."""
        name = tensor.name
        action = self.matching.actions[name]
        part = self.part(name)
        if action == "buffer":
            return part.stored(part.reference, name)
        if action == "base":
            column = part.source(part.reference, name)
            assert not isinstance(column, Adapted)
            return column
        everywhere = part.sources(name)
        if action == "copy":
            return Same(tuple([c for c in everywhere if not isinstance(c, Adapted)]))
        experts = everywhere[-len(part.config.models) :]
        base = everywhere[0] if part.config.has_base else None
        merged = Merged(self._recipe(tensor, base, experts), base, experts)
        balance = merged.recipe.settings.balance
        if balance is None or not can_be_balanced(tensor.shape):
            return merged
        is_kernel = is_convolution(name)
        if has_inputs(balance.rule):
            is_turned = inputs_are_rows(self.reference, name, tensor.shape, balance.side)
        else:
            _, rows, cols = matrices(tensor.shape, is_kernel=is_kernel)
            is_turned = rows < cols
        return Balanced(merged, is_turned, is_kernel)

    def _recipe(
        self, tensor: OutputTensor, base: SourceColumn | None, experts: tuple[SourceColumn, ...]
    ) -> TensorRecipe:
        name = self.twins.get(tensor.name, tensor.name)
        part = self.part(name)
        return TensorRecipe(
            name=name,
            shape=tensor.shape,
            base_dtype=None if base is None else base.dtype,
            expert_dtypes=tuple(expert.dtype for expert in experts),
            out_dtype=tensor.dtype,
            settings=part.settings(name),
            stage=self.stage,
            is_delta=tuple([isinstance(e, Adapted) and e.of is None for e in experts]),
        )

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know of this plan, a line each."""
        config = self.reference.documents.get("config.json", {})
        layers = (config_notes(described(config, s), made) for s, made in self.layers().items())
        return (
            *self.config.notes(),
            *self._decomposed_notes(),
            *self._stage_notes(),
            *self.remarks,
            *chain.from_iterable(layers),
            *self.file_notes,
        )

    def _decomposed_notes(self) -> Iterator[str]:
        if self.config.method.is_decomposed:
            yield (
                f"{self.config.merge_method}: singular values are those of LAPACK. The bytes are "
                "equal on machines of one kind, not on all, unlike those of other methods."
            )

    def _stage_notes(self) -> Iterator[str]:
        merges = [c.location for c in self.inputs if c.stage is not None]
        if merges and self.config.method.drop in ("magprune", "random"):
            verb = "is itself a merge" if len(merges) == 1 else "are themselves merges"
            yield (
                f"{', '.join(merges)} {verb} of della-dist: random words of stage {self.stage} "
                "are drawn."
            )


def build_plan(
    config: MergeConfig,
    base: CheckpointIndex | None,
    experts: tuple[CheckpointIndex, ...],
    *,
    shard_bytes: int | None = None,
    content: Content | None = None,
    vocabularies: Vocabularies | None = None,
    adapted: Mapping[int, AdaptedModel] = NO_ADAPTERS,
    others: tuple[CheckpointIndex, ...] = (),
    layouts: Mapping[int, Layout] = NO_LAYOUTS,
) -> MergePlan:
    """Check everything that headers can tell, and plan the merge.

    Parameters
    ----------
    config
        The validated configuration.
    base, experts
        Headers of the checkpoints, the experts in the order of the configuration.
    shard_bytes
        Data bytes of an output shard at most; None for `default_shard_bytes`.
    content
        Tells which tensors have equal bytes; None: none have that do not lie in the same place.
    vocabularies
        Of every checkpoint, the base first, where rows are to be moved to their tokens.
    adapted, others
        Which of the checkpoints, by number, are models with adapters, and what they are made of.
    layouts
        Which of them all have other names or another layout in their files.

    Raises
    ------
    InputError
        If the checkpoints do not fit together.
    ConfigError
        If the parameters of some tensor are out of bounds.
    """
    content = Positions() if content is None else content
    checkpoints = experts if base is None else (base, *experts)
    if adapted:
        content = AdaptedContent(content, (*checkpoints, *others), adapted)
    each(refuse_quantised, (*checkpoints, *others))
    config = with_stacks(config, checkpoints)
    alignment = None
    if vocabularies is not None and config.tokenizer is not None:
        has_base = base is not None
        alignment = align(config.tokenizer, vocabularies, checkpoints, has_base=has_base)
    if alignment is not None and adapted:
        raise InputError(
            f"{next(iter(adapted.values())).index.location} has an adapter, and `tokenizer` moves "
            "rows to their tokens, which cannot be done at once. Merge the adapter into its model "
            "first: `merge_method: passthrough` with it alone."
        )
    if alignment is not None:
        checkpoints = seen_as(checkpoints, alignment.num_rows)
    ties = separate_heads(checkpoints) if has_two_ends(config) else None
    ties = ties or resolve_ties(checkpoints, content)
    checkpoints = ties.checkpoints
    parts: tuple[Part, ...] = (whole_models(config, checkpoints),)
    slice_notes: tuple[str, ...] = ()
    if config.slices:
        parts, slice_notes = sliced_parts(config, checkpoints)
    if alignment is not None:
        alignment = alignment.over(checkpoints)
        parts = tuple(replace(part, alignment=alignment) for part in parts)
    if adapted:
        parts = tuple(replace(part, adapted=adapted) for part in parts)
    matchings = [match_part(part, checkpoints) for part in parts]
    matching = joined(matchings)
    actions = matching.actions
    of_experts = {
        c.names.get(name, name) for part in parts for c in part.columns for name in c.tensors
    }
    filter_notes = check_filters(config, actions, of_experts, ties.left_out)
    part_of = {name: i for i, matching in enumerate(matchings) for name in matching.actions}
    entries = {name: parts[i].form(name) for name, i in part_of.items()}
    tensors = [
        OutputTensor(name, output_dtype(config, entries[name], action), entries[name].shape)
        for name, action in actions.items()
    ]
    take_over(parts, tensors, actions)
    if shard_bytes is None:
        shard_bytes = default_shard_bytes(sum(t.size_bytes for t in tensors))
    merged = [name for name, action in actions.items() if action == "merge"]
    twins = (
        twins_beside_layers(parts, checkpoints, merged, content)
        if config.slices
        else find_twins(checkpoints, merged, content)
    )
    plan = MergePlan(
        config=config,
        base=None if base is None else checkpoints[0],
        experts=checkpoints if base is None else checkpoints[1:],
        parts=parts,
        part_of=part_of if len(parts) > 1 else {},
        matching=matching,
        shard_bytes=shard_bytes,
        shards=lay_out(tensors, shard_bytes),
        others=others,
        ties=ties,
        twins=twins,
        layouts={number: layout.digest() for number, layout in layouts.items()},
        remarks=(
            *(layout.note for layout in layouts.values()),
            *adapter_notes(adapted.values(), (*checkpoints, *others)),
            *ties.notes,
            *slice_notes,
            *(() if alignment is None else alignment.notes),
            *matching.notes(checkpoints[0].location),
            *filter_notes,
            *(f"{a}: stored again of {b}, and merged as that is." for a, b in twins.items()),
            *dtype_notes(config, parts, merged),
            *fp32_notes(config, entries, tensors),
            *(note for c in checkpoints if (note := leftover_note(c)) is not None),
            *(note for c in checkpoints if (note := strided_note(c)) is not None),
        ),
    )
    for name in merged:  # raises here, before any work, if a gradient leaves its bounds
        part = plan.part(name)
        part.settings(name)
    refuse_unrankable(plan)
    return plan if config.output is None else with_adapter(plan)
