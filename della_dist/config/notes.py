"""What a person should know of how a configuration is read, a line each."""

from __future__ import annotations

from della_dist.config.methods import Method
from della_dist.config.model import ExpertModel
from della_dist.config.parameters import DEFAULT_EPSILON, default_epsilon
from della_dist.config.schema import Document
from della_dist.config.settings import Setting
from della_dist.locations import place


def make_notes(
    document: Document,
    method: Method,
    experts: tuple[ExpertModel, ...],
    written_rescale: Setting[str] | None,
) -> tuple[str, ...]:
    """Return the notes: choices made, differences to mergekit, keys without effect."""
    notes = _listed_base(document, method)
    if method.drop == "magprune":
        notes += _omitted_epsilons(experts)
    if "density" in method.uses:
        if not method.is_balanced:
            notes += _omitted_densities(experts)
        notes += _all_or_nothing(experts)
    notes += _rescale(method, written_rescale)
    if method.note:
        notes.append(f"{document.merge_method}: {method.note}")
    if document.chat_template == "auto":
        notes.append("chat_template: auto is the base's; mergekit's is the most common one.")
    blocks = [document.parameters, *(model.parameters for model in document.models)]
    for module in document.modules.values():
        blocks += [module.parameters, *(model.parameters for model in module.models)]
    listed = (document.slices, *(module.slices for module in document.modules.values()))
    for part in (part for slices in listed for part in slices):
        blocks += [part.parameters, *(source.parameters for source in part.sources)]
    written = {name for block in blocks for name in block}
    if document.rescale is not None:
        written.add("rescale")
    without = sorted(written - method.uses)
    if document.name is not None:
        without.append("name")
    if document.granularity not in (None, "row") and "granularity" not in method.uses:
        without.append("granularity")
    if "rescale" in without and _all_off(written_rescale):
        without.remove("rescale")
    notes += [f"{key}: accepted, has no effect with {document.merge_method}." for key in without]
    return tuple(notes)


def _listed_base(document: Document, method: Method) -> list[str]:
    base = document.base
    if base is None:
        return []
    listed = any(place(entry.model) == place(base) for entry in document.models)
    if not document.models:
        return []
    if method.has_base and listed:
        return [f"{base} is listed among the models, and counts for nothing there: its delta is 0."]
    if method.base_among == "any":
        return [] if listed else [f"base_model: {base} is one of the models, as in mergekit."]
    counts = method.has_base or method.base_among is not None
    if not counts and place(document.models[0].model) != place(base):
        return [
            f"base_model: names, shapes, dtypes and files of the output are those of {base}"
            + ("." if listed else ", which is not averaged itself.")
        ]
    return []


def _all_off(setting: Setting[str] | None) -> bool:
    return setting is not None and set(setting.values()) <= {"false", "none"}


def _listed(models: list[str]) -> str:
    models = list(dict.fromkeys(models))  # a slice may have them all again
    return "every expert" if len(models) > 8 else ", ".join(models)


def _omitted_epsilons(experts: tuple[ExpertModel, ...]) -> list[str]:
    """Return which half widths are chosen, experts with the same choice on one line."""
    choices: dict[str, list[str]] = {}
    for expert in experts:
        density, epsilon = expert.settings.get("density"), expert.settings.get("epsilon")
        if density is None or (epsilon is not None and epsilon.is_total):
            continue
        densities = set(density.values())
        # A gradient that crosses this density takes the largest epsilon on its way.
        densities.add(min(max(2 * DEFAULT_EPSILON, min(densities)), max(densities)))
        values = sorted({default_epsilon(d) for d in densities})
        value = f"{values[0]:.6g}" if len(values) == 1 else f"{values[0]:.6g} to {values[-1]:.6g}"
        where = "" if epsilon is None else ", for tensors that no filter matches"
        choices.setdefault(f"{value}, that is {_RULE}{where}", []).append(expert.model)
    return [f"epsilon of {_listed(m)} is not given: {what}." for what, m in choices.items()]


_RULE = f"min({DEFAULT_EPSILON}, 1 - density, density / 2)"


def _omitted_densities(experts: tuple[ExpertModel, ...]) -> list[str]:
    choices: dict[str, list[str]] = {}
    for expert in experts:
        density = expert.settings.get("density")
        if density is None:
            choices.setdefault("", []).append(expert.model)
        elif not density.is_total:
            choices.setdefault(" for tensors that no filter matches", []).append(expert.model)
    return [
        f"density of {_listed(m)} is not given{where}: 1, nothing is dropped."
        for where, m in choices.items()
    ]


def _all_or_nothing(experts: tuple[ExpertModel, ...]) -> list[str]:
    """Return where densities of 0 and 1 make epsilon or gamma pointless, or an expert."""
    nothing: list[str] = []
    everything: dict[str, list[str]] = {"epsilon": [], "gamma": []}
    for expert in experts:
        density = expert.settings.get("density")
        values = set() if density is None else set(density.values())
        if density is None or not density.is_total:
            values.add(1)  # what is not given
        if 0 in values:
            nothing.append(expert.model)
        for name, models in everything.items():
            written = expert.settings.get(name)
            if 1 in values and written is not None and any(written.values()):
                models.append(expert.model)
    notes = []
    if nothing:
        notes.append(f"density of {_listed(nothing)} is 0: nothing of the delta is kept there.")
    notes += [
        f"{name} of {_listed(models)} has no effect where density is 1: everything is kept, "
        "unscaled."
        for name, models in everything.items()
        if models
    ]
    return notes


def _rescale(method: Method, written: Setting[str] | None) -> list[str]:
    if "rescale" not in method.uses or method.is_balanced:
        return []
    values = {"true"} if written is None else set(written.values())
    if method.rescale_true == "inverse" and "true" in values:
        return [
            "rescale: survivors are divided by their own keep probability, as published; mergekit "
            "multiplies them by one L1 ratio a tensor, which is `rescale: l1` here."
        ]
    if method.rescale_true == "l1" and written is not None and "true" in values:
        return ["rescale: true is `l1` with this method, as in mergekit: one L1 ratio a tensor."]
    return []
