"""The files beside the weights that are not as the checkpoint has them: made when they are read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar

from della_dist.config.modules import DECODER
from della_dist.errors import InputError
from della_dist.planning.build import MergePlan
from della_dist.planning.views.slice_config import sliced_heads
from della_dist.runtime.companions.added_tokens import AddedTokens, as_bytes
from della_dist.runtime.companions.checkpoint_files import CheckpointFiles
from della_dist.runtime.companions.model_config import output_config, renumbered
from della_dist.runtime.companions.small_files import digest_of, parse_json, read_small
from della_dist.runtime.companions.vocabulary import ADDED_NAMES, SPECIAL_NAME
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store
from della_dist.wording import plural

T = TypeVar("T")

#: What makes each of some files, by name.
Made: TypeAlias = dict[str, Callable[[], bytes]]

#: Where transformers writes it, and looks first.
CHAT_TEMPLATE_NAME = "chat_template.jinja"

GENERATION_NAME = "generation_config.json"
_HEADS = "alignment_heads"
_TOKENIZER = "tokenizer.json"

#: Where older versions look, and those of models with a processor.
TEMPLATE_DOCUMENTS = ("tokenizer_config.json", "chat_template.json")


def made_files(
    plan: MergePlan,
    checkpoint: CheckpointIndex,
    store: Store,
    names: Iterable[str],
    store_of: Callable[[str], Store] = open_store,
) -> Made:
    """Return the files that are not as the checkpoint has them, and what makes each.

    Parameters
    ----------
    plan
        Of the merge.
    checkpoint, store
        Whose files, and where they are.
    names
        Of the files.
    store_of
        Returns the store of another checkpoint's location.

    Raises
    ------
    InputError
        If the tokenizer cannot get the tokens that it is to have.
    """
    there, template = set(names), plan.config.chat_template
    made: Made = {}
    if "config.json" in there:
        made["config.json"] = lambda: output_config(plan, _object(store, "config.json"))
    if GENERATION_NAME in there and (
        plan.tokenizer is not plan.reference or DECODER in plan.layers()
    ):
        made[GENERATION_NAME] = lambda: _generation(plan, _object(store, GENERATION_NAME), store_of)
    if checkpoint is not plan.tokenizer:
        return made
    is_grown = plan.alignment is not None and bool(plan.alignment.added)
    if is_grown or (_TOKENIZER in there and _may_take_over(plan, store, store_of)):
        if _TOKENIZER not in there:
            assert plan.alignment is not None
            raise InputError(
                f"checkpoint {checkpoint.location} has no tokenizer.json, which is to get "
                f"{plural(len(plan.alignment.added), 'token')}. Let transformers write it "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...)), or take "
                "`tokenizer_source: base`."
            )
        tokens = _once(partial(_added_tokens, plan, store_of))  # of all tokenizers, for each file
        for name in there & {_TOKENIZER, *ADDED_NAMES, SPECIAL_NAME}:
            made[name] = partial(_with_tokens, plan, store, name, tokens)
    if template is not None:
        made[CHAT_TEMPLATE_NAME] = template.encode
        for name in there & set(TEMPLATE_DOCUMENTS):
            made[name] = partial(_with_template, made.get(name), store, name, template)
    return made


def _may_take_over(plan: MergePlan, store: Store, store_of: Callable[[str], Store]) -> bool:
    """Return whether tokens of the tokenizer may be added ones in others, and so in a union."""
    policy = plan.config.tokenizer
    if policy is None or policy.source != "union":
        return False
    own = [digest_of(store, name) for name in _told_by(plan.tokenizer)]
    return any(
        [digest_of(store_of(c.location), name) for name in _told_by(c)] != own
        for c in plan.inputs
        if c is not plan.tokenizer and _TOKENIZER in c.files
    )


def _told_by(checkpoint: CheckpointIndex) -> list[str]:
    return [name for name in (_TOKENIZER, ADDED_NAMES[1]) if name in checkpoint.files]


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """Return a function that makes what `make` makes, for all threads together once."""
    lock, made = threading.Lock(), cache(make)

    def get() -> T:
        with lock:
            return made()

    return get


def _with_template(
    make: Callable[[], bytes] | None, store: Store, name: str, template: str
) -> bytes:
    return _with_chat_template(_object(store, name) if make is None else make(), template)


def _added_tokens(plan: MergePlan, store_of: Callable[[str], Store]) -> tuple[AddedTokens, Any]:
    """Return the tokens that the tokenizer gets, and what its ``tokenizer_config.json`` says."""
    alignment, policy = plan.alignment, plan.config.tokenizer
    files = CheckpointFiles(plan.tokenizer, store_of)
    vocabulary = files.vocabulary(_TOKENIZER)
    if vocabulary is None:
        raise _unknown_form(plan, files.unknown[_TOKENIZER])
    numbers = {token: number for number, token in vocabulary.items()}
    added: tuple[str, ...] = ()
    if alignment is not None:
        added = tuple(alignment.added)
        first = alignment.num_tokens - len(added)
        numbers |= {token: first + i for i, token in enumerate(added)}
    others = (c for c in plan.inputs if c is not plan.tokenizer and _TOKENIZER in c.files)
    read = (_tokenizer_of(one, store_of(one.location)) for one in others)
    is_union = policy is not None and policy.source == "union"
    tokens = AddedTokens(numbers, added, read, files.own_added_tokens if is_union else None)
    return tokens, files.documents.get(ADDED_NAMES[1], {})


def _with_tokens(
    plan: MergePlan, store: Store, name: str, get: Callable[[], tuple[AddedTokens, Any]]
) -> bytes:
    """Return a file of the tokenizer with the tokens that it gets."""
    try:
        tokens, config = get()
        if tokens.changes_nothing:
            return _object(store, name)
        document = _document(store, name)
        if name == _TOKENIZER:
            return tokens.in_tokenizer(document, config, store.describe(name))
        if name == ADDED_NAMES[0]:
            return tokens.in_added_tokens(document)
        if name == SPECIAL_NAME:
            return tokens.in_special(document)
        has_map = SPECIAL_NAME in plan.tokenizer.files
        special = _document(store, SPECIAL_NAME) if has_map else {}
        return tokens.in_config(document, special)
    except InputError:
        raise
    except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise _unknown_form(plan, f"{type(error).__name__}: {error}") from error


def _unknown_form(plan: MergePlan, reason: str) -> InputError:
    return InputError(
        f"the tokenizer of {plan.tokenizer.location}, or one whose tokens it is to get, is in "
        f"a form that is not known here ({reason}). Let transformers write their tokenizer.json "
        "anew."
    )


def _tokenizer_of(checkpoint: CheckpointIndex, store: Store) -> tuple[Any, Any]:
    """Return what a checkpoint's tokenizer.json and tokenizer_config.json say."""
    config = _document(store, ADDED_NAMES[1]) if ADDED_NAMES[1] in checkpoint.files else {}
    return _document(store, _TOKENIZER), config


