"""What an adapter of PEFT changes: its tensors, by the tensors of the model that they belong to.

Names and meaning are those of PEFT 0.21. A variant that is not known here is refused by its name:
its tensors look like any others, and would come out wrong in silence.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from della_dist.config.patterns import MAX_NAME, compiled
from della_dist.config.problem import shown
from della_dist.errors import InputError
from della_dist.planning.views.layout_rules import TRANSPOSED_EXPERTS
from della_dist.planning.views.located import Located, Target
from della_dist.planning.views.peft_variants import CONFIG_NAME, PREFIX, refuse_variants
from della_dist.planning.views.products import divided, overlap
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import FLOAT_DTYPES
from della_dist.specs.recipe import MAX_FLOAT32
from della_dist.specs.rows import MAX_WHOLE_COLS
from della_dist.specs.sources import LowRank, Stored
from della_dist.wording import few

#: Names of the model that one of an adapter is compared with, at most.
_MOST_COMPARED = 500

#: What wraps a module, and is no part of its name.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?|token_adapter)(?=\.)")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|trainable_tokens_delta)(\.default)?(\.weight)?"
)
_NO_PATTERN = (re.error, ValueError, OverflowError, RecursionError)
#: Matrices that transformers keeps as (in, out), its `Conv1D`.
_CONV1D_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(slots=True)
class Change:
    """What an adapter does to one tensor of a model."""

    products: tuple[LowRank, ...] = ()
    """Of rows that are not those of another."""
    magnitude: Stored | None = None
    """The lengths that rows get after the one product (DoRA)."""
    whole: TensorEntry | None = None
    """It takes the place of the tensor."""
    rows: tuple[Stored, tuple[int, ...]] | None = None
    """They take the place of these rows."""


def changes(
    adapter: CheckpointIndex, number: int, model: CheckpointIndex
) -> tuple[dict[str, Change], str | None]:
    """Return what an adapter changes, by the tensors' names in the model, and what to say of it.

    Parameters
    ----------
    adapter, number
        The adapter, and its own among the inputs of the plan.
    model
        What it is of.

    Raises
    ------
    InputError
        If it is of a kind that is not known here, incomplete, or of another model.
    """
    reader = _Reader(adapter, number, model)
    return reader.changes(), reader.located.note()


class _Reader:
    def __init__(self, adapter: CheckpointIndex, number: int, model: CheckpointIndex) -> None:
        self._adapter = adapter
        self._number = number
        self._model = model
        self._config = adapter.documents[CONFIG_NAME]
        refuse_variants(adapter.location, self._config)

    def changes(self) -> dict[str, Change]:
        modules, whole, copies = self._divided()
        names = [*whole, *(_plain(copy.name) for copy in copies)]
        names += (name for module in modules for name in self._names(_target(module)))
        self.located = Located(self._model, names, f"adapter {self._adapter.location}")
        for entry in copies:  # of the base, saved beside its delta: the base is given
            self._whole(_plain(entry.name), entry)
        found: dict[str, Change] = {}
        for inner, entry in whole.items():
            name = self._whole(inner, entry)
            if name in found:
                raise self._error(f"{name} is there twice: as {inner}, and by another name")
            found[name] = Change(whole=entry)
        for module, parts in modules.items():
            for name, change in self._of_module(module, parts):
                mine = found.setdefault(name, Change())
                mine.products = (*mine.products, *change.products)
                mine.magnitude = change.magnitude or mine.magnitude
                mine.rows = change.rows or mine.rows
        for name, change in found.items():
            self._check(name, change)
        if not found:
            raise self._error("it changes no tensor of the model")
        return found

    def _divided(
        self,
    ) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry], list[TensorEntry]]:
        """Return parts of LoRA by module, tensors in place of others, and copies of the base's."""
        modules: dict[str, dict[str, TensorEntry]] = {}
        whole: dict[str, TensorEntry] = {}
        copies: list[TensorEntry] = []
        for name, entry in self._adapter.tensors.items():
            if entry.dtype not in FLOAT_DTYPES or entry.dtype == "F64":
                raise self._error(f"{name} is {entry.dtype}; an adapter is F32, BF16 or F16")
            if name.endswith(".base_layer.weight"):
                copies.append(entry)
            elif match := _PART.fullmatch(name.removeprefix(PREFIX)):
                parts = modules.setdefault(match["module"], {})
                if match["part"] in parts:
                    raise self._error(f"{name} is there twice")
                parts[match["part"]] = entry
            elif ".original_module." not in name:
                inner = _plain(name)
                # PEFT writes what it saves whole a second time with `save_embedding_layers`.
                if inner in whole and ".modules_to_save." not in f"{whole[inner].name} {name}":
                    raise self._error(f"{inner} is there twice: {whole[inner].name}, {name}")
                whole[inner] = entry
        return modules, whole, copies

    def _check(self, name: str, change: Change) -> None:
        if overlap(change.products):
            raise self._error(f"{name} is changed by two pairs of matrices")
        if change.rows and (change.products or change.whole):
            raise self._error(
                f"{name} has tokens of its own and LoRA, or is there as a whole as well: which "
                "comes first is not said"
            )

    def _names(self, target: str) -> Iterator[str]:
        """Yield what the tensors of a module may be called."""
        yield f"{target}.weight"
        for wanted in self._config.get("target_parameters") or ():
            name = f"{target}.{str(wanted).rpartition('.')[2]}"
            if f".{name}".endswith(f".{wanted}"):
                yield name

    def _whole(self, inner: str, entry: TensorEntry) -> str:
        """Return the name in the model of what an adapter has in its place."""
        target = self.located.target(inner)
        if target is None:
            raise self._error(
                f"{entry.name} is no tensor of {self._model.location}, nor a part of LoRA that is "
                "known here",
                self._prefixes(inner),
            )
        if not target.is_whole:
            raise self._error(
                f"{entry.name} takes the place of rows of several tensors of "
                f"{self._model.location}, which is not known here. Merge the adapter into its "
                "model first (peft's merge_and_unload)"
            )
        weight = target.spans[0].entry
        self._check_shape(entry.name, entry.shape, weight)
        return weight.name

    def _of_module(
        self, module: str, parts: Mapping[str, TensorEntry]
    ) -> Iterator[tuple[str, Change]]:
        if rows := parts.get("trainable_tokens_delta"):
            yield self._tokens(_target(module), rows)
            parts = {part: e for part, e in parts.items() if e is not rows}
            if not parts:
                return
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        names = [f"lora_{'embedding_' * is_embedding}{side}" for side in "AB"]
        if missing := [name for name in names if name not in parts]:
            raise self._error(f"{module} has no {few(missing)}")
        a, b = (parts[name] for name in names)
        if len(a.shape) == 2 and not a.shape[0]:
            raise self._error(f"{module} has rank 0. If it was cut short, get it again")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise self._error(
                f"{module} has {list(a.shape)} and {list(b.shape)}, and LoRA of matrices alone is "
                "known here. Merge the adapter into its model first (peft's merge_and_unload)"
            )
        target, product = self._product(module, a, b, is_embedding=is_embedding)
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None:
            if not self._config.get("use_dora"):  # PEFT would leave it out without a word
                raise self._error(
                    f"{module} has a lora_magnitude_vector, and {CONFIG_NAME} does not say "
                    "`use_dora: true`: it is an adapter of DoRA, or of another kind that has one"
                )
            self._check_magnitude(target, product, magnitude)
        elif self._config.get("use_dora"):
            raise self._error(f"{module} has no lora_magnitude_vector, though it is DoRA")
        for name, one in divided(target, product):
            yield name, Change((one,), None if magnitude is None else self._stored(magnitude))

    def _product(
        self, module: str, a: TensorEntry, b: TensorEntry, *, is_embedding: bool
    ) -> tuple[Target, LowRank]:
        name = _target(module)
        weight = self.located.target(f"{name}.weight")
        if weight is None:
            return self._of_parameter(module, name, a, b)
        if len(weight.shape) != 2 or not weight.shape[0]:
            raise self._error(
                f"{module} is a layer with a weight {list(weight.shape)}, and LoRA of matrices "
                "alone is known here. Merge it into its model first (peft's merge_and_unload)"
            )
        rank = a.shape[0]
        stated = {str(one) for one in self._config.get("target_parameters") or ()}
        is_parameter = any(f".{name}.weight".endswith(f".{one}") for one in stated)
        scaling = self._scaling(f"{name}.weight" if is_parameter else name, rank)
        rows, cols = weight.shape
        shapes, turned = (a.shape, b.shape), ((rank, rows), (cols, rank))
        is_turned = is_embedding or is_conv1d(self._model.documents.get("config.json", {}), name)
        if not is_embedding and rows != cols:  # which a square matrix does not show
            is_turned |= bool(self._config.get("fan_in_fan_out"))
            is_turned &= shapes == turned
        if is_turned:
            strides = (0, 1, rows), (0, 1, rank)
            left, right = a, b
        else:
            strides = (0, rank, 1), (0, cols, 1)
            left, right = b, a
        if shapes != (turned if is_turned else ((rank, cols), (rows, rank))):
            raise self._error(
                f"{module} has matrices {list(a.shape)} and {list(b.shape)}, and {weight.name} of "
                f"{self._model.location} is {list(weight.shape)}: it is an adapter of another model"
            )
        factors = self._stored(left), self._stored(right)
        return weight, LowRank(*factors, scaling, 1, rows, cols, rank, *strides)

    def _of_parameter(
        self, module: str, owner: str, a: TensorEntry, b: TensorEntry
    ) -> tuple[Target, LowRank]:
        """Return the product for a parameter with experts in it (`target_parameters`)."""
        found: list[Target] = []
        for name in dict.fromkeys(self._names(owner)):
            target = self.located.target(name)
            if target is None or len(target.shape) != 3:
                continue
            experts, rows, cols = target.shape
            if not experts:
                continue
            fits = {(a.shape[1], b.shape[0])} & {(cols, rows), (rows, cols)}
            if fits and a.shape[0] % experts == 0 and b.shape[1] == a.shape[0]:
                found.append(target)
        if not found:
            raise self._error(
                f"{module} belongs to no tensor of {self._model.location}", self._prefixes(owner)
            )
        if len(found) > 1:
            raise self._error(
                f"{module} may belong to {few([one.name for one in found])}: they have one size"
            )
        experts, rows, cols = found[0].shape
        rank = a.shape[0] // experts
        is_transposed = (a.shape[1], b.shape[0]) == (rows, cols)
        if rows == cols:
            config = self._model.documents.get("config.json", {})
            is_transposed = config.get("model_type") in TRANSPOSED_EXPERTS
        total = a.shape[0]
        of_a, of_b = (rank * a.shape[1], a.shape[1], 1), (1, experts, total)
        if is_transposed:  # rows are what A has as columns
            strides = (of_a[0], 1, of_a[1]), of_b
            left, right = a, b
        else:
            strides = (1, total, experts), of_a
            left, right = b, a
        scaling = self._scaling(found[0].name, rank)
        factors = self._stored(left), self._stored(right)
        return found[0], LowRank(*factors, scaling, experts, rows, cols, rank, *strides)

    def _check_magnitude(self, target: Target, product: LowRank, magnitude: TensorEntry) -> None:
        is_plain = product.left_strides == (0, product.rank, 1) and target.is_whole
        if len(target.shape) != 2 or not is_plain or magnitude.shape != target.shape[:1]:
            raise self._error(
                f"{target.name}: DoRA of embeddings, transposed matrices and parts of a matrix is "
                "not known here. Merge the adapter into its model first (peft's merge_and_unload)"
            )
        if product.cols > MAX_WHOLE_COLS:
            raise self._error(
                f"rows of {target.name} have {product.cols} elements, and DoRA is known here for "
                f"at most {MAX_WHOLE_COLS}"
            )

    def _stored(self, entry: TensorEntry) -> Stored:
        return Stored(self._number, entry)

    def _tokens(self, module: str, rows: TensorEntry) -> tuple[str, Change]:
        target = self.located.target(f"{module}.weight")
        weight = target.spans[0].entry if target is not None and target.is_whole else None
        stated = self._config.get("trainable_token_indices")
        if isinstance(stated, dict):
            ends = [key for key in stated if f".{module}".endswith(f".{key}")]
            stated = stated[ends[0]] if ends else None
        if weight is None or not isinstance(stated, list):
            raise self._error(f"{rows.name} is of no embedding, or its tokens are not named")
        numbers = tuple(stated)
        if not rows.shape:
            raise self._error(f"{rows.name} has no rows")
        is_right = all(type(n) is int and 0 <= n < weight.shape[0] for n in numbers)
        if not is_right or len(set(numbers)) < len(numbers) or rows.shape[0] != len(numbers):
            raise self._error(f"{rows.name} has other rows than `trainable_token_indices` names")
        self._check_shape(rows.name, (weight.shape[0], *rows.shape[1:]), weight)
        return weight.name, Change(rows=(self._stored(rows), numbers))

    def _scaling(self, target: str, rank: int) -> float:
        config = self._config
        try:
            stated = _pattern(config.get("rank_pattern"), target, config.get("r"))
            alpha = _pattern(config.get("alpha_pattern"), target, config.get("lora_alpha"))
        except (*_NO_PATTERN, TypeError, AttributeError) as error:
            raise self._error(f"rank_pattern or alpha_pattern: {str(error)[:300]}") from error
        if stated != rank:
            raise self._error(f"{target} has rank {rank}, and the configuration says {stated!r}")
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= MAX_FLOAT32:
            raise self._error(f"{target} has lora_alpha {shown(alpha)}: no number of float32")
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _check_shape(self, name: str, shape: Sequence[int], weight: TensorEntry) -> None:
        if tuple(shape) == weight.shape:
            return
        raise self._error(
            f"{name} is {list(shape)}, and {weight.name} of {self._model.location} "
            f"{list(weight.shape)}",
            " If tokens were added, merge the adapter into its model first (peft's "
            "merge_and_unload)",
        )

    def _prefixes(self, name: str) -> str:
        """Return what to say where names do not match."""
        last = name.rpartition(".")[2]
        alike = [n for n in self._model.tensors if last in n.split(".")] or list(
            self._model.tensors
        )
        near = difflib.get_close_matches(name, alike[:_MOST_COMPARED], 1, 0)
        theirs = near[0] if near else "nothing"
        return f" Its names are like {name}, those of the model like {theirs}"

    def _error(self, what: str, more: str = "") -> InputError:
        return InputError(f"adapter {self._adapter.location}: {what}.{more}{'.' * bool(more)}")


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether a module stores its matrix transposed, by the model's config.json.

    PEFT goes by the class, and says of all modules at once what the last one was
    (`fan_in_fan_out`).
    """
    if not module.endswith(_CONV1D_MODULES):
        return False
    if config.get("model_type") in _CONV1D_MODELS:
        return True
    return any(
        isinstance(part, Mapping)
        and part.get("model_type") in _CONV1D_MODELS
        # Of two models in one, each has its key at the beginning of its names; others have not.
        and (key not in ("encoder", "decoder") or f".{key}." in f".{module}")
        for key, part in config.items()
    )


def _plain(name: str) -> str:
    """Return the name of a tensor without what PEFT wraps it in."""
    return _WRAPPED.sub("", name.removeprefix(PREFIX))


def _target(module: str) -> str:
    """Return the name of a module without what PEFT wraps it in."""
    return _plain(f"{module}.").rstrip(".")


def _pattern(patterns: Any, target: str, default: Any) -> Any:  # noqa: ANN401
    """Return what the first pattern says that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        compiled(pattern)  # a name, or a pattern that takes no time
        if len(target) <= MAX_NAME and re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default
