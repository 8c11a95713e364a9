"""The merged delta as an adapter of PEFT: which tensors it has, and what each is made of.

Matrices of linear layers and embeddings become two factors; other tensors that the merge changes
are there whole, as PEFT saves modules beside its own (``modules_to_save``) and biases. What neither
can hold is refused: nothing that the merge changes is left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from della_dist.errors import InputError
from della_dist.planning.layout import OutputTensor, ShardLayout, lay_out
from della_dist.planning.views.adapter_modules import Modules
from della_dist.specs.factoring import factoring
from della_dist.specs.recipe import MergeSettings, keeps_all
from della_dist.specs.sources import Adapted, Factor, LowRank, Merged, Source
from della_dist.wording import few, plural

if TYPE_CHECKING:
    from della_dist.planning.build import MergePlan

#: What PEFT looks for, in one piece.
WEIGHTS_NAME = "adapter_model.safetensors"

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a tensor of the adapter is made of."""

    tensor: OutputTensor
    """Of the merged model."""
    side: Side | None = None
    """Which factor of its delta it is; None: it is the merged tensor itself."""
    rank: int = 0
    is_turned: bool = False
    is_sum: bool = False
    """See `della_dist.specs.sources.Factor`."""


@dataclass(frozen=True, slots=True)
class AdapterOutput:
    """The adapter that is written."""

    pieces: Mapping[str, Piece]
    """Of every tensor that the file has."""
    ranks: Mapping[str, int]
    """Module, as PEFT calls it -> the rank of its factors."""
    saved: tuple[str, ...]
    """Modules that are there whole."""
    has_biases: bool
    """Whether biases of factored modules are there."""
    is_conv1d: bool
    """Whether some modules keep their matrices as (in, out)."""
    known: tuple[str, ...]
    """All modules of the base that have tensors, as PEFT calls them."""
    notes: tuple[str, ...]

    def source(self, name: str, source_of: Callable[[OutputTensor], Source]) -> Source:
        """Return what a tensor of the adapter is made of.

        Parameters
        ----------
        name
            Of the tensor.
        source_of
            Returns what a tensor of the merged model is made of.
        """
        piece = self.pieces[name]
        source = source_of(piece.tensor)
        if piece.side is None:
            return source
        assert isinstance(source, Merged)
        return Factor(source, piece.side, piece.rank, piece.is_turned, piece.is_sum)

    def digest(self) -> str:
        """Return a digest of which tensors it has for which, as the files of the base decide."""
        parts = ((n, p.tensor.name, p.side, p.is_turned) for n, p in self.pieces.items())
        return hashlib.sha256(repr((sorted(parts, key=str), self.saved)).encode()).hexdigest()


def with_adapter(plan: MergePlan) -> MergePlan:
    """Return a plan by which an adapter is written in the place of the merged model.

    Raises
    ------
    InputError
        If what the merge changes cannot be in an adapter, or it is no delta to what the base's
        files have.
    """
    form, base = plan.config.output, plan.base
    assert form is not None
    assert base is not None
    if 0 in plan.parts[0].adapted:
        raise InputError(
            f"output.adapter: the base {base.location} is itself made with an adapter, and what is "
            "written would be one of both. Take the model alone as the base, and its adapter as "
            "another expert."
        )
    tensors = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    changed: dict[str, Merged] = {}
    for name, tensor in tensors.items():
        source = plan.source(tensor)
        if isinstance(source, Merged) and not _is_zero(source):
            changed[name] = source
    if not changed:
        raise InputError("output.adapter: the merge changes no tensor of the base: nothing to do.")
    modules = Modules(base, tensors)
    found = modules.divided(changed)
    if not found.matrices:
        raise InputError(
            f"output.adapter: the merge changes {few(sorted(changed))}, and no matrix of a layer, "
            "without which PEFT takes no adapter. Leave `output` out and merge the model."
        )
    pieces: dict[str, Piece] = {}
    ranks: dict[str, int] = {}
    for name in found.matrices:
        module = modules.module_of(name)
        rank, is_sum = _rank(changed[name], form.adapter)
        ranks[module] = rank
        pieces |= _factors(modules, tensors[name], rank, is_sum=is_sum)
    for name in found.biases:
        pieces[modules.bias_name(name)] = Piece(tensors[name])
    for out_name, name in found.whole.items():
        pieces[out_name] = Piece(tensors[name])
    (shard,) = lay_out([_tensor(name, piece) for name, piece in pieces.items()], 1 << 62)
    adapter = AdapterOutput(
        pieces=pieces,
        ranks=ranks,
        saved=found.saved,
        has_biases=bool(found.biases),
        is_conv1d=any(modules.is_conv1d(name) for name in found.matrices),
        known=modules.known,
        notes=tuple(_notes(form.adapter, pieces, found.notes)),
    )
    remarks = (*plan.remarks, *adapter.notes)
    shard = ShardLayout(WEIGHTS_NAME, shard.tensors, shard.size_bytes)
    # One file, whatever its size.
    size = max(1, shard.size_bytes)
    return replace(plan, shard_bytes=size, shards=(shard,), adapter=adapter, remarks=remarks)


