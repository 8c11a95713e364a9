"""What the files of the experts say otherwise than those that the output takes over.

Tensors that fit by name and shape may still mean something else: by another configuration, or
because the rows of the embedding belong to other tokens. The first is said, one note an expert; the
second is refused, unless the configuration allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from della_dist.config.chat_templates import turn_tokens
from della_dist.errors import InputError, each, refused_as
from della_dist.planning.build import MergePlan
from della_dist.planning.views.tokens import Vocabularies
from della_dist.runtime.companions.checkpoint_files import CheckpointFiles
from della_dist.runtime.companions.config_differences import config_differences
from della_dist.runtime.companions.small_files import (
    FILES_AT_ONCE,
    size_of,
)
from della_dist.runtime.companions.vocabularies import policies
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.opening import open_store
from della_dist.storage.shard_files import is_adapter
from della_dist.storage.store import Store
from della_dist.wording import plural

_SHOWN = 3


def compare_files(
    plan: MergePlan, store_of: Callable[[str], Store] = open_store
) -> tuple[str, ...]:
    """Return one note for every expert whose files differ in what they mean.

    Parameters
    ----------
    plan
        Of the merge.
    store_of
        Returns the store of a checkpoint's location.

    Raises
    ------
    InputError
        If a file of an expert that is looked at cannot be read, or the expert has other tokens at
        the same numbers and the configuration does not allow that.
    """
    carried = {n: (plan.companion_bytes[n], plan.companions[n]) for n in plan.companions}
    reference = CheckpointFiles(plan.reference, store_of, carried)
    tokenizer = (
        reference if plan.tokenizer is plan.reference else CheckpointFiles(plan.tokenizer, store_of)
    )
    models = {c.location: c for c in map(plan.model_of, plan.experts)}
    others = [c for c in models.values() if c is not plan.reference]
    others += [c for c in plan.others if c.is_adapter]  # which may have files of its training
    template = plan.config.chat_template
    models_of = _models_of_adapters(plan, reference, store_of)

    def compare(checkpoint: CheckpointIndex) -> list[str]:
        expert = CheckpointFiles(checkpoint, store_of)
        with refused_as(InputError, f"checkpoint {expert.location}"):
            tokens = []
            if checkpoint.is_adapter:
                tokens = _tokens_of_adapter(plan, models_of[checkpoint.location], expert)
            elif plan.config.tokenizer is None and plan.has_rows_of(checkpoint):
                is_allowed = plan.config.allow_different_tokenizers
                by_position = "as allow_different_tokenizers says" if is_allowed else None
                tokens = _tokens(reference, expert, by_position=by_position)
            is_another = checkpoint is not plan.tokenizer and not template
            templates = _chat_templates(tokenizer, expert) if is_another else []
            config = _config(reference, expert, of_vocabulary=plan.alignment is None)
            return [*config, *tokens, *templates]

    for files in (reference, tokenizer):  # before several threads ask for them
        _ = files.documents, files.chat_templates
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # remote files take round trips
        found = each(compare, others, pool.map)
    files_of = reference.location
    if tokenizer is not reference:
        files_of += f", those of the tokenizer of {tokenizer.location}"
    whose = "The output's files are those of"
    if plan.config.output is not None:
        whose = "The adapter has no such files, and goes with those of"
    lost = []
    if tokenizer is not reference and not template:
        names = [n for n in reference.chat_templates if n not in tokenizer.chat_templates]
        lost = [f"{reference.location}: {_templates(names)} left out"] if names else []
    return (
        *_unused_adapters(plan.inputs),
        *_no_tokenizer(plan, tokenizer, others, store_of),
        *(f"{one}; `chat_template` can give one." for one in lost),
        *_turns(tokenizer, template, _gained(plan, store_of)),
        *(
            f"{expert.location}: {'; '.join(parts)}. {whose} {files_of}."
            for expert, parts in zip(others, found, strict=True)
            if parts
        ),
    )


def _unused_adapters(inputs: Sequence[CheckpointIndex]) -> Iterator[str]:
    """Yield which places hold an adapter beside the model that is read."""
    read = {checkpoint.location for checkpoint in inputs if checkpoint.is_adapter}
    for one in inputs:
        if one.location not in read and is_adapter(one.files):
            yield (
                f"{one.location}: it holds a model and an adapter, and the model alone counts. "
                f"{one.location}+{one.location} is the model with it."
            )


def _models_of_adapters(
    plan: MergePlan, reference: CheckpointFiles, store_of: Callable[[str], Store]
) -> dict[str, CheckpointFiles]:
    """Return the files of the model of every adapter, by the adapter's location."""
    files = {plan.reference.location: reference}
    found: dict[str, CheckpointFiles] = {}
    for one in (one for part in plan.parts for one in part.adapted.values()):
        model, *adapters = (plan.inputs[number] for number in one.inputs)
        if model.location not in files:
            files[model.location] = CheckpointFiles(model, store_of)
            _ = files[model.location].documents  # before several threads ask for them
        found |= {adapter.location: files[model.location] for adapter in adapters}
    return found


def _tokens_of_adapter(
    plan: MergePlan, model: CheckpointFiles, adapter: CheckpointFiles
) -> list[str]:
    """Compare the vocabulary that was saved beside an adapter with its model's, which counts.

    Raises
    ------
    InputError
        If it is another one, and tokens are to be taken from the models.
    """
    tokens = _tokens(model, adapter, by_position="as the model has them")
    policy = plan.config.tokenizer
    if tokens and policy is not None and (policy.source != "base" or policy.tokens):
        raise InputError(
            f"{adapter.location} is an adapter of {model.location} with another tokenizer "
            f"({tokens[0]}), and `tokenizer` takes tokens from models alone. Merge the adapter "
            "into its model first (peft's merge_and_unload), or leave `tokenizer` out: the tokens "
            "are the model's then."
        )
    return tokens


