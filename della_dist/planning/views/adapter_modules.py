"""Tensors of a model as PEFT sees them: by modules, of which it adapts some and saves others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from della_dist.errors import InputError
from della_dist.planning.facts import model_facts
from della_dist.planning.layout import OutputTensor
from della_dist.planning.ties import CAUSAL_HEAD, EMBEDDINGS, HEADS, ends_in, is_top
from della_dist.planning.views.layout_rules import PREFIXES
from della_dist.planning.views.peft import is_conv1d
from della_dist.planning.views.peft_types import why_not_adapted
from della_dist.planning.views.peft_variants import PREFIX
from della_dist.planning.views.renamed_types import RENAMED_TYPES
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.rows import MAX_WHOLE_COLS
from della_dist.wording import few

#: What the classes of transformers put before names that their files may have without it.
_LEFT_OUT_IN_FILES = {"gpt2": "transformer."}
#: What stands outside of all that the classes put before.
_SIDES = ("encoder.", "decoder.", "shared.")
#: Experts and what chooses them: one tensor or no layer at all in memory, whatever files have.
_OF_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe)\.|(^|\.)(gate|router)\.(weight|bias)$")
#: GPT-NeoX's head, which newer versions of transformers call otherwise in memory.
_RENAMED = re.compile(r"^embed_out\.")
#: Tables that are looked up otherwise than by tokens.
_TABLE = re.compile(r"(embed|wpe$|relative_attention_bias$|position)", re.IGNORECASE)
_OF_LAYERS = frozenset({"weight", "bias"})
#: Of a norm's weight and bias.
_OLD_NAMES = frozenset({"gamma", "beta"})


@dataclass(slots=True)
class Divided:
    """What becomes of the tensors that a merge changes."""

    matrices: list[str] = field(default_factory=list)
    """Those that are factored."""
    biases: list[str] = field(default_factory=list)
    """Of layers whose matrices are."""
    whole: dict[str, str] = field(default_factory=dict)
    """What the adapter calls them -> the tensors that are there as they are."""
    saved: tuple[str, ...] = ()
    """Their modules."""
    notes: list[str] = field(default_factory=list)


class Modules:
    """The modules of a model.

    Parameters
    ----------
    base
        The model.
    tensors
        Those of the merged model, by name.

    Raises
    ------
    InputError
        If the model in memory has other names than its files, and they are not known.
    """

    def __init__(self, base: CheckpointIndex, tensors: Mapping[str, OutputTensor]) -> None:
        self._base = base
        self._config = base.documents.get("config.json", {})
        self._tensors = tensors
        self._facts = model_facts(base)
        self._children: dict[str, set[str]] = {}
        for name in tensors:
            module, _, own = name.rpartition(".")
            self._children.setdefault(module, set()).add(own)
        self._outer = {
            ".".join(parts[:i])
            for parts in (module.split(".") for module in self._children)
            for i in range(1, len(parts))
        }
        self._type = str(self._config.get("model_type"))
        if self._type in RENAMED_TYPES:
            raise InputError(
                f"output.adapter: {base.location} is a {self._type}, whose modules transformers "
                "calls otherwise in memory, where PEFT looks for them, than its files do: by which "
                "names is not known here. Leave `output` out and merge the model."
            )
        self._prefix = self._left_out()

    @property
    def known(self) -> tuple[str, ...]:
        """All modules that have tensors."""
        return tuple(map(self._called, self._children))

    def divided(self, changed: Iterable[str]) -> Divided:
        """Return what becomes of the tensors of these names.

        Raises
        ------
        InputError
            If some can be in no adapter.
        """
        found = Divided()
        refused: dict[str, str] = {}
        whole: dict[str, None] = {}
        changed = tuple(changed)
        found.matrices += [name for name in changed if self._is_factored(name)]
        factored = {name.rpartition(".")[0] for name in found.matrices}
        for name in changed:
            module, _, own = name.rpartition(".")
            if self._is_refused(name):
                refused[name] = self._why(name)
            elif module in self._tied_modules:
                whole |= dict.fromkeys(self._tied_modules)
            elif module in factored:
                found.biases += [name] * (own == "bias")
            elif self._is_layer(module):
                whole[module] = None
            else:
                refused[name] = self._why(name)
        refused |= self._with_alike(whole, factored)
        if refused:
            raise _refused(refused)
        for module in whole:
            for own in sorted(self._children.get(module, {"weight"})):
                name = f"{module}.{own}"
                called = f"{PREFIX}{self._called(module)}.{own}"
                found.whole[called] = name if name in self._tensors else self._embedding
        found.saved = tuple(map(self._called, whole))
        if any(module in whole for module in self._tied_modules):
            found.notes.append(
                f"output: the embedding {self._embedding} is the head as well, and PEFT would add "
                "to one of them: both are in the adapter whole."
            )
        return found

    def _with_alike(self, whole: dict[str, None], factored: Collection[str]) -> dict[str, str]:
        """Add the modules that PEFT would save as well, going by the ends of names.

        Return those that cannot be, and why.
        """
        refused = {}
        for module in self._children:  # what is added ends as what is there: nothing follows
            ends = (one for one in whole if self._called(module).endswith(self._called(one)))
            if module not in whole and (alike := next(ends, None)) is not None:
                if module in factored or not self._is_layer(module):
                    refused[module] = (
                        f"PEFT goes by the ends of names, and would save it whole, as {alike}"
                    )
                whole[module] = None
        return refused

    def module_of(self, name: str) -> str:
        """Return the module of a tensor."""
        return self._called(name.rpartition(".")[0])

    def bias_name(self, name: str) -> str:
        """Return what the adapter calls the bias of a layer that it adapts."""
        return f"{PREFIX}{self.module_of(name)}.base_layer.bias"

    def factor_names(self, name: str) -> tuple[str, str]:
        """Return what the adapter calls A and B of a matrix."""
        module = f"{PREFIX}{self.module_of(name)}"
        if self._is_embedding(name):
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def is_conv1d(self, name: str) -> bool:
        """Return whether a layer keeps its matrix as (in, out)."""
        return is_conv1d(self._config, name.rpartition(".")[0])

    def is_turned(self, name: str) -> bool:
        """Return whether B @ A is the transpose of the matrix."""
        return self._is_embedding(name) or self.is_conv1d(name)

    def _called(self, module: str) -> str:
        """Return what the model in memory calls a module."""
        is_head = ends_in(f"{module}.weight", HEADS) and is_top(module)
        return module if is_head else f"{self._prefix}{module}"

    def _left_out(self) -> str:
        """Return what the model in memory has before the names that its files have."""
        stated = self._config.get("architectures")
        classes = [str(one) for one in stated] if isinstance(stated, list) else []
        is_bare = not classes or all(
            one.endswith("Model") and not one.endswith("LMHeadModel") for one in classes
        )
        if is_bare:
            return ""
        known = [prefix for line in PREFIXES for prefix in line if prefix]
        known += _SIDES if self._facts.is_encoder_decoder else ()
        tops = [name for name in self._tensors if not ends_in(name, HEADS)]
        if not tops or any(name.startswith(tuple(known)) for name in tops):
            return ""
        if self._type not in _LEFT_OUT_IN_FILES:
            raise InputError(
                f"output.adapter: {self._base.location} calls a tensor {tops[0]}, and what its "
                "class calls it in memory, where PEFT looks for it, is not known here. Let "
                "transformers write the base anew (from_pretrained(...).save_pretrained(...)), and "
                "take that."
            )
        return _LEFT_OUT_IN_FILES[self._type]

    def _is_refused(self, name: str) -> bool:
        if _OF_EXPERTS.search(name) or _RENAMED.search(name) or self._is_special(name):
            return True
        is_shared = ends_in(name, EMBEDDINGS) and is_top(name)
        masked = self._facts.has_masked_head and not self._facts.has_causal_head
        sides = self._facts.is_encoder_decoder or (masked and self._facts.ties_head is not False)
        return is_shared and sides

    def _is_special(self, name: str) -> str | None:
        """Return why the matrix of a layer can have no adapter, if it is one and cannot."""
        module, _, own = name.rpartition(".")
        if own != "weight" or len(self._tensors[name].shape) != 2:
            return None
        return why_not_adapted(self._type, module.rpartition(".")[2])

    def _why(self, name: str) -> str:
        if _OF_EXPERTS.search(name):
            return "experts and their routers are no linear layers in memory"
        if _RENAMED.search(name):
            return "its module is called otherwise in memory"
        if (special := self._is_special(name)) is not None:
            return special
        if self._is_refused(name):
            return "it is shared by parts of the model, which PEFT would tear apart"
        if name.rpartition(".")[2] in _OLD_NAMES:
            return (
                "the model in memory calls it otherwise (old names of BERT's; let transformers "
                "write the base anew: from_pretrained(...).save_pretrained(...))"
            )
        return "it belongs to no layer that has only a weight and a bias"

    def _is_embedding(self, name: str) -> bool:
        return ends_in(name, EMBEDDINGS)

    def _is_factored(self, name: str) -> bool:
        module, _, own = name.rpartition(".")
        shape = self._tensors[name].shape
        if own != "weight" or len(shape) != 2 or not self._is_layer(module):
            return False
        if self._is_refused(name) or module in self._tied_modules:
            return False
        last = module.rpartition(".")[2]
        is_table = _TABLE.search(last) is not None and not ends_in(name, HEADS)
        is_lookup = is_table and not (ends_in(name, EMBEDDINGS) and is_top(name))
        return 0 not in shape and shape[1] <= MAX_WHOLE_COLS and not is_lookup

    def _is_layer(self, module: str) -> bool:
        """Return whether a module has a weight, perhaps a bias, and no modules within."""
        return self._children[module] <= _OF_LAYERS and module not in self._outer

    @cached_property
    def _tied_modules(self) -> tuple[str, ...]:
        """The embedding and the head, where they are one parameter in memory."""
        facts = self._facts
        heads = [n for n in self._tensors if ends_in(n, HEADS) and is_top(n)]
        is_tied = facts.ties_head or (facts.ties_head is None and not heads)
        if not facts.has_causal_head or facts.is_encoder_decoder or not is_tied:
            return ()
        if self._embedding == "":
            return ()
        return tuple(n.rpartition(".")[0] for n in (self._embedding, *(heads or [CAUSAL_HEAD])))

    @cached_property
    def _embedding(self) -> str:
        """The embedding of the words; empty: none is known."""
        named = [n for n in self._tensors if ends_in(n, EMBEDDINGS) and is_top(n)]
        return max(named, key=lambda n: self._tensors[n].shape, default="")


def _refused(why: Mapping[str, str]) -> InputError:
    """Return the error for tensors, or modules, that can be in no adapter, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in why.items():
        names.setdefault(reason, []).append(name)
    said = "; ".join(f"{few(of_reason)} ({reason})" for reason, of_reason in names.items())
    return InputError(
        f"output.adapter: the merge changes what an adapter of PEFT cannot hold: {said}. Leave it "
        "as the base has it (`weight: [{filter: ..., value: 0}, {value: 1}]`), or leave `output` "
        "out and merge the model."
    )