def _generation(plan: MergePlan, data: bytes, store_of: Callable[[str], Store]) -> bytes:
    """Return the ``generation_config.json`` of the output.

    The tokenizer is another than the base's, or the decoder has other layers, of which some heads
    are named (Whisper's, whose attention tells the time of a word).
    """
    donor: Mapping[str, Any] = {}
    if GENERATION_NAME in plan.tokenizer.files:
        donor = _document(store_of(plan.tokenizer.location), GENERATION_NAME)
    document = changed = json.loads(data)
    if plan.tokenizer is not plan.reference:
        changed = renumbered(plan, document, donor, GENERATION_NAME)
    layers = plan.layers().get(DECODER)
    if layers is not None and _HEADS in document:
        heads = {_HEADS: sliced_heads(document[_HEADS], layers)}
        changed = {k: v for k, v in {**changed, **heads}.items() if k != _HEADS or v}
    return data if changed == document else as_bytes(changed)


def _object(store: Store, name: str) -> bytes:
    """Return the bytes of a JSON object."""
    data = read_small(store, name)
    _parsed(data, store.describe(name))
    return data


def _document(store: Store, name: str) -> dict[str, Any]:
    """Return what a JSON object says."""
    return _parsed(read_small(store, name), store.describe(name))


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    document = parse_json(data, where)
    if not isinstance(document, dict):
        raise InputError(f"{where} is not a configuration: no JSON object. Download it again.")
    return document


def _with_chat_template(data: bytes, template: str) -> bytes:
    """Return a JSON document that states a chat template with `template` in its place.

    Templates of other names (``rag``, ``tool_use``) stay. What states none keeps its bytes.
    """
    document: dict[str, Any] = json.loads(data)
    stated = document.get("chat_template")
    if stated is None:
        return data
    if isinstance(stated, list):
        named = {"name": "default", "template": template}
        others = [e for e in stated if not (isinstance(e, dict) and e.get("name") == "default")]
        document["chat_template"] = [named, *others]
    else:
        document["chat_template"] = template
    return as_bytes(document)