def _no_tokenizer(
    plan: MergePlan,
    tokenizer: CheckpointFiles,
    others: Iterable[CheckpointIndex],
    store_of: Callable[[str], Store],
) -> Iterator[str]:
    """Yield that the output has no tokenizer, although an expert has one."""
    if tokenizer.vocabularies or plan.config.tokenizer is not None:
        return
    for checkpoint in others:
        if not checkpoint.is_adapter and CheckpointFiles(checkpoint, store_of).vocabularies:
            yield (
                f"{tokenizer.location} has no tokenizer, and the output none: "
                f"`tokenizer_source: {checkpoint.location}` takes the one there."
            )
            return


def _gained(plan: MergePlan, store_of: Callable[[str], Store]) -> Iterator[str]:
    """Yield the tokens that are added ones in the output, and may not be in its tokenizer."""
    yield from () if plan.alignment is None else plan.alignment.added
    policy = plan.config.tokenizer
    if policy is not None and policy.source == "union":
        for checkpoint in plan.inputs:
            yield from CheckpointFiles(checkpoint, store_of).own_added_tokens


def _turns(reference: CheckpointFiles, template: str | None, added: Iterable[str]) -> Iterator[str]:
    """Yield that the template of the configuration marks turns by what are no tokens."""
    marks = () if template is None else turn_tokens(template)
    if not marks or not reference.vocabularies:
        return
    vocabulary = reference.vocabulary(reference.vocabularies[0])
    if vocabulary is None:
        return
    is_known = reference.vocabularies[0] == "tokenizer.json"  # which words are added ones
    there = {*added, *(reference.own_added_tokens if is_known else vocabulary.values())}
    missing = [token for token in marks if token not in there]
    if missing:
        yield (
            f"chat_template: it marks turns by {', '.join(missing)}, which are no tokens of "
            f"{reference.location}: the model will see them in pieces."
        )


def _config(
    reference: CheckpointFiles, expert: CheckpointFiles, *, of_vocabulary: bool
) -> list[str]:
    ours, theirs = (files.documents.get("config.json") for files in (reference, expert))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return []
    return config_differences(ours, theirs, of_vocabulary=of_vocabulary)


def _tokens(
    reference: CheckpointFiles,
    expert: CheckpointFiles,
    *,
    by_position: str | None,
) -> list[str]:
    """Compare the vocabularies; parses none of them where the files are equal.

    `by_position` says why rows of other tokens are merged with each other, which None does not
    allow.
    """
    for name in expert.vocabularies:  # although another file may be the one that is compared
        size_of(expert.store, name)
    there = reference.vocabularies
    common = [name for name in there if name in expert.vocabularies]
    if not common:
        if not there or not expert.vocabularies:
            return []
        return [f"its tokenizer was not compared (it has {expert.vocabularies[0]}, not {there[0]})"]
    name = common[0]
    file = reference.digest_of(name)
    equal_files = size_of(expert.store, name) == file[0] and expert.digest_of(name) == file
    if equal_files and reference.added_tokens == expert.added_tokens:
        return []
    ours, theirs = reference.vocabulary(name), expert.vocabulary(name)
    if ours is None or theirs is None:
        return [] if equal_files else [f"its {name} is another, in a form that is not compared"]
    if ours == theirs:
        return []
    differing = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])
    parts = []
    if differing:
        shown = "; ".join(
            f"{n}: {_short(theirs[n])}, not {_short(ours[n])}" for n in differing[:_SHOWN]
        )
        count = f"{len(differing):,} of {len(ours.keys() & theirs.keys()):,}"
        if by_position is None:
            both = Vocabularies()
            both.add(ours)
            both.add(theirs)
            raise InputError(
                f"checkpoint {expert.location} has other tokens than {reference.location}: "
                f"{count} numbers mean different ones ({shown}). Rows of the embedding that "
                f"belong to different tokens would be merged. {policies(both)} Or write "
                "`allow_different_tokenizers: true` to merge by position."
            )
        parts.append(
            f"{count} numbers mean other tokens ({shown}), whose rows are merged by position "
            f"{by_position}"
        )
    for mine, other, who in ((theirs, ours, "it"), (ours, theirs, reference.location)):
        if alone := sorted(mine.keys() - other.keys()):
            shown = ", ".join(f"{n}: {_short(mine[n])}" for n in alone[:_SHOWN])
            more = ", ..." if len(alone) > _SHOWN else ""
            parts.append(f"{plural(len(alone), 'token')} only {who} has ({shown}{more})")
    return parts


def _chat_templates(reference: CheckpointFiles, expert: CheckpointFiles) -> list[str]:
    ours, theirs = reference.chat_templates, expert.chat_templates
    only = [name for name in theirs if name not in ours]
    other = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    parts = []
    if only:
        parts.append(f"only it has {_templates(only)}")
    if other:
        parts.append(f"it has another version of {_templates(other)}")
    return parts


def _templates(names: Iterable[str]) -> str:
    if set(names) == {"default"}:
        return "the chat template"
    return f"the chat templates {', '.join(map(_short, sorted(names)))}"


def _short(token: str) -> str:
    return repr(token if len(token) <= 24 else f"{token[:24]}...")
