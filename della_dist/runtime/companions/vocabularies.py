"""The vocabularies of the inputs, where rows of embeddings are to be moved to their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from della_dist.config import MergeConfig
from della_dist.errors import InputError, refused_as
from della_dist.planning.views.tokens import Vocabularies
from della_dist.planning.views.vocabulary import embedding_of
from della_dist.runtime.companions.checkpoint_files import CheckpointFiles
from della_dist.runtime.companions.small_files import FILES_AT_ONCE, digest_of
from della_dist.runtime.companions.vocabulary import Vocabulary, named_tokens
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store
from della_dist.wording import few, plural


def needed_vocabularies(
    config: MergeConfig,
    checkpoints: Sequence[CheckpointIndex],
    store_of: Callable[[str], Store] = open_store,
) -> Vocabularies | None:
    """Return the vocabulary of every checkpoint, the reference's first; None if none is needed.

    Parameters
    ----------
    config
        Its policy is what needs them. Without one, embeddings must have as many rows everywhere.
    checkpoints
        The inputs, in the order of the plan.
    store_of
        Returns the store of a checkpoint's location.

    Raises
    ------
    InputError
        If one has no vocabulary that can be read; or, without a policy, if embeddings differ in
        their rows: says what each policy would do.
    """
    embeddings = [embedding_of(checkpoint) for checkpoint in checkpoints]
    rows = [None if entry is None else entry.shape[0] for entry in embeddings]
    policy = config.tokenizer
    if len({entry.shape[1:] for entry in embeddings if entry is not None}) > 1:
        return None  # models of other sizes, whatever their tokens: matching says so
    if policy is None:
        merges_rows = not config.method.passes_through and not config.slices
        if merges_rows and None not in rows and len(set(rows)) > 1:
            files = [CheckpointFiles(checkpoint, store_of) for checkpoint in checkpoints]
            _refuse_without_policy(files, [e for e in embeddings if e is not None])
        return None
    for checkpoint, count in zip(checkpoints, rows, strict=True):
        if count is None:
            raise InputError(
                f"checkpoint {checkpoint.location} has no embedding under a name that is known, "
                "whose rows `tokenizer` could move to their tokens. Leave `tokenizer` out."
            )
    files = [CheckpointFiles(checkpoint, store_of) for checkpoint in checkpoints]
    is_plain = not policy.tokens and policy.pad_to_multiple_of is None and len(set(rows)) == 1
    if is_plain and _have_equal_files(files):
        return None
    return _read(files, rows)


def _have_equal_files(files: Sequence[CheckpointFiles]) -> bool:
    """Return whether all tokenizers have the same files, whatever is in them."""
    first = files[0]
    if not first.vocabularies or any(f.vocabularies != first.vocabularies for f in files):
        return False

    def content(one: CheckpointFiles) -> object:
        with refused_as(InputError, f"checkpoint {one.location}"):
            return [digest_of(one.store, name) for name in one.vocabularies], named_tokens(
                one.documents
            )

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # remote files take round trips
        contents = list(pool.map(content, files))
    return all(one == contents[0] for one in contents)


def _read(files: Sequence[CheckpointFiles], rows: Sequence[int | None]) -> Vocabularies:
    """Return the vocabularies, by files of one kind.

    Who has no tokenizer has that of the first that has one, the reference if possible.
    """
    having = [one for one in files if one.vocabularies]
    first = files.index(having[0]) if having else 0
    for one, count in zip(files, rows, strict=True):
        if not one.vocabularies and (not having or count != rows[first]):
            raise InputError(
                f"checkpoint {one.location} has no tokenizer, and {plural(count or 0, 'row')} of "
                "embeddings whose tokens are not known. Put its tokenizer.json there."
            )
    chosen = _files_to_compare(having)

    def read(one: CheckpointFiles) -> Vocabulary:
        name = chosen[one.location]
        with refused_as(InputError, f"checkpoint {one.location}"):
            found = one.vocabulary(name)
        if found is None:
            raise InputError(
                f"checkpoint {one.location}: its {name} cannot be read as a vocabulary: "
                f"{one.unknown[name]}. Let transformers write it anew, or take models of one "
                "vocabulary."
            )
        return found

    known: dict[str, int] = {}
    found = Vocabularies()
    for number, one in enumerate(files):  # one after another: each is large while it is read
        source = one if one.vocabularies else files[first]
        name = chosen[source.location]
        key = f"{digest_of(source.store, name)}{name}{named_tokens(source.documents)}"
        if key in known:
            found.add_same(known[key], is_assumed=not one.vocabularies)
            continue
        known[key] = number
        found.add(read(source))
        source.forget_vocabularies()
    return found


#: Vocabularies as texts, which are the same whatever the form.
_TEXTS = ("tokenizer.json", "vocab.json", "vocab.txt")
#: Their numbers are shifted by the class of the tokenizer.
_SHIFTED = "sentencepiece.bpe.model"


def _files_to_compare(having: Sequence[CheckpointFiles]) -> dict[str, str]:
    """Return which file of each checkpoint tells its tokens: of one kind everywhere."""
    texts = {one.location: next((n for n in _TEXTS if n in one.vocabularies), "") for one in having}
    if all(texts.values()):
        return texts
    common = [n for n in having[0].vocabularies if all(n in f.vocabularies for f in having)]
    if any(texts.values()) or not common or common[0] == _SHIFTED:
        has = (f"{one.location} has {few(one.vocabularies)}" for one in having)
        raise InputError(
            "the tokenizers are not of one kind, or of one that shifts its numbers, so that their "
            f"tokens cannot be told to be the same: {'; '.join(dict.fromkeys(has))}. Let each have "
            "a tokenizer.json (transformers writes it: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...))."
        )
    return dict.fromkeys(texts, common[0])


def _refuse_without_policy(
    files: Sequence[CheckpointFiles], embeddings: Sequence[TensorEntry]
) -> None:
    rows = [entry.shape[0] for entry in embeddings]
    first = next(i for i, count in enumerate(rows) if count != rows[0])
    what = (
        f"{embeddings[first].name} of {files[first].location} has "
        f"{plural(rows[first], 'row')}, and that of {files[0].location} {rows[0]:,}: their "
        "vocabularies differ."
    )
    try:
        vocabularies = _read(files, rows)
    except InputError as error:
        raise InputError(f"{what} Rows can be moved to their tokens, but {error}") from None
    raise InputError(f"{what} {policies(vocabularies)}")


def policies(vocabularies: Vocabularies) -> str:
    """Return what each policy would make of vocabularies that differ."""
    union = len(vocabularies.tokens)
    base = sum(place >= 0 for place in vocabularies.of[0])
    return (
        f"Say what the output has: `tokenizer_source: base` the {plural(base, 'token')} of the "
        f"base ({plural(union - base, 'token')} that only others have left out), "
        f"`tokenizer_source: union` all {union:,}, or name the model whose tokenizer it has. "
        "Rows are then moved to their tokens."
    )
