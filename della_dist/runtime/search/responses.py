"""How well a merge predicts the responses of examples, computed by transformers in this process.

A model is loaded once; the weights of further merges are copied into it, without files, where it
has every tensor under the name and in the form in which it is stored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, InputError
from della_dist.locations import short_names
from della_dist.planning.build import MergePlan
from della_dist.planning.layout import OutputTensor
from della_dist.runtime.in_memory import merged_tensors, merging
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.search.evaluators import Evaluation, Failed
from della_dist.runtime.search.examples import Example, Skill
from della_dist.storage.store import U8Array

if TYPE_CHECKING:
    import torch

#: Examples that are computed together.
BATCH = 8
#: Tokens of an example; the prompts of longer ones are cut at their beginning.
MOST_TOKENS = 2048
#: Of task arithmetic, with which a search is compared.
LAMBDAS = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_IGNORED = -100


class Responses:
    """Scores merges by examples: 0 as the base, 1 as each expert on its own, the mean of all.

    Parameters
    ----------
    config
        Of which merges are scored: its base, which there must be, and experts are the measure.
    skills
        The examples, by the short names of experts.
    folder
        A place for the first merge, which is removed when it is loaded.
    options
        How to merge.

    Raises
    ------
    ConfigError
        If transformers or torch is not installed.
    InputError
        If an expert predicts its own examples no better than the base does.
    """

    def __init__(
        self, config: MergeConfig, skills: Sequence[Skill], folder: Path, options: RunOptions
    ) -> None:
        for name in ("torch", "transformers"):
            if importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"--data evaluates with transformers, for which {name} is not installed: pip "
                    "install torch transformers, or evaluate by --evaluate."
                )
        assert config.base_model is not None
        self._folder, self._options, self._base_model = folder, options, config.base_model
        self.skills = tuple(skills)
        self._model: Any = None
        self._is_copied_to: bool | None = None
        """None: not known yet, for no merge was loaded."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tokenized: dict[int, tuple[list[int], int]] = {}
        locations = [one.model for one in config.models]
        self._experts = dict(zip(short_names(locations), locations, strict=True))
        searched = {skill.name: skill.searched for skill in skills}
        self._base = self._losses(_of_one(config.base_model), searched)
        self._own = {
            skill.name: self._losses(
                _of_one(self._experts[skill.name]), {skill.name: skill.searched}
            )[skill.name]
            for skill in skills
        }
        for name, loss in self._own.items():
            _refuse_useless(name, loss, self._base[name])

    def __call__(self, config: MergeConfig) -> Evaluation:
        """Score a merge on the examples that are searched by.

        Raises
        ------
        Failed
            If a loss is not finite.
        """
        losses = self._losses(config, {skill.name: skill.searched for skill in self.skills})
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise Failed(f"its loss on {name} is {loss}")
        scores = {
            name: _score(loss, self._base[name], self._own[name]) for name, loss in losses.items()
        }
        return Evaluation(statistics.fmean(scores.values()), scores)

    def closing(self, first: MergeConfig, best: MergeConfig) -> dict[str, dict[str, float | None]]:
        """Return scores on what is held out, by name and skill, so that nobody is fooled.

        Of the base, the experts, plain task arithmetic with the best of six lambdas (by what is
        searched), what was tried first and the best. None where a loss is not finite.
        """
        models = [{"model": one.model, "parameters": {"weight": 1.0}} for one in best.models]
        grid = {
            value: config_from_mapping(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": self._base_model,
                    "models": models,
                    "parameters": {"lambda": value},
                }
            )
            for value in LAMBDAS
        }
        scores = {}
        for value, config in grid.items():
            with contextlib.suppress(Failed):  # so far from the base that nothing is finite
                scores[value] = self(config).score
        found = max(scores, key=lambda value: scores[value], default=LAMBDAS[0])
        return self._held_out(
            {f"task arithmetic, lambda {found:g}": grid[found], "first": first, "best": best}
        )

    def _held_out(self, configs: Mapping[str, MergeConfig]) -> dict[str, dict[str, float | None]]:
        """Return the scores of merges, of the base and of every expert on what is held out."""
        items = {skill.name: skill.held_out for skill in self.skills}
        base = self._losses(_of_one(self._base_model), items)
        experts = {
            name: self._losses(_of_one(location), items) for name, location in self._experts.items()
        }
        for name in items:
            _refuse_useless(name, experts[name][name], base[name])
        found = {"base": base, **experts}
        found |= {name: self._losses(config, items) for name, config in configs.items()}
        return {
            name: {
                skill: _score(loss, base[skill], experts[skill][skill])
                if math.isfinite(loss)
                else None
                for skill, loss in losses.items()
            }
            for name, losses in found.items()
        }

    def _losses(
        self, config: MergeConfig, items: Mapping[str, Sequence[Example]]
    ) -> dict[str, float]:
        """Return the mean loss of a token of the responses, in nats, by skill."""
        import torch

        self._load(config)
        losses = {}
        for name, examples in items.items():
            total, count = 0.0, 0
            for first in range(0, len(examples), BATCH):
                ids, labels = self._batch(examples[first : first + BATCH])
                with torch.no_grad():
                    mask = ids != -1
                    found = self._model(
                        input_ids=ids.clamp(min=0), attention_mask=mask.long()
                    ).logits[:, :-1]
                asked = labels[:, 1:] != _IGNORED
                wanted = labels[:, 1:][asked]
                loss = torch.nn.functional.cross_entropy(
                    found[asked].float(), wanted, reduction="sum"
                )
                total += float(loss)
                count += wanted.numel()
            losses[name] = total / count
        return losses

    def _batch(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens, -1 behind the end of each example, and what is to be predicted."""
        import torch

        rows = [self._tokens(example) for example in examples]
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), longest), -1)
        labels = torch.full((len(rows), longest), _IGNORED)
        for i, (tokens, start) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, start : len(tokens)] = torch.tensor(tokens[start:])
        device = self._model.device
        return ids.to(device), labels.to(device)

    def _tokens(self, example: Example) -> tuple[list[int], int]:
        """Return the tokens of an example, and where its response begins."""
        found = self._tokenized.get(id(example))
        if found is None:
            found = self._tokenized[id(example)] = _tokens(self._tokenizer, example)
        return found

    def _load(self, config: MergeConfig) -> None:
        """Put the weights of a merge into the model."""
        import torch

        config = self._options.applied_to(config)
        plan = open_plan(config)
        if self._is_copied_to and self._fits(plan):
            state = self._model.state_dict()
            with merging(plan, self._options) as context:
                for tensor, data in merged_tensors(context):
                    state[tensor.name].copy_(_values(tensor, data, state[tensor.name]))
            return
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        shutil.rmtree(self._folder, ignore_errors=True)
        merge(config, str(self._folder), self._options)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
            model = AutoModelForCausalLM.from_pretrained(self._folder, dtype="auto")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"transformers loads no causal language model from such a merge: {error}. "
                "Evaluate by --evaluate."
            ) from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        on_gpu = self._options.device != "cpu" and torch.cuda.is_available()
        device = "cuda" if on_gpu else "cpu"
        self._model = (model if device == "cuda" else model.float()).to(device).eval()
        if self._is_copied_to is False:  # of such a model it was found out once
            return
        with merging(plan, self._options) as context:
            self._is_copied_to = self._is_stored_so(merged_tensors(context))

    def _fits(self, plan: MergePlan) -> bool:
        """Tell whether a merge has the tensors of the model that is loaded."""
        shapes = {one.name: one.shape for shard in plan.shards for one in shard.tensors}
        return shapes == self._shapes

    def _is_stored_so(self, tensors: Iterable[tuple[OutputTensor, U8Array]]) -> bool:
        """Tell whether the model has just these tensors, as they are."""
        import torch

        state = self._model.state_dict()
        self._shapes = {}
        tied = set(state)
        for tensor, data in tensors:
            self._shapes[tensor.name] = tensor.shape
            mine = state.get(tensor.name)
            if mine is None or not torch.equal(mine, _values(tensor, data, mine)):
                return False
            tied.discard(tensor.name)
        stored = {state[name].data_ptr() for name in state.keys() - tied}
        return all(state[name].data_ptr() in stored for name in tied)


def _values(tensor: OutputTensor, data: U8Array, like: torch.Tensor) -> torch.Tensor:
    """Return the values of a merged tensor, as another one has them."""
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    found = torch.from_numpy(data).view(dtypes[tensor.dtype]).reshape(tensor.shape)
    return found.to(device=like.device, dtype=like.dtype)


def _tokens(tokenizer: Any, example: Example) -> tuple[list[int], int]:  # noqa: ANN401
    if example.messages is not None:
        messages = list(example.messages)
        template = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=True)
        whole = template(messages)["input_ids"]
        before = template(messages[:-1], add_generation_prompt=True)["input_ids"]
        start = len(before)
        if whole[:start] != before:  # the template writes an answer otherwise than it asks for one
            start = next(i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b)
    else:
        before = tokenizer(example.prompt)["input_ids"]
        if len(before) > 1 and before[-1] == tokenizer.eos_token_id:
            before = before[:-1]
        whole = before + tokenizer(example.response, add_special_tokens=False)["input_ids"]
        start = len(before)
        if tokenizer.eos_token_id is not None:
            whole = [*whole, tokenizer.eos_token_id]
    cut = max(0, len(whole) - MOST_TOKENS)
    return whole[cut:], max(1, start - cut)


def _of_one(location: str) -> MergeConfig:
    """Return the configuration that takes one of its models as it is."""
    return config_from_mapping({"merge_method": "passthrough", "models": [{"model": location}]})


def _score(loss: float, base: float, own: float) -> float:
    """Return how much is kept: 0 at the loss of the base, 1 at that of the skill's own expert."""
    return (base - loss) / (base - own)


def _refuse_useless(name: str, own: float, base: float) -> None:
    for what, loss in ((f"the expert {name}", own), ("the base", base)):
        if not math.isfinite(loss):
            raise InputError(
                f"{what} has a loss of {loss} on the examples of {name}: the model is damaged, or "
                "does not compute in its dtype."
            )
    if own >= base:
        raise InputError(
            f"the expert {name} predicts its own examples no better than the base (a loss of "
            f"{own:.4g} to {base:.4g}): there is nothing to keep of it. Are they in the form that "
            "it was trained on?"
        )
