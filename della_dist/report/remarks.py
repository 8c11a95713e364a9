"""What is said of models before their merge: to know, or why they are not merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from della_dist.report.check import ModelCheck, PairCheck, format_percent
from della_dist.report.verdict import FAR, LEAST_COSINE
from della_dist.wording import few

#: Cosine of two deltas above which they are the same fine-tune. In the study those of one task,
#: learnt from different data, are at 0.62 to 0.94, those of different tasks below 0.14.
SAME_DELTA_COSINE = 0.97

#: Cosine of two models above which they have a backbone in common, although not with the base: they
#: are at 0.99 there.
KIN_COSINE = 0.9


def remarks(models: Sequence[ModelCheck], pairs: Sequence[PairCheck]) -> Iterator[str]:
    """Yield what a person should know before the merge, a sentence or two each."""
    for model in models:
        figures = f"delta {format_percent(model.relative_delta)} of the norm of {model.reference}"
        match model.verdict:
            case "copy":
                yield (
                    f"{model.model} is an untouched copy of {model.reference}, as far as it was "
                    "looked at: it adds nothing to the merge but its weight."
                )
            case "far":
                yield (
                    f"{model.model} is much further than a fine-tune ({figures}; these are below "
                    f"{format_percent(FAR)}): merging will hurt it. Try a lambda or weights below "
                    "1, or a base that is nearer to it."
                )
            case "another backbone":
                yield _another(model)
            case "damaged":
                yield _damaged(model)
            case "same backbone":
                pass
    yield from _of_the_base(models, pairs)
    for pair in pairs:
        if pair.delta_cosine > SAME_DELTA_COSINE and not _refused(models, pair):
            yield (
                f"{pair.models[0]} and {pair.models[1]} are nearly the same (cosine of their "
                f"deltas {pair.delta_cosine:.3f}): together they count twice. Leave one out, or "
                "halve their weights."
            )


def _refused(models: Sequence[ModelCheck], pair: PairCheck) -> bool:
    return any(model.is_refused for model in models if model.model in pair.models)


def _another(model: ModelCheck) -> str:
    if model.matrix_cosine >= LEAST_COSINE:
        where = [
            f"{odd.where} ({few(odd.files, 2)}; {odd.what})" if odd.files else odd.where
            for odd in model.oddities
        ]
        return (
            f"{model.model} has likely another backbone than {model.reference} in part, or its "
            f"layers, heads or neurons in another order: nothing in common have {few(where, 3)}."
        )
    return (
        f"{model.model} has likely another backbone than {model.reference}: the median cosine of "
        f"its matrices with those there is {model.matrix_cosine:.3f} (of fine-tunes above 0.9), "
        f"and its delta {format_percent(model.relative_delta)} of the norm (of fine-tunes below "
        f"{format_percent(FAR)})."
    )


def _damaged(model: ModelCheck) -> str:
    where = [f"{odd.where} ({few(odd.files, 2)}): {odd.what}" for odd in model.oddities]
    return f"{model.model} is damaged: {few(where, 3, separator='; ')}."


def _of_the_base(models: Sequence[ModelCheck], pairs: Sequence[PairCheck]) -> Iterator[str]:
    """Yield that it is the base that does not belong to the others, where it is so."""
    strangers = {m.model for m in models if m.verdict == "another backbone"}
    if len(strangers) < 2 or len(strangers) < len(models):
        return
    cosines = [pair.cosine for pair in pairs]
    if cosines and min(cosines) > KIN_COSINE:
        yield (
            f"The models are like each other (cosines above {KIN_COSINE}): it is "
            f"{models[0].reference} that does not belong to them."
        )


def refusal(models: Sequence[ModelCheck], notes: Sequence[str]) -> str:
    """Return why these models are not merged, and what to do.

    Parameters
    ----------
    models
        Those that are refused.
    notes
        All `remarks`; those about these models are given.
    """
    named = {model.model for model in models}
    reasons = [note for note in notes if any(note.startswith(f"{one} ") for one in named)]
    reasons += [note for note in notes if note.startswith("The models are like each other")]
    advice = []
    if any(model.verdict == "another backbone" for model in models):
        advice.append(
            "A backbone is the pre-trained model that weights were trained on from: in models of "
            "another one, even of the same architecture and size, no weight means what the one at "
            "its place does, and merging them destroys both. Name the base that the model was "
            "fine-tuned from, or leave it out."
        )
    if any(model.verdict == "damaged" for model in models):
        advice.append("Download or copy the damaged files again.")
    return " ".join([*reasons, *advice, "--allow-mismatch merges them all the same."])