def _is_zero(source: Merged) -> bool:
    """Return whether nothing is added to the base, by what the configuration says and lists."""
    settings = source.recipe.settings
    if settings.lambda_ == 0:
        return True
    return all(
        weight == 0 or (isinstance(expert, Adapted) and expert.of is None and not expert.terms)
        for expert, weight in zip(source.experts, settings.weights, strict=True)
    )


def _rank(source: Merged, most: int) -> tuple[int, bool]:
    """Return the rank of the factors of a matrix, and whether they are those of adapters."""
    total = _summed_rank(source)
    if total is not None and total <= most:
        return total, True
    return factoring(source.recipe, most).rank, False


def _summed_rank(source: Merged) -> int | None:
    """Return the rank of all products together, where they are what is merged, and only added."""
    if not is_plain_sum(source.recipe.settings):
        return None
    total = 0
    for expert, weight in zip(source.experts, source.recipe.settings.weights, strict=True):
        if not isinstance(expert, Adapted) or expert.of is not None:
            return None
        for term in expert.terms:
            if not isinstance(term, LowRank) or (term.groups, term.rows, term.cols) != (
                1,
                *source.recipe.shape,
            ):
                return None
            total += term.rank * (weight != 0)
    return total


def is_plain_sum(settings: MergeSettings) -> bool:
    """Return whether the merged delta is a sum of the experts' deltas times numbers."""
    is_linear = not settings.elect and settings.rescale != "l1" and settings.angles is None
    is_linear = is_linear and settings.limit is None and settings.overlap is None
    return keeps_all(settings) and is_linear


def _factors(
    modules: Modules, tensor: OutputTensor, rank: int, *, is_sum: bool
) -> dict[str, Piece]:
    """Return the two factors of a matrix, as PEFT calls them."""
    is_turned = modules.is_turned(tensor.name)
    sides: tuple[Side, Side] = ("left", "right") if is_turned else ("right", "left")
    return {
        name: Piece(tensor, side, rank, is_turned, is_sum)
        for name, side in zip(modules.factor_names(tensor.name), sides, strict=True)
    }


def _tensor(name: str, piece: Piece) -> OutputTensor:
    """Return a tensor of the adapter, as its header will have it."""
    if piece.side is None:
        return replace(piece.tensor, name=name)
    rows, cols = piece.tensor.shape
    shape = (rows, piece.rank) if piece.side == "left" else (piece.rank, cols)
    return OutputTensor(name, "F32", shape[::-1] if piece.is_turned else shape)


def _notes(rank: int, pieces: Mapping[str, Piece], notes: Iterable[str]) -> Iterator[str]:
    lefts = [piece for piece in pieces.values() if piece.side == "left"]
    sums = sum(piece.is_sum for piece in lefts)
    wholes = [_tensor(name, piece) for name, piece in pieces.items() if piece.side is None]
    if lefts:
        exactly = f", {sums} of them exactly: the products of the adapters, joined" if sums else ""
        yield (
            f"output: an adapter of rank {rank} at most, in F32, of {plural(len(lefts), 'layer')}"
            f"{exactly}. It is one file, and so the work of one worker."
        )
    if sums < len(lefts):
        yield (
            "output: what a truncated SVD drops of a delta is lost (`energy` in "
            "della_tensors.parquet is what is kept). Its bytes are equal on machines of one kind, "
            "not on all, unlike those of a merged model."
        )
    if wholes:
        size = sum(tensor.size_bytes for tensor in wholes)
        yield (
            f"output: {plural(len(wholes), 'tensor')} that no low rank can stand for are in the "
            f"adapter whole, {size:,} bytes ({few(sorted(t.name for t in wholes), 3)})."
        )
    yield from notes


def common(ranks: Mapping[str, int]) -> int:
    """Return the rank that most modules have; of several the largest."""
    counts = Counter(ranks.values())
    return max(counts, key=lambda rank: (counts[rank], rank), default=1)
